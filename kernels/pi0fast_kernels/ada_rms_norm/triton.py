"""RMSNorm with residual, gate and modulation in Triton, for NVIDIA GPUs from compute capability 8.0 up.

Why, in passes over `[B, T, D]`, one read or one write each. XLA's are those of the reference and of its gradient from
the arguments, as jax 0.11.2 compiles them for an H100:

                              XLA   here
    forward                     2      2
    forward with residual       6      4    XLA adds the residual twice: for the norm, and to store it
    backward                    5      3    XLA reads all for the means over D, and again for the gradients
    backward with residual      8      4
    backward with gate         11      6

Numerics: float32 arithmetic, one rounding to x's dtype; the new residual is rounded before it is normalised. The
backward pass starts from that rounded residual and from the forward pass's float32 `rstd`, `rsqrt(mean(y²) + eps)`.

Backend: jax-triton. The forward kernel takes ROWS tokens a program. The backward kernel walks over LENGTH consecutive
tokens of one example and sums the gradients of scale, shift and gate on the way; JAX adds the sums of the programs.
Nothing is added in memory, so results are the same from run to run. A token lies whole in one program, so D ends at
4096: wider ones spill.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pi0fast_kernels import _dispatch
from pi0fast_kernels._triton import INTERPRET, Launch, cdiv, launch, next_power_of_2

# Tokens. The sums of a chunk are written and read in float32, beside a few passes over its tokens in half precision.
SHORTEST_CHUNK = 8


@dataclass(frozen=True)
class Block:
    """How many tokens a program takes at once, and how it is launched."""

    rows: int
    launch: Launch


@dataclass(frozen=True)
class TuningConfig:
    """fill: into how many chunks for each of the GPU's cores the backward pass cuts the tokens."""

    forward: Block
    backward: Block
    fill: int


def _config(forward_rows: int, backward_rows: int, num_warps: int, fill: int) -> TuningConfig:
    return TuningConfig(Block(forward_rows, Launch(num_warps)), Block(backward_rows, Launch(num_warps)), fill)


# (compute capability, width up to) → blocks. A thread has eight channels of a token, one load of 16 bytes, in at most
# 84 registers, with a gate in at most 118: 24 and 16 warps share a core. Not yet timed on a GPU (profiles/README.md).
TUNING: dict[tuple[int, int], TuningConfig] = {
    (80, 512): _config(4, 1, 2, 16),
    (80, 1024): _config(4, 1, 4, 8),
    (80, 2048): _config(4, 1, 8, 4),
    (80, 4096): _config(2, 1, 16, 2),
}


