"""The Hopper attention's forward pass in Mosaic's GPU interpreter against the reference, races looked for.

Planted: a wait or a commit is left out, and has to be missed. What the interpreter cannot see is listed in
mosaic_gpu_interpreter.py; tests/aot/test_h100_attention.py compiles the kernels for a GPU.
"""

import itertools
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pi0fast.execution import Execution
from pi0fast_kernels import _mosaic_gpu, prefix_lm_attention
from pi0fast_kernels._dispatch import Device
from pi0fast_kernels.prefix_lm_attention import api, mosaic_gpu, mosaic_gpu_forward, mosaic_gpu_tiles, reference
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu import TuningConfig
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_schedule import Plan, Tile, intervals, schedule
from tests.kernels.mosaic_gpu_interpreter import race_free, record_races
from tests.kernels.test_dispatch import H100, on_h100


class Shape(NamedTuple):
    b: int
    t: int
    s: int
    n: int
    k: int
    c: int


def arrays(shape: Shape, seed=0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v."""
    b, t, s, n, k, c = shape
    queries, *rest = jax.random.split(jax.random.key(seed), 3)
    keys, values = (jax.random.normal(key, (b, s, k, c), jnp.bfloat16) for key in rest)
    return jax.random.normal(queries, (b, t, n, c), jnp.bfloat16), keys, values


def random_ranges(shape: Shape, seed=0):
    """Empty, one-key, whole and overhanging intervals among them; where there are two examples, one sees nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(-2, shape.s + 1, (shape.b, shape.t))
    length = rng.choice([-1, 0, 1, shape.s // 2, shape.s, 2 * shape.s], (shape.b, shape.t))
    length[1:] = 0
    return jnp.asarray(start, jnp.int32), jnp.asarray(start + length, jnp.int32)


def causal_ranges(shape: Shape):
    end = np.clip(np.arange(1, shape.t + 1) + shape.s - shape.t, 0, shape.s)
    end = jnp.broadcast_to(jnp.asarray(end, jnp.int32), (shape.b, shape.t))
    return jnp.zeros_like(end), end


def prefix_ranges(shape: Shape, padding=3):
    """The last queries are padding; the others see all keys that are not."""
    end = jnp.where(jnp.arange(shape.t) < shape.t - padding, shape.s - padding, 0)
    end = jnp.broadcast_to(end, (shape.b, shape.t)).astype(jnp.int32)
    return jnp.zeros_like(end), end


def cores(count: int) -> Device:
    """A device that is interpreted, with as many blocks of threads."""
    return Device("cpu", "cpu", None, count)


def kernel(q, k, v, start, end, tile: Tile, num_cores=2, scale=None):
    """out and lse; traced anew, so that what is planted is traced."""
    run = partial(
        mosaic_gpu.forward,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        device=cores(num_cores),
        config=TuningConfig(tile, tile),
    )
    return jax.block_until_ready(jax.jit(run)(q, k, v, start, end))


def error(actual, exact) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(actual, np.float64) - np.asarray(exact, np.float64)))))


