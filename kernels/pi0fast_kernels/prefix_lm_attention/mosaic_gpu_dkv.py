"""Gradients of keys and values for Hopper: a block of threads for each tile of keys, over the queries that see it.

Why two kernels, in registers: at head dimension 256 the float32 sums of dq, dk and dv of 64 rows take 128 registers
each of a warpgroup's threads, which have 240. One kernel would add dq in memory, in an order that differs from run to
run; here dk and dv stay on chip until all query heads are summed, and nothing is spilled.

Warpgroup 0 multiplies Sᵀ = k qᵀ, makes the weights P of it and sums dv += P dout; warpgroup 1 multiplies
dPᵀ = v doutᵀ and sums dk += dS q, where dS = P (dPᵀ − delta). P crosses once through shared memory. Both issue the next
tile's Sᵀ or dPᵀ before this tile's sum, so that the tensor cores work while weights are made. Warpgroup 2 copies tiles
of q and dout into `stages` slots; the blocks of a cluster, whose keys are neighbours, share each copy.

What limits it, in cycles of 64 keys × 64 queries at head dimension 256 (derived; instructions counted in the machine
code): shared memory 2304 (products read 1536, copies write 512, P crosses in 256), tensor cores 2048, instructions of
each scheduler 680, or 824 where rows see only some of the keys.

Numerics: products accumulate in float32. P is rounded to bfloat16 before it multiplies dout, dS before it multiplies q;
dS is made of the unrounded P, which as bfloat16 would save 128 of those cycles.

Backend: compute capability 9.0, for wgmma. Registers that a wgmma reads may be written only after the one before is
done, or ptxas waits for each in turn (its note C7513): conversions stand after the waits. Compiled for an H100 and run
in an interpreter, not yet on a GPU.
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
    LAYOUT,
    LSE,
    PRODUCER_REGISTERS,
    REGISTERS,
    START,
    VECTORS,
    WHOLE,
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

WEIGHTS, LOGITS, PRODUCER = range(3)  # warpgroups

# How float32 lies in shared memory that one warpgroup writes and another reads. pyright takes these for abstract.
EXCHANGED = (
    plgpu.TilingTransform((8, 32)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)


@dataclass(frozen=True)
class Tile:
    """keys: of one block of threads, a multiple of 64. queries: of one step, a multiple of 64.

    stages: tiles of q and dout held at once, at least two. cluster: blocks that share the copies of q and dout.
    """

    keys: int
    queries: int
    stages: int
    cluster: int

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: the next product begins before the last is summed; give 2 or more")

    def shared_memory(self, head_dim: int) -> int:
        """Bytes, without the barriers."""
        vectors, weights = self.stages * VECTORS * self.queries, self.keys * self.queries
        return 4 * columns(head_dim) * (self.keys + self.stages * self.queries) + 4 * (vectors + weights)


def gradients(
    hulls: Int[Array, "B blocks 2"],
    rows: Float[Array, "B N vectors padded"],
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    dout: Float[Array, "B T N C"],
    *,
    scale: float,
    tile: Tile,
    device: _dispatch.Device,
) -> tuple[Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    """dk and dv.

    hulls: of the keys of each cluster the first tile of queries that sees any, and the last (exclusive); at least one.
    rows: the vectors of `mosaic_gpu_tiles`.
    """
    b, kv_heads, c = k.shape[0], k.shape[2], k.shape[3]
    slots, copies = (tile.stages, tile.queries), len(parts(c))
    neighbours = plgpu.ClusterBarrier(collective_axes=("neighbour",), num_arrivals=CONSUMERS, num_barriers=tile.stages)
    dk, dv = launch(
        partial(_kernel, scale=scale, sizes=tile, group=q.shape[2] // kv_heads),
        [hulls, rows, q, k, v, dout],
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="prefix_lm_attention_dkv",
        device=device,
        grid={"batch": b, "head": kv_heads, "keys": hulls.shape[1]},
        cluster={"neighbour": tile.cluster},
        warpgroups=CONSUMERS + 1,
        scratch=[
            Matrix.allocate(tile.keys, c, device=device),
            Matrix.allocate(tile.keys, c, device=device),
            Matrix.allocate(*slots, c, device=device),
            Matrix.allocate(*slots, c, device=device),
            plgpu.SMEM((tile.stages, VECTORS, tile.queries), jnp.float32),
            plgpu.SMEM((tile.keys, tile.queries), jnp.float32, transforms=EXCHANGED),
            plgpu.Barrier(num_arrivals=2 * copies),
            plgpu.Barrier(num_arrivals=2 * copies + 1, num_barriers=tile.stages),
            neighbours,
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
    )
    return dk, dv


def _kernel(
    hulls,
    rows,
    q,
    k,
    v,
    dout,
    dk,
    dv,
    k_tile,
    v_tile,
    q_tiles,
    dout_tiles,
    row_tiles,
    weights_tile,
    keys_loaded,
    loaded,
    released,
    weights_made,
    weights_read,
    *,
    scale: float,
    sizes: Tile,
    group: int,
):
    k_tile, v_tile, q_tiles, dout_tiles = map(Matrix.of, (k_tile, v_tile, q_tiles, dout_tiles))
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    cluster = lax.axis_index("keys")
    first_key = (cluster * sizes.cluster + lax.axis_index("neighbour")) * sizes.keys
    here = batch, pl.ds(first_key, sizes.keys), head
    first_tile, last_tile = hulls[batch, cluster, 0], hulls[batch, cluster, 1]
    steps = (last_tile - first_tile) * group
    square = sizes.keys, sizes.queries
    zero = warpgroup * 0

    def slot(step):
        return lax.rem(step, sizes.stages)

    def vector(at, which):
        return over_rows(plgpu.load(row_tiles.at[at, which], layout=BY_COLUMN), square)

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        k_tile.load(k, here, keys_loaded, zero)
        v_tile.load(v, here, keys_loaded, zero)

        # Also waits for the last slots: nobody may release a slot of a block that has ended.
        @pl.loop(0, steps + sizes.stages)
        def _(step):
            at = slot(step)

            @pl.when(step >= sizes.stages)
            def _():
                plgpu.barrier_wait(released.at[at])

            @pl.when(step < steps)
            def _():
                query_head = head * group + lax.rem(step, group)
                queries = pl.ds((first_tile + lax.div(step, group)) * sizes.queries, sizes.queries)
                there = batch, queries, query_head
                q_tiles.at(at).load(q, there, loaded.at[at], zero, collective_axes="neighbour")
                dout_tiles.at(at).load(dout, there, loaded.at[at], zero, collective_axes="neighbour")
                plgpu.copy_gmem_to_smem(rows.at[batch, query_head, :, queries], row_tiles.at[at], loaded.at[at])

    def summed(left, inner, outer, make, finish):
        """Σ finish(make(left @ inner[step].T)) @ outer[step]. A step's first product is issued before the sum before.

        make: of float32 products and the slot, while the sum before is still being computed. finish: to bfloat16.
        """

        def release(at):
            plgpu.wgmma_wait(0)
            # The vectors were read by ordinary loads; and one thread arrives for all, which this synchronises.
            plgpu.commit_smem()
            plgpu.barrier_arrive(released.at[at])

        def run(*sums):
            def first(product):
                multiply_transposed(product, left, inner.at(0))
                return make(product[...], 0)

            def step(i, operand):
                at, following = slot(i), slot(i + 1)
                plgpu.barrier_wait(loaded.at[following])

                def products(product):
                    multiply_transposed(product, left, inner.at(following))
                    add_product(sums, operand, outer.at(at))
                    return make(plgpu.wgmma_accumulator_load(product, wait_n=len(sums)), following)

                made = pl.run_scoped(products, accumulator(*square))
                release(at)
                return finish(made, following)

            plgpu.barrier_wait(loaded.at[0])
            operand = finish(pl.run_scoped(first, accumulator(*square)), 0)
            operand = lax.fori_loop(0, steps - 1, step, operand)
            add_product(sums, operand, outer.at(slot(steps - 1)))
            release(slot(steps - 1))
            return [total[...] for total in sums]

        return pl.run_scoped(run, *left.accumulators())

    @pl.when(warpgroup == WEIGHTS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        plgpu.barrier_wait(keys_loaded)
        low = first_key.astype(jnp.float32)

        def make(logits, at):
            made = lax.optimization_barrier(weights(logits, vector(at, LSE), scale))
            plgpu.barrier_wait(weights_read)  # these two lines keep exponentials in front of the wait for the sum
            return made

        def masked(made, at):
            key = plgpu.layout_cast(lax.iota(jnp.int32, sizes.keys), BY_ROW) + first_key
            return seen(made, over_columns(key.astype(jnp.float32), square), vector(at, START), vector(at, END))

        def finish(made, at):
            whole_from, whole_to = row_tiles[at, WHOLE, 0], row_tiles[at, WHOLE, 1]
            partly = (low < whole_from) | (low + sizes.keys > whole_to)
            made = lax.cond(partly, lambda: masked(made, at), lambda: made)
            weights_tile[...] = made
            plgpu.barrier_arrive(weights_made)
            return made.astype(jnp.bfloat16)

        sums = summed(k_tile, q_tiles, dout_tiles, make, finish)
        k_tile.store(sums, dv, here, zero)  # nobody else reads k

    @pl.when(warpgroup == LOGITS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        plgpu.barrier_wait(keys_loaded)
        plgpu.barrier_arrive(weights_read)  # nothing to read yet

        def make(dweights, at):
            difference = dweights - vector(at, DELTA)
            plgpu.barrier_wait(weights_made)
            made = plgpu.load(weights_tile, layout=LAYOUT)
            plgpu.barrier_arrive(weights_read)
            return made * difference

        sums = summed(v_tile, dout_tiles, q_tiles, make, lambda dlogits, _: dlogits.astype(jnp.bfloat16))
        v_tile.store([total * scale for total in sums], dk, here, zero)
