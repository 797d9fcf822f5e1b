"""What the two Hopper backward kernels share: how threads are divided, tiles in shared memory, vectors of rows."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = 1.4426950408889634

# Two warpgroups multiply, the last one copies. A thread's registers, in which 128 threads each leave none of 65536 idle.
CONSUMERS = 2
REGISTERS, PRODUCER_REGISTERS = 240, 24

# What a query row has one of beside q and dout, float32 so that one copy brings all of a tile (integers are exact below
# 2^24): which keys it sees (START to END), its logsumexp in base 2, and its sum of out * dout. WHOLE has, in the first
# two places of each tile of the dkv kernel, between which keys every row that sees any sees all.
START, END, LSE, DELTA, WHOLE = range(5)
VECTORS = 5

TILE = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)  # of a vector with one value for each row, each column


def tile(*shape: int, dtype=jnp.bfloat16) -> plgpu.SMEM:
    """Shared memory as copies and wgmma want it; the last two axes are a matrix, of columns in multiples of 16.

    Swizzled 128 bytes wide where the columns are a multiple of that, else 64 or 32.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(wide for wide in (128, 64, 32) if shape[-1] * size % wide == 0)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def over_rows(vector, shape):
    """A vector with one value for each column, in every row."""
    return lax.broadcast_in_dim(vector, shape, [1])


def over_columns(vector, shape):
    """A vector with one value for each row, in every column."""
    return lax.broadcast_in_dim(vector, shape, [0])


def weights(logits, lse, scale: float):
    """Of logits before they are scaled, and their rows' logsumexp in base 2."""
    return jnp.exp2(logits * (scale * LOG2_E) - lse)


def seen(values, key, start, end):
    """The values of keys that are seen, else zeros."""
    return jnp.where((start <= key) & (key < end), values, 0.0)


def store(total: jax.Array, through, where) -> None:
    """To memory, through a tile of shared memory that nothing reads any more; what is past the array's end is dropped."""
    through[...] = total.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, where)
    plgpu.wait_smem_to_gmem(0)
