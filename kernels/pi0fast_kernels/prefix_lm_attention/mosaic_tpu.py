"""Interval-masked attention in Pallas, for TPUs v5e, v5p and v6e.

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

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_tpu import launch
from pi0fast_kernels.prefix_lm_attention import mosaic_tpu_tiles
from pi0fast_kernels.prefix_lm_attention.mosaic_tpu_tiles import LANES, Part, Plan, TuningConfig

LOG2_E = 1.4426950408889634
MASKED = -1e30  # a logit that is not seen
FLOOR = -1e20  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1
NO_KEYS = 1e30  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0
VMEM_BYTES = 64 * 2**20  # api.py refuses more keys than fit


def _at(head: int | slice, tokens, plan: Plan) -> tuple:
    """The index of tokens of a head, or of several, in an array that lies as `Plan.transposed` says."""
    return (head, slice(None), tokens) if plan.transposed else (head, tokens)


def _row_sums(x: Float[Array, "rows C"] | Float[Array, "C rows"], plan: Plan) -> Float[Array, "1 rows"]:
    """Over C. Along lanes, registers side by side are added first, so that fewer are transposed."""
    if plan.transposed:
        return jnp.sum(x, axis=0, keepdims=True)
    columns = [x[:, lanes] for lanes in mosaic_tpu_tiles.cut(x.shape[1], LANES)]
    if x.shape[1] % LANES == 0:
        x = sum(columns[1:], columns[0])
    return jnp.sum(x.T, axis=0, keepdims=True)


def _dot(a, b, over: tuple[int, int]):
    """The product of a and b in float32, summed over these axes."""
    if over == (1, 1) and b.shape[0] == 1:  # for a matrix and one row of half precision Mosaic has no product
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((over[:1], over[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _by_row(a: Float[Array, "keys C"], x, part: Part, plan: Plan) -> Float[Array, "keys rows"]:
    """The product of each key's vector with that of each row of x."""
    return _dot(a, x[_at(*part, plan)], (1, 0) if plan.transposed else (1, 1))


def _over_rows(weights: Float[Array, "keys rows"], x, part: Part, plan: Plan):
    """For each key the weighted sum of the rows of x. [keys, C], or [C, keys] as `Plan.transposed` says."""
    rows = x[_at(*part, plan)]
    return _dot(rows, weights, (1, 1)) if plan.transposed else _dot(weights, rows, (1, 0))


def _interval(ranges, part: Part) -> tuple[Int[Array, "1 rows"], Int[Array, "1 rows"]]:
    """The keys that each row sees, from and to; heads of one example see the same."""
    example = min(part.head, ranges.shape[0] - 1)
    return ranges[example, 0:1, part.rows], ranges[example, 1:2, part.rows]


def _logits(q, k, ranges, part: Part, keys: slice, block, masked: bool, scale: float, plan: Plan):
    """Of a chunk of a block's keys, in base 2. k: [head, keys, C]. Returns [keys, rows]."""
    logits = _by_row(k[part.head, keys], q, part, plan) * (scale * LOG2_E)
    start, end = _interval(ranges, part)
    key = block * plan.keys + keys.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    if masked or keys.start < plan.inner.start:
        logits = jnp.where(start <= key, logits, MASKED)
    if masked or keys.stop > plan.inner.stop:
        logits = jnp.where(key < end, logits, MASKED)
    return logits


def _staggered(parts: list[Part], *stages: Callable[[Part], Iterator[None]]) -> None:
    """Every stage on every part, each stage one part behind the one before it.

    The stages take turns at every `yield`, the last one first: what they compute then is independent, so that the
    compiler can overlap it, and a stage may overwrite what the one after it has just read.
    """
    for step in range(len(parts) + len(stages) - 1):
        running = [stage(parts[step - lag]) for lag, stage in enumerate(stages) if 0 <= step - lag < len(parts)]
        for _ in zip_longest(*reversed(running)):
            pass


def _clear(first: int, plan: Plan, *refs) -> None:
    """Tokens from the first on."""
    for ref in refs:
        past = _at(0, slice(first, None), plan)
        ref[past] = jnp.zeros_like(ref[past])


def _clear_past_end(block, plan: Plan, *refs) -> None:
    """Zeros where the last block of keys has none: whatever is there would spoil sums, zero weights or not."""
    if plan.num_keys % plan.keys:

        @pl.when(block == plan.blocks - 1)
        def _():
            _clear(plan.num_keys % plan.keys, plan, *refs)


def _where_seen(hulls, plan: Plan, block, run: Callable[[bool], None]) -> jax.Array:
    """`run(masked)` if the tile sees any of the block's keys; whether it does. masked: `plan.inner` must be, too."""
    first, last, whole_from, whole_to = (hulls[i, plan.tile(pl.program_id(0), pl.program_id(1))] for i in range(4))
    partly = (block * plan.keys + plan.inner.start < whole_from) | (block * plan.keys + plan.inner.stop > whole_to)
    seen = (first <= block) & (block < last)
    pl.when(seen & partly)(partial(run, True))
    pl.when(seen & jnp.logical_not(partly))(partial(run, False))
    return seen


