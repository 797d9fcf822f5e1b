"""The Hopper attention's backward kernels in Mosaic's interpreter, against the reference, with races looked for.

What the interpreter cannot find: registers that a wgmma in flight reads and others write (ptxas then notes C7513 and
waits for each wgmma), threads of one warpgroup racing with each other (on the barrier of a cluster one thread arrives
for all 128), a block of a cluster that ends while its neighbour still signals it, and that memory which copies see as
rows and wgmma as tiles is one. How many registers there are only the compiler knows.
"""

from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pi0fast_kernels import _dispatch
from pi0fast_kernels.prefix_lm_attention import mosaic_gpu_backward, mosaic_gpu_dkv, mosaic_gpu_dq, reference
from pi0fast_kernels.prefix_lm_attention.cases import Case
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_backward import NO_KEYS, TuningConfig
from tests.kernels.mosaic_gpu_interpreter import race_free, record_races

PREFIX = Case("prefix", 2, 40, 40, 2, 1, 64, "prefix", (20, 40))
SUFFIX = Case("suffix", 2, 7, 75, 4, 1, 64, "suffix", (30, 68), states=1)
SIGLIP = Case("siglip", 1, 20, 70, 2, 2, 72, "all")
GROUPED = Case("grouped", 1, 70, 140, 4, 2, 64, "causal")
WIDE = Case("wide", 1, 20, 80, 4, 1, 256, "causal")
SMALL = TuningConfig(mosaic_gpu_dq.Tile(64, 3), mosaic_gpu_dkv.Tile(64, 64, stages=2, cluster=1))


def arrays(case: Case):
    """q, k, v, the keys that are seen, and what the backward pass gets from the forward pass and the next layer."""
    q, k, v, start, end = case.inputs()
    if start is None or end is None:
        start = jnp.zeros(q.shape[:2], jnp.int32)
        end = start + case.keys
    return q, k, v, start, end, jax.random.normal(jax.random.key(1), q.shape, q.dtype)


def random_ranges(case: Case):
    """Empty, one-key, whole and overhanging intervals among them; where there are two examples, one sees nothing."""
    rng = np.random.default_rng(0)
    start = rng.integers(-2, case.keys + 1, (case.batch, case.queries))
    length = rng.choice([-1, 0, 1, case.keys // 2, case.keys, 2 * case.keys], start.shape)
    length[1:] = 0
    return jnp.asarray(start, jnp.int32), jnp.asarray(start + length, jnp.int32)


def forward(q, k, v, start, end):
    """out and lse as the forward kernel gives them."""
    wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    out, lse = reference.forward(wide_q, wide_k, wide_v, start, end, scale=q.shape[-1] ** -0.5)
    sees = jnp.maximum(start, 0) < jnp.minimum(end, k.shape[1])
    return out.astype(q.dtype), jnp.where(sees[..., None], lse, NO_KEYS)


def kernels(q, k, v, start, end, dout, config=None, residuals=None):
    """dq, dk, dv."""
    out, lse = residuals or forward(q, k, v, start, end)
    options = {"scale": q.shape[-1] ** -0.5, "device": _dispatch.device(), "config": config}
    return jax.block_until_ready(mosaic_gpu_backward.backward(q, k, v, start, end, out, lse, dout, **options))


def expected(q, k, v, start, end, dout):
    def attention(q, k, v):
        return reference.attention(q, k, v, start, end, scale=q.shape[-1] ** -0.5)

    return jax.vjp(attention, q, k, v)[1](dout)


def error(actual, exact) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(actual, np.float64) - np.asarray(exact, np.float64)))))


def agree(actual, q, k, v, start, end, dout) -> None:
    """The error against float32 is at most 1.5 times the bfloat16 reference's."""
    wide_q, wide_k, wide_v, wide_dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
    exact = expected(wide_q, wide_k, wide_v, start, end, wide_dout)
    for name, ours, half, target in zip(
        ("dq", "dk", "dv"), actual, expected(q, k, v, start, end, dout), exact, strict=True
    ):
        assert ours.dtype == jnp.bfloat16 and np.isfinite(np.asarray(ours, np.float32)).all(), name
        assert error(ours, target) <= 1.5 * error(half, target), name


@pytest.mark.parametrize(
    ("case", "config"),
    [
        pytest.param(PREFIX, None, id="pi0 prefix, rows without keys"),
        pytest.param(SUFFIX, None, id="pi0 suffix, neither end aligned"),
        pytest.param(SIGLIP, None, id="siglip, 72"),
        pytest.param(GROUPED, SMALL, id="grouped, causal, several tiles of queries and keys"),
        pytest.param(WIDE, None, id="256, one head of keys"),
    ],
)
def test_gradients(case, config):
    inputs = arrays(case)
    with race_free():
        actual = kernels(*inputs, config)
    agree(actual, *inputs)


def test_random_ranges():
    case = Case("random", 2, 24, 70, 2, 1, 64, "all")
    q, k, v, _, _, dout = arrays(case)
    start, end = random_ranges(case)
    with race_free():
        dq, dk, dv = kernels(q, k, v, start, end, dout, SMALL)
    agree((dq, dk, dv), q, k, v, start, end, dout)
    sees = np.asarray(jnp.maximum(start, 0) < jnp.minimum(end, case.keys))
    assert 0 < sees[0].sum() < sees[0].size
    assert not np.asarray(dq)[~sees].any()
    assert not np.asarray(dk)[1].any() and not np.asarray(dv)[1].any()


