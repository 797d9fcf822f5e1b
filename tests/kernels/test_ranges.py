"""Each helper's ranges against a dense mask written token by token, and through the op; and those of the benchmarks'
cases against the model's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0fast import config
from pi0fast.layout import PrefixLayout
from pi0fast_kernels import prefix_lm_attention, ranges
from pi0fast_kernels.prefix_lm_attention.cases import CASES
from tests.kernels.test_prefix_lm_attention import unchecked


def dense(key_ranges: ranges.KeyRanges, num_keys: int) -> np.ndarray:
    """Ranges → which keys each query sees, [B, T, S]."""
    start, end = map(np.asarray, key_ranges)
    assert start.dtype == end.dtype == np.int32
    assert start.shape == end.shape
    assert start.min() >= 0 and end.max() <= num_keys
    key = np.arange(num_keys)
    return (start[..., None] <= key) & (key < end[..., None])


def mask(batch, num_queries, num_keys, sees) -> np.ndarray:
    """`sees(b, t, s)`, for every b, t and s."""
    return np.array(
        [[[sees(b, t, s) for s in range(num_keys)] for t in range(num_queries)] for b in range(batch)], bool
    )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (2, 7), (1, 4), (3, 3)])
def test_causal(num_queries, num_keys):
    found = ranges.causal(2, num_queries, num_keys)
    past = num_keys - num_queries
    np.testing.assert_array_equal(dense(found, num_keys), mask(2, num_queries, num_keys, lambda b, t, s: s <= past + t))
    if not past:
        for given, default in zip(found, ranges.causal(2, num_queries), strict=True):
            np.testing.assert_array_equal(given, default)


@pytest.mark.parametrize(("num_queries", "num_keys", "window"), [(6, 6, 3), (2, 7, 3), (6, 6, 1), (4, 4, 99)])
def test_sliding_window(num_queries, num_keys, window):
    found = ranges.sliding_window(2, num_queries, num_keys, window=window)
    past = num_keys - num_queries
    np.testing.assert_array_equal(
        dense(found, num_keys), mask(2, num_queries, num_keys, lambda b, t, s: 0 <= past + t - s < window)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_packed(causal):
    ids = np.array([[4, 4, 4, 2, 7, 7, 0, 0], [0, 1, 1, 0, 3, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5], [0] * 8])
    found = ranges.packed(jnp.asarray(ids), causal=causal)

    def sees(b, t, s):
        return ids[b, t] != 0 and ids[b, t] == ids[b, s] and (s <= t or not causal)

    np.testing.assert_array_equal(dense(found, 8), mask(4, 8, 8, sees))


def test_an_id_that_comes_back_is_another_document():
    found = dense(ranges.packed(jnp.array([[1, 2, 2, 1, 1]]), causal=False), 5)[0]
    np.testing.assert_array_equal(found[0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found[4], [0, 0, 0, 1, 1])


def test_padded():
    lengths = np.array([6, 3, 0])
    found = ranges.padded(jnp.asarray(lengths), 6)
    np.testing.assert_array_equal(dense(found, 6), mask(3, 6, 6, lambda b, t, s: t < lengths[b] and s < lengths[b]))


@pytest.mark.parametrize("lengths", [None, (7, 5, 4)])
def test_prefix_lm(lengths):
    prefix = np.array([3, 5, 0])
    total = (7, 7, 7) if lengths is None else lengths
    found = ranges.prefix_lm(jnp.asarray(prefix), 7, None if lengths is None else jnp.asarray(lengths))
    np.testing.assert_array_equal(
        dense(found, 7), mask(3, 7, 7, lambda b, t, s: t < total[b] and (s <= t or s < prefix[b]))
    )


def test_under_jit():
    found = jax.jit(lambda ids, lengths: (ranges.packed(ids), ranges.prefix_lm(lengths, 4)))(
        jnp.array([[1, 1, 2, 0]]), jnp.array([2])
    )
    np.testing.assert_array_equal(found[0].start, [[0, 0, 2, 0]])
    np.testing.assert_array_equal(found[0].end, [[1, 2, 3, 0]])
    np.testing.assert_array_equal(found[1].end, [[2, 2, 3, 4]])


def test_through_the_op():
    """Packed documents through the op, against attention with a dense mask."""
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 3, 3, 3, 4, 0, 0]])
    q, k, v = (
        jax.random.normal(key, (2, 8, heads, 16))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    found = prefix_lm_attention(q, k, v, *ranges.packed(ids), scale=0.25)

    exact = [np.asarray(x, np.float64) for x in (q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2))]
    same = np.asarray(ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0) & np.tri(8, dtype=bool)
    weights = np.exp(0.25 * np.einsum("btnc,bsnc->bnts", *exact[:2])) * same[:, None]
    total = weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnc->btnc", weights / np.where(total, total, 1.0), exact[2])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0, 7:].any() and not found[1, 6:].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ranges.causal(1, 5, 4), ValueError, "5 queries and 4 keys.*at least as many keys"),
        (lambda: ranges.sliding_window(1, 5, 4, window=2), ValueError, "5 queries and 4 keys"),
        (lambda: ranges.sliding_window(1, 5, window=0), ValueError, "at least 1"),
        (lambda: unchecked(ranges.packed)(jnp.ones(4, int)), ValueError, r"segment_ids has shape \(4,\)"),
        (lambda: unchecked(ranges.packed)(jnp.ones((1, 4))), TypeError, "segment_ids is float32"),
        (lambda: unchecked(ranges.padded)(jnp.ones((2, 1), int), 4), ValueError, r"lengths has shape \(2, 1\)"),
        (lambda: unchecked(ranges.prefix_lm)(jnp.ones(2), 4), TypeError, "lengths is float32"),
        (
            lambda: unchecked(ranges.prefix_lm)(jnp.ones(2, int), 4, jnp.ones(3, int)),
            ValueError,
            r"^lengths has shape \(3,\)",
        ),
    ],
)
def test_malformed_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("case", [case for case in CASES if case.valid[1]], ids=lambda case: case.name)
def test_cases_are_the_models(case):
    """Shapes as the released models have them, ranges as `PrefixLayout` builds them."""
    size = config.pi05_base() if case.name.startswith("pi05") else config.pi0_base()
    num_prefix = 3 * size.tokens_per_image + size.max_token_len
    num_suffix = case.keys - num_prefix
    assert num_suffix == (0 if case.mask == "prefix" else size.suffix_len)
    assert case.queries == (num_suffix or num_prefix)
    assert (case.heads, case.kv_heads, case.head_dim) == (size.vlm.num_heads, size.vlm.num_kv_heads, size.vlm.head_dim)

    start, end = jax.jit(lambda: case.inputs()[3:])()  # without the large arrays
    num_valid = end[:, 0] - num_suffix
    assert (num_valid.min(), num_valid.max()) == (case.valid if case.batch > 1 else (case.valid[0],) * 2)
    layout = PrefixLayout.build(
        jnp.arange(num_prefix) < num_valid[:, None], action_horizon=size.action_horizon, has_state=not size.pi05
    )
    expected = (layout.suffix_start, layout.suffix_end) if num_suffix else (layout.prefix_start, layout.prefix_end)
    np.testing.assert_array_equal(start, expected[0])
    np.testing.assert_array_equal(end, expected[1])


@pytest.mark.parametrize("case", [case.shrunk() for case in CASES], ids=lambda case: case.name)
def test_costs_of_cases(case):
    """Floating-point operations of what the ranges show, bytes of the arrays."""
    q, k, v, start, end = case.inputs(dtype=jnp.bfloat16)
    assert q.shape == (case.batch, case.queries, case.heads, case.head_dim)
    assert k.shape == v.shape == (case.batch, case.keys, case.kv_heads, case.head_dim)
    if start is None or end is None:
        assert case.mask == "all"
        pairs, ranges_bytes = case.batch * case.queries * case.keys, 0
    else:
        pairs, ranges_bytes = int(jnp.sum(jnp.maximum(end - start, 0))), start.nbytes + end.nbytes
    assert case.flops() == 4 * pairs * case.heads * case.head_dim
    assert case.flops(backward=True) == 2.5 * case.flops()
    arrays = q.nbytes + k.nbytes + v.nbytes
    assert case.bytes() == arrays + q.nbytes + ranges_bytes
    logsumexp = 4 * case.batch * case.queries * case.heads
    assert case.bytes(backward=True) == 2 * arrays + 2 * q.nbytes + logsumexp + ranges_bytes
