"""RMSNorm with optional modulation, fused residual and gate, in pure JAX: the oracle for the kernels, and the CPU path.

Numerics: everything in float32, one rounding to x's dtype at the end; the new residual is rounded before it is
normalised, so that it is the value that the next layer reads.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, " D"] | Float[Array, "B D"],
    shift: Float[Array, " D"] | Float[Array, "B D"] | None,
    residual: Float[Array, "B T D"] | None,
    gate: Float[Array, " D"] | Float[Array, "B D"] | None,
    *,
    eps: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The normed value and the value that was normed; see `pi0fast_kernels.ada_rms_norm`."""
    total = x
    if residual is not None:
        added = x.astype(jnp.float32)
        if gate is not None:
            added = added * _over_tokens(gate)
        total = (residual.astype(jnp.float32) + added).astype(x.dtype)
    wide = total.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    normed = normed * (1.0 + _over_tokens(scale))
    if shift is not None:
        normed = normed + _over_tokens(shift)
    return normed.astype(x.dtype), total


def _over_tokens(modulation: Float[Array, "*B D"]) -> Float[Array, "... D"]:
    """[D] or [B, D] → float32, broadcastable over [B, T, D]."""
    return jnp.expand_dims(modulation.astype(jnp.float32), -2)
