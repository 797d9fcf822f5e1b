"""The reference against textbook attention, one query at a time; its edges; and the op's checks of its input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pi0fast_kernels import prefix_lm_attention

B, T, S, C = 2, 5, 9, 16


def inputs(n, k) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((B, T, n, C), (B, S, k, C), (B, S, k, C)), strict=True)
    )
    return q, k, v


def ranges():
    start = jnp.array([[0, 0, 3, 8, 4], [2, 0, 9, 0, 1]])
    end = jnp.array([[9, 1, 7, 9, 4], [5, 9, 9, 0, 2]])
    return start, end  # [0, 4], [1, 2] and [1, 3] are empty


def one_query(q, k, v, start, end, scale):
    if end <= start:
        return np.zeros_like(q)
    logits = k[start:end] @ q * scale
    weights = np.exp(logits - logits.max())
    return weights @ v[start:end] / weights.sum()


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (3, 3)])
def test_values(n, k):
    (q, keys, v), (start, end) = inputs(n, k), ranges()
    out = prefix_lm_attention(q, keys, v, start, end, scale=0.3)
    for b in range(B):
        for t in range(T):
            for head in range(n):
                kv = head // (n // k)
                exact = [np.asarray(x, np.float64) for x in (q[b, t, head], keys[b, :, kv], v[b, :, kv])]
                expected = one_query(*exact, start=int(start[b, t]), end=int(end[b, t]), scale=0.3)
                np.testing.assert_allclose(out[b, t, head], expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_differences():
    (q, k, v), (start, end) = inputs(4, 1), ranges()
    target = jax.random.normal(jax.random.key(1), q.shape)

    def total(*qkv):
        q, k, v = map(jnp.asarray, qkv)
        return jnp.sum(prefix_lm_attention(q, k, v, start, end, scale=0.3) * target)

    check_grads(total, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_keys_outside_every_range_get_no_gradient():
    (q, k, v), _ = inputs(4, 1), ranges()
    start, end = jnp.full((B, T), 2), jnp.full((B, T), 6)
    dk, dv = jax.grad(lambda k, v: jnp.sum(prefix_lm_attention(q, k, v, start, end, scale=0.3) ** 2), (0, 1))(k, v)
    for gradient in (dk, dv):
        assert np.abs(gradient[:, 2:6]).min(axis=-1).max() > 0
        assert not gradient[:, :2].any() and not gradient[:, 6:].any()


def test_empty_ranges_give_zeros_and_zero_gradients():
    (q, k, v), _ = inputs(4, 1), ranges()
    empty = jnp.full((B, T), 3)

    def total(q, k, v):
        out = prefix_lm_attention(q, k, v, empty, empty, scale=0.3)
        return jnp.sum(out), out

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads"])
def test_arrays_without_elements(empty):
    b, t, s, n = (0 if name == empty else 2 for name in ("batch", "queries", "keys", "heads"))
    q, k = jnp.ones((b, t, n, C)), jnp.ones((b, s, 1, C))

    def total(q, k, v):
        return jnp.sum(prefix_lm_attention(q, k, v, None, None, scale=1.0))

    out, gradients = jax.value_and_grad(total, (0, 1, 2))(q, k, k)
    assert out == 0 and not any(gradient.any() for gradient in gradients)


def test_half_precision_stays_close_and_keeps_its_dtype():
    (q, k, v), (start, end) = inputs(4, 1), ranges()
    exact = prefix_lm_attention(q, k, v, start, end, scale=0.3)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    half = prefix_lm_attention(q, k, v, start, end, scale=0.3)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": jnp.zeros((B, T, 3, C))}, ValueError, "3 query heads are not a multiple of 2"),
        ({"k": jnp.zeros((B, S, 0, C)), "v": jnp.zeros((B, S, 0, C))}, ValueError, "not a multiple of 0"),
        ({"v": jnp.zeros((B, S + 1, 2, C))}, ValueError, "differ"),
        ({"key_start": jnp.zeros((T,), int)}, ValueError, "key_start has shape"),
        ({"key_end": jnp.zeros((B, T))}, TypeError, "key_end is float32"),
        ({"q": jnp.zeros((B, T, 4, C), jnp.bfloat16)}, TypeError, "cast them to one"),
        ({"implementation": "cuda"}, ValueError, "no implementation 'cuda'; it has reference"),
    ],
)
def test_malformed_input(change, error, message):
    q, k, v = inputs(4, 2)
    start, end = ranges()
    arguments = {"q": q, "k": k, "v": v, "key_start": start, "key_end": end, **change}
    with pytest.raises(error, match=message):
        unchecked(prefix_lm_attention)(**arguments, scale=1.0)


def unchecked(function):
    """Without the shape checks that the tests' import hook adds, as users run it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
