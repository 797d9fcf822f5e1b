"""Interval-masked attention in Pallas, for TPUs v5e, v5p and v6e.

How a call is cut up is in mosaic_tpu_tiles.py, what the two kernels share in mosaic_tpu_blocks.py.

Why, in bytes (derived): for the prefix of 32 examples of Pi0 the logits of one layer are 0.68 GB in float32, and XLA
writes and reads them, and their half-precision probabilities, in main memory. Here they stay on chip: 0.24 GB are read
and written in all.

The G = N/K query heads that share a key/value head are packed into rows: row r of key/value head h is query token
r // G, head h * G + r % G. With one key/value head that is a view of q. Logits are held transposed, keys × rows: what a
row has one of (its interval, maximum, sum) then lies along lanes, and a row's maximum is taken over whole registers.

Up to `Tile.single` keys are one block, which stays in VMEM for all rows of an example, and the softmax is a plain one.
More keys come in blocks, and the softmax runs online in base 2 (Dao 2023, https://arxiv.org/abs/2307.08691). The blocks
that a tile of rows may see are known before the kernel starts (prefetched scalars): the others are neither loaded nor
computed, and those that every row sees whole are not masked. A single block is masked in its first and last chunk only
where all rows see what lies between.

The backward pass is one kernel of five products. A TPU's programs run one after another, so dk and dv are summed in
VMEM over the rows of an example and key/value head, and results are the same from run to run.

Schedule (derived, and read in compiled code): on v6e the two products of a register of 8 × 128 logits keep the matrix
units busy for 2 cycles (8 on v5e), in which the vector unit has 8 slots. The softmax takes 4.5 of them and summing
products over chunks 1.2; a whole mask would take 4 more. So both must be busy side by side, which the compiler arranges
within straight code only: at each branch v6e's matrix units idle for some 350 cycles, until the first results come out
and after the last product went in. Hence many parts of a tile are unrolled, and three are in work at once: the products
with v of one, the weights of the next, the logits of the one after. v6e sums 256 products at a time, so values of 816
keys cost there what 1024 do; with that, and rows and keys past the valid ones, 1.19 times the bound of the visible
pairs is the least for the prefix of Pi0.

Numerics: products accumulate in float32 (those of float32 arrays are exact to float32); the weights are rounded to v's
dtype before they multiply v (before they are normalised, where the reference rounds after), and the logits' gradients
before they multiply q and k.

Backend: with more than one key/value head XLA moves the heads in front of the tokens before and after. Where each head
has its own keys, and C is no multiple of the 128 lanes (SigLIP's 72), the kernels take and make C × tokens instead:
that is how XLA lays such arrays out by itself, so nothing moves, C is not padded, and no row is transposed here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_tpu import launch
from pi0fast_kernels.prefix_lm_attention import mosaic_tpu_blocks as blocks
from pi0fast_kernels.prefix_lm_attention import mosaic_tpu_tiles
from pi0fast_kernels.prefix_lm_attention.mosaic_tpu_tiles import Part, Plan, TuningConfig

FLOOR = -1e20  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1
NO_KEYS = 1e30  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0
VMEM_BYTES = 64 * 2**20  # api.py refuses more keys than fit


def _forward(
    hulls, ranges, q, k, v, out, lse, maximum, total, summed, logits, weights, turned, *, scale: float, plan: Plan
):
    block = pl.program_id(2)
    by_key, by_channel = (turned, v) if plan.transposed else (k, turned)

    def finish(part: Part, attended, whole, highest):
        # A row that sees nothing was left unmasked where the others see all.
        start, end = blocks.interval(ranges, part)
        whole = jnp.where(start < end, whole, 1.0)
        attended = jnp.where(start < end, attended / whole, 0.0).astype(out.dtype)
        out[blocks.at(*part, plan)] = attended if plan.transposed else attended.T
        lse[part.head, :, part.rows] = jnp.where(start < end, (highest + jnp.log2(whole)) / blocks.LOG2_E, NO_KEYS)

    def run(masked: bool):
        blocks.clear_past_end(block, plan, v)
        for head in range(plan.heads):
            turned[head] = (k if plan.transposed else v)[head].T
        highest, whole = {}, {}  # of a part's rows

        def multiply(part: Part):
            shape = (1, part.size)
            highest[part] = jnp.full(shape, FLOOR) if plan.blocks == 1 else maximum[:, part.rows]
            for keys in plan.chunks:
                some = blocks.logits(q, by_key, ranges, part, keys, block, masked, scale, plan)
                highest[part] = jnp.maximum(highest[part], jnp.max(some, axis=0, keepdims=True))
                logits[keys, : part.size] = some
                yield

        def weigh(part: Part):
            whole[part] = jnp.zeros((1, part.size), jnp.float32)
            for keys in plan.chunks:
                some = jnp.exp2(logits[keys, : part.size] - highest[part])
                whole[part] += jnp.sum(some, axis=0, keepdims=True)
                weights[keys, : part.size] = some.astype(weights.dtype)
                yield

        def attend(part: Part):
            attended = jnp.zeros((), jnp.float32)
            for keys in plan.chunks:
                attended += blocks.dot(by_channel[part.head, :, keys], weights[keys, : part.size], (1, 0))
                yield
            if plan.blocks == 1:
                finish(part, attended, whole[part], highest[part])
            else:
                rows = part.rows
                shrink = jnp.exp2(maximum[:, rows] - highest[part])
                maximum[:, rows] = highest[part]
                total[:, rows] = total[:, rows] * shrink + whole[part]
                summed[:, rows] = summed[:, rows] * shrink + attended

        blocks.staggered(plan.parts, multiply, weigh, attend)

    if plan.blocks == 1:
        seen = blocks.where_seen(hulls, plan, block, run)

        @pl.when(jnp.logical_not(seen))
        def _():
            out[...] = jnp.zeros_like(out)
            lse[...] = jnp.full_like(lse, NO_KEYS)

        return

    @pl.when(block == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, FLOOR)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    blocks.where_seen(hulls, plan, block, run)

    @pl.when(block == plan.blocks - 1)
    def _():
        for part in plan.parts:
            finish(part, summed[:, part.rows], total[:, part.rows], maximum[:, part.rows])


def _backward(
    hulls,
    ranges,
    q,
    k,
    v,
    out,
    lse,
    dout,
    dq,
    dk,
    dv,
    dqueries,
    dkeys,
    dvalues,
    weights,
    dlogits,
    turned,
    *of_values,
    scale: float,
    plan: Plan,
):
    keys_by_key, keys_by_channel = (turned, k) if plan.transposed else (k, turned)
    (values_by_key,) = of_values or (v,)
    tile, block = pl.program_id(1), pl.program_id(2)
    alone = plan.tiles == plan.blocks == 1  # every sum begins and ends in this program

    @pl.when((tile == 0) & (block == 0) & (not alone))
    def _():
        dkeys[...] = jnp.zeros_like(dkeys)
        dvalues[...] = jnp.zeros_like(dvalues)

    if plan.packed % plan.rows:  # rows past the end are summed over, with zero weights

        @pl.when((tile == plan.tiles - 1) & (block == 0))
        def _():
            blocks.clear(plan.packed % plan.rows, plan, q, out, dout)

    def run(masked: bool):
        blocks.clear_past_end(block, plan, k, v)
        for head in range(plan.heads):
            turned[head] = k[head].T
            if plan.transposed:
                values_by_key[head] = v[head].T
        first = pl.multiple_of(block * plan.keys, plan.keys) if plan.blocks > 1 else 0

        def weigh(part: Part):
            head, rows = part
            there = blocks.at(head, rows, plan)
            delta = blocks.row_sums(out[there].astype(jnp.float32) * dout[there].astype(jnp.float32), plan)
            for keys in plan.chunks:
                logits = blocks.logits(q, keys_by_key, ranges, part, keys, block, masked, scale, plan)
                some = jnp.exp2(logits - lse[head, :, rows] * blocks.LOG2_E)
                weights[keys, : part.size] = some.astype(weights.dtype)
                dweights = blocks.by_row(values_by_key[head, keys], dout, part, plan)
                dlogits[keys, : part.size] = (some * (dweights - delta)).astype(dlogits.dtype)
                yield

        def attend(part: Part):
            head, rows = part
            dquery = jnp.zeros((), jnp.float32)
            for keys in plan.chunks:
                here = blocks.at(head, keys, plan)
                there = blocks.at(head, pl.ds(first + keys.start, keys.stop - keys.start), plan)
                dvalue = blocks.over_rows(weights[keys, : part.size], dout, part, plan)
                dkey = blocks.over_rows(dlogits[keys, : part.size], q, part, plan)
                dquery += blocks.dot(keys_by_channel[head, :, keys], dlogits[keys, : part.size], (1, 0))
                if not alone or rows.start > 0:
                    dvalue += dvalues[there]
                    dkey += dkeys[there]
                if alone and rows.stop == plan.rows:
                    dv[here] = dvalue.astype(dv.dtype)
                    dk[here] = (dkey * scale).astype(dk.dtype)
                else:
                    dvalues[there] = dvalue
                    dkeys[there] = dkey
                yield
            if plan.blocks == 1:
                dquery = (dquery * scale).astype(dq.dtype)
                dq[blocks.at(head, rows, plan)] = dquery if plan.transposed else dquery.T
            else:
                dqueries[:, rows] += dquery

        blocks.staggered(plan.parts, weigh, attend)

    if plan.blocks == 1:
        seen = blocks.where_seen(hulls, plan, block, run)

        @pl.when(jnp.logical_not(seen))
        def _():
            for ref in (dq, dk, dv) if alone else (dq,):
                ref[...] = jnp.zeros_like(ref)
    else:

        @pl.when(block == 0)
        def _():
            dqueries[...] = jnp.zeros_like(dqueries)

        blocks.where_seen(hulls, plan, block, run)

        @pl.when(block == plan.blocks - 1)
        def _():
            dquery = (dqueries[...] * scale).astype(dq.dtype)
            dq[0] = dquery if plan.transposed else dquery.T

    @pl.when((tile == plan.tiles - 1) & (block == plan.blocks - 1) & (not alone))
    def _():
        valid = blocks.at(slice(None), slice(plan.num_keys), plan)
        dk[...] = (dkeys[valid] * scale).astype(dk.dtype)
        dv[...] = dvalues[valid].astype(dv.dtype)


def forward(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
    device: _dispatch.Device,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """The attended values, and the logsumexp of each row's logits."""
    b, t, n, c = q.shape
    chosen = config or mosaic_tpu_tiles.tuning(device, q.dtype)
    plan = mosaic_tpu_tiles.plan(q, k, chosen.forward, chosen)
    ranges = mosaic_tpu_tiles.intervals(key_start, key_end, plan)
    of_ranges, of_rows, of_keys, of_lse = blocks.specs(plan, c)
    heads = b * plan.kv_heads
    out, lse = launch(
        partial(_forward, scale=scale, plan=plan),
        [mosaic_tpu_tiles.hulls(ranges, plan), ranges, *(blocks.by_head(x, plan) for x in (q, k, v))],
        [
            jax.ShapeDtypeStruct(blocks.lying(heads, plan.packed, c, plan), q.dtype),
            jax.ShapeDtypeStruct((heads, 1, plan.padded), jnp.float32),
        ],
        name="prefix_lm_attention_forward",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // plan.heads, plan.tiles, plan.blocks),
            in_specs=[of_ranges, of_rows, of_keys, of_keys],
            out_specs=[of_rows, of_lse],
            scratch_shapes=[
                *[pltpu.VMEM((size, plan.rows), jnp.float32) for size in (1, 1, c if plan.blocks > 1 else 1)],
                *[pltpu.VMEM((plan.keys, plan.parts[0].size), kind) for kind in (jnp.float32, v.dtype)],
                pltpu.VMEM(blocks.turned(c, plan), v.dtype),
            ],
        ),
        parallel=(True, True, False),
        cost=blocks.cost(q, k, products=2, passes=2),
        vmem_limit_bytes=VMEM_BYTES,
    )
    lse = lse[:, 0, : plan.packed, None]
    return blocks.by_token(out, q.shape, plan), blocks.by_token(lse, (b, t, n, 1), plan)[..., 0]


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
    b, c = q.shape[0], q.shape[3]
    chosen = config or mosaic_tpu_tiles.tuning(device, q.dtype)
    plan = mosaic_tpu_tiles.plan(q, k, chosen.backward, chosen)
    ranges = mosaic_tpu_tiles.intervals(key_start, key_end, plan)
    of_ranges, of_rows, of_keys, of_lse = blocks.specs(plan, c)
    of_whole = pl.BlockSpec(blocks.lying(plan.heads, plan.num_keys, c, plan), lambda program, *_: (program, 0, 0))
    by_head = partial(blocks.by_head, plan=plan)
    padding = (0, 0), (0, 0), (0, plan.padded - plan.packed)
    heads = b * plan.kv_heads
    lse = jnp.pad(by_head(lse[..., None]).reshape(heads, 1, plan.packed), padding, constant_values=NO_KEYS)
    whole = blocks.lying(plan.heads, plan.blocks * plan.keys, c, plan)
    sums = [(c if plan.blocks > 1 else 1, plan.rows), whole, whole]
    halves = [*2 * [(plan.keys, plan.parts[0].size)], *(2 if plan.transposed else 1) * [blocks.turned(c, plan)]]
    dq, dk, dv = launch(
        partial(_backward, scale=scale, plan=plan),
        [
            mosaic_tpu_tiles.hulls(ranges, plan),
            ranges,
            *map(by_head, (q, k, v, out)),
            lse,
            by_head(dout.astype(q.dtype)),
        ],
        [
            jax.ShapeDtypeStruct(blocks.lying(heads, plan.packed, c, plan), q.dtype),
            *2 * [jax.ShapeDtypeStruct(blocks.lying(heads, plan.num_keys, c, plan), k.dtype)],
        ],
        name="prefix_lm_attention_backward",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads // plan.heads, plan.tiles, plan.blocks),
            in_specs=[of_ranges, of_rows, of_keys, of_keys, of_rows, of_lse, of_rows],
            out_specs=[of_rows, of_whole, of_whole],
            scratch_shapes=[
                *[pltpu.VMEM(shape, jnp.float32) for shape in sums],
                *[pltpu.VMEM(shape, q.dtype) for shape in halves],
            ],
        ),
        parallel=(True, False, False),
        cost=blocks.cost(q, k, products=5, passes=4),
        vmem_limit_bytes=VMEM_BYTES,
    )
    return (
        blocks.by_token(dq, q.shape, plan),
        blocks.by_token(dk, k.shape, plan),
        blocks.by_token(dv, v.shape, plan),
    )
