"""Interval-masked attention in Triton, for NVIDIA GPUs from compute capability 8.0 up.

Why, in bytes (derived): for the prefix of 32 examples of Pi0 the logits of one layer are 0.68 GB in float32, and XLA
writes and reads them, and their half-precision probabilities, in main memory. Here they stay on chip: 0.24 GB are read
and written in all, and keys that nobody sees are not multiplied.

The G = N/K query heads that share a key/value head are packed into rows: row r of key/value head h is query token
r // G, head h * G + r % G, so eight heads of one token fill a tile as eight tokens would. The keys that a tile of rows
may see are the hull of its rows' intervals; blocks outside are neither loaded nor computed, blocks that every row sees
whole are not masked. The softmax runs online in base 2 (Dao 2023, https://arxiv.org/abs/2307.08691).

Few rows (inference) leave the GPU idle: the keys are then split over programs, and one more kernel combines the parts.

The backward pass is two kernels, one over tiles of rows (dq), one over tiles of keys (dk, dv, all rows of all G heads
summed on chip): nothing is added in memory, so results are the same from run to run.

Numerics: products accumulate in float32; the weights are rounded to v's dtype before they multiply v (before they are
normalised, where the reference rounds after), and the logits' gradients before they multiply q and k.
"""
# Kernels call jitted functions, which by their types never return.
# pyright: reportGeneralTypeIssues=false

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._triton import INTERPRET, Launch, cdiv, launch, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1e30)  # a logit that is not seen
FLOOR = tl.constexpr(-1e20)  # running maxima start here, so that exp2(MASKED - maximum) is 0 and never 1
NO_KEYS = tl.constexpr(1e30)  # logsumexp of a row without keys: exp2(logit - NO_KEYS) is 0


@dataclass(frozen=True)
class Tile:
    """Rows and keys of one tile, and how it is launched."""

    rows: int
    keys: int
    launch: Launch


@dataclass(frozen=True)
class TuningConfig:
    """Tiles of the forward kernel, of the forward kernel with few rows, and of the two backward kernels."""

    forward: Tile
    few_rows: Tile
    dq: Tile
    dkv: Tile


def _tile(rows: int, keys: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(rows, keys, Launch(num_warps, num_stages))


# (compute capability, head dimension up to) → tiles: among those that compile without spills the largest whose loads
# are pipelined. Not yet timed on a GPU (profiles/README.md says what has been).
TUNING: dict[tuple[int, int], TuningConfig] = {
    (80, 64): TuningConfig(_tile(128, 128, 8, 2), _tile(64, 64, 4, 2), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2)),
    (80, 128): TuningConfig(_tile(128, 64, 8, 3), _tile(64, 64, 4, 3), _tile(64, 64, 4, 2), _tile(64, 64, 8, 2)),
    (80, 256): TuningConfig(_tile(64, 64, 8, 2), _tile(64, 32, 4, 2), _tile(64, 64, 8, 2), _tile(16, 64, 8, 3)),
    (86, 64): TuningConfig(_tile(128, 64, 8, 3), _tile(64, 64, 4, 3), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2)),
    (86, 128): TuningConfig(_tile(128, 64, 8, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 8, 2)),
    (86, 256): TuningConfig(_tile(64, 32, 8, 2), _tile(64, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 32, 8, 2)),
    (90, 64): TuningConfig(_tile(128, 128, 8, 2), _tile(64, 64, 4, 3), _tile(128, 64, 8, 3), _tile(64, 128, 8, 2)),
    (90, 128): TuningConfig(_tile(128, 128, 8, 2), _tile(64, 64, 4, 3), _tile(128, 64, 8, 3), _tile(64, 64, 8, 3)),
    (90, 256): TuningConfig(_tile(128, 64, 8, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(32, 64, 8, 3)),
    (120, 64): TuningConfig(_tile(128, 64, 8, 3), _tile(64, 64, 4, 3), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2)),
    (120, 128): TuningConfig(_tile(128, 64, 8, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 8, 2)),
    (120, 256): TuningConfig(_tile(64, 32, 8, 2), _tile(64, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 32, 8, 2)),
}
COMBINED_ROWS = 8


def tuning(capability: int | None, head_dim: int, keys: int) -> TuningConfig:
    """The tiles for a head dimension on the newest listed generation that is not newer than this GPU."""
    if INTERPRET:  # every block takes as long, so many keys have larger ones
        size = 16 if keys <= 128 else 128
        return TuningConfig(*4 * [_tile(size, size, 1, 1)])
    assert capability is not None
    generation = max(listed for listed, _ in TUNING if listed <= capability)
    return TUNING[generation, min(limit for listed, limit in TUNING if listed == generation and limit >= head_dim)]


