"""What a training step, or an inference call, will take on devices that are not here: compiled for them, and read.

    python -m pi0fast.plan pi0_base --target=v5e:2x4 --batch-size=32
    python -m pi0fast.plan pi0_base --target=h100:8 --mesh=data:2,fsdp:4 --remat=full --json
    python -m pi0fast.plan pi0_base --target=h100:1 --infer

The trainer's own flags change the step. Memory and the collectives are the compiler's; the times are estimates at the
device's peaks (`pi0fast.estimate`), so real steps take longer.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from pi0fast import config, flops, fsdp, memory, targets, train_state
from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.estimate import CLOCKS, Estimate, estimate
from pi0fast.fitting import Advice, advise, largest_batch
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import Program
from pi0fast.memory import Memory
from pi0fast.params import flatten
from pi0fast.precompile import compile_policy, compile_step
from pi0fast.settings import DEFAULTS, Settings
from pi0fast.train_state import device_bytes
from pi0fast.training_data import abstract_batch
from pi0fast.tuning import adapted

TRAINING, INFERENCE = "training step", "inference call"
HOST_LINK = 16e9  # bytes/s from a host to each of its devices: PCIe 4 with 8 lanes, the least that these devices have


@dataclass(frozen=True)
class PlanSettings:
    """Compile a training step for devices that are not here, and say what it takes.

    Args:
        target: h100:8, v5e:2x4, v5p:2x2x2, v6e:2x4, v5e:16x16, or cpu.
        cameras: how many of the model's cameras the data have; all by default. Prompts are as long as the model takes,
            or as --input.prompt-len says.
        infer: the policy's call on one device of the target instead, with a batch of one.
        largest_batch: also find the largest batch that fits, by bisection.
        advise: where the step does not fit, compile what might, and say which does.
        json: print one JSON object.
        hlo: also write the compiled program to this file.
    """

    target: str
    cameras: int | None = None
    infer: bool = False
    largest_batch: bool = False
    advise: bool = True
    json: bool = False
    hlo: Path | None = None
    train: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


# ── The plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, per step. bytes: sent by each device. exposed_ms: not covered by compute, where the
    device is known."""

    kind: str
    axes: str
    dtype: str
    count: int
    bytes: int
    async_share: float
    exposed_ms: float | None


@dataclass(frozen=True)
class Time:
    """One step, or one call, in milliseconds. Sources: "compiler estimate" or "derived".

    compute_source: of `compute_ms`; all else here is derived. transfer_ms: the batch from the host, beside the step
    before; input_ms: what of it the step does not cover. mfu: the model's FLOPs over the device's peak, an upper bound;
    of what is frozen only those that are needed count. stages_ms: compute by part of the
    model. products_ms: compute in instructions with a matrix product; ideal_ms: the model's FLOPs at the peak.
    """

    compute_source: str
    compute_ms: float
    exposed_ms: float
    transfer_ms: float
    input_ms: float
    step_ms: float
    samples_per_s: float
    mfu: float
    ideal_ms: float
    products_ms: float
    stages_ms: dict[str, float]
    model_tflops: float
    decoded_frames_per_s: float


@dataclass(frozen=True)
class Plan:
    """parameters: trained and frozen ones, by part of the model. savings: bytes of the train state on each device that
    each lever would save, by flag; both of training only."""

    preset: str
    target: str
    device: str
    devices: int
    kind: str
    mesh: dict[str, int]
    settings: dict[str, Any]
    cameras: int
    memory: Memory
    parameters: dict[str, tuple[int, int]]
    savings: dict[str, int]
    fits: bool
    compile_s: float
    time: Time | None
    collectives: list[Traffic]
    warning: str | None = None
    advice: list[Advice] = field(default_factory=list)
    largest_batch: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


