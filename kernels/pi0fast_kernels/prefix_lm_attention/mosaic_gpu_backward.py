"""Backward pass of interval-masked attention for Hopper: two kernels, and what both need to know beforehand.

With one key/value head, all heads of all tokens are the rows of one head: a view of q, so that eight heads of eight
tokens fill a tile as 64 tokens would. With more, each query head has tiles of its own.

XLA sums out * dout (delta): two arrays are read once more, in bytes (derived) 0.21 GB for the prefix of 32 examples of
Pi0, 64 µs of an H100's memory. In the dq kernel a third tile of queries would not fit shared memory at head_dim 256.
"""

import itertools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import SHARED_MEMORY
from pi0fast_kernels.prefix_lm_attention import mosaic_gpu_dkv, mosaic_gpu_dq
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_tiles import LOG2_E, NO_KEYS

BARRIERS = 1024  # bytes of shared memory, at most


@dataclass(frozen=True)
class TuningConfig:
    """Tiles of the two kernels."""

    dq: mosaic_gpu_dq.Tile
    dkv: mosaic_gpu_dkv.Tile


# Head dimension up to → tiles, among those that compile without spills. Nothing here has been timed on a GPU.
TUNING = {
    80: TuningConfig(mosaic_gpu_dq.Tile(keys=128, slots=4), mosaic_gpu_dkv.Tile(64, 128, stages=2, cluster=2)),
    128: TuningConfig(mosaic_gpu_dq.Tile(keys=128, slots=3), mosaic_gpu_dkv.Tile(64, 64, stages=4, cluster=2)),
    256: TuningConfig(mosaic_gpu_dq.Tile(keys=64, slots=3), mosaic_gpu_dkv.Tile(64, 64, stages=2, cluster=2)),
}


def tuning(head_dim: int) -> TuningConfig:
    """The tiles for a head dimension."""
    return TUNING[min(limit for limit in TUNING if limit >= head_dim)]


def candidates(head_dim: int) -> tuple[list[mosaic_gpu_dq.Tile], list[mosaic_gpu_dkv.Tile]]:
    """The tuning grids of the two kernels: tiles that fit shared memory. Not all compile without spills."""
    dq = [mosaic_gpu_dq.Tile(*sizes) for sizes in itertools.product((64, 128), (3, 4, 6))]
    dkv = [mosaic_gpu_dkv.Tile(*sizes) for sizes in itertools.product((64, 128), (64, 128), (2, 3, 4), (1, 2, 4))]
    most = SHARED_MEMORY - BARRIERS
    return (
        [tile for tile in dq if tile.shared_memory(head_dim) <= most],
        [tile for tile in dkv if tile.shared_memory(head_dim) <= most],
    )


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
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """Gradients of q, k and v."""
    b, t, n, c = q.shape
    s, kv_heads = k.shape[1:3]
    tiles = config or tuning(c)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    tokens, heads = (t * n, 1) if kv_heads == 1 else (t, n)
    start, end = (jnp.repeat(x, tokens // t, axis=1) for x in (jnp.maximum(key_start, 0), jnp.minimum(key_end, s)))
    unit = math.lcm(tiles.dkv.queries, mosaic_gpu_dq.QUERIES)
    padded = -(-tokens // unit) * unit
    start, end = (jnp.pad(x, ((0, 0), (0, padded - tokens))) for x in (start, end))

    vectors = _vectors(start, end, lse.reshape(b, tokens, heads), delta.reshape(b, tokens, heads), s, tiles.dkv.queries)

    q_rows, dout_rows = (x.reshape(b, tokens, heads, c) for x in (q, dout.astype(q.dtype)))
    arrays = vectors, q_rows, k, v, dout_rows
    run = {"scale": scale, "device": device}
    dq = mosaic_gpu_dq.gradient(_query_hulls(start, end, s, tiles.dq.keys), *arrays, tile=tiles.dq, **run)
    dk, dv = mosaic_gpu_dkv.gradients(_key_hulls(start, end, s, tiles.dkv), *arrays, tile=tiles.dkv, **run)
    return dq.reshape(q.shape), dk, dv


def _vectors(start, end, lse, delta, num_keys: int, size: int) -> Float[Array, "B N vectors padded"]:
    """The rows of `mosaic_gpu_tiles`: a tile has `size` queries."""
    (b, padded), heads = start.shape, lse.shape[2]
    whole = jnp.stack(_whole(start, end, num_keys, size), axis=-1)
    whole = jnp.pad(whole, ((0, 0), (0, 0), (0, size - 2))).reshape(b, padded)

    def by_head(x, fill):
        return jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, padded - x.shape[1])), constant_values=fill)

    start, end, whole = (jnp.broadcast_to(x[:, None], (b, heads, padded)) for x in (start, end, whole))
    vectors = start, end, by_head(lse * LOG2_E, NO_KEYS), by_head(delta, 0.0), whole
    return jnp.stack([x.astype(jnp.float32) for x in vectors], axis=2)


def _whole(start, end, num_keys: int, size: int) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """Of each `size` queries between which keys all that see any see all."""
    start, end = (x.reshape(x.shape[0], -1, size) for x in (start, end))
    sees = start < end
    return jnp.max(jnp.where(sees, start, 0), axis=-1), jnp.min(jnp.where(sees, end, num_keys), axis=-1)


def _query_hulls(start, end, num_keys: int, block: int) -> Int[Array, "B tiles 4"]:
    """See `mosaic_gpu_dq.gradient`."""
    of_tile = [x.reshape(x.shape[0], -1, mosaic_gpu_dq.QUERIES) for x in (start, end)]
    sees = of_tile[0] < of_tile[1]
    last = -(-jnp.max(jnp.where(sees, of_tile[1], 0), axis=-1) // block)
    first = jnp.minimum(jnp.min(jnp.where(sees, of_tile[0], num_keys), axis=-1) // block, last)
    return jnp.stack([first, last, *_whole(start, end, num_keys, mosaic_gpu_dq.QUERIES)], axis=-1)


def _key_hulls(start, end, num_keys: int, size: mosaic_gpu_dkv.Tile) -> Int[Array, "B blocks 2"]:
    """See `mosaic_gpu_dkv.gradients`."""
    keys = size.keys * size.cluster
    low = jnp.arange(0, num_keys, keys)
    sees = (start < end)[..., None] & (start[..., None] < low + keys) & (end[..., None] > low)  # [B, T, blocks]
    sees = jnp.any(sees.reshape(sees.shape[0], -1, size.queries, len(low)), axis=2)
    first = jnp.argmax(sees, axis=1)
    last = jnp.where(jnp.any(sees, axis=1), sees.shape[1] - jnp.argmax(sees[:, ::-1], axis=1), first + 1)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)
