"""What the Hopper forward kernel is told beforehand: which blocks of keys each tile of rows sees, and in which order.

Rows. With one key/value head all heads of a token follow each other, so that row r is query token r // N, head r % N:
a view of q, and eight heads of eight tokens fill a tile as 64 tokens would. With more key/value heads a tile has rows
of one query head.

Items. One item is one tile of rows against one part of the keys; blocks of threads take items in turn, the heaviest
first, so that the last ones to end are short (longest processing time first, Graham 1969).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

ROWS = 64  # of one warpgroup: what wgmma takes
MOSAICS = 2048  # bytes of shared memory that Mosaic keeps for reductions


@dataclass(frozen=True)
class Tile:
    """How the work is cut up.

    keys: of one block, a multiple of 64. stages: blocks of keys, and as many of values, that are on chip at once.
    warpgroups: that multiply, `ROWS` rows each: one, two or three. queries: tiles of q that are on chip at once.
    """

    keys: int
    stages: int
    warpgroups: int
    queries: int = 1

    @property
    def rows(self) -> int:
        return ROWS * self.warpgroups

    def shared_memory(self, head_dim: int) -> int:
        """Bytes: q, keys, values; bounds and logsumexp of rows, in whole KiB; what Mosaic keeps; barriers."""
        rows = self.queries * self.rows
        blocks = 2 * sum(width for _, width in parts(head_dim)) * (rows + 2 * self.stages * self.keys)
        vectors = sum(_ceil(size, 1024) * 1024 for size in (8 * rows, 4 * self.rows))
        return blocks + vectors + MOSAICS + 8 * (2 * self.queries * self.warpgroups + 4 * self.stages)


def parts(head_dim: int) -> list[tuple[int, int]]:
    """Of the head dimension, (first column, width): as wide as shared memory is swizzled, 64, and for the rest."""
    whole, rest = divmod(head_dim, 64)
    widths = [64] * whole + ([next(width for width in (16, 32, 64) if width >= rest)] if rest else [])
    return [(64 * i, width) for i, width in enumerate(widths)]


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    heads: that have rows of their own. kv_group: how many of them share a key/value head. packed: rows of one head.
    splits: parts of the keys, each with a result of its own. blocks: of threads, that share the items.
    """

    tile: Tile
    batch: int
    heads: int
    kv_group: int
    packed: int
    num_keys: int
    head_dim: int
    splits: int
    num_cores: int

    @classmethod
    def of(cls, q, k, tile: Tile, *, num_cores: int, splits: int = 1) -> "Plan":
        (b, t, n, c), (s, kv_heads) = q.shape, k.shape[1:3]
        heads, packed = (1, t * n) if kv_heads == 1 else (n, t)
        return cls(tile, b, heads, heads // kv_heads, packed, s, c, splits, num_cores)

    @property
    def tiles(self) -> int:
        """Of one head."""
        return _ceil(self.packed, self.tile.rows)

    @property
    def padded(self) -> int:
        """Rows of one head's tiles."""
        return self.tiles * self.tile.rows

    @property
    def key_blocks(self) -> int:
        return _ceil(self.num_keys, self.tile.keys)

    @property
    def items(self) -> int:
        return self.batch * self.heads * self.tiles * self.splits

    @property
    def blocks(self) -> int:
        return min(self.items, self.num_cores)

    @property
    def parts(self) -> list[tuple[int, int]]:
        return parts(self.head_dim)

    @property
    def width(self) -> int:
        """Columns of all parts."""
        return sum(width for _, width in self.parts)


def intervals(key_start: Int[Array, "B T"], key_end: Int[Array, "B T"], plan: Plan) -> Int[Array, "B 2 padded"]:
    """The keys that each row sees, cut to those that exist; rows past the end see none."""
    bounds = jnp.stack([jnp.maximum(key_start, 0), jnp.minimum(key_end, plan.num_keys)], axis=1)
    rows = jnp.repeat(bounds, plan.packed // key_start.shape[1], axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, plan.padded - plan.packed)))


def schedule(bounds: Int[Array, "B 2 padded"], plan: Plan) -> Int[Array, "5 items"]:
    """Of each item, in the order in which they are taken: its number, and which blocks of keys it visits.

    An item visits `masked` blocks that not all its rows see whole, first `left` ones from block `first` on, then those
    behind the `whole` ones, and the `whole` ones last: (number, first, left, masked, whole). An item that sees nothing
    visits one block past the end, in which nothing is loaded and nothing is seen. Where there is a split for each block
    nothing is left to compute: each item visits its own, seen or not.
    """
    if plan.splits == plan.key_blocks:
        number = np.arange(plan.items, dtype=np.int32)
        return jnp.asarray(np.stack([number, number % plan.splits, *np.broadcast_to([[1], [1], [0]], (3, plan.items))]))
    keys = plan.tile.keys
    start, end = jnp.moveaxis(bounds, 1, 0).reshape(2, plan.batch, 1, plan.tiles, 1, plan.tile.rows)
    sees = start < end
    last = _ceil(jnp.max(jnp.where(sees, end, 0), axis=-1), keys)
    first = jnp.minimum(jnp.min(jnp.where(sees, start, plan.num_keys), axis=-1) // keys, last)
    whole_from = _ceil(jnp.max(jnp.where(sees, start, 0), axis=-1), keys)
    whole_to = jnp.min(jnp.where(sees, end, plan.num_keys), axis=-1) // keys

    size = _ceil(last - first, plan.splits)
    first = jnp.minimum(first + size * jnp.arange(plan.splits), last)
    last = jnp.minimum(first + size, last)
    whole_from = jnp.clip(whole_from, first, last)
    whole = jnp.clip(whole_to, whole_from, last) - whole_from
    none = first == last
    visits = (
        jnp.where(none, plan.key_blocks, first),
        jnp.where(none, 1, whole_from - first),
        jnp.where(none, 1, last - first - whole),
        whole,
    )
    shape = plan.batch, plan.heads, plan.tiles, plan.splits
    visits = jnp.stack([jnp.broadcast_to(x, shape).reshape(-1) for x in visits])
    order = jnp.arange(plan.items)
    if plan.items > plan.blocks:
        order = jnp.argsort(-(visits[2] + visits[3]), stable=True)
    return jnp.concatenate([order[None], visits[:, order]]).astype(jnp.int32)


def _ceil(n, m):
    return -(-n // m)