def _forward(
    hulls, ranges, q, k, v, out, lse, maximum, total, summed, logits, weights, turned, *, scale: float, plan: Plan
):
    block = pl.program_id(2)
    by_key, by_channel = (turned, v) if plan.transposed else (k, turned)

    def finish(part: Part, attended, whole, highest):
        # A row that sees nothing was left unmasked where the others see all.
        start, end = _interval(ranges, part)
        whole = jnp.where(start < end, whole, 1.0)
        attended = jnp.where(start < end, attended / whole, 0.0).astype(out.dtype)
        out[_at(*part, plan)] = attended if plan.transposed else attended.T
        lse[part.head, :, part.rows] = jnp.where(start < end, (highest + jnp.log2(whole)) / LOG2_E, NO_KEYS)

    def run(masked: bool):
        _clear_past_end(block, plan, v)
        for head in range(plan.heads):
            turned[head] = (k if plan.transposed else v)[head].T
        highest, whole = {}, {}  # of a part's rows

        def multiply(part: Part):
            shape = (1, part.size)
            highest[part] = jnp.full(shape, FLOOR) if plan.blocks == 1 else maximum[:, part.rows]
            for keys in plan.chunks:
                some = _logits(q, by_key, ranges, part, keys, block, masked, scale, plan)
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
                attended += _dot(by_channel[part.head, :, keys], weights[keys, : part.size], (1, 0))
                yield
            if plan.blocks == 1:
                finish(part, attended, whole[part], highest[part])
            else:
                rows = part.rows
                shrink = jnp.exp2(maximum[:, rows] - highest[part])
                maximum[:, rows] = highest[part]
                total[:, rows] = total[:, rows] * shrink + whole[part]
                summed[:, rows] = summed[:, rows] * shrink + attended

        _staggered(plan.parts, multiply, weigh, attend)

    if plan.blocks == 1:
        seen = _where_seen(hulls, plan, block, run)

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

    _where_seen(hulls, plan, block, run)

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
            _clear(plan.packed % plan.rows, plan, q, out, dout)

    def run(masked: bool):
        _clear_past_end(block, plan, k, v)
        for head in range(plan.heads):
            turned[head] = k[head].T
            if plan.transposed:
                values_by_key[head] = v[head].T
        first = pl.multiple_of(block * plan.keys, plan.keys) if plan.blocks > 1 else 0

        def weigh(part: Part):
            head, rows = part
            there = _at(head, rows, plan)
            delta = _row_sums(out[there].astype(jnp.float32) * dout[there].astype(jnp.float32), plan)
            for keys in plan.chunks:
                logits = _logits(q, keys_by_key, ranges, part, keys, block, masked, scale, plan)
                some = jnp.exp2(logits - lse[head, :, rows] * LOG2_E)
                weights[keys, : part.size] = some.astype(weights.dtype)
                dweights = _by_row(values_by_key[head, keys], dout, part, plan)
                dlogits[keys, : part.size] = (some * (dweights - delta)).astype(dlogits.dtype)
                yield

        def attend(part: Part):
            head, rows = part
            dquery = jnp.zeros((), jnp.float32)
            for keys in plan.chunks:
                here = _at(head, keys, plan)
                there = _at(head, pl.ds(first + keys.start, keys.stop - keys.start), plan)
                dvalue = _over_rows(weights[keys, : part.size], dout, part, plan)
                dkey = _over_rows(dlogits[keys, : part.size], q, part, plan)
                dquery += _dot(keys_by_channel[head, :, keys], dlogits[keys, : part.size], (1, 0))
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
                dq[_at(head, rows, plan)] = dquery if plan.transposed else dquery.T
            else:
                dqueries[:, rows] += dquery

        _staggered(plan.parts, weigh, attend)

    if plan.blocks == 1:
        seen = _where_seen(hulls, plan, block, run)

        @pl.when(jnp.logical_not(seen))
        def _():
            for ref in (dq, dk, dv) if alone else (dq,):
                ref[...] = jnp.zeros_like(ref)
    else:

        @pl.when(block == 0)
        def _():
            dqueries[...] = jnp.zeros_like(dqueries)

        _where_seen(hulls, plan, block, run)

        @pl.when(block == plan.blocks - 1)
        def _():
            dquery = (dqueries[...] * scale).astype(dq.dtype)
            dq[0] = dquery if plan.transposed else dquery.T

    @pl.when((tile == plan.tiles - 1) & (block == plan.blocks - 1) & (not alone))
    def _():
        valid = _at(slice(None), slice(plan.num_keys), plan)
        dk[...] = (dkeys[valid] * scale).astype(dk.dtype)
        dv[...] = dvalues[valid].astype(dv.dtype)


