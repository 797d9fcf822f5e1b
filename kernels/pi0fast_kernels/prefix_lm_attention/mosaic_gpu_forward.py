"""Interval-masked attention, forward, for Hopper: copies, products and softmax overlap in one persistent kernel.

Why, in operations (derived): at head dimension 256 a block of 64 keys takes a warpgroup 1024 tensor core cycles.
Beside them are 64 x 64 exponentials, maxima, sums and roundings, and 64 x 256 products to rescale, in which the tensor
cores are idle unless something else is multiplied. Triton's compiler gives all warps the same task; XLA writes the
logits to memory.

One warpgroup of a block of threads copies: keys and values go around in rings of `Tile.stages` blocks, each slot with a
barrier for "full" and one for "empty". The others have 64 rows each, q in shared memory and the sums of weighted values
in registers. They issue the logits of the next block and the product of this block's weights at once, then make the
next weights while that product runs (Shah et al. 2024, https://arxiv.org/abs/2407.08608). The weights stay in
registers. `mosaic_gpu_schedule` says which blocks of keys an item visits.

The wait for the next block's keys stands between the weights and the wait for the product: it ends a basic block, and
ptxas otherwise moves the second wait in front of the exponentials.

Sums are rescaled with every block, grown maxima or not. To ask first compiles, too: 22 instructions and two barriers
more for 128 fewer of 521 where nothing has grown, and 12 bytes spilled, at head dimension 256. There the tensor cores
are what limits the loop (derived: 2048 cycles for two warpgroups, which issue 1042 instructions meanwhile).

Numerics: products accumulate in float32; exp2, log2 and division are the hardware's approximations; the weights are
rounded to bfloat16 before they multiply v (before they are normalised, where the reference rounds after).

Backend: compute capability 9.0. A head dimension is cut into parts of 64 columns and a rest of 16, 32 or 64, a copy
each, so that TMA checks the bounds of rows and columns and nothing is padded in memory. What of it holds on a GPU is
not known yet: it has been compiled for one and has run in an interpreter.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import launch
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_schedule import ROWS, Plan, intervals, schedule
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_tiles import (
    BY_ROW,
    LAYOUT,
    LOG2_E,
    NO_KEYS,
    Matrix,
    accumulator,
    add_product,
    multiply_transposed,
    over_columns,
)

MASKED = -1e30  # a logit that is not seen
FLOOR = -1e20  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1

# Registers of a thread that copies and of one that multiplies, by how many warpgroups multiply: 65536 in all.
REGISTERS = {2: (24, 240), 3: (32, 160)}


class Ring(NamedTuple):
    """Slots of shared memory that are filled and emptied in turn, and barriers for each slot."""

    slots: Matrix
    full: Any
    empty: Any


class Item(NamedTuple):
    """One tile of rows against one part of the keys: where it is, and the blocks it visits (see `schedule`)."""

    example: Any
    head: Any
    row: Any
    split: Any
    first: Any
    left: Any
    masked: Any
    whole: Any

    @property
    def zero(self):
        """One that the compiler does not know: no block's number is negative."""
        return jnp.minimum(self.first, 0)

    @property
    def visits(self):
        return self.masked + self.whole

    def key_block(self, n):
        """The n-th that it visits."""
        behind = jnp.where(n < self.masked, self.whole, self.left - self.masked)
        return self.first + n + jnp.where(n < self.left, 0, behind)


def attend(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    plan: Plan,
    *,
    scale: float,
    device: _dispatch.Device,
) -> tuple[jax.Array, jax.Array]:
    """The attended values [B, packed, heads, C], and the logsumexp of each row's logits [B, heads, padded].

    With `plan.splits` > 1 the results of each part of the keys, which `combine` puts together: [splits, B, heads,
    padded, width] in float32, and [splits, B, heads, padded], very negative where a row sees none of them.
    """
    bounds = intervals(key_start, key_end, plan)
    splits = () if plan.splits == 1 else (plan.splits,)
    out = (plan.batch, plan.packed, plan.heads, plan.head_dim)
    if splits:
        out = (*splits, plan.batch, plan.heads, plan.padded, plan.width)
    warpgroups, stages, parts = plan.tile.warpgroups, plan.tile.stages, len(plan.parts)

    def ring(slots: int, rows: int, copies: int, readers: int) -> tuple[Any, ...]:
        """copies: that fill a slot. readers: warpgroups that read it."""
        barriers = (plgpu.Barrier(num_barriers=slots, num_arrivals=count) for count in (copies, readers))
        return Matrix.allocate(slots, rows, plan.head_dim, device=device), *barriers

    attended, lse = launch(
        partial(_kernel, plan=plan, scale=scale),
        [schedule(bounds, plan), bounds, q.reshape(plan.batch, plan.packed, plan.heads, plan.head_dim), k, v],
        [
            jax.ShapeDtypeStruct(out, jnp.float32 if splits else q.dtype),
            jax.ShapeDtypeStruct((*splits, plan.batch, plan.heads, plan.padded), jnp.float32),
        ],
        name="prefix_lm_attention_forward",
        device=device,
        grid={"block": plan.blocks},
        warpgroups=warpgroups + 1,
        scratch=[
            ring(warpgroups * plan.tile.queries, ROWS, 1 + parts, 1),
            ring(stages, plan.tile.keys, parts, warpgroups),
            ring(stages, plan.tile.keys, parts, warpgroups),
            plgpu.SMEM((warpgroups * plan.tile.queries, 2, ROWS), jnp.int32),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        ],
    )
    return attended, lse


