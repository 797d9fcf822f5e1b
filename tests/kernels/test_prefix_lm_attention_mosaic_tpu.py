"""The TPU attention in Pallas's interpreter against the reference, races looked for; and compiled for real TPUs."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec

from pi0fast import targets
from pi0fast_kernels import ATTENTION_RESIDUALS, _dispatch, _mosaic_tpu, prefix_lm_attention
from pi0fast_kernels._dispatch import Device
from pi0fast_kernels.prefix_lm_attention import api, cases, mosaic_tpu, mosaic_tpu_tiles, reference
from pi0fast_kernels.prefix_lm_attention.mosaic_tpu_tiles import Tile, TuningConfig
from tests.kernels.tpu_interpreter import race_free

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
SLOW = pytest.mark.slow
SMALL = TuningConfig(*2 * [Tile(128, 32, 0, 128, 16, 1)], unit=128, fill=32, few=0)
NOT_MOVED = {"pi0_prefix": "32,6528,256", "siglip": r"[\d,]*\b72\b[\d,]*"}
SINGLE = TuningConfig(*2 * [Tile(32, 0, 64, 16, 8, 2)], unit=16, fill=16, few=0)  # one block, of chunks


class Shape(NamedTuple):
    b: int
    t: int
    s: int
    n: int
    k: int
    c: int


def arrays(shape: Shape, seed=0, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent."""
    b, t, s, n, k, c = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (b, t, n, c), (b, s, k, c), (b, s, k, c), (b, t, n, c)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def random_ranges(shape: Shape, seed=0):
    """Empty, one-key, whole and overhanging intervals among them; where there are two examples, one sees nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(-2, shape.s + 1, (shape.b, shape.t))
    length = rng.choice([-1, 0, 1, shape.s // 2, shape.s, 2 * shape.s], (shape.b, shape.t))
    length[1:] = 0
    return jnp.asarray(start, jnp.int32), jnp.asarray(start + length, jnp.int32)


def suffix_ranges(shape: Shape, seed=0):
    """From one of the first 8 keys to one of the last 8; one row, or of several examples one, sees nothing."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 8, (shape.b, shape.t))
    end = rng.integers(shape.s - 8, shape.s + 1, (shape.b, shape.t))
    if shape.b > 1:
        end[-1] = 0
    else:
        end[0, 1] = 0
    return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def whole_ranges(shape: Shape):
    start = jnp.zeros((shape.b, shape.t), jnp.int32)
    return start, start + shape.s


def causal_ranges(shape: Shape):
    end = np.clip(np.arange(1, shape.t + 1) + shape.s - shape.t, 0, shape.s)
    end = jnp.broadcast_to(jnp.asarray(end, jnp.int32), (shape.b, shape.t))
    return jnp.zeros_like(end), end


def kernels(q, k, v, start, end, dout, config=None):
    """out, lse, dq, dk, dv of the TPU kernels, in which there is no race."""
    run = {"scale": q.shape[-1] ** -0.5, "device": _dispatch.device(), "config": config}
    with race_free():
        out, lse = mosaic_tpu.forward(q, k, v, start, end, **run)
        gradients = mosaic_tpu.backward(q, k, v, start, end, out, lse, dout, **run)
        return jax.block_until_ready((out, lse, *gradients))


def expected(q, k, v, start, end, dout):
    scale = q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, start, end, scale=scale)
    return out, lse, *reference.backward(q, k, v, start, end, out, lse, dout, scale=scale)


def agree(actual, exact, start, end, shape: Shape) -> None:
    sees = np.asarray(jnp.maximum(start, 0) < jnp.minimum(end, shape.s))
    out, lse, *gradients = map(np.asarray, actual)
    exact_out, exact_lse, *exact_gradients = map(np.asarray, exact)
    assert not out[~sees].any() and not gradients[0][~sees].any()
    np.testing.assert_allclose(lse[sees], exact_lse[sees], rtol=2e-6, atol=2e-6)
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), (exact_out, *exact_gradients), strict=True
    ):
        assert np.isfinite(ours).all(), name
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * max(1.0, np.abs(theirs).max()), err_msg=name)