def _by_head(x: Float[Array, "B L H C"], plan: Plan) -> Float[Array, "B*K L*H/K C"] | Float[Array, "B*H C L"]:
    b, length, heads, c = x.shape
    if plan.transposed:
        return x.transpose(0, 2, 3, 1).reshape(b * heads, c, length)
    x = x.reshape(b, length, plan.kv_heads, heads // plan.kv_heads, c)
    return jnp.moveaxis(x, 2, 1).reshape(b * plan.kv_heads, -1, c)


def _by_token(x: Array, shape: tuple[int, ...], plan: Plan) -> Float[Array, "B L H C"]:
    """What `_by_head` makes, back."""
    b, length, heads, c = shape
    if plan.transposed:
        return x.reshape(b, heads, c, length).transpose(0, 3, 1, 2)
    x = x.reshape(b, plan.kv_heads, length, heads // plan.kv_heads, c)
    return jnp.moveaxis(x, 1, 2).reshape(shape)


def _lying(heads, tokens, c, plan: Plan) -> tuple:
    """What `_by_head` makes has these three of each axis, in its order: sizes, or places of blocks."""
    return (heads, c, tokens) if plan.transposed else (heads, tokens, c)


def _turned(c: int, plan: Plan) -> tuple[int, int, int]:
    """The shape of a block's keys or values, the other way round than `_by_head` lays them."""
    heads, *turned = _lying(plan.heads, plan.keys, c, plan)
    return heads, *reversed(turned)


def _specs(plan: Plan, c: int) -> tuple[pl.BlockSpec, ...]:
    """Blocks of ranges, of rows, of keys (one that is repeated is not loaded again), of what each row has one of."""

    def key_block(program, tile, block, hulls):
        at = plan.tile(program, tile)
        return _lying(program, lax.max(hulls[0, at], lax.min(block, hulls[1, at] - 1)), 0, plan)

    return (
        pl.BlockSpec((plan.examples, 2, plan.rows), lambda program, tile, *_: (plan.example(program), 0, tile)),
        pl.BlockSpec(_lying(plan.heads, plan.rows, c, plan), lambda program, tile, *_: _lying(program, tile, 0, plan)),
        pl.BlockSpec(_lying(plan.heads, plan.keys, c, plan), key_block),
        pl.BlockSpec((plan.heads, 1, plan.rows), lambda program, tile, *_: (program, 0, tile)),
    )


def _cost(q, k, products: int, passes: int) -> tuple[int, int, int]:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return 2 * products * pairs * q.shape[3], passes * (q.size + k.size) * q.dtype.itemsize, pairs


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
    of_ranges, of_rows, of_keys, of_lse = _specs(plan, c)
    heads = b * plan.kv_heads
    out, lse = launch(
        partial(_forward, scale=scale, plan=plan),
        [mosaic_tpu_tiles.hulls(ranges, plan), ranges, *(_by_head(x, plan) for x in (q, k, v))],
        [
            jax.ShapeDtypeStruct(_lying(heads, plan.packed, c, plan), q.dtype),
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
                pltpu.VMEM(_turned(c, plan), v.dtype),
            ],
        ),
        parallel=(True, True, False),
        cost=_cost(q, k, products=2, passes=2),
        vmem_limit_bytes=VMEM_BYTES,
    )
    lse = lse[:, 0, : plan.packed, None]
    return _by_token(out, q.shape, plan), _by_token(lse, (b, t, n, 1), plan)[..., 0]


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
    of_ranges, of_rows, of_keys, of_lse = _specs(plan, c)
    of_whole = pl.BlockSpec(_lying(plan.heads, plan.num_keys, c, plan), lambda program, *_: (program, 0, 0))
    by_head = partial(_by_head, plan=plan)
    padding = (0, 0), (0, 0), (0, plan.padded - plan.packed)
    heads = b * plan.kv_heads
    lse = jnp.pad(by_head(lse[..., None]).reshape(heads, 1, plan.packed), padding, constant_values=NO_KEYS)
    whole = _lying(plan.heads, plan.blocks * plan.keys, c, plan)
    sums = [(c if plan.blocks > 1 else 1, plan.rows), whole, whole]
    halves = [*2 * [(plan.keys, plan.parts[0].size)], *(2 if plan.transposed else 1) * [_turned(c, plan)]]
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
            jax.ShapeDtypeStruct(_lying(heads, plan.packed, c, plan), q.dtype),
            *2 * [jax.ShapeDtypeStruct(_lying(heads, plan.num_keys, c, plan), k.dtype)],
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
        cost=_cost(q, k, products=5, passes=4),
        vmem_limit_bytes=VMEM_BYTES,
    )
    return (
        _by_token(dq, q.shape, plan),
        _by_token(dk, k.shape, plan),
        _by_token(dv, v.shape, plan),
    )
