"""`prefix_lm_attention`: attention in which every query sees one interval of keys."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels.prefix_lm_attention import reference

Implementation = Literal["reference"]


def prefix_lm_attention(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N C"]:
    """`softmax(scale * q @ k.T) @ v` over the keys `key_start[b, t] <= s < key_end[b, t]` of each query.

    One interval a query covers causal, prefix-LM, block-causal, sliding-window, padded and packed masks. Each of the K
    key/value heads serves N/K consecutive query heads. A query with an empty interval gives zeros, and zero gradients.

    Returns: the attended values, in v's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that cannot run.
        TypeError: q, k and v of different dtypes, or ranges that are not integers.
    """
    _validate(q, k, v, key_start, key_end)
    run = _dispatch.choose("prefix_lm_attention", implementation, {"reference": (reference.attention, None)})
    return run(q, k, v, key_start, key_end, scale=scale)


def _validate(q, k, v, key_start, key_end) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {q.shape} and k {k.shape} must be [B, T, N, C] and [B, S, K, C]; add the missing axes")
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} differ; give both as [B, S, K, C]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must share batch and head dimension")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound.shape != q.shape[:2]:
            raise ValueError(f"{name} has shape {bound.shape}, expected [B, T] = {q.shape[:2]}; broadcast it first")
        if not jnp.issubdtype(bound.dtype, jnp.integer):
            raise TypeError(f"{name} is {bound.dtype}; key ranges are integers, cast them to int32")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
