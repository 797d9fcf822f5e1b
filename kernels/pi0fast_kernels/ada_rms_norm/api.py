"""`ada_rms_norm`: RMSNorm with scale, shift, gate and residual in one op."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0fast_kernels import _dispatch, _mosaic_tpu, _triton
from pi0fast_kernels.ada_rms_norm import reference

Implementation = Literal["reference", "triton", "mosaic_tpu"]

# What None tries, by platform. Not yet measured: profiles/README.md says what has been.
ORDER = {"cuda": ("triton", "reference"), "tpu": ("mosaic_tpu", "reference")}

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

    implementation: `triton` runs on NVIDIA GPUs from compute capability 8.0 up, in bfloat16 or float16, and
        `mosaic_tpu` on TPU v5e, v5p and v6e, in bfloat16 or float32, both with widths up to 4096; `reference` is pure
        JAX.

    Returns: the normed value in x's dtype; with `residual`, also the new residual `y` in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, a gate without a residual, or an implementation that cannot run.
    """
    _validate(x, scale, shift, residual, gate)
    device = _dispatch.device()
    name = _dispatch.choose(
        "ada_rms_norm",
        implementation,
        _reasons(device, x, scale, shift, gate),
        ORDER.get(device.platform, ("reference",)),
    )
    if name == "reference":
        normed, total = reference.norm(x, scale, shift, residual, gate, eps=eps)
        return normed if residual is None else (normed, total)
    how = _How(name, device, float(eps), guess=implementation is None)
    results = _fused(*_one_form(*_dispatch.vary_alike(x, scale, shift, residual, gate)), how)
    normed, total = jax.tree.map(lambda result: result.reshape(x.shape), results)
    return normed if residual is None else (normed, total)


def _one_form(x, scale, shift, residual, gate):
    """The same with every modulation `[B, D]`; B is 1, over all tokens, where no modulation depends on the example."""
    b, t, d = x.shape
    if all(m is None or m.ndim == 1 for m in (scale, shift, gate)):
        b, t = 1, b * t
    scale, shift, gate = (None if m is None else jnp.broadcast_to(m, (b, d)) for m in (scale, shift, gate))
    return x.reshape(b, t, d), scale, shift, None if residual is None else residual.reshape(b, t, d), gate


@dataclass(frozen=True)
class _How:
    """guess: the caller named no implementation, so the reference must run where the kernel's platform is not."""

    name: str
    device: _dispatch.Device
    eps: float
    guess: bool

    def run(self, direction: str, arrays: dict[str, jax.Array | None], **options: Any) -> Any:
        """`forward` or `backward`, on the arrays that are there."""
        given = {name: array for name, array in arrays.items() if array is not None}

        def of(module: ModuleType, **more: Any) -> Callable[..., Any]:
            function = partial(getattr(module, direction), **options, **more)
            return lambda *values: function(**dict(zip(given, values, strict=True)))

        run = of(import_module(f"pi0fast_kernels.ada_rms_norm.{self.name}"), device=self.device)
        if self.guess:
            run = _dispatch.on_platform(_dispatch.PLATFORMS[self.name], run, of(reference))
        return _dispatch.once_differentiable(_dispatch.fold_vmap(run), "ada_rms_norm")(*given.values())


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused(x, scale, shift, residual, gate, how: _How) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"] | None]:
    return _fused_forward(x, scale, shift, residual, gate, how)[0]


def _fused_forward(x, scale, shift, residual, gate, how):
    arrays = {"x": x, "scale": scale, "shift": shift, "residual": residual, "gate": gate}
    normed, rstd, total = how.run("forward", arrays, eps=how.eps)
    saved = {"total": x if total is None else total, "rstd": rstd, "scale": scale, "shift": shift}
    if gate is not None:
        saved |= {"x": x, "gate": gate}
    return (normed, total), saved


def _fused_backward(how, saved, cotangents):
    dnormed, dtotal = cotangents
    dresidual, dscale, dshift, dx, dgate = how.run("backward", {**saved, "dnormed": dnormed, "dtotal": dtotal})
    if dx is None:
        dx = dresidual
    return dx, dscale, dshift, None if dtotal is None else dresidual, dgate


_fused.defvjp(_fused_forward, _fused_backward)


def _reasons(
    device: _dispatch.Device, x: Float[Array, "B T D"], *modulations: Modulation | None
) -> dict[str, str | None]:
    """Every implementation, and why it cannot run."""
    shape = None if x.shape[-1] <= 4096 else f"it takes widths up to 4096, not {x.shape[-1]}"
    if x.size == 0:
        shape = f"x {x.shape} is empty"
    dtypes = [array.dtype for array in (x, *modulations) if array is not None]
    return {
        "reference": None,
        "triton": shape or _triton.reason(device, x.dtype),
        "mosaic_tpu": shape or next(filter(None, (_mosaic_tpu.reason(device, dtype) for dtype in dtypes)), None),
    }


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
