"""The model's layers, one at a time, forward and backward: what a training step is made of.

On an accelerator those of the released sizes, with a batch of 32 and all cameras, by reference and by our kernels, in
turn; elsewhere those of the tiny presets, by reference. `bytes` counts weights, inputs and results once, and their
gradients; residuals are not counted. *backward* is the backward pass alone, from residuals that a forward pass left.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bench import ceilings, parts, timing
from bench.memory import KeepLast
from pi0fast import config
from pi0fast.execution import Execution, Kernels
from pi0fast.flops import Cost

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)

ACCELERATOR = jax.default_backend() != "cpu"
PRESETS, BATCH = (("pi0_base", "pi05_base"), 32) if ACCELERATOR else (("pi0_tiny", "pi05_tiny"), 8)
KERNELS: tuple[Kernels, ...] = ("reference", "auto") if ACCELERATOR else ("reference",)
ROUNDS, ROUND_SECONDS = (15, 0.02) if ACCELERATOR else (5, 0.0)
SPAN = 128 * 2**20 if ACCELERATOR else 0  # inputs rotate over more bytes than this, beyond an H200's cache
LAYERS = {"pi0": ("siglip layer", "vlm layer", "expert layer"), "pi05": ("expert layer",)}  # what else it has is Pi0's

CASES = [
    pytest.param(preset, layer, direction, kernels, id=f"{preset}-{layer.replace(' ', '_')}-{direction}-{kernels}")
    for preset in PRESETS
    for layer in LAYERS[preset.partition("_")[0]]
    for direction in ("forward", "backward")
    for kernels in KERNELS
]


@pytest.mark.parametrize(("preset", "layer", "direction", "kernels"), CASES)
def test_layer(benchmark, preset, layer, direction, kernels):
    calls, seconds, cost = compare(preset, layer, direction)
    benchmark.group = f"{preset} {layer} {direction}, batch {BATCH}"
    benchmark.extra_info.update(preset=preset, stage=layer, direction=direction, batch=BATCH, contender=kernels)
    benchmark.extra_info.update(calls[kernels])
    timing.CLOCK.replay(benchmark, seconds[kernels])
    if benchmark.enabled:
        benchmark.extra_info.update(ceilings.rates(cost, benchmark.stats.stats.median))


@KeepLast
def compare(preset: str, layer: str, direction: str) -> tuple[dict[str, dict], dict[str, list[float]], Cost]:
    """By kernels: how calls were made, seconds by round; and what the layer needs at least."""
    size = config.PRESETS[preset]()
    calls: dict[str, timing.Calls] = {}
    cost = Cost(0.0, 0.0)
    for kernels in KERNELS:
        case = parts.cases(size, BATCH, Execution(kernels=kernels))[layer]
        first = make(case, size, 0)
        sets = [first, *(make(case, size, seed) for seed in range(1, 1 + SPAN // nbytes(first)))]
        weights, inside, outside = first
        if direction == "forward":
            calls[kernels] = timing.Calls(jax.jit(case.forward), sets)
            written = nbytes(jax.eval_shape(case.forward, *first))
            cost = Cost(BATCH * case.part(size).forward, nbytes(first) + written)
        else:
            linearize = jax.jit(case.linearize)
            pulls = [(pull, out) for out, pull in (linearize(*inputs) for inputs in sets)]
            calls[kernels] = timing.Calls(jax.jit(lambda pull, out: pull(out)), pulls)
            moved = 2 * nbytes((weights, inside)) + nbytes((outside, pulls[0][1]))
            cost = Cost(BATCH * case.part(size).backward, moved)
    info = {name: each.calibrate(ROUND_SECONDS) for name, each in calls.items()}
    return info, timing.interleaved({name: each.round for name, each in calls.items()}, ROUNDS), cost


def make(case: parts.Case, size: config.Pi0Config, seed: int) -> tuple[nnx.State, tuple, tuple]:
    """Random weights as the model's are drawn, in its dtype, and random inputs; every key valid."""
    weights, inside, outside = case.inputs
    leaves, structure = jax.tree.flatten((inside, outside))
    keys = jax.random.split(jax.random.key(2 * seed), len(leaves))
    drawn = [
        jnp.ones(x.shape, x.dtype) if x.dtype == jnp.bool_ else jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    weight_leaves, weight_structure = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(2 * seed + 1), len(weight_leaves))
    of_weights = [
        (jax.random.normal(key, x.shape) * (0.1 if len(x.shape) < 2 else x.shape[0] ** -0.5)).astype(size.dtype)
        for key, x in zip(keys, weight_leaves, strict=True)
    ]
    return weight_structure.unflatten(of_weights), *structure.unflatten(drawn)


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