def agree(actual, q, k, v, start, end, scale=None) -> None:
    """Errors at most half as large again as the bfloat16 reference's; zeros where nothing is seen."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = actual
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    exact, exact_lse = reference.forward(wide_q, wide_k, wide_v, start, end, scale=scale)
    half, _ = reference.forward(q, k, v, start, end, scale=scale)
    sees = np.asarray(jnp.maximum(start, 0) < jnp.minimum(end, k.shape[1]))
    assert out.dtype == jnp.bfloat16 and out.shape == q.shape and lse.shape == q.shape[:3]
    assert not np.asarray(out)[~sees].any()
    assert (np.asarray(lse)[~sees] == mosaic_gpu_forward.NO_KEYS).all()
    np.testing.assert_allclose(np.asarray(lse)[sees], np.asarray(exact_lse)[sees], rtol=2e-6, atol=2e-6)
    assert error(out, exact) <= 1.5 * error(half, exact)


# What is known beforehand.


def visible(bounds, plan: Plan):
    """Of each example and tile, which rows see which keys, with blocks past the end that nobody sees."""
    start, end = (np.asarray(bounds)[:, i].reshape(plan.batch, plan.tiles, plan.tile.rows, 1) for i in range(2))
    key = np.arange((plan.key_blocks + 1) * plan.tile.keys)
    return (start <= key) & (key < end)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("ranges", [random_ranges, causal_ranges, prefix_ranges])
@pytest.mark.parametrize(
    "shape", [Shape(2, 40, 300, 8, 1, 64), Shape(1, 200, 333, 4, 2, 64)], ids=["one key/value head", "two"]
)
def test_every_block_that_is_seen_is_visited_once(shape, ranges, splits):
    q, k, _ = arrays(shape)
    plan = Plan.of(q, k, Tile(64, 2, 1), num_cores=2, splits=splits)
    start, end = ranges(shape)
    bounds = intervals(start, end, plan)
    items = np.asarray(schedule(bounds, plan))
    assert sorted(items[0]) == list(range(plan.items))
    visits = items[3] + items[4]
    assert (visits >= 1).all() and (np.diff(visits) <= 0).all()

    keys, seen = plan.tile.keys, visible(bounds, plan)
    visited = {}
    for number, *rest in items.T.tolist():
        split = number % splits
        tile = number // splits % plan.tiles
        head = number // splits // plan.tiles % plan.heads
        example = number // splits // plan.tiles // plan.heads
        item = mosaic_gpu_forward.Item(example, head, tile * plan.tile.rows, split, *rest)
        blocks = [int(item.key_block(n)) for n in range(item.visits)]
        visited.setdefault((example, head, tile), []).extend(blocks)
        in_tile = seen[example, tile]
        rows = in_tile[in_tile.any(-1)]
        for block in blocks[item.masked :]:
            assert rows[:, block * keys : (block + 1) * keys].all()
    assert len(visited) == plan.batch * plan.heads * plan.tiles
    for (example, _, tile), blocks in visited.items():
        real = sorted(block for block in blocks if block < plan.key_blocks)
        in_blocks = seen[example, tile].reshape(plan.tile.rows, -1, keys).any((0, 2))
        hull = np.flatnonzero(in_blocks)
        assert real == (list(range(hull[0], hull[-1] + 1)) if hull.size else [])


def test_with_a_split_for_each_block_an_item_visits_its_own():
    shape = Shape(2, 40, 300, 8, 1, 64)
    q, k, _ = arrays(shape)
    plan = Plan.of(q, k, Tile(64, 2, 1), num_cores=2, splits=5)
    start, end = causal_ranges(shape)
    items = np.asarray(schedule(intervals(start, end, plan), plan))
    assert items.dtype == np.int32 and (items[0] == np.arange(plan.items)).all()
    for number, *rest in items.T.tolist():
        item = mosaic_gpu_forward.Item(0, 0, 0, 0, *rest)
        assert [int(item.key_block(n)) for n in range(item.visits)] == [number % 5] and item.masked == 1


@pytest.mark.parametrize("head_dim", [16, 64, 72, 96, 128, 256])
def test_parts_of_the_head_dimension(head_dim):
    q = jnp.zeros((1, 1, 1, head_dim))
    plan = Plan.of(q, q, Tile(64, 2, 1), num_cores=1)
    ends = [0, *(column + width for column, width in plan.parts)]
    assert [column for column, _ in plan.parts] == ends[:-1]
    assert head_dim <= plan.width < head_dim + 32 and {width for _, width in plan.parts} <= {16, 32, 64}
    assert mosaic_gpu.candidates(head_dim)


@pytest.mark.parametrize(
    ("tile", "head_dim", "needed"),
    [(Tile(128, 3, 2), 128, 233600), (Tile(192, 2, 2), 128, 233568), (Tile(64, 2, 2), 256, 200704 + 96)],
)
def test_shared_memory(tile, head_dim, needed):
    """What the compiler says that it needs: in an error, for the first two; without barriers, for the last."""
    assert tile.shared_memory(head_dim) == needed
    assert (tile in mosaic_gpu.candidates(head_dim)) == (needed <= _mosaic_gpu.SHARED_MEMORY)


# In the interpreter.


@pytest.mark.parametrize(
    ("shape", "ranges", "tile"),
    [
        pytest.param(Shape(1, 21, 150, 4, 1, 64), random_ranges, Tile(64, 2, 1), id="packed rows, neither end aligned"),
        pytest.param(Shape(2, 10, 70, 2, 1, 72), prefix_ranges, Tile(64, 2, 1), id="siglip's head dimension, padding"),
        pytest.param(Shape(1, 70, 200, 4, 2, 128), random_ranges, Tile(128, 2, 2, 2), id="grouped, two warpgroups"),
        pytest.param(Shape(1, 17, 200, 8, 1, 256), causal_ranges, Tile(64, 2, 2), id="causal, head dimension 256"),
        pytest.param(
            Shape(2, 40, 130, 2, 1, 96), random_ranges, Tile(64, 3, 3), marks=pytest.mark.slow, id="three warpgroups"
        ),
        pytest.param(
            Shape(1, 51, 333, 8, 1, 256), prefix_ranges, Tile(64, 2, 2), marks=pytest.mark.slow, id="pi0 suffix"
        ),
    ],
)
def test_values(shape, ranges, tile):
    q, k, v = arrays(shape)
    start, end = ranges(shape)
    with race_free():
        actual = kernel(q, k, v, start, end, tile, num_cores=1)
    agree(actual, q, k, v, start, end)


@pytest.mark.parametrize(
    "shape", [Shape(1, 5, 140, 8, 1, 72), pytest.param(Shape(2, 9, 140, 2, 2, 64), marks=pytest.mark.slow)]
)
def test_few_rows(shape):
    """Keys are split; the parts are combined."""
    q, k, v = arrays(shape)
    inputs = q, k, v, *random_ranges(shape)
    tile = Tile(64, 2, 1)
    plan = mosaic_gpu.forward_plan(q, k, TuningConfig(tile, tile), num_cores=12)
    assert plan.splits == plan.key_blocks
    with race_free():
        actual = kernel(*inputs, tile, num_cores=12)
    agree(actual, *inputs)


@pytest.mark.parametrize("scale", [-0.25, 0.0])
def test_scales_that_are_not_positive(scale):
    shape = Shape(1, 4, 20, 1, 1, 16)
    inputs = *arrays(shape), *random_ranges(shape)
    with race_free():
        actual = kernel(*inputs, Tile(64, 2, 1), num_cores=1, scale=scale)
    agree(actual, *inputs, scale=scale)


def test_blocks_that_no_query_of_a_tile_sees_are_not_touched():
    """NaN in a key or value would spoil every sum that it enters, even with weight zero."""
    shape = Shape(1, 40, 192, 2, 1, 64)
    q, k, v = arrays(shape)
    start, end = jnp.full((1, 40), 64, jnp.int32), jnp.full((1, 40), 128, jnp.int32)
    seen = (jnp.arange(192) >= 64) & (jnp.arange(192) < 128)
    poisoned_k, poisoned_v = (jnp.where(seen[:, None, None], x, jnp.nan) for x in (k, v))
    with race_free():
        actual = kernel(q, poisoned_k, poisoned_v, start, end, Tile(64, 2, 2), num_cores=1)
    agree(actual, q, k, v, start, end)


def test_results_are_the_same_from_run_to_run():
    shape = Shape(1, 9, 70, 2, 1, 64)
    inputs = *arrays(shape), *random_ranges(shape)
    with record_races():
        first, second = (kernel(*inputs, Tile(64, 2, 1), num_cores=1) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


# Planted.


def leave_out(monkeypatch, function: str, barrier: str | None) -> None:
    """The kernel is traced without calls of this function, or without those for one of its barriers."""
    named = {}
    ring, names = mosaic_gpu_forward._ring, itertools.cycle(("queries", "keys", "values"))

    def naming(scratch, full, empty):
        name = next(names)
        named.update({id(full): f"{name}.full", id(empty): f"{name}.empty"})
        return ring(scratch, full, empty)

    def called(*arguments, **options):
        if barrier is not None and named[id(arguments[0].ref)] != barrier:
            original(*arguments, **options)

    original = getattr(plgpu, function)
    for module in (mosaic_gpu_forward, mosaic_gpu_tiles):
        monkeypatch.setattr(module, "plgpu", SimpleNamespace(**{**vars(plgpu), function: called}))
    monkeypatch.setattr(mosaic_gpu_forward, "_ring", naming)


@pytest.mark.parametrize(
    ("function", "barrier"),
    [
        *(("barrier_wait", f"{ring}.{state}") for ring in ("queries", "keys", "values") for state in ("full", "empty")),
        ("commit_smem", None),
        ("wgmma_wait", None),
        ("wait_smem_to_gmem", None),
        pytest.param(None, None, id="nothing"),
    ],
)
def test_what_is_left_out_is_missed(function, barrier, monkeypatch):
    """Two tiles of one block of threads, three blocks of keys in rings of two."""
    shape = Shape(1, 128, 192, 1, 1, 16)
    inputs = *arrays(shape), *causal_ranges(shape)
    if function is not None:
        leave_out(monkeypatch, function, barrier)
    ended = False
    with record_races() as records, suppress(jax.errors.JaxRuntimeError):  # some are errors at once
        kernel(*inputs, Tile(64, 2, 1), num_cores=1)
        ended = True
    assert (not ended or any(kernel.races_found for kernel in records)) == (function is not None)


# Through the public op.


def test_the_public_op_under_vmap_and_scan():
    shape = Shape(1, 3, 20, 2, 1, 16)
    q, k, v = arrays(shape)
    start, end = random_ranges(shape)
    queries = jnp.stack([q, q + 1])

    def both(implementation):
        attend = partial(prefix_lm_attention, scale=0.25, implementation=implementation)
        mapped = jax.jit(jax.vmap(attend, (0, None, None, None, None)))(queries, k, v, start, end)
        step = lambda x, _: (attend(x, k, v, start, end), None)  # noqa: E731
        return mapped, jax.jit(lambda q: jax.lax.scan(step, q, length=2)[0])(q)

    with race_free():
        ours = jax.block_until_ready(both("mosaic_gpu"))
    for actual, exact in zip(ours, both("reference"), strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), exact.astype(jnp.float32), rtol=0, atol=2e-2)


def test_gradients_through_the_public_op():
    """The backward kernels take what the forward kernel saves."""
    shape = Shape(1, 5, 40, 2, 1, 16)
    q, k, v = arrays(shape)
    start, end = random_ranges(shape)

    def gradients(implementation, *inputs):
        def loss(q, k, v):
            out = prefix_lm_attention(q, k, v, start, end, scale=0.25, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)

    with race_free():
        ours = jax.block_until_ready(gradients("mosaic_gpu", q, k, v))
    exact = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for actual, half, wide in zip(ours, gradients("reference", q, k, v), exact, strict=True):
        assert error(actual, wide) <= 1.5 * error(half, wide)


def test_only_a_caller_that_names_it_gets_it():
    q, k, v = arrays(Shape(1, 4, 8, 1, 1, 64))
    ranges = jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), 8, jnp.int32)
    with on_h100():
        named, unnamed = (
            str(jax.make_jaxpr(partial(prefix_lm_attention, scale=1.0, implementation=name))(q, k, v, *ranges))
            for name in ("mosaic_gpu", None)
        )
    assert "warpgroup" in named and "warpgroup" not in unnamed


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "message"),
    [
        (H100, jnp.bfloat16, 72, None),
        (H100, jnp.bfloat16, 20, "multiples of 8"),
        (H100, jnp.float16, 64, "takes bfloat16, not float16"),
        (Device("cuda", "NVIDIA A100-SXM4-80GB", 80, 108), jnp.bfloat16, 64, "capability 80"),
        (Device("cuda", "NVIDIA B200", 100, 148), jnp.bfloat16, 64, "capability 100"),
    ],
)
def test_what_it_refuses(device, dtype, head_dim, message):
    x = jnp.zeros((1, 4, 2, head_dim), dtype)
    refused = api._reasons(device, x, x)["mosaic_gpu"]
    assert refused is None if message is None else message in str(refused)


def test_it_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "INTERPRET", False)
    assert "needs an NVIDIA GPU" in str(_mosaic_gpu.reason(Device("cpu", "cpu", None, None), jnp.bfloat16))


def test_beside_it_the_model_takes_any_norm():
    assert Execution(kernels="mosaic_gpu").attention == "mosaic_gpu"
    assert Execution(kernels="mosaic_gpu").norm is None
    assert Execution(kernels="triton").attention == Execution(kernels="triton").norm == "triton"
