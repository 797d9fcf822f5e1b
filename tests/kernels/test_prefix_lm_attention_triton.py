"""The Triton attention in Triton's interpreter against the reference: values and every gradient."""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pi0fast_kernels import _dispatch, prefix_lm_attention
from pi0fast_kernels._triton import Launch
from pi0fast_kernels.prefix_lm_attention import reference, triton

pytestmark = pytest.mark.skipif(not triton.INTERPRET, reason="runs in Triton's interpreter only")


class Shape(NamedTuple):
    b: int
    t: int
    s: int
    n: int
    k: int
    c: int


# The shapes that must be fast, with less of B and N, unaligned to the interpreter's tiles of 16 × 16.
SHAPES = {
    "pi0 prefix": Shape(2, 21, 21, 4, 1, 32),
    "pi0 suffix": Shape(2, 5, 26, 8, 1, 24),
    "siglip": Shape(1, 20, 20, 2, 2, 72),
    "head_dim 256": Shape(1, 3, 18, 2, 1, 256),
    "grouped": Shape(2, 7, 33, 6, 2, 16),
    "aligned": Shape(1, 16, 32, 2, 1, 16),
    "one query": Shape(1, 1, 40, 1, 1, 16),
    "one key": Shape(1, 4, 1, 2, 1, 16),
}