def combine(
    out: Float[Array, "splits B heads padded width"], lse: Float[Array, "splits B heads padded"]
) -> tuple[Float[Array, "B heads padded width"], Float[Array, "B heads padded"]]:
    """The results of all keys from those of each part of them.

    Split by split, so that XLA sees nothing to reduce: it makes two fusions of the attended values, not three.
    """
    maximum = reduce(jnp.maximum, lse)
    weights = [jnp.exp(part - maximum) for part in lse]
    total = reduce(jnp.add, weights)
    attended = reduce(jnp.add, (part * weight[..., None] for part, weight in zip(out, weights, strict=True)))
    lse = jnp.where(maximum > -NO_KEYS, maximum + jnp.log(total), NO_KEYS)
    return attended / total[..., None], lse


def _kernel(items, bounds, q, k, v, out, lse, queries, keys, values, bounds_s, lse_s, *, plan: Plan, scale: float):
    rings = [_ring(*ring) for ring in (queries, keys, values)]
    warpgroup = lax.axis_index("warpgroup")
    producer, consumers = REGISTERS.get(plan.tile.warpgroups, (None, None))

    @pl.when(warpgroup == plan.tile.warpgroups)
    def _():
        if producer:
            plgpu.set_max_registers(producer, action="decrease")
        copy = partial(_copy, bounds, q, k, v, bounds_s, *rings, plan)
        _for_each_item(items, plan, copy)

    @pl.when(warpgroup < plan.tile.warpgroups)
    def _():
        if consumers:
            plgpu.set_max_registers(consumers, action="increase")
        multiply = partial(_multiply, out, lse, bounds_s, lse_s, *rings, plan, scale)
        _for_each_item(items, plan, multiply)


def _ring(scratch, full, empty) -> Ring:
    return Ring(Matrix.of(scratch), full, empty)


def _for_each_item(items, plan: Plan, run: Callable[..., Any]) -> None:
    """`run(item, how many the block has done, and how many blocks of keys those visited)`, for each of this block."""
    block = lax.axis_index("block")

    def one(i, visited):
        number, *visits = (items[j, block + i * plan.blocks] for j in range(5))
        number, split = lax.div(number, plan.splits), lax.rem(number, plan.splits)
        number, tile = lax.div(number, plan.tiles), lax.rem(number, plan.tiles)
        example, head = lax.div(number, plan.heads), lax.rem(number, plan.heads)
        item = Item(example, head, tile * plan.tile.rows, split, *visits)
        run(item, i, visited)
        return visited + item.visits

    lax.fori_loop(0, lax.div(plan.items - 1 - block, plan.blocks) + 1, one, jnp.int32(0))


def _copy(bounds, q, k, v, bounds_s, queries: Ring, keys: Ring, values: Ring, plan: Plan, item: Item, done, copied):
    """Fills the slots: a block of keys and values, then q, so that keys are on their way while the last item ends."""

    def load(n, _):
        slot = lax.rem(copied + n, plan.tile.stages)
        rows = pl.ds(item.key_block(n) * plan.tile.keys, plan.tile.keys)
        for source, ring in ((k, keys), (v, values)):

            @pl.when(copied + n >= plan.tile.stages)
            def _(ring=ring):
                plgpu.barrier_wait(ring.empty.at[slot])

            where = item.example, rows, lax.div(item.head, plan.kv_group)
            ring.slots.at(slot).load(source, where, ring.full.at[slot], item.zero)

    load(0, None)
    for warpgroup in range(plan.tile.warpgroups):
        slot = _query_slot(plan, done, warpgroup)

        @pl.when(done >= plan.tile.queries)
        def _(slot=slot):
            plgpu.barrier_wait(queries.empty.at[slot])

        rows, full = pl.ds(item.row + warpgroup * ROWS, ROWS), queries.full.at[slot]
        plgpu.copy_gmem_to_smem(bounds.at[item.example, :, rows], bounds_s.at[slot], full)
        queries.slots.at(slot).load(q, (item.example, rows, item.head), full, item.zero)
    lax.fori_loop(1, item.visits, load, None)


def _query_slot(plan: Plan, done, warpgroup):
    return lax.rem(done, plan.tile.queries) * plan.tile.warpgroups + warpgroup