@pytest.mark.parametrize(
    ("shape", "ranges", "config"),
    [
        pytest.param(Shape(2, 21, 21, 4, 1, 32), random_ranges, None, id="pi0 prefix"),
        pytest.param(Shape(2, 3, 22, 8, 1, 256), suffix_ranges, SINGLE, id="pi0 suffix, two examples a program"),
        pytest.param(Shape(1, 5, 22, 8, 1, 16), suffix_ranges, SINGLE, id="one block, several tiles", marks=SLOW),
        pytest.param(Shape(1, 19, 19, 2, 2, 72), whole_ranges, None, id="siglip"),
        pytest.param(Shape(2, 7, 33, 6, 2, 64), random_ranges, None, id="grouped"),
        pytest.param(Shape(2, 35, 70, 4, 1, 16), random_ranges, SMALL, id="several blocks, neither end aligned"),
        pytest.param(Shape(1, 64, 64, 4, 1, 16), causal_ranges, SMALL, id="several blocks, causal, aligned"),
        pytest.param(Shape(1, 21, 24, 2, 2, 24), suffix_ranges, SINGLE, id="transposed, two heads a program"),
        pytest.param(Shape(1, 140, 70, 2, 2, 24), random_ranges, SMALL, id="transposed, several tiles and blocks"),
    ],
)
def test_values_and_gradients(shape, ranges, config):
    inputs = arrays(shape)
    start, end = ranges(shape)
    q, k, v, dout = inputs
    agree(kernels(q, k, v, start, end, dout, config), expected(q, k, v, start, end, dout), start, end, shape)


def error(actual, exact) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(actual, np.float64) - np.asarray(exact, np.float64)))))


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (Shape(1, 21, 21, 4, 1, 64), None),
        (Shape(1, 20, 40, 8, 2, 32), SMALL),
        pytest.param(Shape(1, 17, 40, 1, 1, 32), SINGLE, id="a part of one row"),
    ],
)
def test_bfloat16(shape, config):
    start, end = causal_ranges(shape)
    inputs = arrays(shape)
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in inputs)
    wide_q, wide_k, wide_v, wide_dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
    exact = expected(wide_q, wide_k, wide_v, start, end, wide_dout)
    ours, theirs = kernels(q, k, v, start, end, dout, config), expected(q, k, v, start, end, dout)
    for name, actual, half, target in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        if name == "lse":
            np.testing.assert_allclose(actual, target, rtol=1e-5, atol=1e-5)
        else:
            assert actual.dtype == jnp.bfloat16
            assert error(actual, target) <= 1.5 * error(half, target), name


def test_blocks_that_no_query_of_a_tile_sees_are_not_touched():
    """NaN in a key or value would spoil every sum that it enters, even with weight zero."""
    shape = Shape(1, 40, 96, 4, 1, 16)
    q, k, v, dout = arrays(shape)
    start = jnp.full((1, 40), 32, jnp.int32)
    end = jnp.full((1, 40), 64, jnp.int32)
    seen = (jnp.arange(96) >= 32) & (jnp.arange(96) < 64)
    poisoned_k, poisoned_v = (jnp.where(seen[:, None, None], x, jnp.nan) for x in (k, v))
    actual = kernels(q, poisoned_k, poisoned_v, start, end, dout, SMALL)
    agree(actual, expected(q, k, v, start, end, dout), start, end, shape)


def test_results_are_the_same_from_run_to_run():
    shape = Shape(2, 7, 33, 6, 2, 64)
    q, k, v, dout = arrays(shape)
    for a, b in zip(*(kernels(q, k, v, *random_ranges(shape), dout) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("waits", [True, False])
def test_a_missing_wait_is_found(waits):
    def kernel(source, result, buffer, semaphore):
        copy = pltpu.make_async_copy(source, buffer, semaphore)
        copy.start()
        if waits:
            copy.wait()
        result[...] = buffer[...] + 1.0
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128))
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    harmless = Shape(1, 2, 8, 1, 1, 16)
    q, k, v, _ = arrays(harmless)

    def both():
        with race_free():
            jax.block_until_ready(run(x))
            out = mosaic_tpu.forward(q, k, v, *whole_ranges(harmless), scale=1.0, device=_dispatch.device())
            jax.block_until_ready(out)  # a later kernel does not hide an earlier one's race

    if waits:
        both()
    else:
        with pytest.raises(AssertionError):
            both()


# Through the public op, under JAX's transformations.

PUBLIC = Shape(2, 5, 9, 2, 1, 16)


def loss(implementation, q, k, v, start, end):
    out = prefix_lm_attention(q, k, v, start, end, scale=0.3, implementation=implementation)
    return jnp.sum(jnp.sin(out))


def gradients(function):
    return jax.value_and_grad(function, (0, 1, 2))


