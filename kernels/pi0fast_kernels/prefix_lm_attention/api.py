"""`prefix_lm_attention`: attention in which every query sees one interval of keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch, _mosaic_gpu, _mosaic_tpu, _triton
from pi0fast_kernels.prefix_lm_attention import jax_nn, mosaic_tpu_tiles, reference

Implementation = Literal["reference", "triton", "mosaic_gpu", "mosaic_tpu", "xla", "cudnn"]

# What None tries, by platform. Not yet measured: profiles/README.md says what has been. `mosaic_gpu` must be named:
# it has run in an interpreter only, which does not see whether registers or shared memory change under a wgmma in
# flight.
ORDER = {"cuda": ("triton", "reference"), "tpu": ("mosaic_tpu", "reference")}

# Names (`jax.ad_checkpoint.checkpoint_name`) of what the backward pass needs beside the arguments. A remat policy that
# saves them runs the forward kernel once.
ATTENTION_RESIDUALS = ("prefix_lm_attention_out", "prefix_lm_attention_lse")


def prefix_lm_attention(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"] | None,
    key_end: Int[Array, "B T"] | None,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N C"]:
    """`softmax(scale * q @ k.T) @ v` over the keys `key_start[b, t] <= s < key_end[b, t]` of each query.

    One interval a query covers causal, prefix-LM, block-causal, sliding-window, padded and packed masks
    (`pi0fast_kernels.ranges` builds them). None for a bound leaves that side open. Each of the K key/value heads serves
    N/K consecutive query heads. A query with an empty interval gives zeros, and zero gradients.

    implementation: `triton` runs on NVIDIA GPUs from compute capability 8.0 up, in bfloat16 or float16; `mosaic_gpu` on
        H100 and H200, in bfloat16, with head dimensions in multiples of 8, and only when named; `mosaic_tpu` on TPU
        v5e, v5p and v6e, in bfloat16 or float32; all three with head dimensions from 16 to 256. `xla` and `cudnn` are
        `jax.nn.dot_product_attention`, which holds a mask of B × T × S where there are ranges; `reference` is pure JAX.

    Returns: the attended values, in v's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that cannot run.
        TypeError: q, k and v of different dtypes, or ranges that are not integers.

    Warns:
        UserWarning: nothing better than the reference can run, and its logits take more than 2 GiB.
    """
    _validate(q, k, v, key_start, key_end)
    (b, t, n, _), s = q.shape, k.shape[1]
    device = _dispatch.device()
    name = _dispatch.choose(
        "prefix_lm_attention",
        implementation,
        _reasons(device, q, k),
        ORDER.get(device.platform, ("reference",)),
        fallback_bytes=4 * b * n * t * s,
    )
    if name in ("xla", "cudnn"):
        out = jax_nn.attention(q, k, v, key_start, key_end, scale=scale, implementation=name)
        return checkpoint_name(out, ATTENTION_RESIDUALS[0])
    start = jnp.zeros((b, t), jnp.int32) if key_start is None else key_start.astype(jnp.int32)
    end = jnp.full((b, t), s, jnp.int32) if key_end is None else key_end.astype(jnp.int32)
    if name == "reference":
        return checkpoint_name(reference.attention(q, k, v, start, end, scale=scale), ATTENTION_RESIDUALS[0])
    how = _How(name, device, float(scale), guess=implementation is None)
    return _fused(*_dispatch.vary_alike(q, k, v, start, end), how)


@dataclass(frozen=True)
class _How:
    """guess: the caller named no implementation, so the reference must run where the kernel's platform is not."""

    name: str
    device: _dispatch.Device
    scale: float
    guess: bool

    def direction(self, name: str) -> Callable[..., Any]:
        """`forward` or `backward`, on arrays."""
        kernels = import_module(f"pi0fast_kernels.prefix_lm_attention.{self.name}")
        run = partial(getattr(kernels, name), scale=self.scale, device=self.device)
        if self.guess:
            run = _dispatch.on_platform(
                _dispatch.PLATFORMS[self.name], run, partial(getattr(reference, name), scale=self.scale)
            )
        return _dispatch.once_differentiable(_dispatch.fold_vmap(run), "prefix_lm_attention")


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused(q, k, v, start, end, how: _How) -> Float[Array, "B T N C"]:
    return _fused_forward(q, k, v, start, end, how)[0]


