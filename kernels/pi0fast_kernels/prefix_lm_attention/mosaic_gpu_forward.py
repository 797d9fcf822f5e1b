"""TODO"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import launch, swizzled, views

LOG2_E = 1.4426950408889634
MASKED = -1e30  # a logit that is not seen
FLOOR = -1e20  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1
NO_KEYS = 1e30  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0
ROWS = 64  # of one warpgroup: wgmma's
COLUMNS = 64  # of one part of the head dimension: the widest that shared memory is swizzled in
MATRIX, BY_ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Tile:
    """How the work is cut up.

    keys: of one block, a multiple of 64. stages: blocks of keys, and of values, that are on chip at once.
    warpgroups: that multiply, each 64 rows.
    """

    keys: int
    stages: int
    warpgroups: int


@dataclass(frozen=True)
class Plan:
    """How one call is cut up.

    group: query heads that share a tile. heads: groups of them. kv_group: how many of those share a key/value head.
    packed: rows of one group. splits: parts of the keys, each of which gives a result of its own.
    """

    tile: Tile
    batch: int
    group: int
    heads: int
    kv_group: int
    packed: int
    num_keys: int
    head_dim: int
    splits: int

    @property
    def rows(self) -> int:
        return ROWS * self.tile.warpgroups

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.packed, self.rows)

    @property
    def padded(self) -> int:
        return self.tiles * self.rows

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.num_keys, self.tile.keys)

    @property
    def items(self) -> int:
        return self.batch * self.heads * self.tiles * self.splits

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Of the head dimension: where each begins, and its width."""
        whole, rest = divmod(self.head_dim, COLUMNS)
        widths = [COLUMNS] * whole + [next(w for w in (16, 32, 64) if w >= rest)] * (rest > 0)
        return [(COLUMNS * i, width) for i, width in enumerate(widths)]


def intervals(key_start, key_end, plan: Plan) -> Int[Array, "2 B rows"]:
    bounds = jnp.stack([jnp.maximum(key_start, 0), jnp.minimum(key_end, plan.num_keys)])
    rows = jnp.repeat(bounds, plan.group, axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, plan.padded - plan.packed)))


