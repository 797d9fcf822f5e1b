"""Traces of a few training steps or policy calls, and what each stage takes in them.

JAX's profiler writes the trace (https://docs.jax.dev/en/latest/profiling.html), for xprof or Perfetto to show. The
table of stages is read from it: a device's event tells which instruction of the compiled program ran, and the program
which `jax.named_scope` that comes from (`pi0fast.estimate.stages`).

An event's time is its duration without that of events inside it on the same thread or stream; loops and calls count as
what runs in them. Operations run side by side on CPUs and GPUs, so their sum may exceed the time that passes. What an
operation of a CPU hands to other threads is not in the trace.
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pi0fast import flops
from pi0fast.estimate import estimate, only_communicates, stages
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import COLLECTIVES, Program

WARM = 2  # steps of a process that are not traced: the first compiles
TOP = 12  # stages printed
# A device on which a FLOP takes a second and all else nothing.
COUNTER = DeviceSpec("", flops=1.0, bandwidth=math.inf, memory=0.0)


# ── Capture ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps_to_trace(count: int, start: int, steps: int) -> range:
    """The steps, counted from 0, that `--profile=count` traces in a run that goes from `start` to `steps`.

    Those after the first `WARM`; of a resumed run, as many of them as are left.

    Raises:
        ValueError: count is negative, or the whole run is too short.
    """
    if count < 0:
        raise ValueError(f"--profile={count} must be at least 0, the number of steps to trace")
    if count and not start and steps < WARM + count:
        raise ValueError(
            f"--profile={count} traces steps {WARM + 1} to {WARM + count}, and the run has {steps}; lower it, or raise "
            "--steps"
        )
    return range(start + WARM, min(start + WARM + count, steps))


class Profile:
    """Traces the steps of `run` whose turn it is; a context manager. One that is left early keeps what was traced.

    turns: which steps, from `steps_to_trace`. done: steps that were done before. say: prints the table.
    """

    def __init__(self, folder: Path, turns: range, *, done: int, say: Callable[[str], None]):
        self._folder, self._turns, self._step, self._say = folder, turns, done, say
        self._text: str | None = None  # of the program, while a trace is taken

    def run(self, step: Any, *arguments: Any) -> Any:
        """`step(*arguments)`, of a compiled program. Around the traced steps, it waits for the device."""
        if self._step in self._turns and self._text is None:
            jax.block_until_ready(arguments)
            self._text = step.as_text()
            start(self._folder)
        results = step(*arguments)
        self._step += 1
        if self._text is not None and self._step not in self._turns:
            jax.block_until_ready(results)
            self._stop()
        return results

    def _stop(self) -> None:
        text, self._text = self._text, None
        assert text is not None
        self._say(stop(self._folder, text, self._step - self._turns.start))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self._text is None:
            return
        if error is None:
            self._stop()
        else:
            jax.profiler.stop_trace()


def start(folder: Path) -> None:
    """Starts a trace into a folder of the folder, named by the time. Python's own calls are left out."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


