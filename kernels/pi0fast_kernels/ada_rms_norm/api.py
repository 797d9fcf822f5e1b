"""`ada_rms_norm`: RMSNorm with scale, shift, gate and residual in one op."""

from typing import Literal, overload

from jaxtyping import Array, Float

from pi0fast_kernels import _dispatch
from pi0fast_kernels.ada_rms_norm import reference

Implementation = Literal["reference"]
Modulation = Float[Array, " D"] | Float[Array, "B D"]


@overload
def ada_rms_norm(
    x: Float[Array, "B T D"],
    scale: Modulation,
    shift: Modulation | None = None,
    *,
    residual: None = None,
    gate: None = None,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> Float[Array, "B T D"]: ...


@overload
def ada_rms_norm(
    x: Float[Array, "B T D"],
    scale: Modulation,
    shift: Modulation | None = None,
    *,
    residual: Float[Array, "B T D"],
    gate: Modulation | None = None,
    eps: float = 1e-6,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]: ...


def ada_rms_norm(x, scale, shift=None, *, residual=None, gate=None, eps=1e-6, implementation=None):
    """`y = x` or `residual + gate * x`, then `y * rsqrt(mean(y²) + eps) * (1 + scale) + shift`.

    scale, shift and gate are `[D]`, or `[B, D]` when they depend on a condition (adaptive LayerNorm, Peebles & Xie
    2023, https://arxiv.org/abs/2212.09748, on RMSNorm, https://arxiv.org/abs/1910.07467).

    Returns: the normed value in x's dtype; with `residual`, also the new residual `y` in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, a gate without a residual, or an implementation that cannot run.
    """
    _validate(x, scale, shift, residual, gate)
    _dispatch.choose("ada_rms_norm", implementation, {"reference": None}, ("reference",))
    normed, total = reference.norm(x, scale, shift, residual, gate, eps=eps)
    return normed if residual is None else (normed, total)


def _validate(x, scale, shift, residual, gate) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [B, T, D]; add the missing axes")
    b, _, d = x.shape
    for name, modulation in (("scale", scale), ("shift", shift), ("gate", gate)):
        if modulation is not None and modulation.shape not in ((d,), (b, d)):
            raise ValueError(f"{name} has shape {modulation.shape}, expected [D] = {(d,)} or [B, D] = {(b, d)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype}{residual.shape} and x is {x.dtype}{x.shape}; give both alike")
    if gate is not None and residual is None:
        raise ValueError("a gate scales what is added to a residual; pass residual too")