def _fused_forward(q, k, v, start, end, how):
    results = how.direction("forward")(q, k, v, start, end)
    out, lse = map(checkpoint_name, results, ATTENTION_RESIDUALS)
    return out, (q, k, v, start, end, out, lse)


def _fused_backward(how, residuals, dout):
    dq, dk, dv = how.direction("backward")(*residuals, dout)
    return dq, dk, dv, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _reasons(device: _dispatch.Device, q: Float[Array, "B T N C"], k: Float[Array, "B S K C"]) -> dict[str, str | None]:
    """Every implementation, and why it cannot run."""
    c, num_keys = q.shape[-1], k.shape[1]
    shape = None if 16 <= c <= 256 else f"it takes head dimensions from 16 to 256, not {c}"
    if q.size == 0 or num_keys == 0:
        shape = f"q {q.shape} or its {num_keys} keys are empty"
    return {
        "reference": None,
        "triton": shape or _triton.reason(device, q.dtype),
        "mosaic_gpu": shape or _mosaic_gpu.reason(device, q.dtype) or _unaligned(c),
        "mosaic_tpu": shape
        or _mosaic_tpu.reason(device, q.dtype)
        or _too_many_keys(q, num_keys)
        or _too_many_tiles(device, q, k),
        "xla": None,
        "cudnn": jax_nn.cudnn_reason(device, q),
    }


def _unaligned(head_dim: int) -> str | None:
    """Hopper's copy engine takes arrays whose rows begin at multiples of 16 bytes."""
    return None if head_dim % 8 == 0 else f"it takes head dimensions in multiples of 8, not {head_dim}"


def _too_many_keys(q: Float[Array, "B T N C"], num_keys: int) -> str | None:
    """The TPU's backward kernel holds dk and dv of one head in VMEM: float32 sums, and two buffers of the results."""
    lanes = -(-q.shape[-1] // 128) * 128
    most = 40 * 2**20 // (2 * lanes * (4 + 2 * q.dtype.itemsize))
    if num_keys <= most:
        return None
    return (
        f"it takes up to {most} keys of head dimension {q.shape[-1]} in {q.dtype}, not {num_keys}; attend to fewer "
        "keys, or pass implementation='reference'"
    )


def _too_many_tiles(device: _dispatch.Device, q: Float[Array, "B T N C"], k: Float[Array, "B S K C"]) -> str | None:
    """The TPU's kernels prefetch four scalars for each, into an SMEM of 1 MiB."""
    config = mosaic_tpu_tiles.tuning(device, q.dtype)
    plan = mosaic_tpu_tiles.plan(q, k, config.backward, config)
    tiles, most = q.shape[0] // plan.examples * plan.tiles, 15 * 2**12
    if tiles <= most:
        return None
    return f"it takes up to {most} tiles of rows, not {tiles}; split the batch, or pass implementation='reference'"


def _validate(q, k, v, key_start, key_end) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {q.shape} and k {k.shape} must be [B, T, N, C] and [B, S, K, C]; add the missing axes")
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} differ; give both as [B, S, K, C]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must share batch and head dimension")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound is None:
            continue
        if bound.shape != q.shape[:2]:
            raise ValueError(f"{name} has shape {bound.shape}, expected [B, T] = {q.shape[:2]}; broadcast it first")
        if not jnp.issubdtype(bound.dtype, jnp.integer):
            raise TypeError(f"{name} is {bound.dtype}; key ranges are integers, cast them to int32")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
