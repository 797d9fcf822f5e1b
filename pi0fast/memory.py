"""What a program takes on each device, part by part; what of it is trained; and what each lever would save.

What the arrays take is exact, from shapes and shardings. Temporaries and the peak are the compiler's.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.table import Table

from pi0fast import compiler, flops, liveness
from pi0fast.optim import OptimConfig
from pi0fast.params import flatten
from pi0fast.settings import Settings
from pi0fast.train_state import TrainState, device_bytes, on_mesh

Trace = Callable[[Settings], jax.stages.Traced]

# What makes the train state smaller: flags, and the fields that they set.
LEVERS: dict[str, dict[str, Any]] = {
    "--optim.mu-dtype=bfloat16": {"mu_dtype": "bfloat16"},
    "--optim.second-moment=factored": {"second_moment": "factored"},
    "--optim.ema-on-host": {"ema_on_host": True},
    "--optim.ema-decay=None": {"ema_decay": None},
}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    arguments: what the program is given, by the compiler. temporaries: activations, gradients, gathered layers. peak:
    of all together, as the compiler lays them out, or would: where it does not fit, both others are not known.
    capacity: 0 is not known.
    """

    parameters: int
    frozen: int
    optimizer: int
    average: int
    capacity: int
    peak: int = 0
    arguments: int | None = None
    temporaries: int | None = None

    @property
    def fits(self) -> bool:
        return not self.capacity or self.peak <= self.capacity

    def compiled(self, program: jax.stages.Compiled, platform: str) -> "Memory":
        """With the compiler's figures."""
        analysis: Any = program.memory_analysis()
        # The CPU's compiler tells no peak: all that is there at once, then, but what the step writes in place.
        whole = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        whole += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return dataclasses.replace(
            self,
            peak=whole if platform == "cpu" else analysis.peak_memory_in_bytes,
            arguments=analysis.argument_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
        )

    def refused(self, error: Exception) -> "Memory":
        """What a compiler asked for that would not compile; its error is raised again if it is about anything else."""
        needed = re.search(
            r"(?:Used |for HLO temporaries \()([\d.]+)([GM])\)? (?:of|exceeds).* (?:hbm|HBM)", str(error)
        )
        if needed is None:
            raise error
        peak = int(float(needed[1]) * {"G": 2**30, "M": 2**20}[needed[2]])
        if "temporaries" in needed[0]:
            peak += self.parameters + self.frozen + self.optimizer + self.average
        return dataclasses.replace(self, peak=max(peak, self.capacity + 1))  # it is rounded, and may say less


def held(state: TrainState, frozen: nnx.State, device: Any) -> Memory:
    """Between steps. All arrays may be abstract."""
    return Memory(
        parameters=device_bytes(state.weights),
        frozen=device_bytes(frozen),
        optimizer=device_bytes(state.opt_state),
        average=device_bytes(state.average),
        capacity=capacity(device),
    )


def capacity(device: Any, gpu_share: float = compiler.GPU_MEMORY_SHARE) -> int:
    """Bytes that a program can have, of a GPU's memory this share; 0 where that is not known."""
    spec = flops.device(device.device_kind)
    return int(spec.memory * (gpu_share if device.platform == "gpu" else 1.0)) if spec else 0


def count_parameters(state: TrainState, frozen: nnx.State) -> dict[str, tuple[int, int]]:
    """Trained and frozen ones, by part of the model."""
    counts = Counter(), Counter()
    for counted, weights in zip(counts, (state.weights, frozen), strict=True):
        for path, variable in flatten(weights).items():
            counted[path.split("/")[0]] += variable.size
    return {name: (counts[0][name], counts[1][name]) for name in sorted({*counts[0], *counts[1]})}


def savings(state: TrainState, optim: OptimConfig, mesh: Mesh) -> dict[str, int]:
    """What each lever that is not in use would save of this state, by its flag: exact."""
    found, now = {}, device_bytes(state.opt_state)
    for flag, fields in LEVERS.items():
        changed = dataclasses.replace(optim, **fields)
        moments = device_bytes(on_mesh(jax.eval_shape(changed.optimizer().init, state.weights), mesh))
        averaged = changed.ema_decay is not None and not changed.ema_on_host
        saved = now - moments + (0 if averaged else device_bytes(state.average))
        if saved > 0:
            found[flag] = saved
    return found