def _multiply(
    out, lse, bounds_s, lse_s, queries: Ring, keys: Ring, values: Ring, plan: Plan, scale, item: Item, done, visited
):
    """Empties the slots: the attended values of this warpgroup's rows."""
    warpgroup = lax.axis_index("warpgroup")
    rows = pl.ds(item.row + warpgroup * ROWS, ROWS)
    # If the compiler knew that this is the same for each item, it would compute every address of the loops before
    # them, more than registers hold (at head dimension 256, 28 bytes are spilled).
    query_slot = _query_slot(plan, done, warpgroup + item.zero)
    own = queries.slots.at(query_slot)

    def slot(n):
        return lax.rem(visited + n, plan.tile.stages)

    def wait_for_keys(n):
        @pl.when(n < item.visits)
        def _():
            plgpu.barrier_wait(keys.full.at[slot(n)])

    def load_bounds():
        return [plgpu.load(bounds_s.at[query_slot, i], layout=BY_ROW) for i in range(2)]

    def weigh(logits, n, masked: bool, maximum):
        """The new maximum of each row, and weights."""
        shape, factor = logits.shape, scale * LOG2_E
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT)
            start, end = (bound - item.key_block(n) * plan.tile.keys for bound in load_bounds())
            visible = (over_columns(start, shape) <= key) & (key < over_columns(end, shape))
            logits, factor = jnp.where(visible, logits * factor, MASKED), 1.0
        maximum = jnp.maximum(maximum, jnp.max(logits, axis=1) * factor)
        return maximum, jnp.exp2(logits * factor - over_columns(maximum, shape))

    def visit(n, state, sums, masked: bool):
        """Logits and weights of block n, while the block before is multiplied with its weights."""
        maximum, total, weights = state
        plgpu.barrier_wait(values.full.at[slot(n - 1)])

        def overlapped(logits):
            multiply_transposed(logits, own, keys.slots.at(slot(n)))
            add_product(sums, weights, values.slots.at(slot(n - 1)))
            return plgpu.wgmma_accumulator_load(logits, wait_n=len(sums))

        logits = pl.run_scoped(overlapped, accumulator(ROWS, plan.tile.keys))
        plgpu.barrier_arrive(keys.empty.at[slot(n)])
        new_maximum, new_weights = weigh(logits, n, masked, maximum)
        shrink = jnp.exp2(maximum - new_maximum)
        total = total * shrink + jnp.sum(new_weights, axis=1)
        wait_for_keys(n + 1)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(values.empty.at[slot(n - 1)])
        for part in sums:
            part[...] = part[...] * over_columns(shrink, part.shape)
        return new_maximum, total, new_weights.astype(jnp.bfloat16)  # not earlier: a wgmma still reads the old ones

    def run(*sums):
        """The attended values, in parts, and the logsumexp."""
        plgpu.barrier_wait(queries.full.at[query_slot])
        wait_for_keys(0)

        def first_logits(logits):
            multiply_transposed(logits, own, keys.slots.at(slot(0)))
            return logits[...]

        logits = pl.run_scoped(first_logits, accumulator(ROWS, plan.tile.keys))
        plgpu.barrier_arrive(keys.empty.at[slot(0)])
        floor = plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), BY_ROW)
        maximum, weights = weigh(logits, 0, True, floor)
        wait_for_keys(1)
        state = maximum, jnp.sum(weights, axis=1), weights.astype(jnp.bfloat16)
        state = lax.fori_loop(1, item.masked, partial(visit, sums=sums, masked=True), state)
        state = lax.fori_loop(jnp.maximum(item.masked, 1), item.visits, partial(visit, sums=sums, masked=False), state)
        maximum, total, weights = state
        last = slot(item.visits - 1)
        plgpu.barrier_wait(values.full.at[last])
        add_product(sums, weights, values.slots.at(last))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(values.empty.at[last])

        start, end = load_bounds()
        sees = (start < end) & (total > 0)
        nothing = NO_KEYS if plan.splits == 1 else -NO_KEYS
        lse_s.at[warpgroup][...] = jnp.where(sees, (maximum + jnp.log2(total)) / LOG2_E, nothing)
        normalise = jnp.where(sees, 1 / total, 0.0)
        attended = [part[...] * over_columns(normalise, part.shape) for part in sums]
        if plan.splits == 1:
            own.store(attended, out, (item.example, rows, item.head), item.zero)
            return
        for (column, width), part in zip(plan.parts, attended, strict=True):
            out.at[item.split, item.example, item.head, rows, pl.ds(column, width)][...] = part
        plgpu.commit_smem()

    pl.run_scoped(run, *own.accumulators())
    split = () if plan.splits == 1 else (item.split,)
    plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse.at[*split, item.example, item.head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(queries.empty.at[query_slot])
