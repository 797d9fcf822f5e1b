"""Interval-masked grouped-query attention in pure JAX: the oracle for the kernels, and the CPU path.

Numerics: logits and softmax in float32; probabilities are cast to v's dtype before the second matmul.

Memory: the logits of `BLOCK` queries at a time. Whole logits are too large for a CPU's caches, and for what its
allocator keeps from one call to the next.

`attention` is what is differentiated and what kernels are checked against. `forward` and `backward` have the kernels'
form, for programs that turn out to run where the kernel chosen while tracing cannot.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128  # queries
MASKED = -2.3819763e38  # finite, so that a row without keys stays free of NaN


def attention(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N C"]:
    """See `pi0fast_kernels.prefix_lm_attention`."""
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    rows = (slice(first, first + BLOCK) for first in range(0, q.shape[1], BLOCK))
    blocks = [_attention(q[:, some], k, v, key_start[:, some], key_end[:, some], scale) for some in rows]
    return jnp.concatenate(blocks, axis=1)


def _attention(q, k, v, key_start, key_end, scale):
    logits = _logits(q, k, key_start, key_end, scale)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    rows = probabilities.reshape(-1, logits.shape[2] * logits.shape[3], logits.shape[4])
    attended = jnp.einsum("hrs,hsc->hrc", rows, _by_head(v)).reshape(*logits.shape[:4], -1)
    sees_some = (jnp.maximum(key_start, 0) < jnp.minimum(key_end, k.shape[1]))[:, None, :, None, None]
    return jnp.moveaxis(jnp.where(sees_some, attended, 0), 1, 2).reshape(q.shape)


def forward(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """The attended values, and the logsumexp of each query's visible logits (very negative where it sees none)."""
    lse = jax.nn.logsumexp(_logits(q, k, key_start, key_end, scale), axis=-1)  # [B, K, T, G]
    out = attention(q, k, v, key_start, key_end, scale=scale)
    return out, jnp.moveaxis(lse, 1, 2).reshape(q.shape[:3])


def backward(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    out: Float[Array, "B T N C"],
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N C"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """Gradients of q, k and v; everything is computed again, so out and lse are not needed."""
    _, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, key_start, key_end, scale=scale), q, k, v)
    return vjp(dout)


def _logits(q, k, key_start, key_end, scale):
    """Logits `[B, K, T, G, S]`, very negative where a query does not see a key.

    In this order nothing moves where there is one key/value head; the mask is added, not selected with, so that it is
    one more input of the product's loop on a CPU, where this is what runs.
    """
    (b, t, _, c), (s, num_kv_heads) = q.shape, k.shape[1:3]
    grouped = q.reshape(b, t, num_kv_heads, -1, c)
    rows = jnp.moveaxis(grouped, 2, 1).reshape(b * num_kv_heads, -1, c)
    logits = jnp.einsum("hrc,hsc->hrs", rows, _by_head(k), preferred_element_type=jnp.float32) * scale
    key = jnp.arange(s)
    visible = (key_start[:, :, None] <= key) & (key < key_end[:, :, None])
    mask = jnp.where(visible, 0.0, MASKED)[:, None, :, None]
    return logits.reshape(b, num_kv_heads, t, -1, s) + mask


def _by_head(x: Float[Array, "B S K C"]) -> Float[Array, "B*K S C"]:
    """One matrix for each example and head."""
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])
