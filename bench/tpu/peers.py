"""JAX's own attention kernels for TPUs behind our op's signature, to be compiled beside ours.

Both want whole blocks, so tokens are padded to a multiple of them. Padded prefixes are given as segments, the only mask
of theirs that differs between examples: every block of keys is then computed. The rule that a state does not see the
actions is left out, in their favour. Where no query's own place matters, the query heads of one key/value head are
packed into rows, as in our kernel, so that few queries need no padding of their own.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pi0fast_kernels.prefix_lm_attention.cases import Case

FLASH = "jax.experimental.pallas.ops.tpu.flash_attention"
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
LANES = 128


class Blocks(NamedTuple):
    """Rows and keys of one block; of a case with fewer keys, the keys padded to whole registers are one block."""

    rows: int
    keys: int


def flash(case: Case, blocks: Blocks) -> Callable[..., jax.Array]:
    """`flash_attention`: as many key/value heads as query heads, so under a causal mask they are repeated."""
    module = importlib.import_module(FLASH)

    def run(q, k, v, segments):
        rows, keys = blocks
        sizes = module.BlockSizes(
            block_q=rows,
            block_k_major=keys,
            block_k=keys,
            block_b=1,
            block_q_major_dkv=rows,
            block_k_major_dkv=keys,
            block_k_dkv=keys,
            block_q_dkv=rows,
            block_k_major_dq=keys,
            block_k_dq=keys,
            block_q_dq=rows,
        )
        if q.shape[1] != k.shape[1]:
            k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        return module.flash_attention(
            q,
            k,
            v,
            segment_ids=segments and module.SegmentIds(*segments),
            causal=case.mask == "causal",
            sm_scale=case.scale,
            block_sizes=sizes,
        )

    return _attention(case, blocks, run, width=1)


def splash(case: Case, blocks: Blocks) -> Callable[..., jax.Array]:
    """`splash_attention`, fused backward pass: one of its heads at a time, or all that share keys under a causal mask.

    It has no scale, so q is scaled before.
    """
    module = importlib.import_module(SPLASH)

    def run(q, k, v, segments):
        rows, keys = blocks
        sizes = module.BlockSizes(
            block_q=rows,
            block_kv=keys,
            block_kv_compute=keys,
            block_q_dkv=rows,
            block_kv_dkv=keys,
            block_kv_dkv_compute=keys,
            use_fused_bwd_kernel=True,
        )
        b, heads, length, c = q.shape
        kv_heads = k.shape[1]
        mask = module.CausalMask if case.mask == "causal" else module.FullMask
        masks = module.MultiHeadMask([mask((length, k.shape[2])) for _ in range(heads // kv_heads)])
        kernel = module.make_splash_mqa_single_device(masks, block_sizes=sizes)
        q = (q * jnp.asarray(case.scale, q.dtype)).reshape(b, kv_heads, heads // kv_heads, length, c)
        of_heads = jax.vmap(kernel, (0, 0, 0, None))
        out = jax.vmap(of_heads, (0, 0, 0, 0))(q, k, v, segments and module.SegmentIds(*segments))
        return out.reshape(b, heads, length, c)

    return _attention(case, blocks, run, width=LANES)


def _attention(case: Case, blocks: Blocks, run: Callable[..., Any], width: int) -> Callable[..., jax.Array]:
    """Our op by `run(q [B N T C], k [B K S C], v, (segments of queries, of keys) or None)`, on padded arrays.

    width: what head dimensions are a multiple of.
    """
    group = 1 if case.mask == "causal" else case.heads // case.kv_heads

    def attention(q, k, v, start, end):
        segments = None
        if case.mask in ("prefix", "suffix"):
            seen = jnp.arange(case.keys) < jnp.max(end, axis=1, keepdims=True)
            rows = jnp.repeat(start < end, group, axis=1)
            segments = tuple(
                _padded(x.astype(jnp.int32), 1, size) for x, size in zip((rows, seen), blocks, strict=True)
            )
        b, t, n, c = q.shape
        q = q.reshape(b, t, n // group, group, c).transpose(0, 2, 1, 3, 4).reshape(b, n // group, t * group, c)
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        q, k, v = (
            _padded(_padded(x, 2, size), 3, width)
            for x, size in zip((q, k, v), (blocks.rows, blocks.keys, blocks.keys), strict=True)
        )
        out = run(q, k, v, segments)[:, :, : t * group, :c]
        return out.reshape(b, n // group, t, group, c).transpose(0, 2, 1, 3, 4).reshape(b, t, n, c)

    return attention


def blocks(case: Case, rows: int, keys: int) -> Blocks:
    """No larger than what the case has of either, padded to whole registers."""
    group = 1 if case.mask == "causal" else case.heads // case.kv_heads
    whole_rows, whole_keys = (-(-size // LANES) * LANES for size in (case.queries * group, case.keys))
    return Blocks(min(rows, whole_rows), min(keys, whole_keys))


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, widths)
