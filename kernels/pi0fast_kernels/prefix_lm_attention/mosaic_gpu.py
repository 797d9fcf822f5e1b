"""Interval-masked attention for Hopper (H100, H200): the kernels' public form and how they are tuned."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut up."""


def forward(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
    device: _dispatch.Device,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """The attended values, and the logsumexp of each row's logits."""
    raise NotImplementedError


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
    device: _dispatch.Device,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """Gradients of q, k and v."""
    from pi0fast_kernels.prefix_lm_attention import mosaic_gpu_backward

    return mosaic_gpu_backward.backward(q, k, v, key_start, key_end, out, lse, dout, scale=scale, device=device)
