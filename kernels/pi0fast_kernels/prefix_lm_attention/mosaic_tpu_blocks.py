"""What the TPU attention's two kernels share: how arrays lie, and what is done with a block of keys.

`mosaic_tpu` has the kernels, and why they are as they are.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pi0fast_kernels.prefix_lm_attention import mosaic_tpu_tiles
from pi0fast_kernels.prefix_lm_attention.mosaic_tpu_tiles import LANES, Part, Plan

LOG2_E = 1.4426950408889634
MASKED = -1e30  # a logit that is not seen


def at(head: int | slice, tokens, plan: Plan) -> tuple:
    """The index of tokens of a head, or of several, in an array that lies as `Plan.transposed` says."""
    return (head, slice(None), tokens) if plan.transposed else (head, tokens)


def row_sums(x: Float[Array, "rows C"] | Float[Array, "C rows"], plan: Plan) -> Float[Array, "1 rows"]:
    """Over C. Along lanes, registers side by side are added first, so that fewer are transposed."""
    if plan.transposed:
        return jnp.sum(x, axis=0, keepdims=True)
    columns = [x[:, lanes] for lanes in mosaic_tpu_tiles.cut(x.shape[1], LANES)]
    if x.shape[1] % LANES == 0:
        x = sum(columns[1:], columns[0])
    return jnp.sum(x.T, axis=0, keepdims=True)


def dot(a, b, over: tuple[int, int]):
    """The product of a and b in float32, summed over these axes."""
    if over == (1, 1) and b.shape[0] == 1:  # for a matrix and one row of half precision Mosaic has no product
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((over[:1], over[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def by_row(a: Float[Array, "keys C"], x, part: Part, plan: Plan) -> Float[Array, "keys rows"]:
    """The product of each key's vector with that of each row of x."""
    return dot(a, x[at(*part, plan)], (1, 0) if plan.transposed else (1, 1))


def over_rows(weights: Float[Array, "keys rows"], x, part: Part, plan: Plan):
    """For each key the weighted sum of the rows of x. [keys, C], or [C, keys] as `Plan.transposed` says."""
    rows = x[at(*part, plan)]
    return dot(rows, weights, (1, 1)) if plan.transposed else dot(weights, rows, (1, 0))


def interval(ranges, part: Part) -> tuple[Int[Array, "1 rows"], Int[Array, "1 rows"]]:
    """The keys that each row sees, from and to; heads of one example see the same."""
    example = min(part.head, ranges.shape[0] - 1)
    return ranges[example, 0:1, part.rows], ranges[example, 1:2, part.rows]


def logits(q, k, ranges, part: Part, keys: slice, block, masked: bool, scale: float, plan: Plan):
    """Of a chunk of a block's keys, in base 2. k: [head, keys, C]. Returns [keys, rows]."""
    logits = by_row(k[part.head, keys], q, part, plan) * (scale * LOG2_E)
    start, end = interval(ranges, part)
    key = block * plan.keys + keys.start + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    if masked or keys.start < plan.inner.start:
        logits = jnp.where(start <= key, logits, MASKED)
    if masked or keys.stop > plan.inner.stop:
        logits = jnp.where(key < end, logits, MASKED)
    return logits


def staggered(parts: list[Part], *stages: Callable[[Part], Iterator[None]]) -> None:
    """Every stage on every part, each stage one part behind the one before it.

    The stages take turns at every `yield`, the last one first: what they compute then is independent, so that the
    compiler can overlap it, and a stage may overwrite what the one after it has just read.
    """
    for step in range(len(parts) + len(stages) - 1):
        running = [stage(parts[step - lag]) for lag, stage in enumerate(stages) if 0 <= step - lag < len(parts)]
        for _ in zip_longest(*reversed(running)):
            pass


def clear(first: int, plan: Plan, *refs) -> None:
    """Tokens from the first on."""
    for ref in refs:
        past = at(0, slice(first, None), plan)
        ref[past] = jnp.zeros_like(ref[past])


def clear_past_end(block, plan: Plan, *refs) -> None:
    """Zeros where the last block of keys has none: whatever is there would spoil sums, zero weights or not."""
    if plan.num_keys % plan.keys:

        @pl.when(block == plan.blocks - 1)
        def _():
            clear(plan.num_keys % plan.keys, plan, *refs)


def where_seen(hulls, plan: Plan, block, run: Callable[[bool], None]) -> jax.Array:
    """`run(masked)` if the tile sees any of the block's keys; whether it does. masked: `plan.inner` must be, too."""
    first, last, whole_from, whole_to = (hulls[i, plan.tile(pl.program_id(0), pl.program_id(1))] for i in range(4))
    partly = (block * plan.keys + plan.inner.start < whole_from) | (block * plan.keys + plan.inner.stop > whole_to)
    seen = (first <= block) & (block < last)
    pl.when(seen & partly)(partial(run, True))
    pl.when(seen & jnp.logical_not(partly))(partial(run, False))
    return seen


def by_head(x: Float[Array, "B L H C"], plan: Plan) -> Float[Array, "B*K L*H/K C"] | Float[Array, "B*H C L"]:
    b, length, heads, c = x.shape
    if plan.transposed:
        return x.transpose(0, 2, 3, 1).reshape(b * heads, c, length)
    x = x.reshape(b, length, plan.kv_heads, heads // plan.kv_heads, c)
    return jnp.moveaxis(x, 2, 1).reshape(b * plan.kv_heads, -1, c)


def by_token(x: Array, shape: tuple[int, ...], plan: Plan) -> Float[Array, "B L H C"]:
    """What `by_head` makes, back."""
    b, length, heads, c = shape
    if plan.transposed:
        return x.reshape(b, heads, c, length).transpose(0, 3, 1, 2)
    x = x.reshape(b, plan.kv_heads, length, heads // plan.kv_heads, c)
    return jnp.moveaxis(x, 1, 2).reshape(shape)


def lying(heads, tokens, c, plan: Plan) -> tuple:
    """What `by_head` makes has these three of each axis, in its order: sizes, or places of blocks."""
    return (heads, c, tokens) if plan.transposed else (heads, tokens, c)


def turned(c: int, plan: Plan) -> tuple[int, int, int]:
    """The shape of a block's keys or values, the other way round than `by_head` lays them."""
    heads, *turned = lying(plan.heads, plan.keys, c, plan)
    return heads, *reversed(turned)


def specs(plan: Plan, c: int) -> tuple[pl.BlockSpec, ...]:
    """Blocks of ranges, of rows, of keys (one that is repeated is not loaded again), of what each row has one of."""

    def key_block(program, tile, block, hulls):
        at = plan.tile(program, tile)
        return lying(program, lax.max(hulls[0, at], lax.min(block, hulls[1, at] - 1)), 0, plan)

    return (
        pl.BlockSpec((plan.examples, 2, plan.rows), lambda program, tile, *_: (plan.example(program), 0, tile)),
        pl.BlockSpec(lying(plan.heads, plan.rows, c, plan), lambda program, tile, *_: lying(program, tile, 0, plan)),
        pl.BlockSpec(lying(plan.heads, plan.keys, c, plan), key_block),
        pl.BlockSpec((plan.heads, 1, plan.rows), lambda program, tile, *_: (program, 0, tile)),
    )


def cost(q, k, products: int, passes: int) -> tuple[int, int, int]:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return 2 * products * pairs * q.shape[3], passes * (q.size + k.size) * q.dtype.itemsize, pairs