def schedule(ranges: Int[Array, "2 B rows"], plan: Plan) -> Int[Array, "5 items"]:
    start, end = ranges.reshape(2, plan.batch, 1, plan.tiles, 1, plan.rows)
    sees = start < end
    keys = plan.tile.keys
    last = pl.cdiv(jnp.max(jnp.where(sees, end, 0), -1), keys)
    first = jnp.minimum(jnp.min(jnp.where(sees, start, plan.num_keys), -1) // keys, last)
    whole_from = pl.cdiv(jnp.max(jnp.where(sees, start, 0), -1), keys)
    whole_to = jnp.min(jnp.where(sees, end, plan.num_keys), -1) // keys
    each = pl.cdiv(last - first, plan.splits)
    first = first + each * jnp.arange(plan.splits)
    last = jnp.minimum(first + each, last)
    whole_from = jnp.clip(whole_from, first, last)
    whole_to = jnp.clip(whole_to, whole_from, last)
    none = first >= last
    first = jnp.where(none, plan.blocks, first)
    left = jnp.where(none, 1, whole_from - first)
    whole = jnp.where(none, 0, whole_to - whole_from)
    masked = jnp.where(none, 1, last - first - whole)
    shape = plan.batch, plan.heads, plan.tiles, plan.splits
    first, left, masked, whole = (jnp.broadcast_to(x, shape).reshape(-1) for x in (first, left, masked, whole))
    order = jnp.argsort(-(masked + whole))
    return jnp.stack([order, first[order], left[order], masked[order], whole[order]]).astype(jnp.int32)


def _kernel(items_g, bounds_g, q_g, k_g, v_g, out_g, lse_g, q_s, k_s, v_s, lse_s, *barriers, plan: Plan, scale: float):
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_s, k_s, v_s = ([views(part) for part in buffers] for buffers in (q_s, k_s, v_s))
    (q_s, q_r), (k_s, k_r), (v_s, v_r) = (list(zip(*x)) for x in (q_s, k_s, v_s))
    tile, warpgroup = plan.tile, lax.axis_index("warpgroup")
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(plan.items - 1 - block, blocks) + 1
    stages = tile.stages

    def item(i):
        number, first, left, masked, whole = (items_g[j, block + i * blocks] for j in range(5))
        split = lax.rem(number, plan.splits)
        number = lax.div(number, plan.splits)
        row = lax.rem(number, plan.tiles) * plan.rows
        number = lax.div(number, plan.tiles)
        head = lax.rem(number, plan.heads)
        example = lax.div(number, plan.heads)

        def key_of(n):
            skipped = jnp.where(n < left, 0, jnp.where(n < masked, whole, left - masked))
            return (first + n + skipped) * tile.keys

        return example, head, row, split, masked, whole, key_of

    @pl.when(warpgroup == tile.warpgroups)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")

        def run(i, loaded):
            example, head, row, _, masked, whole, key_of = item(i)
            kv_head = lax.div(head, plan.kv_group)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(q_empty)

            for (column, width), to in zip(plan.parts, q_r, strict=True):
                for w in range(tile.warpgroups):
                    rows = pl.ds(row + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(
                        q_g.at[example, rows, head, pl.ds(example * 0 + column, width)], to.at[w], q_full
                    )

            def load(n, loaded):
                slot = lax.rem(loaded, stages)
                keys = pl.ds(key_of(n), tile.keys)
                for source, to, full, empty in ((k_g, k_r, k_full, k_empty), (v_g, v_r, v_full, v_empty)):

                    @pl.when(loaded >= stages)
                    def _(empty=empty):
                        plgpu.barrier_wait(empty.at[slot])

                    for (column, width), part in zip(plan.parts, to, strict=True):
                        plgpu.copy_gmem_to_smem(
                            source.at[example, keys, kv_head, pl.ds(example * 0 + column, width)],
                            part.at[slot],
                            full.at[slot],
                        )
                return loaded + 1

            return lax.fori_loop(0, masked + whole, load, loaded)

        lax.fori_loop(0, mine, run, jnp.int32(0))

    @pl.when(warpgroup < tile.warpgroups)
    def _consume():
        plgpu.set_max_registers(240, action="increase")

        def run(i, used):
            example, head, row, split, masked, whole, key_of = item(i)
            rows = pl.ds(row + warpgroup * ROWS, ROWS)
            start, end = (plgpu.load(bounds_g.at[j, example, rows], layout=BY_ROW, optimized=False) for j in range(2))
            total = masked + whole

            def logits(slot, s):
                for q, k in zip(q_s, k_s, strict=True):
                    plgpu.wgmma(s, q.at[warpgroup], k.at[slot].T)

            def values(slot, p, accs):
                for acc, v in zip(accs, v_s, strict=True):
                    plgpu.wgmma(acc, p, v.at[slot])

            def softmax(s, n, is_masked, m):
                factor = scale * LOG2_E
                if is_masked:
                    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=MATRIX) + key_of(n)
                    visible = (lax.broadcast_in_dim(start, s.shape, [0]) <= key) & (
                        key < lax.broadcast_in_dim(end, s.shape, [0])
                    )
                    s = jnp.where(visible, s * factor, MASKED)
                    factor = 1.0
                new = jnp.maximum(m, jnp.max(s, axis=1) * factor)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(new, s.shape, [0]))
                return new, p

            def attend(*accs):
                slot = lax.rem(used, stages)
                plgpu.barrier_wait(q_full)
                plgpu.barrier_wait(k_full.at[slot])

                def first_logits(s):
                    logits(slot, s)
                    return s[...]

                shape = ROWS, tile.keys
                s = pl.run_scoped(first_logits, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(k_empty.at[slot])
                m = plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), BY_ROW)
                m, p = softmax(s, 0, True, m)
                l = jnp.sum(p, axis=1)
                p = p.astype(jnp.bfloat16)

                def wait_keys(n):
                    @pl.when(n < total)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(used + n, stages)])

                wait_keys(1)

                def step(n, carry, *, is_masked):
                    m, l, p = carry
                    slot, before = lax.rem(used + n, stages), lax.rem(used + n - 1, stages)
                    plgpu.barrier_wait(v_full.at[before])

                    def overlapped(s):
                        logits(slot, s)
                        values(before, p, accs)
                        return plgpu.wgmma_accumulator_load(s, wait_n=len(accs))

                    s = pl.run_scoped(overlapped, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(k_empty.at[slot])
                    new, weights = softmax(s, n, is_masked, m)
                    shrink = jnp.exp2(m - new)
                    l = l * shrink + jnp.sum(weights, axis=1)
                    wait_keys(n + 1)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(v_empty.at[before])
                    for acc in accs:
                        acc[...] = acc[...] * lax.broadcast_in_dim(shrink, acc.shape, [0])
                    return new, l, weights.astype(jnp.bfloat16)

                carry = lax.fori_loop(1, masked, partial(step, is_masked=True), (m, l, p))
                m, l, p = lax.fori_loop(jnp.maximum(masked, 1), total, partial(step, is_masked=False), carry)
                last = lax.rem(used + total - 1, stages)
                plgpu.barrier_wait(v_full.at[last])
                values(last, p, accs)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_empty.at[last])
                sees = (start < end) & (l > 0)
                inverse = jnp.where(sees, 1 / l, 0.0)
                lse_s.at[warpgroup][...] = jnp.where(sees, (m + jnp.log2(l)) / LOG2_E, NO_KEYS)
                for acc, to in zip(accs, q_s, strict=True):
                    to.at[warpgroup][...] = (acc[...] * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(to.dtype)

            pl.run_scoped(attend, *(plgpu.ACC((ROWS, width), jnp.float32) for _, width in plan.parts))
            plgpu.commit_smem()
            for (column, width), part in zip(plan.parts, q_r, strict=True):
                plgpu.copy_smem_to_gmem(
                    part.at[warpgroup], out_g.at[example, rows, head, pl.ds(example * 0 + column, width)]
                )
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse_g.at[example, head, rows])
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(q_empty)
            return used + total

        lax.fori_loop(0, mine, run, jnp.int32(0))