def same(make, *inputs) -> None:
    """`make(loss)(*inputs)` is the same with both implementations."""
    with race_free():
        ours = jax.block_until_ready(make(partial(loss, "mosaic_tpu"))(*inputs))
    theirs = make(partial(loss, "reference"))(*inputs)
    for actual, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(exact).max())))


def test_vmap():
    q, k, v, _ = arrays(PUBLIC)
    axes = (0, None, None, None, None)
    same(lambda f: jax.jit(jax.vmap(gradients(f), axes)), jnp.stack([q, q + 1]), k, v, *random_ranges(PUBLIC))


def test_scan():
    """Without `jax.checkpoint`, which the interpreter's effects do not go through."""
    q, k, v, _ = arrays(PUBLIC)
    start, end = random_ranges(PUBLIC)

    def scanned(f):
        def run(q, k, v):
            queries = jnp.stack([q, q + 1])
            return jax.lax.scan(lambda x, y: (x + f(x * y, k, v, start, end), None), jnp.ones(()), queries)[0]

        return jax.jit(gradients(run))

    same(scanned, q, k, v)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "triton"])
def test_a_second_derivative_names_the_remedy(implementation):
    q, k, v, _ = arrays(PUBLIC)
    once = jax.grad(partial(loss, implementation))
    with pytest.raises(NotImplementedError, match="no second derivatives .* pass implementation='reference'"):
        jax.grad(lambda q: jnp.sum(once(q, k, v, *random_ranges(PUBLIC))))(q)


def on_tpu(generation: str):
    """As if the program were traced for a TPU."""
    described = AbstractDevice(device_kind=KINDS[generation], num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def test_the_forward_kernel_runs_once_where_its_residuals_are_saved():
    inputs = *arrays(PUBLIC)[:3], *random_ranges(PUBLIC)

    def count(jaxpr) -> int:
        inner = (x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())))
        inner = (getattr(x, "jaxpr", x) for x in inner)
        here = sum(eqn.primitive.name == "pallas_call" for eqn in jaxpr.eqns)
        return here + sum(count(x) for x in inner if hasattr(x, "eqns"))

    def launches(policy) -> int:
        with on_tpu("v5e"):
            program = jax.make_jaxpr(gradients(jax.checkpoint(partial(loss, "mosaic_tpu"), policy=policy)))(*inputs)
        return count(program.jaxpr)

    assert launches(jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS)) == 2
    assert launches(jax.checkpoint_policies.nothing_saveable) == 3