def arrays(shape: Shape, seed=0, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent."""
    b, t, s, n, k, c = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (b, t, n, c), (b, s, k, c), (b, s, k, c), (b, t, n, c)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def random_ranges(shape: Shape, seed=0):
    """Empty, one-key, whole and overhanging intervals among them."""
    rng = np.random.default_rng(seed)
    start = rng.integers(-2, shape.s + 1, (shape.b, shape.t))
    length = rng.choice([-1, 0, 1, shape.s // 2, shape.s, 2 * shape.s], (shape.b, shape.t))
    return jnp.asarray(start, jnp.int32), jnp.asarray(start + length, jnp.int32)


def padded_ranges(shape: Shape, seed=0):
    """Every example has its own number of valid keys; the last queries see nothing."""
    valid = np.random.default_rng(seed).integers(1, shape.s + 1, (shape.b, 1))
    sees = np.arange(shape.t) < max(1, shape.t - 2)
    end = np.where(sees, valid, 0)
    return jnp.zeros((shape.b, shape.t), jnp.int32), jnp.asarray(end, jnp.int32)


def causal_ranges(shape: Shape, seed=0):
    end = np.clip(np.arange(1, shape.t + 1) + shape.s - shape.t, 0, shape.s)
    end = jnp.broadcast_to(jnp.asarray(end, jnp.int32), (shape.b, shape.t))
    return jnp.zeros_like(end), end


RANGES = {"random": random_ranges, "padded": padded_ranges, "causal": causal_ranges}


def kernels(module: ModuleType, q, k, v, start, end, dout, **options):
    """out, lse, dq, dk, dv of the Triton kernels."""
    run = {"scale": q.shape[-1] ** -0.5, "device": _dispatch.device()}
    out, lse = module.forward(q, k, v, start, end, **run, **options)
    options = {name: value for name, value in options.items() if name != "splits"}
    return out, lse, *module.backward(q, k, v, start, end, out, lse, dout, **run, **options)


def expected(q, k, v, start, end, dout):
    scale = q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, start, end, scale=scale)
    return out, lse, *reference.backward(q, k, v, start, end, out, lse, dout, scale=scale)


def error(actual, exact) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(actual, np.float64) - np.asarray(exact, np.float64)))))


def check(module: ModuleType, shape: Shape, start, end, seed=0, **options) -> None:
    """Values and gradients agree to float32 rounding; what no query sees gives zeros."""
    q, k, v, dout = arrays(shape, seed)
    out, lse, *gradients = kernels(module, q, k, v, start, end, dout, **options)
    exact_out, exact_lse, *exact_gradients = expected(q, k, v, start, end, dout)
    sees = np.asarray(jnp.maximum(start, 0) < jnp.minimum(end, shape.s))
    assert not np.asarray(out)[~sees].any() and not np.asarray(gradients[0])[~sees].any()
    np.testing.assert_allclose(np.asarray(lse)[sees], np.asarray(exact_lse)[sees], rtol=2e-6, atol=2e-6)
    for name, actual, exact in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), (exact_out, *exact_gradients), strict=True
    ):
        assert np.isfinite(actual).all(), name
        np.testing.assert_allclose(
            actual, exact, rtol=0, atol=2e-6 * max(1.0, float(np.abs(exact).max())), err_msg=name
        )


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, ranges):
    check(triton, SHAPES[shape], *RANGES[ranges](SHAPES[shape]))


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("ranges", RANGES)
def test_split_keys(ranges, splits):
    shape = SHAPES["pi0 suffix"]._replace(s=39)
    check(triton, shape, *RANGES[ranges](shape), splits=splits)


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16)])
def test_tiles(rows, keys):
    tile = triton.Tile(rows, keys, Launch(1, 1))
    shape = SHAPES["pi0 prefix"]
    check(triton, shape, *random_ranges(shape), config=triton.TuningConfig(tile, tile, tile, tile))


def test_no_query_sees_anything():
    shape = SHAPES["grouped"]
    nothing = jnp.full((shape.b, shape.t), 3, jnp.int32)
    q, k, v, dout = arrays(shape)
    out, _, *gradients = kernels(triton, q, k, v, nothing, nothing, dout)
    assert not any(np.asarray(x).any() for x in (out, *gradients))


@pytest.mark.parametrize("shape", ["pi0 prefix", "pi0 suffix", "siglip", "head_dim 256", "grouped"])
def test_half_precision(shape):
    """float16: Triton's interpreter multiplies bfloat16 wrongly."""
    shape = SHAPES[shape]
    start, end = padded_ranges(shape)
    q, k, v, dout = arrays(shape)
    exact = expected(q, k, v, start, end, dout)
    q, k, v, dout = (x.astype(jnp.float16) for x in (q, k, v, dout))
    ours = kernels(triton, q, k, v, start, end, dout)
    theirs = expected(q, k, v, start, end, dout)
    for name, actual, reference_half, target in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        if name != "lse":
            assert actual.dtype == jnp.float16
            assert error(actual, target) <= 1.5 * error(reference_half, target), name


def test_results_are_the_same_from_run_to_run():
    shape = SHAPES["grouped"]
    q, k, v, dout = arrays(shape)
    first, second = (kernels(triton, q, k, v, *random_ranges(shape), dout) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@st.composite
def problems(draw, largest: int):
    k, group = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    lengths = st.integers(1, largest)
    shape = Shape(draw(st.integers(1, 2)), draw(lengths), draw(lengths), k * group, k, draw(st.integers(16, 40)))
    return shape, draw(st.sampled_from(sorted(RANGES))), draw(st.integers(0, 99)), draw(st.sampled_from([1, 2, 4]))


def check_problem(problem) -> None:
    shape, ranges, seed, splits = problem
    blocks = -(-shape.s // 16)
    check(triton, shape, *RANGES[ranges](shape, seed), seed=seed, splits=min(splits, blocks))


@pytest.mark.long
@settings(max_examples=4, deadline=None, derandomize=True)
@given(problems(largest=24))
def test_random_problems(problem):
    check_problem(problem)


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(largest=40))
def test_many_random_problems(problem):
    check_problem(problem)


FAULTS = {
    "the last block of keys is skipped, forward": (
        "_hull(start, end, sees, S, KEYS)",
        0,
        "_hull(start, end - KEYS, sees, S, KEYS)",
    ),
    "the last block of keys is skipped, dq": (
        "_hull(start, end, sees, S, KEYS)",
        1,
        "_hull(start, end - KEYS, sees, S, KEYS)",
    ),
    "the last query is skipped, dkv": ("last_token * G, ROWS", 0, "last_token * G - ROWS, ROWS"),
    "a block is not masked": ("tl.min(tl.where(sees, end, S))", 0, "S + KEYS"),
    "rows without keys are not cleared": ("tl.where(sees[:, None], summed /", 0, "tl.where(exists[:, None], summed /"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    old, occurrence, new = FAULTS[fault]
    parts = Path(triton.__file__).read_text().split(old)
    text = old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])
    (tmp_path / "faulty.py").write_text(text)
    spec = importlib.util.spec_from_file_location("pi0fast_kernels.prefix_lm_attention.faulty", tmp_path / "faulty.py")
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    shape = SHAPES["pi0 prefix"]
    end = jnp.where(jnp.arange(shape.t) < shape.t - 2, jnp.array([[shape.s], [shape.s - 2]]), 0)  # two blocks of keys
    check(triton, shape, jnp.zeros_like(end), end)
    with pytest.raises(AssertionError):
        check(faulty, shape, jnp.zeros_like(end), end)


# Through the public op, under JAX's transformations.

WHOLE = SHAPES["grouped"]


def loss(implementation, q, k, v, start, end):
    out = prefix_lm_attention(q, k, v, start, end, scale=0.3, implementation=implementation)
    return jnp.sum(jnp.sin(out))


def agree(make, *inputs) -> None:
    """`make(loss)(*inputs)` is the same with both implementations."""
    ours, theirs = (make(partial(loss, implementation))(*inputs) for implementation in ("triton", "reference"))
    for actual, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(exact).max())))


