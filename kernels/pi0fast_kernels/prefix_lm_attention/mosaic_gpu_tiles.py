"""What the Hopper kernels share: matrices in shared memory, and products of them; and what the backward kernels do: how
threads are divided, vectors of rows, weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import swizzled
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_schedule import parts

LOG2_E = 1.4426950408889634
NO_KEYS = 1e30  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0

# Two warpgroups multiply, the last one copies. Registers of a thread: 128 threads of each take all 65536 but 1024.
CONSUMERS = 2
REGISTERS, PRODUCER_REGISTERS = 240, 24

# What a query row has one of beside q and dout, float32 so that one copy brings all of a tile (integers are exact below
# 2^24): which keys it sees (START to END), its logsumexp in base 2, and its sum of out * dout. WHOLE has, in the first
# two places of each tile of the dkv kernel, between which keys every row that sees any sees all.
START, END, LSE, DELTA, WHOLE = range(5)
VECTORS = 5

LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)  # of a vector with one value for each row, each column


def accumulator(rows: int, columns: int) -> Any:
    """Registers of a warpgroup that a product is summed in, zeros at first."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def columns(head_dim: int) -> int:
    """Of a matrix in shared memory."""
    return sum(width for _, width in parts(head_dim))


class Matrix(NamedTuple):
    """Shared memory of [..., rows, c] in `parts`. tiles: as wgmma takes it; rows: as copies do, which check bounds."""

    tiles: tuple[Any, ...]
    rows: tuple[Any, ...]

    @staticmethod
    def allocate(*shape: int, device: _dispatch.Device) -> list[Any]:
        """The scratch memory that `of` takes."""
        return [swizzled((*shape[:-1], width), jnp.bfloat16, device) for _, width in parts(shape[-1])]

    @classmethod
    def of(cls, scratch: Sequence[Any]) -> "Matrix":
        return cls(tuple(views[0] for views in scratch), tuple(views[-1] for views in scratch))

    def at(self, index) -> "Matrix":
        return Matrix(tuple(tile.at[index] for tile in self.tiles), tuple(row.at[index] for row in self.rows))

    def accumulators(self) -> list[Any]:
        """For sums of this matrix's shape."""
        return [accumulator(*tile.shape) for tile in self.tiles]

    def load(self, source, where, barrier, zero, **options) -> None:
        """Begins to copy `source[where]` here, zeros where it has ended. zero: one that the compiler does not know."""
        for (column, width), rows in zip(parts(source.shape[-1]), self.rows, strict=True):
            plgpu.copy_gmem_to_smem(source.at[(*where, _past(column, width, zero))], rows, barrier, **options)

    def store(self, values, target, where, zero) -> None:
        """Values through here to `target[where]`, where that has not ended. Nothing else may still be read here."""
        for tile, value in zip(self.tiles, values, strict=True):
            tile[...] = value.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for (column, width), rows in zip(parts(target.shape[-1]), self.rows, strict=True):
            plgpu.copy_smem_to_gmem(rows, target.at[(*where, _past(column, width, zero))])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the memory is free again; the kernel's end waits for the rest


def _past(column: int, width: int, zero):
    """Columns, as a slice that may reach past the end, as one may whose beginning is not known."""
    return pl.ds(zero + column, width)


def multiply_transposed(product, left: Matrix, right: Matrix) -> None:
    """product += left @ right.T"""
    for a, b in zip(left.tiles, right.tiles, strict=True):
        plgpu.wgmma(product, a, b.T)


def add_product(sums, left, right: Matrix) -> None:
    """sums += left @ right, of which each sum is a part; `len(sums)` wgmmas."""
    for total, b in zip(sums, right.tiles, strict=True):
        plgpu.wgmma(total, left, b)


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