def test_a_program_traced_for_a_tpu_chooses_it_and_still_runs_on_a_cpu():
    inputs = *arrays(PUBLIC)[:3], *random_ranges(PUBLIC)
    with on_tpu("v6e"):
        traced = jax.jit(gradients(partial(loss, None))).trace(*inputs)
    assert "prefix_lm_attention_forward" in str(traced.jaxpr)
    actual = traced.lower().compile()(*inputs)
    for a, b in zip(*map(jax.tree.leaves, (actual, gradients(partial(loss, "reference"))(*inputs))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_keys", "dtype", "message"),
    [
        (2**15, jnp.bfloat16, "it takes up to 10240 keys .* not 32768"),
        (8192, jnp.float32, "up to 6826 keys"),
        (9, jnp.float32, None),
    ],
)
def test_what_it_refuses(num_keys, dtype, message):
    q, k = jnp.zeros((1, 4, 2, 256), dtype), jnp.zeros((1, num_keys, 1, 256), dtype)
    refused = api._reasons(Device("tpu", KINDS["v5e"], None, 1), q, k)["mosaic_tpu"]
    assert refused is None if message is None else re.search(message, str(refused))


@pytest.mark.parametrize(("batch", "refuses"), [(2**16, True), (60_000, False)])
def test_it_refuses_more_examples_than_scalars_can_be_prefetched_for(batch, refuses):
    x = jnp.zeros((batch, 1, 1, 16), jnp.bfloat16)
    refused = api._reasons(Device("tpu", KINDS["v5e"], None, 1), x, x)["mosaic_tpu"]
    assert (refused is not None) == refuses
    if refuses:
        assert "up to 61440 tiles of rows, not 65536; split the batch" in str(refused)


# Compiled by libtpu.


@pytest.fixture
def uncached():
    """A program for a TPU that is not there cannot be loaded from the compilation cache."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def compiled(name: str, generation: str, backward: bool, dtype=jnp.bfloat16) -> str:
    """The optimised program of one direction of a case."""
    return compiled_case(next(case for case in cases.CASES if case.name == name), generation, backward, dtype)


def compiled_case(case: cases.Case, generation: str, backward: bool, dtype=jnp.bfloat16) -> str:
    chip = jax.sharding.SingleDeviceSharding(targets.devices(CHIPS[generation])[0])
    array = partial(jax.ShapeDtypeStruct, sharding=chip)
    q = array((case.batch, case.queries, case.heads, case.head_dim), dtype)
    k = array((case.batch, case.keys, case.kv_heads, case.head_dim), dtype)
    bound = array((case.batch, case.queries), jnp.int32)
    lse = array(q.shape[:3], jnp.float32)
    run = {"scale": case.scale, "device": Device("tpu", KINDS[generation], None, 1)}
    if backward:
        lowered = jax.jit(partial(mosaic_tpu.backward, **run)).lower(q, k, k, bound, bound, q, lse, q)
    else:
        lowered = jax.jit(partial(mosaic_tpu.forward, **run)).lower(q, k, k, bound, bound)
    return str(lowered.compile().as_text())


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name == "v6e" else pytest.mark.long) for name in KINDS]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(case.name, marks=pytest.mark.slow if case.name in NOT_MOVED else pytest.mark.long)
        for case in cases.CASES
    ],
)
def test_compiles(uncached, name, generation):
    """An overflow of VMEM would be an error. q is not copied, nor is SigLIP's k or v, nor what is made of them."""
    for backward in (False, True):
        program = compiled(name, generation, backward)
        kernel = "prefix_lm_attention_backward" if backward else "prefix_lm_attention_forward"
        assert f"%{kernel}" in program and "tpu_custom_call" in program
        if name in NOT_MOVED:
            moved = re.findall(rf" = bf16\[{NOT_MOVED[name]}\]\S* (?:copy|transpose|reshape|fusion)\(", program)
            assert not moved, moved


@pytest.mark.parametrize(
    "generation", [pytest.param(name, marks=() if name == "v6e" else pytest.mark.slow) for name in KINDS]
)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [
        pytest.param(257, 257, 64, id="ViT-L/14 with its class token"),
        pytest.param(1, 300, 64, id="decoding"),
        pytest.param(1, 300, 128, id="decoding, whole lanes"),
    ],
)
def test_compiles_where_a_part_has_one_row(uncached, queries, keys, head_dim, generation):
    case = cases.Case("one row", 1, queries, keys, 2, 2, head_dim, "all")
    for backward in (False, True):
        assert "tpu_custom_call" in compiled_case(case, generation, backward)


@pytest.mark.parametrize("generation", KINDS)
def test_float32_programs_stay_short(generation):
    """On v6e 112 pieces of logits in one program took minutes to compile, float32 products being of several passes."""
    config = mosaic_tpu_tiles.tuning(Device("tpu", KINDS[generation], None, 1), jnp.float32)
    for tile in (config.forward, config.backward):
        for rows in range(128, 4096, 128):
            q, k = (jnp.broadcast_to(jnp.zeros(()), (8, length, 1, 256)) for length in (rows, 1024))
            plan = mosaic_tpu_tiles.plan(q, k, tile, config)
            assert len(plan.parts) * len(plan.chunks) <= 32


@pytest.mark.slow
def test_compiles_inside_shard_map_and_checkpoint(uncached):
    """The interpreter has not been tried on several devices: here the compiler has eight."""
    mesh = Mesh(np.array(targets.devices("v5e:2x4")), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")
    policy = jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS)
    remat = jax.checkpoint(partial(loss, "mosaic_tpu"), policy=policy)
    losses = jax.shard_map(lambda *x: remat(*x)[None], mesh=mesh, in_specs=(data,) * 5, out_specs=data)
    array = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.NamedSharding(mesh, data))
    q, k = array((16, 51, 8, 256), jnp.bfloat16), array((16, 867, 1, 256), jnp.bfloat16)
    bound = array((16, 51), jnp.int32)
    total = gradients(lambda *x: jnp.sum(losses(*x)))
    program = str(jax.jit(total).lower(q, k, k, bound, bound).compile().as_text())
    assert "prefix_lm_attention_forward" in program and "prefix_lm_attention_backward" in program


@pytest.mark.parametrize("generation", KINDS)
def test_every_generation_is_tuned(generation):
    device = Device("tpu", KINDS[generation], None, 1)
    assert _mosaic_tpu.generation(device) == generation
    assert mosaic_tpu_tiles.tuning(device, jnp.bfloat16) is mosaic_tpu_tiles.TUNING[generation]
