"""Interval-masked grouped-query attention in pure JAX: the oracle for the kernels, and the CPU path.

Numerics: logits and softmax in float32; probabilities are cast to v's dtype before the second matmul.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    b, t, n, c = q.shape
    s, num_kv_heads = k.shape[1:3]
    grouped = q.reshape(b, t, num_kv_heads, n // num_kv_heads, c)
    logits = jnp.einsum("btkgc,bskc->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    key = jnp.arange(s)
    visible = (key_start[:, :, None] <= key) & (key < key_end[:, :, None])
    visible = visible[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(visible, logits, MASKED), axis=-1)
    probabilities = jnp.where(visible, probabilities, 0.0).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", probabilities, v).reshape(b, t, n, c)
