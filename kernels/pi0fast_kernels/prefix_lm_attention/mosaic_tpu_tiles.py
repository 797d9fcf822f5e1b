"""How the TPU attention cuts up a call: into programs, tiles of rows, blocks of keys, and what is multiplied at once.

A program computes one tile of rows of one block of keys, of one key/value head or, where a head is one tile and one
block, of several. Code between two branches is what the compiler overlaps. A tile there is cut into parts, and a block
into chunks, that the matrix units multiply while the vector units have others (`mosaic_tpu`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_tpu import generation

LANES = 128  # of a vector register


@dataclass(frozen=True)
class Tile:
    """The sizes that one kernel is cut into.

    rows: of one tile, at most. keys: of one block. single: up to how many keys are one block whatever `keys` says.
    part, chunk: how many rows and how many keys are multiplied at once. heads: up to how many key/value heads a program
        takes that have one tile and one block each.
    """

    rows: int
    keys: int
    single: int
    part: int
    chunk: int
    heads: int


@dataclass(frozen=True)
class TuningConfig:
    """Tiles of the forward and of the backward kernel.

    unit: columns of a matrix unit; the rows of a tile are a multiple of it. fill: how many rows could be multiplied
        while the matrix units fill and drain once. few: up to how many key/value heads in all have a program each, so
        that the next one's keys are loaded while this one's are multiplied.
    """

    forward: Tile
    backward: Tile
    unit: int
    fill: int
    few: int


# Compared by the compiler's bundles at Pi0's prefix, suffix and inference and with causal attention, on v5e and v6e;
# v5p has v5e's units and takes its tiles. Larger tiles and programs save cycles, and take longer to compile: v6e's 13
# parts of a tile are some 8,000 bundles, twice (masked and not). Nothing here has been timed on a TPU.
V5 = TuningConfig(
    forward=Tile(1024, 512, 1024, 256, 256, heads=2),
    backward=Tile(512, 512, 1024, 256, 256, heads=1),
    unit=128,
    fill=64,
    few=4,
)
V6 = TuningConfig(
    forward=Tile(3328, 512, 1024, 256, 256, heads=4),
    backward=Tile(1792, 512, 1024, 256, 256, heads=4),
    unit=256,
    fill=384,
    few=4,
)
TUNING: dict[str, TuningConfig] = {"v5e": V5, "v5p": V5, "v6e": V6}


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    rows, keys: of one tile and block. packed: rows of one key/value head. heads: of one program. part, chunk: as in
        `Tile`. transposed: the kernel takes and makes arrays with tokens along lanes.
    """

    rows: int
    keys: int
    packed: int
    num_keys: int
    kv_heads: int
    heads: int
    part: int
    chunk: int
    transposed: bool

    @property
    def parts(self) -> list["Part"]:
        return [Part(head, rows) for head in range(self.heads) for rows in cut(self.rows, self.part)]

    @property
    def chunks(self) -> list[slice]:
        return cut(self.keys, self.chunk)

    @property
    def inner(self) -> slice:
        """The keys of a block that are left unmasked where every row that sees any sees all of these: all of them, or
        of a single block those between its first and its last chunk, in which masks begin and end."""
        if self.blocks > 1 or len(self.chunks) == 1:
            return slice(0, self.keys)
        return slice(self.chunks[0].stop, self.chunks[-1].start)

    @property
    def tiles(self) -> int:
        return ceil_div(self.packed, self.rows)

    @property
    def blocks(self) -> int:
        return ceil_div(self.num_keys, self.keys)

    @property
    def padded(self) -> int:
        """Rows of all tiles."""
        return self.tiles * self.rows

    @property
    def examples(self) -> int:
        """Of which a program takes heads."""
        return self.heads if self.kv_heads == 1 else 1

    def example(self, program):
        """Which of the groups of so many examples a program is of."""
        return lax.div(program, jnp.int32(max(self.kv_heads // self.heads, 1)))

    def tile(self, program, tile):
        """Where the prefetched scalars of a tile are."""
        return self.example(program) * self.tiles + tile


class Part(NamedTuple):
    """Rows of one of a program's heads."""

    head: int
    rows: slice

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def ceil_div(a, b):
    """Whole or traced numbers."""
    return -(-a // b)


def cut(size: int, piece: int) -> list[slice]:
    """Of pieces; the last one may be smaller."""
    return [slice(first, min(first + piece, size)) for first in range(0, size, piece)]


def plan(q: Float[Array, "B T N C"], k: Float[Array, "B S K C"], tile: Tile, config: TuningConfig) -> Plan:
    """Tiles that take the least time in all, the filling of matrix units included."""
    (b, t, n, c), (s, kv_heads) = q.shape, k.shape[1:3]
    packed = rows = t * n // kv_heads
    if packed > tile.rows:
        sizes = range(config.unit, tile.rows + 1, config.unit)
        rows = min(sizes, key=lambda size: ceil_div(packed, size) * (size + config.fill))
    keys = s if s <= max(tile.single, tile.keys) else tile.keys
    alike = b if kv_heads == 1 else kv_heads  # heads that a program can take
    most = tile.heads if packed == rows and keys == s and b * kv_heads > config.few else 1
    heads = max(n for n in range(1, most + 1) if alike % n == 0)
    transposed = n == kv_heads > 1 and c % LANES > 0  # heads are moved anyway, and C would be padded to whole lanes
    return Plan(rows, keys, packed, s, kv_heads, heads, tile.part, tile.chunk, transposed)


def intervals(key_start, key_end, plan: Plan) -> Int[Array, "B 2 rows"]:
    """The keys that each row sees, cut to those that exist; rows past the end see none."""
    bounds = jnp.stack([jnp.maximum(key_start, 0), jnp.minimum(key_end, plan.num_keys)], axis=1)
    rows = jnp.repeat(bounds, plan.packed // key_start.shape[1], axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, plan.padded - plan.packed)))


def hulls(ranges: Int[Array, "B 2 rows"], plan: Plan) -> Int[Array, "4 tiles"]:
    """Of each tile the first block and the last (exclusive), and between which keys rows that see any see all."""
    start, end = jnp.moveaxis(ranges.reshape(-1, plan.examples, 2, plan.tiles, plan.rows), 2, 0)
    sees, every = start < end, (1, 3)
    last = ceil_div(jnp.max(jnp.where(sees, end, 0), every), plan.keys)
    first = jnp.minimum(jnp.min(jnp.where(sees, start, plan.num_keys), every) // plan.keys, last)
    whole_from = jnp.max(jnp.where(sees, start, 0), every)
    whole_to = jnp.min(jnp.where(sees, end, plan.num_keys), every)
    return jnp.stack([bound.reshape(-1) for bound in (first, last, whole_from, whole_to)])


def tuning(device: _dispatch.Device, dtype: Any) -> TuningConfig:
    """The tiles for a TPU; the interpreter takes those of the newest.

    In float32, whose products take several passes, v6e takes v5e's: its own take 3 to 19 minutes to compile.
    """
    return V5 if jnp.dtype(dtype) == jnp.float32 else TUNING[generation(device) or "v6e"]