def test_tiles_that_see_nothing_of_each_other_are_not_loaded():
    """NaN in a key, value, query or cotangent would spoil every sum that it enters, even with weight zero."""
    case = Case("two halves", 1, 256, 128, 1, 1, 64, "all")
    q, k, v, _, _, dout = arrays(case)
    start = jnp.where(jnp.arange(256) < 128, 0, 64)[None].astype(jnp.int32)
    residuals = forward(q, k, v, start, start + 64)
    exact = expected(q, k, v, start, start + 64, dout)
    q, dout = (x.at[:, 128:].set(jnp.nan) for x in (q, dout))
    k, v = (x.at[:, 64:].set(jnp.nan) for x in (k, v))
    with race_free():
        actual = kernels(q, k, v, start, start + 64, dout, SMALL, residuals)
    for name, ours, theirs, half in zip(("dq", "dk", "dv"), actual, exact, (128, 64, 64), strict=True):
        assert error(ours[:, :half], theirs[:, :half]) < 0.01 * error(theirs[:, :half], 0), name
        assert np.isnan(np.asarray(ours[:, half:], np.float32)).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dq", "dkv"),
    [
        (mosaic_gpu_dq.Tile(64, 6), mosaic_gpu_dkv.Tile(64, 128, stages=2, cluster=1)),
        (mosaic_gpu_dq.Tile(128, 4), mosaic_gpu_dkv.Tile(64, 64, stages=3, cluster=2)),
        (mosaic_gpu_dq.Tile(64, 4), mosaic_gpu_dkv.Tile(128, 64, stages=2, cluster=1)),
        (mosaic_gpu_dq.Tile(128, 3), mosaic_gpu_dkv.Tile(64, 64, stages=4, cluster=4)),
    ],
)
@pytest.mark.parametrize("case", [replace(GROUPED, head_dim=16), replace(SUFFIX, queries=40, keys=200, head_dim=112)])
def test_every_option_of_the_tuning_grid(case, dq, dkv):
    inputs = arrays(case)
    with race_free():
        actual = kernels(*inputs, TuningConfig(dq, dkv))
    agree(actual, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 96, 128, 192, 256])
def test_head_dimensions(head_dim):
    inputs = arrays(replace(SUFFIX, batch=1, head_dim=head_dim))
    with race_free():
        actual = kernels(*inputs)
    agree(actual, *inputs)


# ── Planted faults ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("missing", ["commit_smem", "wgmma_wait"])
def test_races_are_found(missing):
    """In both kernels: stores and loads that are not committed; slots that are released while a wgmma reads them."""
    inputs = arrays(Case("some slots are filled again", 1, 96, 128, 2, 1, 64, "all"))
    with record_races() as records, mock.patch.object(plgpu, missing, lambda *_: None):
        kernels(*inputs, SMALL)
    assert [kernel.races_found for kernel in records] == [True, True]


def test_a_store_that_is_not_waited_for_is_an_error():
    inputs = arrays(Case("one tile", 1, 16, 16, 1, 1, 64, "all"))
    missing = mock.patch.object(plgpu, "wait_smem_to_gmem", lambda *_, **__: None)
    with record_races(), missing, pytest.raises(jax.errors.JaxRuntimeError, match="Not all copy_smem_to_gmem"):
        kernels(*inputs, SMALL)


# ── What the kernels are told beforehand ──────────────────────────────────────────────────────────────────────────────


def test_hulls():
    rng, examples, num_keys = np.random.default_rng(0), 3, 300
    start = rng.integers(0, num_keys, (examples, 256))
    end = np.minimum(start + rng.choice([0, 1, 60], start.shape), num_keys)
    end = np.where(np.repeat(rng.random((examples, 4)) < 0.5, 64, axis=1), end, 0)  # tiles that see nothing
    key = np.arange(num_keys)
    sees = np.asarray((start[..., None] <= key) & (key < end[..., None]))

    tile = mosaic_gpu_dkv.Tile(64, 64, stages=2, cluster=2)
    hulls = np.asarray(mosaic_gpu_backward._key_hulls(jnp.asarray(start), jnp.asarray(end), num_keys, tile))
    for example, keys in np.ndindex(examples, 3):
        some = np.any(sees[example, :, 128 * keys : 128 * (keys + 1)].reshape(4, -1), axis=1)
        first, last = hulls[example, keys]
        assert (last - first == 1) if not some.any() else (first, last) == (some.argmax(), 4 - some[::-1].argmax())

    hulls = np.asarray(mosaic_gpu_backward._query_hulls(jnp.asarray(start), jnp.asarray(end), num_keys, 64))
    for example, tile in np.ndindex(examples, 2):
        rows = sees[example, 128 * tile : 128 * (tile + 1)]
        first, last, whole_from, whole_to = hulls[example, tile]
        some = np.flatnonzero(rows.any(0))
        assert (first, last) == ((some[0] // 64, some[-1] // 64 + 1) if some.size else (0, 0))
        assert rows[rows.any(1), whole_from:whole_to].all()


def test_too_few_slots_would_wait_forever():
    with pytest.raises(ValueError, match="stages=1: .*give 2 or more"):
        mosaic_gpu_dkv.Tile(64, 64, stages=1, cluster=1)
    with pytest.raises(ValueError, match="slots=2: .*give 3 or more"):
        mosaic_gpu_dq.Tile(64, slots=2)