def gradients(function):
    return jax.value_and_grad(function, (0, 1, 2))


def test_jit_and_open_ranges():
    q, k, v, _ = arrays(WHOLE)
    agree(lambda f: jax.jit(gradients(f)), q, k, v, *random_ranges(WHOLE))
    agree(lambda f: gradients(lambda *qkv: f(*qkv, None, None)), q, k, v)
    agree(lambda f: gradients(lambda *qkv: f(*qkv, None, causal_ranges(WHOLE)[1])), q, k, v)


def test_vmap():
    q, k, v, _ = arrays(WHOLE)
    start, end = random_ranges(WHOLE)
    several = jnp.stack([q, q + 1, 2 * q])
    axes = (0, None, None, None, None)
    agree(lambda f: jax.vmap(gradients(f), axes), several, k, v, start, end)
    agree(lambda f: gradients(lambda *x: jnp.sum(jax.vmap(f, axes)(*x))), several, k, v, start, end)
    nested = jnp.stack([several, -several])
    agree(lambda f: jax.vmap(jax.vmap(f, axes), axes), nested, k, v, start, end)


def test_remat_and_scan():
    q, k, v, _ = arrays(WHOLE)
    start, end = random_ranges(WHOLE)

    def scanned(f):
        def run(q, k, v):
            step = jax.checkpoint(lambda total, x: (total + f(x * total, k, v, start, end), None))
            return jax.lax.scan(step, jnp.ones(()), jnp.stack([q, q + 1]))[0]

        return gradients(run)

    agree(scanned, q, k, v)


def over_a_mesh(f, devices: int, specs, *, remat=False):
    """Loss and gradients of f inside `shard_map`, every device's loss by itself."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

    def local(*x):
        return f(*x)[None]

    local = jax.checkpoint(local) if remat else local
    losses = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
    return jax.jit(gradients(lambda *x: jnp.sum(losses(*x))))


@pytest.mark.parametrize("remat", [False, True])
def test_shard_map(remat):
    q, k, v, _ = arrays(WHOLE)
    specs = (PartitionSpec("data"),) * 5
    agree(lambda f: over_a_mesh(f, 2, specs, remat=remat), q, k, v, *random_ranges(WHOLE))


def test_gradients_of_replicated_keys_are_summed_over_the_mesh():
    """On one device: XLA's CPU collectives and host callbacks (the interpreter) can wait for each other for ever."""
    q, k, v, _ = arrays(WHOLE)
    inputs = q, k, v, *random_ranges(WHOLE)
    data, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = (data, everywhere, everywhere, data, data)
    agree(lambda f: over_a_mesh(f, 1, specs), *inputs)
    jaxpr = str(jax.make_jaxpr(over_a_mesh(partial(loss, "triton"), 1, specs))(*inputs))
    assert jaxpr.count("psum") == 2  # dk and dv; none inside the op


def test_the_forward_kernel_runs_once_where_its_residuals_are_saved():
    from pi0fast_kernels import ATTENTION_RESIDUALS

    q, k, v, _ = arrays(WHOLE)
    ranges = random_ranges(WHOLE)

    def launches(policy) -> int:
        f = jax.checkpoint(partial(loss, "triton"), policy=policy)
        compiled = jax.jit(gradients(f)).lower(q, k, v, *ranges).compile().as_text()
        return sum("custom-call(" in line and "python_cpu_callback" in line for line in str(compiled).splitlines())

    save = jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS)
    assert launches(save) == 3  # forward, dq, dkv
    assert launches(jax.checkpoint_policies.nothing_saveable) == 4


def test_new_data_compiles_nothing_new():
    traced = []

    @jax.jit
    def run(*inputs):
        traced.append(inputs)
        return loss("triton", *inputs)

    for seed in range(3):
        run(*arrays(WHOLE, seed)[:3], *random_ranges(WHOLE, seed)).block_until_ready()
    assert len(traced) == 1


def test_keys_are_split_until_the_cores_are_full():
    tile = triton.Tile(64, 64, Launch())
    assert triton.num_splits(7, 867, tile, 132) == 14  # 400 packed rows: 7 tiles; 14 blocks of keys
    assert triton.num_splits(7, 867, tile, 40) == 5
    assert triton.num_splits(3264, 816, tile, 132) == 1
    for cores in range(1, 200, 7):  # no split is empty
        splits = triton.num_splits(3, 500, tile, cores)
        span = -(-500 // (splits * 64))
        assert (splits - 1) * span < -(-500 // 64)
