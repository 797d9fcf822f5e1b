"""What this device does at most, measured before anything else, so that fractions are of what is possible here.

Two numbers: a matrix product of two large matrices of random bfloat16 (float32 on a CPU) through XLA, and a large copy,
bytes read and bytes written both counted. Datasheet peaks (`pi0fast.flops.DEVICES`) stand beside them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bench import timing
from bench.provenance import provenance
from pi0fast import flops
from pi0fast.flops import Cost, DeviceSpec

ROUNDS = 9


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s. bandwidth: bytes/s. seconds: raw, of each call."""

    flops: float
    bandwidth: float
    seconds: dict[str, list[float]]


@functools.cache
def measure() -> Ceilings:
    """Takes a second or two, once in a process."""
    cpu = jax.default_backend() == "cpu"
    size, words, dtype = (1024, 2**24, jnp.float32) if cpu else (8192, 2**28, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys[:2])
    source = jax.random.bits(keys[2], (words,), jnp.uint32)
    calls = {
        "matmul": timing.Calls(jax.jit(jnp.matmul), [(a, b), (b, a)]),
        "copy": timing.Calls(jax.jit(lambda x: x ^ jnp.uint32(1)), [(source,)]),
    }
    for each in calls.values():
        each.calibrate(0.0 if cpu else 0.05)
    seconds = timing.interleaved({name: each.round for name, each in calls.items()}, ROUNDS)
    median = {name: sorted(times)[ROUNDS // 2] for name, times in seconds.items()}
    return Ceilings(2 * size**3 / median["matmul"], 2 * source.nbytes / median["copy"], seconds)


def here() -> dict[str, Any]:
    """What every result says: `provenance`, and the ceilings."""
    return {**provenance(), "ceilings": dataclasses.asdict(measure())}


def rates(cost: Cost | Sequence[Cost], seconds: float) -> dict[str, float]:
    """Of a call that takes so long: its work and traffic, both per second, and its least time over this one.

    cost: of the call, or of its stages, one after the other; no bytes where they are not counted. of_ceiling: by what
    was measured here. of_peak: by the datasheet, where it is known. mfu: its FLOP/s over the datasheet's.
    """
    stages = [cost] if isinstance(cost, Cost) else cost
    work, traffic, ceiling = sum(x.flops for x in stages), sum(x.bytes for x in stages), measure()
    here = DeviceSpec("", ceiling.flops, ceiling.bandwidth, memory=0.0)
    found = {
        "flops": work,
        "tflops_per_s": work / seconds / 1e12,
        "of_ceiling": sum(x.floor_seconds(here) for x in stages) / seconds,
    }
    if traffic:
        found |= {"bytes": traffic, "gb_per_s": traffic / seconds / 1e9}
    if device := flops.device(jax.devices()[0].device_kind):
        found["of_peak"] = sum(x.floor_seconds(device) for x in stages) / seconds
        found["mfu"] = work / seconds / device.flops
    return found