def stop(folder: Path, text: str, calls: int) -> str:
    """Ends the trace, in which the program of this text ran `calls` times; writes `stages.json` beside it, and returns
    the table."""
    jax.profiler.stop_trace()
    path = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        return f"Trace: the profiler wrote none into {folder}"
    kind = jax.local_devices()[0].device_kind
    try:
        found = read(path, Program(text), program_name(text), calls, kind)
    except ValueError as error:
        return f"Trace: {path}\nIts stages are not told: {error}"
    (path.parent / "stages.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return f"{found}\nTrace: {path}"


def keep_scopes() -> None:
    """Compiled programs on disk are found by their scopes, too. For command lines; it sets JAX's own option.

    Without it, a program that older code compiled comes with that code's scopes.
    """
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


# ── Stages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stage:
    """What a stage takes in one call on one device. seconds: of operations. share: of all stages' seconds.

    flops: of the program's matrix products; None where it does not tell. floor: seconds at the device's peaks; None
    where these are not known.
    """

    name: str
    seconds: float
    share: float
    flops: float | None
    floor: float | None

    @property
    def roofline(self) -> float | None:
        """Which fraction of the device's peaks the stage reaches."""
        return self.floor / self.seconds if self.floor and self.seconds else None


@dataclass(frozen=True)
class StageTimes:
    """stages: those that take longest first. seconds: from the first operation to the last, divided by the calls."""

    program: str
    device: str
    devices: int
    calls: int
    seconds: float
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        rows = [{**vars(stage), "roofline": stage.roofline} for stage in self.stages]
        return {**vars(self), "stages": rows, "jax": jax.__version__}

    def __str__(self) -> str:
        total = sum(stage.seconds for stage in self.stages)
        known = any(stage.floor for stage in self.stages)
        head = f"  {'':22}{'ms':>9}{'share':>8}{'GFLOP/s':>11}" + (f"{'floor ms':>11}{'roofline':>10}" if known else "")
        lines = [
            f"Measured by the trace, {self.calls} x {self.program} on {self.devices} x {self.device}: each takes "
            f"{1e3 * self.seconds:.2f} ms, its operations {1e3 * total:.2f} ms together",
            head,
        ]
        for stage in self.stages[:TOP]:
            rate = f"{stage.flops / stage.seconds / 1e9:.4g}" if stage.flops and stage.seconds else "-"
            line = f"  {stage.name:22}{1e3 * stage.seconds:9.2f}{stage.share:8.1%}{rate:>11}"
            if known:
                line += f"{1e3 * stage.floor:11.3f}" if stage.floor else f"{'-':>11}"
                line += f"{stage.roofline:10.1%}" if stage.roofline else f"{'-':>10}"
            lines.append(line)
        if rest := self.stages[TOP:]:
            lines.append(f"  and {len(rest)} more, together {sum(stage.share for stage in rest):.1%}")
        lines.append("Share: of the operations' time, summed over threads and streams; communication includes waiting.")
        lines.append("GFLOP/s: the program's matrix products, counted in it, over the stage's time.")
        lines.append(
            "Floor: derived from the program's products and memory traffic at the device's peaks, or estimated by the "
            "TPU's compiler; roofline: its part of the measured time."
            if known
            else f"The peaks of {self.device!r} are not known, so neither is the roofline."
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Event:
    """What ran. op: the instruction. name: of the event, on GPUs the kernel's. module: the program, if the trace tells.
    start, end: nanoseconds."""

    op: str
    name: str
    module: str | None
    device: str
    start: float
    end: float


def read(path: Path, program: Program, name: str, calls: int, kind: str) -> StageTimes:
    """The stages of a program in a trace in which it was called `calls` times on devices of that kind.

    Collectives are a stage of their own, and other programs are another.

    Raises:
        ValueError: the trace has no operation of the program, or its FLOPs cannot be counted.
    """
    where = stages(program)
    found = [x for computation in program.computations.values() for x in computation]
    kernels = {re.sub("[.-]", "_", x.name): x for x in found}  # as GPUs call them
    instructions = {**kernels, **{x.name: x for x in found}}
    nanoseconds: dict[str, float] = defaultdict(float)
    devices, first, last = set(), math.inf, -math.inf
    for event, own in (pair for line in device_lines(path) for pair in own_times(line)):
        instruction = instructions.get(event.op) or instructions.get(event.name)
        if event.module not in (None, name):
            stage = "other programs"
        elif instruction is None:
            stage = "other"
        elif instruction.opcode in ("while", "call", "conditional"):
            continue
        elif instruction.opcode.removesuffix("-done") in COLLECTIVES or only_communicates(program, instruction):
            stage = "communication"
        else:
            stage = where.get(instruction.name, "other")
        nanoseconds[stage] += own
        devices.add(event.device)
        first, last = min(first, event.start), max(last, event.end)
    if not set(nanoseconds) - {"other programs"}:
        raise ValueError(f"the trace has no operation of {name}; is the profiler of this device there?")
    spec = flops.device(kind)
    counted = estimate(program, COUNTER, lambda collective: 0.0).stages
    floors = estimate(program, spec, lambda collective: 0.0).stages if spec else {}
    total, runs = sum(nanoseconds.values()), calls * len(devices)
    rows = (
        Stage(stage, spent / runs / 1e9, spent / total, counted.get(stage) or None, floors.get(stage))
        for stage, spent in sorted(nanoseconds.items(), key=lambda item: -item[1])
    )
    return StageTimes(name, kind, len(devices), calls, (last - first) / calls / 1e9, tuple(rows))


def program_name(text: str) -> str:
    """A compiled program's name. Raises: ValueError: there is none."""
    found = re.match(r"HloModule ([\w.-]+)", text)
    if found is None:
        raise ValueError("the program has no name")
    return found[1]


def device_lines(path: Path) -> Iterator[list[Event]]:
    """The operations of each of a trace's threads or streams: those of GPUs and TPUs, or, without any, of the CPU."""
    lines: dict[str, list[list[Event]]] = {"device": [], "host": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)  # jaxlib's own types
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            device = re.fullmatch(r"/device:(GPU|TPU):\d+.*", plane.name)
            for line in plane.lines:
                if device and not line.name.startswith("Stream" if device[1] == "GPU" else "XLA Ops"):
                    continue  # what the profiler derives from the same events
                found = [event for x in line.events if (event := _event(x, plane.name, known=device is not None))]
                lines["device" if device else "host"].append(found)
    yield from filter(None, lines["device"] if any(lines["device"]) else lines["host"])


def _event(event: Any, plane: str, *, known: bool) -> Event | None:
    """known: a device's event, which is an operation even if the trace does not tell of which program."""
    told = dict(event.stats)
    op = told.get("hlo_op")
    if op is None:
        if not known:
            return None
        op = event.name.removeprefix("%").split(" ")[0]  # a TPU's is the whole instruction
    module = told.get("hlo_module")
    device = plane if known else f"{plane} {told.get('device_ordinal', '')}"
    return Event(str(op), event.name, None if module is None else str(module), device, event.start_ns, event.end_ns)


def own_times(line: list[Event]) -> list[tuple[Event, float]]:
    """Each event of a thread or stream, and its nanoseconds without those of the events inside it."""
    times: list[float] = []
    events = sorted(line, key=lambda event: (event.start, -event.end))
    around: list[int] = []
    for place, event in enumerate(events):
        while around and events[around[-1]].end <= event.start:
            around.pop()
        times.append(event.end - event.start)
        if around:
            times[around[-1]] -= times[place]
        around.append(place)
    return list(zip(events, times, strict=True))