def plan(preset: str, chosen: PlanSettings) -> Plan:
    """Raises: ValueError, ModuleNotFoundError: a target, mesh or batch that cannot be compiled for."""
    model_config = config.PRESETS[preset]()
    if not chosen.infer:
        model_config = adapted(model_config, chosen.train)
    cameras = len(model_config.cameras) if chosen.cameras is None else chosen.cameras
    if not 0 <= cameras <= len(model_config.cameras):
        raise ValueError(f"--cameras={cameras}: {preset} has {len(model_config.cameras)} cameras; give 0 to that many")
    devices = targets.devices(chosen.target)
    settings = dataclasses.replace(chosen.train, mesh="fsdp:1") if chosen.infer else chosen.train
    mesh = meshes.make(settings.mesh, devices[:1] if chosen.infer else devices)
    compile_one = compile_policy if chosen.infer else compile_step
    warning, parameters, savings = None, {}, {}
    if not chosen.infer:
        _, state, frozen = train_state.abstract_state(model_config, settings, mesh)
        warning = fsdp.undivided(state.weights, mesh)
        parameters, savings = memory.count_parameters(state, frozen), memory.savings(state, settings.optim, mesh)
    compiled = compile_one(model_config, settings, mesh, cameras)
    if chosen.hlo and compiled.text:
        chosen.hlo.write_text(compiled.text)
    spec = flops.device(devices[0].device_kind)
    timed, moved = None, []
    if compiled.text is not None:
        read = read_program(compiled.text, spec, chosen.target, mesh)
        moved = traffic(read, timed=spec is not None)
        if spec is not None:
            timed = _time(read, model_config, settings, mesh, cameras, spec, chosen.infer)
    made = Plan(
        preset=preset,
        target=chosen.target,
        device=devices[0].device_kind,
        devices=mesh.size,
        kind=INFERENCE if chosen.infer else TRAINING,
        mesh=dict(mesh.shape),
        settings=_shown(settings, chosen.infer),
        cameras=cameras,
        memory=compiled.memory,
        parameters=parameters,
        savings=savings,
        fits=compiled.memory.fits,
        compile_s=round(compiled.seconds, 1),
        time=timed,
        collectives=moved,
        warning=warning,
        versions={name: version(name) for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin") if _installed(name)},
    )
    if not made.fits and chosen.advise and not chosen.infer:
        made = dataclasses.replace(made, advice=list(advise(model_config, settings, mesh, cameras)))
    if chosen.largest_batch and not chosen.infer:
        made = dataclasses.replace(
            made, largest_batch=largest_batch(model_config, settings, mesh, cameras, compiled.memory)
        )
    return made


def _shown(settings: Settings, infer: bool) -> dict[str, Any]:
    """Those that change the program."""
    if infer:
        return {"batch_size": 1, "kernels": settings.kernels}
    names = "batch_size", "accum", "flow_samples", "remat", "reduce_dtype", "kernels", "xla", "tune", "freeze"
    optim = "mu_dtype", "second_moment", "ema_decay", "ema_on_host"
    lora = {"lora": dataclasses.asdict(settings.lora)} if "lora" in settings.tune else {}
    return {x: getattr(settings, x) for x in names} | {x: getattr(settings.optim, x) for x in optim} | lora


def read_program(text: str, spec: DeviceSpec | None, target: str, mesh: Mesh) -> Estimate:
    """What the program does; its seconds mean nothing without a `spec`."""
    known = spec or DeviceSpec("unknown", 1.0, 1.0, 0.0, 1.0)
    return estimate(Program(text), known, targets.link_seconds(target, known, mesh))


def traffic(read: Estimate, timed: bool) -> list[Traffic]:
    """timed: the device is known, so that what is exposed means something."""
    return [
        Traffic(
            x.kind,
            ",".join(x.axes),
            x.dtype,
            x.count,
            int(x.bytes),
            round(x.async_bytes / x.bytes, 3),
            round(x.exposed_s * 1e3, 3) if timed else None,
        )
        for x in sorted(read.moved.values(), key=lambda x: -x.bytes)
        if x.bytes
    ]


def _time(
    read: Estimate,
    model_config: Pi0Config,
    settings: Settings,
    mesh: Mesh,
    cameras: int,
    spec: DeviceSpec,
    infer: bool,
) -> Time:
    batch_size = 1 if infer else settings.batch_size
    prompt_len = settings.input.prompt_len or model_config.max_token_len
    if infer:
        cost = flops.inference(model_config, cameras, prompt_len)
        model_flops = cost.vision.flops + cost.prefix.flops + cost.state.flops + cost.evaluations * cost.step.flops
        batch_bytes = 0
    else:
        _, state, _ = train_state.abstract_state(model_config, settings, mesh)
        trained = flatten(state.weights).keys()
        model_flops = flops.train_step(model_config, cameras, prompt_len, batch_size, trained, settings.flow_samples)
        batch_bytes = device_bytes(
            abstract_batch(model_config, batch_size, model_config.cameras[:cameras], mesh, prompt_len)
        )
    ideal = model_flops / mesh.size / spec.flops
    transfer = batch_bytes / HOST_LINK
    late = max(0.0, transfer - read.seconds)
    step = read.seconds + late
    return Time(
        compute_source="compiler estimate, or memory traffic, derived" if spec.kind in CLOCKS else "derived",
        compute_ms=read.compute_s * 1e3,
        exposed_ms=read.exposed_s * 1e3,
        transfer_ms=transfer * 1e3,
        input_ms=late * 1e3,
        step_ms=step * 1e3,
        samples_per_s=batch_size / step,
        mfu=ideal / step,
        ideal_ms=ideal * 1e3,
        products_ms=read.products_s * 1e3,
        stages_ms={x: read.stages[x] * 1e3 for x in sorted(read.stages, key=lambda x: -read.stages[x])},
        model_tflops=model_flops / 1e12,
        decoded_frames_per_s=batch_size * cameras / step,
    )


# ── Printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(made: Plan, console: Console) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in made.settings.items() if value not in ("", None))
    mesh = ", ".join(f"{axis} {size}" for axis, size in made.mesh.items())
    console.print(f"[bold]{made.preset}[/], {made.kind}, {made.devices} × {made.device} ({mesh})")
    console.print(f"{made.cameras} cameras, {settings}\n")
    training = made.kind == TRAINING
    if made.parameters:
        console.print(memory.parameters_table(made.parameters))
    console.print(memory.memory_table(made.memory, training))
    if made.savings:
        console.print(memory.savings_table(made.savings))
    verdict = "[green]fits[/]" if made.fits else "[red]does not fit[/]"
    console.print(f"It {verdict}. Compiled in {made.compile_s:.0f} s.\n")
    if made.time:
        _show_time(made.time, "step" if training else "call", console)
    if made.collectives:
        _show_collectives(made.collectives, console)
    if made.warning:
        console.print(made.warning)
    for advice in made.advice:
        verdict = "fits" if advice.fits else "does not fit"
        console.print(f"with {advice.flags}: {memory.size(advice.peak)}, {verdict} (compiled)")
    if made.largest_batch is not None:
        console.print(f"The largest batch that fits is {made.largest_batch or 'none'} (compiled).")


def _show_time(timed: Time, what: str, console: Console) -> None:
    table = Table(f"one {what}", "ms", "source", title="Time at the device's peaks", title_justify="left")
    table.add_row("compute", f"{timed.compute_ms:.1f}", timed.compute_source)
    for stage, milliseconds in timed.stages_ms.items():
        table.add_row(f"  {stage}", f"{milliseconds:.1f}", timed.compute_source)
    table.add_row("exposed communication", f"{timed.exposed_ms:.1f}", "derived")
    table.add_row("input", f"{timed.input_ms:.1f}", f"derived; {timed.transfer_ms:.2f} ms from the host, overlapped")
    table.add_row(what, f"{timed.step_ms:.1f}", "sum", end_section=True)
    again, rest = timed.products_ms - timed.ideal_ms, timed.compute_ms - timed.products_ms
    table.add_row("its parts: the model's FLOPs at the peak", f"{timed.ideal_ms:.1f}", "derived")
    table.add_row("  products recomputed, or below the peak", f"{again:.1f}", timed.compute_source)
    table.add_row("  norms, activations, copies, the optimizer", f"{rest:.1f}", timed.compute_source)
    console.print(table)
    mfu = f"{timed.mfu:.1%} MFU ({timed.model_tflops:.0f} TFLOP)"
    console.print(f"At most {timed.samples_per_s:.1f} samples/s and {mfu}.")
    console.print(f"The loader has to decode {timed.decoded_frames_per_s:.0f} frames/s.\n")


def _show_collectives(moved: list[Traffic], console: Console) -> None:
    table = Table(
        "collective", "over", "dtype", "count", "sent", "async", "exposed ms", title="Communication, per device",
        title_justify="left",
    )  # fmt: skip
    for x in moved:
        row = x.kind, x.axes, x.dtype, str(x.count), memory.size(x.bytes), f"{x.async_share:.0%}"
        table.add_row(*row, "-" if x.exposed_ms is None else f"{x.exposed_ms:.2f}")
    console.print(table)


def main(arguments: list[str]) -> None:
    """The command line: `PRESET --target=… [flags]`. The preset decides the flags' defaults."""
    if not arguments or arguments[0] not in DEFAULTS:
        sys.exit(f"python -m pi0fast.plan PRESET --target=…: the presets are {', '.join(DEFAULTS)}")
    preset = arguments.pop(0)
    default = PlanSettings(target=tyro.MISSING, train=DEFAULTS[preset])
    chosen = tyro.cli(PlanSettings, default=default, args=arguments, prog=f"python -m pi0fast.plan {preset}")
    jax.config.update("jax_platforms", "cpu")  # the compilers need no device, and must not look for one
    try:
        made = plan(preset, chosen)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if chosen.json:
        print(json.dumps(dataclasses.asdict(made), indent=1))
    else:
        show(made, Console())
    if not made.fits:
        sys.exit(2)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
