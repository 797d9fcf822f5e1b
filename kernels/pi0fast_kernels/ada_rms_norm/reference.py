"""RMSNorm with optional modulation, fused residual and gate, in pure JAX: the oracle for the kernels, and the CPU path.

Numerics: everything in float32, one rounding to x's dtype at the end; the new residual is rounded before it is
normalised, so that it is the value that the next layer reads.

`norm` is what is differentiated and what kernels are checked against. `forward` and `backward` have the kernels' form,
for programs that turn out to run where the kernel chosen while tracing cannot.
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


def forward(
    x: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"] | None = None,
    residual: Float[Array, "B T D"] | None = None,
    gate: Float[Array, "B D"] | None = None,
    *,
    eps: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "B T D"] | None]:
    """The normed value, `rsqrt(mean(y²) + eps)` of each token, and the new residual where there is one."""
    normed, total = norm(x, scale, shift, residual, gate, eps=eps)
    rstd = lax.rsqrt(jnp.mean(jnp.square(total.astype(jnp.float32)), axis=-1) + eps)
    return normed, rstd, None if residual is None else total


def backward(
    total: Float[Array, "B T D"],
    rstd: Float[Array, "B T"],
    dnormed: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"] | None = None,
    dtotal: Float[Array, "B T D"] | None = None,
    x: Float[Array, "B T D"] | None = None,
    gate: Float[Array, "B D"] | None = None,
) -> tuple[
    Float[Array, "B T D"],
    Float[Array, "B D"],
    Float[Array, "B D"] | None,
    Float[Array, "B T D"] | None,
    Float[Array, "B D"] | None,
]:
    """Gradients of `total`, scale, shift, and with a gate also of x and the gate.

    total: what was normed, x or the new residual. dtotal: the new residual's own cotangent.
    """
    inverse = rstd[..., None]
    unit = total.astype(jnp.float32) * inverse
    dout = dnormed.astype(jnp.float32)
    dunit = dout * (1.0 + _over_tokens(scale))
    dy = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True))
    if dtotal is not None:
        dy = dy + dtotal.astype(jnp.float32)
    dscale = jnp.sum(dout * unit, axis=1).astype(scale.dtype)
    dshift = None if shift is None else jnp.sum(dout, axis=1).astype(shift.dtype)
    dx = dgate = None
    if x is not None and gate is not None:
        dx = (dy * _over_tokens(gate)).astype(x.dtype)
        dgate = jnp.sum(dy * x.astype(jnp.float32), axis=1).astype(gate.dtype)
    return dy.astype(total.dtype), dscale, dshift, dx, dgate


def _over_tokens(modulation: Float[Array, "*B D"]) -> Float[Array, "... D"]:
    """[D] or [B, D] → float32, broadcastable over [B, T, D]."""
    return jnp.expand_dims(modulation.astype(jnp.float32), -2)
