"""What would fit into a device's memory: other settings, or another batch, each proved by compiling it."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.memory import Memory, capacity
from pi0fast.precompile import compile_step
from pi0fast.settings import Settings


@dataclass(frozen=True)
class Advice:
    """A change, and what compiling it showed. peak: bytes on each device."""

    flags: str
    peak: int
    fits: bool


def changes(settings: Settings, mesh: Mesh) -> Iterator[tuple[str, Settings]]:
    """What takes less memory than these settings: each change alone, then more and more of them together."""
    singles: list[tuple[str, dict[str, Any]]] = []
    if settings.remat != "full":
        singles.append(("--remat=full", {"remat": "full"}))
    if settings.optim.mu_dtype != "bfloat16":
        optim = dataclasses.replace(settings.optim, mu_dtype="bfloat16")
        singles.append(("--optim.mu-dtype=bfloat16", {"optim": optim}))
    if mesh.shape["data"] > 1:
        singles.append((f"--mesh=fsdp:{mesh.size}", {"mesh": f"fsdp:{mesh.size}"}))
    together = list(singles)
    per_device = settings.batch_size // mesh.size
    accums = [n for n in range(2 * settings.accum, per_device + 1, settings.accum) if per_device % n == 0]
    for n in accums:
        if n in (accums[0], accums[-1]) or n & (n - 1) == 0:
            singles.append((f"--accum={n}", {"accum": n}))
    together += singles[-1:] if accums else []
    for flag, change in singles:
        yield flag, dataclasses.replace(settings, **change)
    for count in range(2, len(together) + 1):
        change = {name: value for _, change in together[:count] for name, value in change.items()}
        yield " ".join(flag for flag, _ in together[:count]), dataclasses.replace(settings, **change)


def advise(model_config: Pi0Config, settings: Settings, mesh: Mesh, cameras: int) -> Iterator[Advice]:
    """Compiles one change after the other; together only where none alone is enough, and no more than needed."""
    enough = False
    for flags, changed in changes(settings, mesh):
        if enough and " " in flags:
            return
        on = meshes.make(changed.mesh, list(mesh.devices.flat))
        memory = compile_step(model_config, changed, on, cameras).memory
        enough = enough or memory.fits
        yield Advice(flags, memory.peak, memory.fits)


def largest_batch(
    model_config: Pi0Config, settings: Settings, mesh: Mesh, cameras: int, known: Memory | None = None
) -> int:
    """The largest global batch that fits; 0 where not even the smallest does.

    known: what the settings' own batch takes, if it was compiled already.

    Raises:
        ValueError: a device whose memory is not known.
    """
    unit = mesh.size * settings.accum
    if not capacity(mesh.devices.flat[0]):
        raise ValueError("--largest-batch: how much memory this device has is not known; name an accelerator")

    def memory(units: int) -> Memory:
        if known is not None and units * unit == settings.batch_size:
            return known
        found = compile_step(model_config, dataclasses.replace(settings, batch_size=units * unit), mesh, cameras).memory
        return found

    return bisect(memory, max(1, settings.batch_size // unit)) * unit


def bisect(memory: Callable[[int], Memory], first: int) -> int:
    """The largest size that fits, 0 if 1 does not; sizes that fit are taken to be all those up to one.

    Each next size is where the line through the two peaks nearest to the capacity meets it, at first the line from the
    train state alone; kept between the largest size that is known to fit and the smallest that is known not to.
    """
    peaks: dict[int, int] = {}
    fits, too_large, size = 0, None, first
    while too_large is None or too_large - fits > 1:
        found = memory(size)
        peaks[size] = found.peak
        if found.fits:
            fits = size
        else:
            too_large = size
        near = sorted(peaks, key=lambda size: abs(peaks[size] - found.capacity))[:2]
        held = found.parameters + found.frozen + found.optimizer + found.average
        guess = int((found.capacity - held) * size / max(1, found.peak - held))
        if len(near) == 2 and (slope := (peaks[near[1]] - peaks[near[0]]) / (near[1] - near[0])) > 0:
            guess = int(near[0] + (found.capacity - peaks[near[0]]) / slope)
        size = min(max(guess, fits + 1), 4 * fits if too_large is None else too_large - 1)
    return fits
