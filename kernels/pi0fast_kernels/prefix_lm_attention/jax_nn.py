"""The attention that comes with JAX, `jax.nn.dot_product_attention`, through XLA or cuDNN, behind this op's contract.

With ranges it holds a mask of B × T × S (cuDNN: a bias of q's dtype). Rows without keys, which it would give the mean
of all values, are set to zero.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch


def attention(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"] | None,
    key_end: Int[Array, "B T"] | None,
    *,
    scale: float,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B T N C"]:
    """See `pi0fast_kernels.prefix_lm_attention`."""
    mask = None
    key = jnp.arange(k.shape[1])
    if key_start is not None:
        mask = key_start[:, None, :, None] <= key
    if key_end is not None:
        before = key < key_end[:, None, :, None]
        mask = before if mask is None else mask & before
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)
    if mask is None:
        return out
    return jnp.where(jnp.any(mask, axis=(1, 3))[:, :, None, None], out, jnp.zeros((), out.dtype))


def cudnn_reason(device: _dispatch.Device, q: Float[Array, "B T N C"]) -> str | None:
    """Why cuDNN cannot run, or None."""
    if device.platform != "cuda":
        return f"it needs an NVIDIA GPU and the program is for {device.kind or device.platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    limit = 256 if (device.capability or 0) >= 90 else 128
    if q.shape[-1] % 8 or q.shape[-1] > limit:
        return f"it takes head dimensions in multiples of 8 up to {limit} here, not {q.shape[-1]}"
    return None