@triton.jit
def _split_row(row, T: tl.constexpr, G: tl.constexpr):
    """Packed rows → query token, head within its group, whether the row exists."""
    return row // G, row % G, row < T * G


@triton.jit
def _intervals(key_start, key_end, batch, token, exists, T: tl.constexpr, S: tl.constexpr):
    """The keys that rows see, cut to those that exist; rows that do not exist see none."""
    start = tl.load(key_start + batch * T + token, mask=exists, other=0)
    end = tl.load(key_end + batch * T + token, mask=exists, other=0)
    return tl.maximum(start, 0), tl.minimum(end, S)


@triton.jit
def _hull(start, end, sees, S: tl.constexpr, KEYS: tl.constexpr):
    """Where the first block of keys begins and the last ends; between which keys every row that sees any sees all."""
    first = tl.min(tl.where(sees, start, S)) // KEYS * KEYS
    last = tl.max(tl.where(sees, end, 0))
    return first, last, tl.max(tl.where(sees, start, 0)), tl.min(tl.where(sees, end, S))


@triton.jit
def _clamp(index, SIZE: tl.constexpr):
    """Past the end, the last index again: no mask for its loads, but whatever comes of it must not be used."""
    return tl.minimum(index, SIZE - 1)


@triton.jit
def _forward(
    q,
    k,
    v,
    key_start,
    key_end,
    out,  # [splits, B, T, N, C]
    lse,  # [splits, B, T, N]
    SCALE: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,  # C, rounded up to a power of two
):
    G: tl.constexpr = N // K
    TILES: tl.constexpr = (T * G + ROWS - 1) // ROWS
    SPAN: tl.constexpr = (S + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS  # keys of one split
    tile = TILES - 1 - tl.program_id(0) % TILES  # the last rows see most under a causal mask: they go first
    split = tl.program_id(0) // TILES % SPLITS
    head = tl.program_id(0) // (TILES * SPLITS) % K
    batch = (tl.program_id(0) // (TILES * SPLITS * K)).to(tl.int64)

    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    token, member, exists = _split_row(row, T, G)
    start, end = _intervals(key_start, key_end, batch, token, exists, T, S)
    start = tl.maximum(start, split * SPAN)
    end = tl.minimum(end, split * SPAN + SPAN)
    sees = start < end
    first, last, whole_from, whole_to = _hull(start, end, sees, S, KEYS)

    base = batch * T * N + head * G
    head_row = _clamp(token, T) * N + member
    at_rows = head_row[:, None] * C + channel[None, :]
    inside = exists[:, None] & (channel < C)[None, :]
    queries = tl.load(q + base * C + at_rows, mask=(channel < C)[None, :], other=0.0)
    keys_at = k + (batch * S * K + head) * C
    values_at = v + (batch * S * K + head) * C

    maximum = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    for block in range(first, last, KEYS):
        key = block + tl.arange(0, KEYS)
        at = _clamp(key, S)[:, None] * (K * C) + channel[None, :]
        keys = tl.load(keys_at + at, mask=(channel < C)[None, :], other=0.0)
        values = tl.load(values_at + at, mask=(channel < C)[None, :], other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (SCALE * LOG2_E)
        if (block < whole_from) | (block + KEYS > whole_to):
            seen = (start[:, None] <= key[None, :]) & (key[None, :] < end[:, None])
            logits = tl.where(seen, logits, MASKED)
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(values.dtype), values, summed * shrink[:, None], input_precision="ieee")
        maximum = new_maximum

    # A row that sees nothing was left unmasked in blocks that the others see whole.
    summed = tl.where(sees[:, None], summed / tl.where(sees, total, 1.0)[:, None], 0.0)
    logsumexp = (maximum + tl.log2(tl.where(sees, total, 1.0))) / LOG2_E
    nothing = FLOOR if SPLITS > 1 else NO_KEYS
    base += split * (B * T * N)
    tl.store(out + base * C + at_rows, summed.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + base + head_row, tl.where(sees, logsumexp, nothing), mask=exists)


@triton.jit
def _combine(
    parts,  # [splits, rows, C]
    lses,  # [splits, rows]
    out,
    lse,
    TOTAL: tl.constexpr,  # rows
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    exists = row < TOTAL
    inside = exists[:, None] & (channel < C)[None, :]
    maximum = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    for split in range(SPLITS):
        part_lse = tl.load(lses + split * TOTAL + row, mask=exists, other=FLOOR)
        part = tl.load(parts + (split * TOTAL + row)[:, None] * C + channel[None, :], mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, part_lse)
        weight = tl.where(part_lse > FLOOR, tl.exp2((part_lse - new_maximum) * LOG2_E), 0.0)
        shrink = tl.exp2((maximum - new_maximum) * LOG2_E)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + part * weight[:, None]
        maximum = new_maximum
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    result = summed / total[:, None]
    tl.store(out + row[:, None] * C + channel[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, tl.where(sees, maximum + tl.log2(total) / LOG2_E, NO_KEYS), mask=exists)


@triton.jit
def _dq(
    q,
    k,
    v,
    key_start,
    key_end,
    lse,
    delta,
    dout,
    dq,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):
    G: tl.constexpr = N // K
    TILES: tl.constexpr = (T * G + ROWS - 1) // ROWS
    tile = TILES - 1 - tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % K
    batch = (tl.program_id(0) // (TILES * K)).to(tl.int64)

    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    token, member, exists = _split_row(row, T, G)
    start, end = _intervals(key_start, key_end, batch, token, exists, T, S)
    sees = start < end
    first, last, whole_from, whole_to = _hull(start, end, sees, S, KEYS)

    base = batch * T * N + head * G
    head_row = _clamp(token, T) * N + member
    at_rows = head_row[:, None] * C + channel[None, :]
    inside = exists[:, None] & (channel < C)[None, :]
    queries = tl.load(q + base * C + at_rows, mask=(channel < C)[None, :], other=0.0)
    douts = tl.load(dout + base * C + at_rows, mask=(channel < C)[None, :], other=0.0)
    lse2 = tl.load(lse + base + head_row, mask=exists, other=NO_KEYS) * LOG2_E
    deltas = tl.load(delta + base + head_row, mask=exists, other=0.0)
    keys_at = k + (batch * S * K + head) * C
    values_at = v + (batch * S * K + head) * C

    summed = tl.zeros([ROWS, WIDE], tl.float32)
    for block in range(first, last, KEYS):
        key = block + tl.arange(0, KEYS)
        at = _clamp(key, S)[:, None] * (K * C) + channel[None, :]
        keys = tl.load(keys_at + at, mask=(channel < C)[None, :], other=0.0)
        values = tl.load(values_at + at, mask=(channel < C)[None, :], other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (SCALE * LOG2_E)
        if (block < whole_from) | (block + KEYS > whole_to):
            seen = (start[:, None] <= key[None, :]) & (key[None, :] < end[:, None])
            logits = tl.where(seen, logits, MASKED)
        weights = tl.exp2(logits - lse2[:, None])
        dweights = tl.dot(douts, tl.trans(values), input_precision="ieee")
        dlogits = weights * (dweights - deltas[:, None])
        summed = tl.dot(dlogits.to(keys.dtype), keys, summed, input_precision="ieee")
    tl.store(dq + base * C + at_rows, (summed * SCALE).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _dkv(
    q,
    k,
    v,
    key_start,
    key_end,
    lse,
    delta,
    dout,
    dk,
    dv,
    SCALE: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,  # how many intervals are looked at at once
):
    G: tl.constexpr = N // K
    TILES: tl.constexpr = (S + KEYS - 1) // KEYS
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % K
    batch = (tl.program_id(0) // (TILES * K)).to(tl.int64)

    key = tile * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, WIDE)
    key_base = (batch * S * K + head) * C
    at_keys = key[:, None] * (K * C) + channel[None, :]
    inside = (key < S)[:, None] & (channel < C)[None, :]
    keys = tl.load(k + key_base + at_keys, mask=inside, other=0.0)
    values = tl.load(v + key_base + at_keys, mask=inside, other=0.0)

    # The query tokens from the first to the last that see one of these keys.
    first_token = T
    last_token = 0
    for chunk in range(0, T, TOKENS):
        token = chunk + tl.arange(0, TOKENS)
        start, end = _intervals(key_start, key_end, batch, token, token < T, T, S)
        sees = (start < end) & (start < tile * KEYS + KEYS) & (end > tile * KEYS)
        first_token = tl.minimum(first_token, tl.min(tl.where(sees, token, T)))
        last_token = tl.maximum(last_token, tl.max(tl.where(sees, token + 1, 0)))

    base = batch * T * N + head * G
    dkeys = tl.zeros([KEYS, WIDE], tl.float32)
    dvalues = tl.zeros([KEYS, WIDE], tl.float32)
    for block in range(first_token * G // ROWS * ROWS, last_token * G, ROWS):
        row = block + tl.arange(0, ROWS)
        token, member, exists = _split_row(row, T, G)
        head_row = _clamp(token, T) * N + member
        at_rows = head_row[:, None] * C + channel[None, :]
        queries = tl.load(q + base * C + at_rows, mask=(channel < C)[None, :], other=0.0)
        douts = tl.load(dout + base * C + at_rows, mask=(channel < C)[None, :], other=0.0)
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (SCALE * LOG2_E)
        # What each row has one of is loaded where it is used: loaded earlier it costs some 20 registers a thread.
        start, end = _intervals(key_start, key_end, batch, token, exists, T, S)
        seen = (start[None, :] <= key[:, None]) & (key[:, None] < end[None, :])
        lse2 = tl.load(lse + base + head_row, mask=exists, other=NO_KEYS) * LOG2_E
        deltas = tl.load(delta + base + head_row, mask=exists, other=0.0)
        weights = tl.exp2(tl.where(seen, logits, MASKED) - lse2[None, :])
        dvalues = tl.dot(weights.to(douts.dtype), douts, dvalues, input_precision="ieee")
        dweights = tl.dot(values, tl.trans(douts), input_precision="ieee")
        dlogits = weights * (dweights - deltas[None, :])
        dkeys = tl.dot(dlogits.to(queries.dtype), queries, dkeys, input_precision="ieee")
    tl.store(dk + key_base + at_keys, (dkeys * SCALE).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + key_base + at_keys, dvalues.to(dv.dtype.element_ty), mask=inside)


def _constants(q, k, scale: float, tile: Tile) -> dict[str, Any]:
    """What all kernels need to know beforehand."""
    (_, t, n, c), (s, num_kv_heads) = q.shape, k.shape[1:3]
    wide = max(16, next_power_of_2(c))
    shape = {"SCALE": float(scale), "T": t, "S": s, "N": n, "K": num_kv_heads, "C": c}
    return {**shape, "ROWS": tile.rows, "KEYS": tile.keys, "WIDE": wide}


def num_splits(tiles: int, s: int, tile: Tile, num_cores: int) -> int:
    """Over how many programs the keys of one tile of rows are split, so that the GPU's cores are filled once."""
    blocks = cdiv(s, tile.keys)
    wanted = max(1, min(num_cores // tiles, blocks))
    return cdiv(blocks, cdiv(blocks, wanted))  # no split without keys


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
    splits: int | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """The attended values, and the logsumexp of each row's logits.

    splits: over how many programs the keys of a tile of rows are split; None fills the GPU.
    """
    b, t, n, c = q.shape
    s, num_kv_heads = k.shape[1:3]
    rows = t * (n // num_kv_heads)
    chosen = config or tuning(device.capability, c, s)
    tile = chosen.forward
    if splits is None:
        few = b * num_kv_heads * cdiv(rows, chosen.few_rows.rows)
        splits = num_splits(few, s, chosen.few_rows, device.num_cores or 1)
    if splits > 1:
        tile = chosen.few_rows
    run = functools.partial(launch, capability=device.capability)
    part = () if splits == 1 else (splits,)
    out, lse = run(
        _forward,
        [q, k, v, key_start, key_end],
        [
            jax.ShapeDtypeStruct((*part, *q.shape), jnp.float32 if part else q.dtype),
            jax.ShapeDtypeStruct((*part, b, t, n), jnp.float32),
        ],
        grid=cdiv(rows, tile.rows) * splits * num_kv_heads * b,
        how=tile.launch,
        **_constants(q, k, scale, tile),
        B=b,
        SPLITS=splits,
    )
    if splits > 1:
        out, lse = run(
            _combine,
            [out, lse],
            [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, t, n), jnp.float32)],
            grid=cdiv(b * t * n, COMBINED_ROWS),
            how=Launch(),
            TOTAL=b * t * n,
            C=c,
            SPLITS=splits,
            ROWS=COMBINED_ROWS,
            WIDE=max(16, next_power_of_2(c)),
        )
    return out, lse


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
    b, t, n, c = q.shape
    s, num_kv_heads = k.shape[1:3]
    chosen = config or tuning(device.capability, c, s)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    arrays = [q, k, v, key_start, key_end, lse, delta, dout.astype(q.dtype)]
    run = functools.partial(launch, capability=device.capability)
    (dq,) = run(
        _dq,
        arrays,
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=cdiv(t * (n // num_kv_heads), chosen.dq.rows) * num_kv_heads * b,
        how=chosen.dq.launch,
        **_constants(q, k, scale, chosen.dq),
    )
    dk, dv = run(
        _dkv,
        arrays,
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        grid=cdiv(s, chosen.dkv.keys) * num_kv_heads * b,
        how=chosen.dkv.launch,
        **_constants(q, k, scale, chosen.dkv),
        TOKENS=min(1024, next_power_of_2(t)),
    )
    return dq, dk, dv