def activation_savings(settings: Settings, mesh: Mesh, traced: jax.stages.Traced, trace: Trace) -> dict[str, int]:
    """What recomputing and smaller microbatches would save of the temporaries, by flag: estimated (`liveness`).

    traced: the step of these settings. trace: of others.
    """
    platform = mesh.devices.flat[0].platform
    accum = 2 * settings.accum
    levers: dict[str, dict[str, Any]] = {"--remat=full": {"remat": "full"}}
    if settings.batch_size % (mesh.size * accum) == 0:
        levers[f"--accum={accum}"] = {"accum": accum}

    def temporaries(step: Any) -> int:
        return liveness.peak_bytes(step.jaxpr.jaxpr, "cuda" if platform == "gpu" else platform, donated=True)

    now = temporaries(traced)
    found = {
        flag: now - temporaries(trace(dataclasses.replace(settings, **changes))) for flag, changes in levers.items()
    }
    return {flag: saved for flag, saved in found.items() if saved > 0}


def compile_and_report(
    trace: Trace, settings: Settings, mesh: Mesh, state: TrainState, frozen: nnx.State, say: Callable[[Any], None]
) -> jax.stages.Compiled:
    """The step, compiled. Says what it trains, what it takes, and what would take less.

    trace: settings → the step. Those that would take less are traced only where the device's memory is known.

    Raises: ValueError: the compiler refuses a step that is too large for the device.
    """
    say(parameters_table(count_parameters(state, frozen)))
    device, traced = mesh.devices.flat[0], trace(settings)
    taken, step = held(state, frozen, device), None
    try:
        step = traced.lower().compile()
        taken = taken.compiled(step, device.platform)
    except jax.errors.JaxRuntimeError as error:
        taken = taken.refused(error)
    say(memory_table(taken))
    activations = activation_savings(settings, mesh, traced, trace) if taken.capacity else {}
    if saved := savings(state, settings.optim, mesh) | activations:
        say(savings_table(saved, estimated=activations.keys()))
    problem = f"the step takes {size(taken.peak)}, by its compiler, of the {size(taken.capacity)} of a device"
    if step is None:
        raise ValueError(f"{problem}; see above what takes less, or ask `python -m pi0fast.plan` what fits")
    if not taken.fits:
        say(f"It may not fit: {problem}.")
    return step


# ── Printing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parameters_table(parameters: Mapping[str, tuple[int, int]]) -> Table:
    table = Table("parameters", "trained", "frozen", title="What is trained", title_justify="left")
    for name, counts in parameters.items():
        table.add_row(name, *map(_count, counts))
    table.add_section()
    table.add_row("all", *(_count(sum(counts)) for counts in zip(*parameters.values(), strict=True)))
    return table


def memory_table(found: Memory, training: bool = True) -> Table:
    table = Table("per device", "bytes", "source", title="Memory", title_justify="left")
    rows = [
        ("parameters", found.parameters, "derived"),
        ("frozen parameters", found.frozen, "derived"),
        ("optimizer state", found.optimizer, "derived"),
        ("average of weights", found.average, "derived"),
        (f"activations{', gradients, gathered layers' * training}", found.temporaries, "compiler estimate"),
        ("peak", found.peak, "compiler estimate"),
        ("capacity", found.capacity, "data sheet, less what XLA keeps"),
    ]
    for name, count, source in rows:
        if count or name == "peak":
            table.add_row(name, "-" if count is None else size(count), source)
    return table


def savings_table(savings: Mapping[str, int], estimated: Collection[str] = ()) -> Table:
    """savings: bytes by flag. estimated: those flags whose savings are."""
    table = Table("lever", "would save", "source", title="What takes less", title_justify="left")
    for flag, saved in savings.items():
        table.add_row(flag, size(saved), "estimated" if flag in estimated else "derived")
    return table


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M" if parameters else ""
