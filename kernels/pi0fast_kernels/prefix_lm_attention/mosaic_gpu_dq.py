"""Gradient of the queries for Hopper: a block of threads for each tile of queries, over the keys that it sees.

Why: as in mosaic_gpu_dkv.py, dq stays on chip until it is summed, so nothing is added in memory and results are the
same from run to run.

Each of two warpgroups has `ROWS` queries, q and dout of them in shared memory for good, and multiplies S = q kᵀ and
dP = dout vᵀ at once; the weights P are made of S while dP is multiplied, then dS = P (dP − delta), then dq += dS k.
While one warpgroup makes weights, the other has the tensor cores. The third copies tiles of k and v in turn into
`slots`, which both share.

What limits it, in cycles of 128 queries × 64 keys at head dimension 256 (derived; instructions counted in the machine
code): tensor cores 3072, shared memory 3072 (products read 2560, copies write 512), instructions of each scheduler 864,
or 1152 where rows see only some of the keys.

Numerics: products accumulate in float32; dS is rounded to bfloat16 before it multiplies k.

Backend: as mosaic_gpu_dkv.py.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import launch
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_schedule import parts
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_tiles import (
    BY_COLUMN,
    BY_ROW,
    CONSUMERS,
    DELTA,
    END,
    LSE,
    PRODUCER_REGISTERS,
    REGISTERS,
    START,
    Matrix,
    accumulator,
    add_product,
    columns,
    multiply_transposed,
    over_columns,
    over_rows,
    seen,
    weights,
)

ROWS = 64  # of one warpgroup
PRODUCER = CONSUMERS  # warpgroup
QUERIES = ROWS * CONSUMERS  # of one block of threads


@dataclass(frozen=True)
class Tile:
    """keys: of one step, a multiple of 64. slots: tiles of k or v that are held at once, at least three."""

    keys: int
    slots: int

    def __post_init__(self):
        if self.slots < 3:
            raise ValueError(f"slots={self.slots}: k, v and the next k are held at once; give 3 or more")

    def shared_memory(self, head_dim: int) -> int:
        """Bytes, without the barriers."""
        return 2 * columns(head_dim) * (2 * QUERIES + self.slots * self.keys)


def gradient(
    hulls: Int[Array, "B tiles 4"],
    rows: Float[Array, "B N vectors padded"],
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    dout: Float[Array, "B T N C"],
    *,
    scale: float,
    tile: Tile,
    device: _dispatch.Device,
) -> Float[Array, "B T N C"]:
    """dq.

    hulls: of each `QUERIES` queries the first block of keys that any sees, the last (exclusive), and between which keys
        all that see any see all.
    rows: the vectors of `mosaic_gpu_tiles`.
    """
    b, _, n, c = q.shape
    copies = len(parts(c))
    (dq,) = launch(
        partial(_kernel, scale=scale, sizes=tile, group=n // k.shape[2]),
        [hulls, rows, q, k, v, dout],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        name="prefix_lm_attention_dq",
        device=device,
        grid={"batch": b, "head": n, "tile": hulls.shape[1]},
        warpgroups=CONSUMERS + 1,
        scratch=[
            Matrix.allocate(CONSUMERS, ROWS, c, device=device),
            Matrix.allocate(CONSUMERS, ROWS, c, device=device),
            Matrix.allocate(tile.slots, tile.keys, c, device=device),
            plgpu.Barrier(num_arrivals=2 * copies, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=copies, num_barriers=tile.slots),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.slots),
        ],
    )
    return dq


def _kernel(
    hulls,
    rows,
    q,
    k,
    v,
    dout,
    dq,
    q_tiles,
    dout_tiles,
    key_tiles,
    rows_loaded,
    loaded,
    released,
    *,
    scale: float,
    sizes: Tile,
    group: int,
):
    q_tiles, dout_tiles, key_tiles = map(Matrix.of, (q_tiles, dout_tiles, key_tiles))
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    # The last queries see most under a causal mask: they go first.
    tile = hulls.shape[1] - 1 - lax.axis_index("tile")
    first_block, last_block, whole_from, whole_to = (hulls[batch, tile, i] for i in range(4))
    zero = warpgroup * 0

    def slot(copy):
        return lax.rem(copy, sizes.slots)

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, last_block - first_block)
        def _(step):
            keys = pl.ds((first_block + step) * sizes.keys, sizes.keys)
            for source, copy in ((k, 2 * step), (v, 2 * step + 1)):

                @pl.when(copy >= sizes.slots)
                def _(copy=copy):
                    plgpu.barrier_wait(released.at[slot(copy)])

                where = batch, keys, lax.div(head, group)
                key_tiles.at(slot(copy)).load(source, where, loaded.at[slot(copy)], zero)

    def consume(own):
        plgpu.set_max_registers(REGISTERS, action="increase")
        queries = pl.ds(tile * QUERIES + own * ROWS, ROWS)
        here = batch, queries, head
        q_tile, dout_tile = q_tiles.at(own), dout_tiles.at(own)
        q_tile.load(q, here, rows_loaded.at[own], zero)
        dout_tile.load(dout, here, rows_loaded.at[own], zero)
        square = ROWS, sizes.keys

        def vector(which):
            values = plgpu.load(rows.at[batch, head, which, queries], layout=BY_ROW, optimized=False)
            return over_columns(values.astype(jnp.int32) if which in (START, END) else values, square)

        lse, delta, start, end = map(vector, (LSE, DELTA, START, END))
        plgpu.barrier_wait(rows_loaded.at[own])
        steps = last_block - first_block

        def wait_for_keys(step):
            @pl.when(step < steps)
            def _():
                plgpu.barrier_wait(loaded.at[slot(2 * step)])

        def run(*sums):
            wait_for_keys(0)

            @pl.loop(0, steps)
            def _(step):
                k_slot, v_slot = slot(2 * step), slot(2 * step + 1)
                k_tile, v_tile = key_tiles.at(k_slot), key_tiles.at(v_slot)

                def weigh(logits):
                    multiply_transposed(logits, q_tile, k_tile)
                    plgpu.barrier_wait(loaded.at[v_slot])
                    return pl.run_scoped(partial(weigh_meanwhile, logits), accumulator(*square))

                def weigh_meanwhile(logits, dweights):
                    multiply_transposed(dweights, dout_tile, v_tile)
                    logits = plgpu.wgmma_accumulator_load(logits, wait_n=len(sums))
                    made = lax.optimization_barrier(weights(logits, lse, scale))
                    wait_for_keys(step + 1)  # these two lines keep exponentials in front of the wait for dP
                    return made, dweights[...]

                made, dweights = pl.run_scoped(weigh, accumulator(*square))
                plgpu.barrier_arrive(released.at[v_slot])
                dlogits = made * (dweights - delta)

                def masked():
                    key = plgpu.layout_cast(lax.iota(jnp.int32, sizes.keys), BY_COLUMN) + first_key
                    return seen(dlogits, over_rows(key, square), start, end)

                first_key = (first_block + step) * sizes.keys
                partly = (first_key < whole_from) | (first_key + sizes.keys > whole_to)
                dlogits = lax.cond(partly, masked, lambda: dlogits)
                add_product(sums, dlogits.astype(jnp.bfloat16), k_tile)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(released.at[k_slot])

            return [total[...] * scale for total in sums]

        sums = pl.run_scoped(run, *q_tile.accumulators())
        q_tile.store(sums, dq, here, zero)

    for own in range(CONSUMERS):  # with `own` known beforehand, addresses of q and dout take no registers
        pl.when(warpgroup == own)(partial(consume, own))
