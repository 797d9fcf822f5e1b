"""draft"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_tpu import generation, launch

LOG2_E = 1.4426950408889634
MASKED = -1e30  # a logit that is not seen
FLOOR = -1e20  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1
NO_KEYS = 1e30  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0
LANES = 128
VMEM = 64 * 2**20


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int


@dataclass(frozen=True)
class TuningConfig:
    forward: Tile
    few_rows: Tile
    backward: Tile


def tuning(generation, head_dim):
    return TuningConfig(Tile(512, 1024), Tile(512, 256), Tile(512, 1024))


def _cdiv(a, b):
    return -(-a // b)


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


def _row_tile(rows, most):
    if rows <= most:
        return rows
    sizes = range(LANES, most + 1, LANES)
    return min(sizes, key=lambda size: (_cdiv(rows, size) * size, -size))


def _visible(first, keys, ranges_ref):
    key = first + lax.broadcasted_iota(jnp.int32, (keys, ranges_ref.shape[2]), 0)
    return (ranges_ref[0, 0:1] <= key) & (key < ranges_ref[0, 1:2])


def _either(condition, run):
    """run(True) where the traced condition holds, else run(False)"""
    pl.when(condition)(functools.partial(run, True))
    pl.when(jnp.logical_not(condition))(functools.partial(run, False))


def _forward(hulls, ranges, q, k, v, out, lse, maximum, total, summed, *, scale, tiles, kv_heads, s):
    blocks = pl.num_programs(2)
    block = pl.program_id(2)
    keys = k.shape[1]
    at = lax.div(pl.program_id(0), kv_heads) * tiles + pl.program_id(1)
    first, last, whole_from, whole_to = (hulls[i, at] for i in range(4))

    @pl.when(block == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, FLOOR)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    def compute(masked):
        logits = _dot(k[0], q[0], (1, 1)) * (scale * LOG2_E)
        if masked:
            logits = jnp.where(_visible(block * keys, keys, ranges), logits, MASKED)
        new_maximum = jnp.maximum(maximum[...], jnp.max(logits, 0, keepdims=True))
        weights = jnp.exp2(logits - new_maximum)
        shrink = jnp.exp2(maximum[...] - new_maximum)
        total[...] = total[...] * shrink + jnp.sum(weights, 0, keepdims=True)
        summed[...] = summed[...] * shrink + _dot(v[0], weights.astype(v.dtype), (0, 0))
        maximum[...] = new_maximum

    @pl.when((first <= block) & (block < last))
    def _():
        if s % keys:
            @pl.when(block == blocks - 1)
            def _():
                v[0, s % keys:] = jnp.zeros_like(v[0, s % keys:])
        _either((block * keys < whole_from) | (block * keys + keys > whole_to), compute)

    @pl.when(block == blocks - 1)
    def _():
        sees = ranges[0, 0:1] < ranges[0, 1:2]
        whole = jnp.where(sees, total[...], 1.0)
        out[0] = jnp.where(sees, summed[...] / whole, 0.0).T.astype(out.dtype)
        lse[0] = jnp.where(sees, (maximum[...] + jnp.log2(whole)) / LOG2_E, NO_KEYS)


def _backward(hulls, ranges, q, k, v, out, lse, dout, dq, dk, dv, dqueries, dkeys, dvalues, *, scale, tiles, kv_heads, t_rows, s):
    block = pl.program_id(2)
    keys = k.shape[1]
    rows = q.shape[1]
    at = lax.div(pl.program_id(0), kv_heads) * tiles + pl.program_id(1)
    first, last, whole_from, whole_to = (hulls[i, at] for i in range(4))
    begins = block == 0
    ends = block == pl.num_programs(2) - 1

    @pl.when(begins & (pl.program_id(1) == 0))
    def _():
        dkeys[...] = jnp.zeros_like(dkeys)
        dvalues[...] = jnp.zeros_like(dvalues)

    @pl.when(begins)
    def _():
        dqueries[...] = jnp.zeros_like(dqueries)
        if t_rows % rows:
            @pl.when(pl.program_id(1) == tiles - 1)
            def _():
                for ref in (q, out, dout):
                    ref[0, t_rows % rows:] = jnp.zeros_like(ref[0, t_rows % rows:])

    def compute(masked):
        span = pl.ds(block * keys, keys)
        delta = jnp.sum((out[0].astype(jnp.float32) * dout[0].astype(jnp.float32)).T, 0, keepdims=True)
        logits = _dot(k[0], q[0], (1, 1)) * (scale * LOG2_E)
        if masked:
            logits = jnp.where(_visible(block * keys, keys, ranges), logits, MASKED)
        weights = jnp.exp2(logits - lse[0] * LOG2_E)
        dvalues[span] += _dot(weights.astype(q.dtype), dout[0], (1, 0))
        dweights = _dot(v[0], dout[0], (1, 1))
        dlogits = (weights * (dweights - delta)).astype(q.dtype)
        dkeys[span] += _dot(dlogits, q[0], (1, 0))
        dqueries[...] += _dot(k[0], dlogits, (0, 0))

    @pl.when((first <= block) & (block < last))
    def _():
        if s % keys:
            @pl.when(block == pl.num_programs(2) - 1)
            def _():
                for ref in (k, v):
                    ref[0, s % keys:] = jnp.zeros_like(ref[0, s % keys:])
        _either((block * keys < whole_from) | (block * keys + keys > whole_to), compute)

    @pl.when(ends)
    def _():
        dq[0] = (dqueries[...] * scale).T.astype(dq.dtype)

    @pl.when(ends & (pl.program_id(1) == tiles - 1))
    def _():
        dk[0] = (dkeys[:s] * scale).astype(dk.dtype)
        dv[0] = dvalues[:s].astype(dv.dtype)


def _by_head(x, kv_heads):
    b, length, heads, c = x.shape
    group = heads // kv_heads
    if kv_heads > 1:
        x = jnp.moveaxis(x.reshape(b, length, kv_heads, group, c), 2, 1)
    return x.reshape(b * kv_heads, length * group, c)


def _by_token(x, shape):
    """the inverse, C may lack"""
    b, length, heads, kv_heads = shape
    group = heads // kv_heads
    rest = x.shape[2:]
    if kv_heads > 1:
        x = jnp.moveaxis(x.reshape(b, kv_heads, length, group, *rest), 1, 2)
    return x.reshape(b, length, heads, *rest)


def _pad_rows(x, size, value):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])], constant_values=value)


def _ranges(key_start, key_end, group, s, padded):
    start = _pad_rows(jnp.repeat(jnp.maximum(key_start, 0), group, 1), padded, 0)
    end = _pad_rows(jnp.repeat(jnp.minimum(key_end, s), group, 1), padded, 0)
    return jnp.stack([start, end], 1)


def _hulls(ranges, rows, keys, s):
    start, end = jnp.moveaxis(ranges.reshape(ranges.shape[0], 2, -1, rows), 1, 0)
    sees = start < end
    last = _cdiv(jnp.max(jnp.where(sees, end, 0), -1), keys)
    first = jnp.minimum(jnp.min(jnp.where(sees, start, s), -1) // keys, last)
    whole_from = jnp.max(jnp.where(sees, start, 0), -1)
    whole_to = jnp.min(jnp.where(sees, end, s), -1)
    return jnp.stack([x.reshape(-1) for x in (first, last, whole_from, whole_to)])


def _specs(kv_heads, rows, keys, tiles, c):
    def key_block(h, i, j, hulls):
        at = lax.div(h, kv_heads) * tiles + i
        return h, lax.max(hulls[0, at], lax.min(j, hulls[1, at] - 1)), 0
    ranges = pl.BlockSpec((1, 2, rows), lambda h, i, j, hulls: (lax.div(h, kv_heads), 0, i))
    of_rows = pl.BlockSpec((1, rows, c), lambda h, i, j, hulls: (h, i, 0))
    of_keys = pl.BlockSpec((1, keys, c), key_block)
    lse = pl.BlockSpec((1, 1, rows), lambda h, i, j, hulls: (h, 0, i))
    return ranges, of_rows, of_keys, lse


def forward(q, k, v, key_start, key_end, *, scale, device, config=None):
    (b, t, n, c), (s, kv_heads) = q.shape, k.shape[1:3]
    group = n // kv_heads
    chosen = config or tuning(generation(device), c)
    tile = chosen.forward
    if t * group <= tile.rows:
        tile = chosen.few_rows
    rows = _row_tile(t * group, tile.rows)
    keys = min(s, tile.keys)
    tiles, blocks = _cdiv(t * group, rows), _cdiv(s, keys)
    ranges = _ranges(key_start, key_end, group, s, tiles * rows)
    of_ranges, of_rows, of_keys, of_lse = _specs(kv_heads, rows, keys, tiles, c)
    out, lse = launch(
        functools.partial(_forward, scale=scale, tiles=tiles, kv_heads=kv_heads, s=s),
        [_hulls(ranges, rows, keys, s), ranges, _by_head(q, kv_heads), _by_head(k, kv_heads), _by_head(v, kv_heads)],
        [jax.ShapeDtypeStruct((b * kv_heads, t * group, c), q.dtype), jax.ShapeDtypeStruct((b * kv_heads, 1, tiles * rows), jnp.float32)],
        name="prefix_lm_attention_forward",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * kv_heads, tiles, blocks),
            in_specs=[of_ranges, of_rows, of_keys, of_keys],
            out_specs=[of_rows, of_lse],
            scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32), pltpu.VMEM((1, rows), jnp.float32), pltpu.VMEM((c, rows), jnp.float32)],
        ),
        parallel=(True, True, False),
        cost=(4 * b * n * t * s * c, 2 * (q.size + k.size) * q.dtype.itemsize, b * n * t * s),
        vmem_limit_bytes=VMEM,
    )
    shape = (b, t, n, kv_heads)
    return _by_token(out, shape), _by_token(lse[:, 0, : t * group], shape)


def backward(q, k, v, key_start, key_end, out, lse, dout, *, scale, device, config=None):
    (b, t, n, c), (s, kv_heads) = q.shape, k.shape[1:3]
    group = n // kv_heads
    chosen = config or tuning(generation(device), c)
    tile = chosen.backward
    rows = _row_tile(t * group, tile.rows)
    keys = min(s, tile.keys)
    tiles, blocks = _cdiv(t * group, rows), _cdiv(s, keys)
    ranges = _ranges(key_start, key_end, group, s, tiles * rows)
    of_ranges, of_rows, of_keys, of_lse = _specs(kv_heads, rows, keys, tiles, c)
    whole = pl.BlockSpec((1, s, c), lambda h, i, j, hulls: (h, 0, 0))
    by_head = functools.partial(_by_head, kv_heads=kv_heads)
    lse = _pad_rows(by_head(lse[..., None])[:, None, :, 0], tiles * rows, NO_KEYS)
    dq, dk, dv = launch(
        functools.partial(_backward, scale=scale, tiles=tiles, kv_heads=kv_heads, t_rows=t * group, s=s),
        [_hulls(ranges, rows, keys, s), ranges, by_head(q), by_head(k), by_head(v), by_head(out), lse, by_head(dout.astype(q.dtype))],
        [jax.ShapeDtypeStruct((b * kv_heads, t * group, c), q.dtype), *2 * [jax.ShapeDtypeStruct((b * kv_heads, s, c), k.dtype)]],
        name="prefix_lm_attention_backward",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b * kv_heads, tiles, blocks),
            in_specs=[of_ranges, of_rows, of_keys, of_keys, of_rows, of_lse, of_rows],
            out_specs=[of_rows, whole, whole],
            scratch_shapes=[pltpu.VMEM((c, rows), jnp.float32), *2 * [pltpu.VMEM((blocks * keys, c), jnp.float32)]],
        ),
        parallel=(True, False, False),
        cost=(10 * b * n * t * s * c, 4 * (q.size + k.size) * q.dtype.itemsize, b * n * t * s),
        vmem_limit_bytes=VMEM,
    )
    return _by_token(dq, (b, t, n, kv_heads)), _by_token(dk, (b, s, kv_heads, kv_heads)), _by_token(dv, (b, s, kv_heads, kv_heads))