def attend(q, k, v, key_start, key_end, *, scale: float, device: _dispatch.Device, tile: Tile, splits: int = 1):
    b, t, n, c = q.shape
    s, kv_heads = k.shape[1:3]
    group = n if kv_heads == 1 else 1
    heads = n // group
    plan = Plan(tile, b, group, heads, heads // kv_heads, t * group, s, c, splits)
    ranges = intervals(key_start, key_end, plan)
    blocks = min(plan.items, device.num_cores or 132)
    barrier = plgpu.Barrier
    parts = len(plan.parts)
    each = partial(barrier, num_barriers=tile.stages)
    shared = lambda *shape: [swizzled((*shape, width), q.dtype) for _, width in plan.parts]  # noqa: E731
    out, lse = launch(
        partial(_kernel, plan=plan, scale=scale),
        [schedule(ranges, plan), ranges, q.reshape(b, -1, heads, c), k, v],
        [
            jax.ShapeDtypeStruct((b, plan.packed, heads, c), q.dtype),
            jax.ShapeDtypeStruct((b, heads, plan.padded), jnp.float32),
        ],
        name="prefix_lm_attention_forward",
        device=device,
        grid={"block": blocks},
        warpgroups=tile.warpgroups + 1,
        scratch=[
            shared(tile.warpgroups, ROWS),
            shared(tile.stages, tile.keys),
            shared(tile.stages, tile.keys),
            plgpu.SMEM((tile.warpgroups, ROWS), jnp.float32),
            barrier(num_arrivals=parts * tile.warpgroups),
            barrier(num_arrivals=tile.warpgroups),
            each(num_arrivals=parts),
            each(num_arrivals=tile.warpgroups),
            each(num_arrivals=parts),
            each(num_arrivals=tile.warpgroups),
        ],
    )
    lse = jnp.moveaxis(lse[:, :, : plan.packed], 1, 2).reshape(b, t, n)
    return out.reshape(q.shape), lse