def tuning(capability: int | None, width: int, tokens: int) -> TuningConfig:
    """The blocks for a width on the newest listed generation that is not newer than this GPU."""
    if INTERPRET:  # every block takes as long, so many tokens have larger ones
        rows = min(64, max(2, next_power_of_2(tokens) // 32))
        return _config(rows, rows, 1, 2)
    assert capability is not None
    generation = max(listed for listed, _ in TUNING if listed <= capability)
    return TUNING[generation, min(limit for listed, limit in TUNING if listed == generation and limit >= width)]


@triton.jit
def _forward(
    x,
    scale,
    shift,
    residual,
    gate,
    normed,
    rstd,
    total,  # None without a residual
    EPS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,  # D, rounded up to a power of two
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (T + ROWS - 1) // ROWS
    batch = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    exists = first + row < T
    inside = exists[:, None] & (channel < D)[None, :]
    token = batch.to(tl.int64) * T + first
    base = token * D
    at = row[:, None] * D + channel[None, :]
    modulation = batch * D + channel

    # All loads come before the sum over D, so that they wait for memory once.
    y = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    scales = tl.load(scale + modulation, mask=channel < D, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        shifts = tl.load(shift + modulation, mask=channel < D, other=0.0).to(tl.float32)
    if HAS_GATE:
        y *= tl.load(gate + modulation, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + base + at, mask=inside, other=0.0).to(tl.float32)
        rounded = y.to(total.dtype.element_ty)
        tl.store(total + base + at, rounded, mask=inside)
        y = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 1) / D + EPS)
    tl.store(rstd + token + row, inverse, mask=exists)
    y = y * inverse[:, None] * (1.0 + scales)[None, :]
    if HAS_SHIFT:
        y += shifts[None, :]
    tl.store(normed + base + at, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    total,
    rstd,
    dnormed,
    scale,
    dtotal,
    x,
    gate,
    dresidual,  # the gradient of what was normed
    sums,  # [B, chunks, 1 + HAS_SHIFT + HAS_GATE, D]
    dx,  # None without a gate
    T: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    LENGTH: tl.constexpr,  # of a chunk, a multiple of ROWS
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    batch = tl.program_id(0) // CHUNKS
    first = tl.program_id(0) % CHUNKS * LENGTH
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    token = batch.to(tl.int64) * T + first
    base = token * D
    modulation = batch * D + channel
    scales = 1.0 + tl.load(scale + modulation, mask=channel < D, other=0.0).to(tl.float32)
    if HAS_GATE:
        gates = tl.load(gate + modulation, mask=channel < D, other=0.0).to(tl.float32)

    dscale = tl.zeros([WIDE], tl.float32)
    dshift = tl.zeros([WIDE], tl.float32)
    dgate = tl.zeros([WIDE], tl.float32)
    for offset in range(0, LENGTH, ROWS):
        exists = first + offset + row < T
        inside = exists[:, None] & (channel < D)[None, :]
        at = (offset + row)[:, None] * D + channel[None, :]
        # All loads come before the sum over D, so that they wait for memory once.
        inverse = tl.load(rstd + token + offset + row, mask=exists, other=0.0)[:, None]
        y = tl.load(total + base + at, mask=inside, other=0.0)
        dout = tl.load(dnormed + base + at, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            dkept = tl.load(dtotal + base + at, mask=inside, other=0.0)
        if HAS_GATE:
            added = tl.load(x + base + at, mask=inside, other=0.0)

        unit = y.to(tl.float32) * inverse
        dout = dout.to(tl.float32)
        dscale += tl.sum(dout * unit, 0)
        if HAS_SHIFT:
            dshift += tl.sum(dout, 0)
        dunit = dout * scales[None, :]
        dy = inverse * (dunit - unit * (tl.sum(dunit * unit, 1) / D)[:, None])
        if HAS_RESIDUAL:
            dy += dkept.to(tl.float32)
        tl.store(dresidual + base + at, dy.to(dresidual.dtype.element_ty), mask=inside)
        if HAS_GATE:
            dgate += tl.sum(dy * added.to(tl.float32), 0)
            tl.store(dx + base + at, (dy * gates[None, :]).to(dx.dtype.element_ty), mask=inside)

    at_sums = sums + tl.program_id(0).to(tl.int64) * ((1 + HAS_SHIFT + HAS_GATE) * D) + channel
    tl.store(at_sums, dscale, mask=channel < D)
    if HAS_SHIFT:
        tl.store(at_sums + D, dshift, mask=channel < D)
    if HAS_GATE:
        tl.store(at_sums + (HAS_SHIFT + 1) * D, dgate, mask=channel < D)


def num_rows(b: int, t: int, rows: int, num_cores: int) -> int:
    """Tokens of one program of the forward kernel: `rows`, or fewer so that few tokens still fill the GPU's cores."""
    while rows > 1 and b * cdiv(t, rows) < num_cores:
        rows //= 2
    return rows


def chunk_length(b: int, t: int, rows: int, programs: int) -> int:
    """Tokens of one program of the backward kernel, a multiple of `rows`, so that there are about `programs`."""
    length = max(cdiv(t, max(1, programs // b)), SHORTEST_CHUNK)
    return cdiv(min(length, t), rows) * rows


def forward(
    x: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"] | None = None,
    residual: Float[Array, "B T D"] | None = None,
    gate: Float[Array, "B D"] | None = None,
    *,
    eps: float,
    device: _dispatch.Device,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "B T D"] | None]:
    """The normed value, `rsqrt(mean(y²) + eps)` of each token, and the new residual where there is one."""
    b, t, d = x.shape
    block = (config or tuning(device.capability, d, t)).forward
    rows = num_rows(b, t, block.rows, device.num_cores or 1)
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = [like_x, jax.ShapeDtypeStruct((b, t), jnp.float32)]
    absent = {}
    if residual is None:
        absent["total"] = None
    else:
        results.append(like_x)
    normed, rstd, *total = launch(
        _forward,
        # In the place of an array that is absent another is passed, and not read.
        [x, scale, _or(shift, scale), _or(residual, x), _or(gate, scale)],
        results,
        grid=b * cdiv(t, rows),
        how=block.launch,
        capability=device.capability,
        EPS=float(eps),
        T=t,
        D=d,
        ROWS=rows,
        WIDE=next_power_of_2(d),
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        **absent,
    )
    return normed, rstd, total[0] if total else None


def backward(
    total: Float[Array, "B T D"],
    rstd: Float[Array, "B T"],
    dnormed: Float[Array, "B T D"],
    scale: Float[Array, "B D"],
    shift: Float[Array, "B D"] | None = None,
    dtotal: Float[Array, "B T D"] | None = None,
    x: Float[Array, "B T D"] | None = None,
    gate: Float[Array, "B D"] | None = None,
    *,
    device: _dispatch.Device,
    config: TuningConfig | None = None,
) -> tuple[
    Float[Array, "B T D"],
    Float[Array, "B D"],
    Float[Array, "B D"] | None,
    Float[Array, "B T D"] | None,
    Float[Array, "B D"] | None,
]:
    """Gradients of `total`, scale, shift, and with a gate also of x and the gate.

    total: what was normed, x or the new residual. dtotal: the new residual's own cotangent.
    """
    b, t, d = total.shape
    chosen = config or tuning(device.capability, d, t)
    block = chosen.backward
    length = chunk_length(b, t, block.rows, chosen.fill * (device.num_cores or 1))
    chunks = cdiv(t, length)
    like_total = jax.ShapeDtypeStruct(total.shape, total.dtype)
    num_sums = 1 + (shift is not None) + (gate is not None)
    results = [like_total, jax.ShapeDtypeStruct((b, chunks, num_sums, d), jnp.float32)]
    absent = {}
    if gate is None:
        absent["dx"] = None
    else:
        results.append(like_total)
    dresidual, sums, *dx = launch(
        _backward,
        [total, rstd, dnormed, scale, _or(dtotal, total), _or(x, total), _or(gate, scale)],
        results,
        grid=b * chunks,
        how=block.launch,
        capability=device.capability,
        T=t,
        D=d,
        CHUNKS=chunks,
        LENGTH=length,
        ROWS=block.rows,
        WIDE=next_power_of_2(d),
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=dtotal is not None,
        HAS_GATE=gate is not None,
        **absent,
    )
    summed = jnp.sum(sums, axis=1)
    dscale = summed[:, 0].astype(scale.dtype)
    dshift = None if shift is None else summed[:, 1].astype(shift.dtype)
    dgate = None if gate is None else summed[:, -1].astype(gate.dtype)
    return dresidual, dscale, dshift, dx[0] if dx else None, dgate


def _or(array: jax.Array | None, other: jax.Array) -> jax.Array:
    return other if array is None else array
