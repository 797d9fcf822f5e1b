"""Tiles of the Hopper backward kernels in shared memory, and what of each query row they need beside q and dout."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = 1.4426950408889634

# What the vectors of a row are, float32 so that one copy brings all of a tile (integers are exact below 2^24): between
# which keys it sees any, its logsumexp in base 2, and the sum of out * dout. Of each tile of queries, in the first two
# places of WHOLE: between which keys every row that sees any sees all.
START, END, LSE, DELTA, WHOLE = range(5)
VECTORS = 5

TILE = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)  # of a vector with one value for each row, each column


def width(c: int) -> int:
    """Columns of a tile for head dimension c: swizzled 128, 64 or 32 bytes wide, whichever has none too many."""
    return -(-c // _elements(c)) * _elements(c)


def _elements(c: int) -> int:
    return next((size for size in (64, 32) if c % size == 0), 16)


def tile(*shape: int, dtype=jnp.bfloat16) -> plgpu.SMEM:
    """Shared memory as copies and wgmma want it: the last two axes are a matrix."""
    wide = _elements(shape[-1]) if dtype == jnp.bfloat16 else 32
    swizzle = wide * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(swizzle)))


def over_rows(vector, shape):
    """A vector with one value for each column, in every row."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """A vector with one value for each row, in every column."""
    return lax.broadcast_in_dim(vector, shape, [0])
