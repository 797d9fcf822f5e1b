"""RMSNorm with residual, gate and modulation in Pallas, for TPUs from v5e up.

Why, in passes over `[B, T, D]`, one read or one write each: forward 2, with a residual 4; backward 3, with a residual
4, with a gate 6.

Numerics: float32 arithmetic, one rounding to x's dtype; the new residual is rounded before it is normalised. The
backward pass starts from that rounded residual and from the forward pass's float32 `rstd`, `rsqrt(mean(y²) + eps)`.

Backend: Mosaic for TPUs. A program takes a block of tokens into VMEM, of several examples where they are short, and
computes a chunk of them at a time. `rstd` lies along the lanes in HBM, where a column would take 128 times the bytes,
and is turned in VMEM. The backward kernel walks over the tokens of an example in order and sums the gradients of scale,
shift and gate in VMEM on the way, so results are the same from run to run. A token lies whole in one block, so D ends
at 4096.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_tpu import generation, launch

SUBLANES, LANES = 8, 128
# Blocks of a call that are at least made, where there are as many examples: the first read and the last write wait.
FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class TuningConfig:
    """block: bytes of x in a program's block, about. chunk: channels of tokens computed at once, about.

    lanes, sublanes: tokens of which a part of an example, and a chunk, are multiples. cores: TensorCores of a chip.
    """

    block: int
    chunk: int
    cores: int
    lanes: int = LANES
    sublanes: int = SUBLANES


# TPU generation → blocks; None for the interpreter. A block of 1 MiB takes HBM longer than the step around it. A chunk
# of 16 registers of 64 leaves room for what is computed from it: with 64 of them the compiler spilled 259 times, with
# 16 hardly ever (v5e, 2048 channels). Not yet timed on a TPU.
TUNING: dict[str | None, TuningConfig] = {
    "v5e": TuningConfig(2**20, 2**14, cores=1),
    "v5p": TuningConfig(2**20, 2**14, cores=2),
    "v6e": TuningConfig(2**20, 2**14, cores=1),
    None: TuningConfig(2**10, 2**7, cores=2, lanes=2, sublanes=2),
}
# VMEM that a kernel is sure to have, and what one that needs more asks for beside its blocks.
SCOPED_VMEM, MARGIN = 12 * 2**20, 4 * 2**20


@dataclass(frozen=True)
class Cut:
    """How a call is cut: blocks of `examples` × `rows` tokens, computed in chunks of `chunk` tokens.

    group: examples whose modulations, and the gradients of those, lie in one block: a whole tile of HBM, or XLA copies
    them into other tiles. splits: of the tokens of one example, so that every core has some.
    """

    b: int
    t: int
    group: int
    examples: int
    rows: int
    chunk: int
    splits: int

    @property
    def blocks(self) -> int:
        """Of one example's tokens."""
        return pl.cdiv(self.t, self.rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Parts that may run in any order, and in each, in order: examples, and of these the blocks."""
        return self.b // self.group * self.splits, self.group // self.examples, pl.cdiv(self.blocks, self.splits)

    def step(self, part, step):
        """Which of the blocks that is. Where the splits do not divide them, the last part steps past the last one."""
        return part % self.splits * self.grid[2] + step

    def index(self, part, member, step):
        """Examples and tokens of a block; past the last one, the last one again."""
        return part // self.splits * self.grid[1] + member, jnp.minimum(self.step(part, step), self.blocks - 1)


def cut(x: jax.Array, config: TuningConfig) -> Cut:
    """Blocks of about `config.block` bytes for x `[B, T, D]`."""
    b, t, d = x.shape
    token = d * x.dtype.itemsize
    rows = max(config.block // token // config.lanes, 1) * config.lanes
    chunk = max(config.chunk // max(d, config.lanes) // config.sublanes, 1) * config.sublanes
    group = math.gcd(b, SUBLANES)
    examples = 1
    if t <= rows:
        rows = t
        most = max(1, min(config.block // (token * t), b // FEWEST_BLOCKS))
        examples = max(n for n in range(1, most + 1) if group % n == 0)
    splits = min(config.cores, pl.cdiv(t, rows)) if b == 1 else 1
    return Cut(b, t, group, examples, rows, chunk, splits)


def _for_each_chunk(how: Cut, begin: Callable, chunk: Callable, end: Callable):
    """For each example: `begin(example)`, `chunk(example, row, tokens)` for all that exist, `end(example)`.

    row: where the example's modulations lie in their block.
    """

    def block(tokens: int) -> None:
        def run(example, _):
            row = pl.program_id(1) * how.examples + example

            def whole_chunk(i, _):
                chunk(example, row, pl.ds(pl.multiple_of(i * how.chunk, how.chunk), how.chunk))

            begin(example)
            lax.fori_loop(0, tokens // how.chunk, whole_chunk, None)
            if tokens % how.chunk:
                chunk(example, row, slice(tokens - tokens % how.chunk, tokens))
            end(example)

        lax.fori_loop(0, how.examples, run, None)

    step = how.step(pl.program_id(0), pl.program_id(2))
    whole, rest = divmod(how.t, how.rows)
    if whole:
        pl.when(step < whole)(partial(block, how.rows))
    if rest:
        pl.when(step == whole)(partial(block, rest))


def _at_first(run: Callable[[], None]) -> None:
    """Once in every part, before all else."""
    pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))(run)


def _forward(*refs, names: tuple[str, ...], how: Cut, eps: float):
    at = dict(zip(names, refs, strict=True))

    @_at_first
    def _():
        _widen(at)

    def chunk(example, row, tokens):
        y = at["x"][example, tokens].astype(jnp.float32)
        if "gate" in at:
            y *= at["wide_gate"][pl.ds(row, 1)]
        if "residual" in at:
            y += at["residual"][example, tokens].astype(jnp.float32)
            rounded = y.astype(at["total"].dtype)
            at["total"][example, tokens] = rounded
            y = rounded.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(y), axis=1, keepdims=True) + eps)
        at["column"][tokens] = inverse
        y *= inverse * at["wide_scale"][pl.ds(row, 1)]
        if "shift" in at:
            y += at["wide_shift"][pl.ds(row, 1)]
        at["normed"][example, tokens] = y.astype(at["normed"].dtype)

    def end(example):
        at["rstd"][example] = jnp.transpose(at["column"][...])

    _for_each_chunk(how, lambda _: None, chunk, end)


def _backward(*refs, names: tuple[str, ...], how: Cut):
    at = dict(zip(names, refs, strict=True))
    sums = [name for name in ("dscale", "dshift", "dgate") if name in at]

    @_at_first
    def _():
        _widen(at)
        for name in sums:
            at[f"{name}_sum"][...] = jnp.zeros_like(at[f"{name}_sum"])

    def add(name, row, terms):
        """[tokens, D], to the sums over every eighth token."""
        for first in range(0, terms.shape[0], SUBLANES):
            some = terms[first : first + SUBLANES]
            at[f"{name}_sum"][row, : some.shape[0]] += some

    def begin(example):
        at["column"][...] = jnp.transpose(at["rstd"][example])

    def chunk(example, row, tokens):
        inverse = at["column"][tokens]
        unit = at["total"][example, tokens].astype(jnp.float32) * inverse
        dout = at["dnormed"][example, tokens].astype(jnp.float32)
        add("dscale", row, dout * unit)
        if "dshift" in at:
            add("dshift", row, dout)
        dunit = dout * at["wide_scale"][pl.ds(row, 1)]
        dy = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=1, keepdims=True))
        if "dtotal" in at:
            dy += at["dtotal"][example, tokens].astype(jnp.float32)
        at["dresidual"][example, tokens] = dy.astype(at["dresidual"].dtype)
        if "dgate" in at:
            add("dgate", row, dy * at["x"][example, tokens].astype(jnp.float32))
            dx = dy * at["wide_gate"][pl.ds(row, 1)]
            at["dx"][example, tokens] = dx.astype(at["dx"].dtype)

    _for_each_chunk(how, begin, chunk, lambda _: None)

    @pl.when((pl.program_id(1) == how.grid[1] - 1) & (pl.program_id(2) == how.grid[2] - 1))
    def _():
        for name in sums:
            at[name][0] = jnp.sum(at[f"{name}_sum"][...], axis=1).astype(at[name].dtype)


def _widen(at) -> None:
    """Modulations in float32, of which a row can be read at any place; scale counted from one."""
    for name in ("scale", "shift", "gate"):
        if f"wide_{name}" in at:
            at[f"wide_{name}"][...] = at[name][0].astype(jnp.float32) + (name == "scale")


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
    b, t, _ = x.shape
    how = cut(x, config or TUNING[generation(device)])
    given = {"x": x, "residual": residual, "scale": scale, "shift": shift, "gate": gate}
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = {"normed": like_x, "rstd": jax.ShapeDtypeStruct((b, 1, t), jnp.float32)}
    if residual is not None:
        results["total"] = like_x
    operations = 4 + (shift is not None) + (residual is not None) + (gate is not None)
    made = _call(partial(_forward, eps=eps), given, results, {}, how, device, operations)
    return made["normed"], made["rstd"].reshape(b, t), made.get("total")


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
    b, _, d = total.shape
    how = cut(total, config or TUNING[generation(device)])
    modulations = {"scale": scale, "shift": shift, "gate": gate}
    like_total = jax.ShapeDtypeStruct(total.shape, total.dtype)
    given = {"total": total, "dnormed": dnormed, "dtotal": dtotal, "x": x, "rstd": rstd[:, None]}
    given |= {"scale": scale, "gate": gate}
    results = {"dresidual": like_total} | ({} if gate is None else {"dx": like_total})
    sums = {f"d{name}": m for name, m in modulations.items() if m is not None}
    shape = (b // how.group * how.splits, how.group, d)
    kinds = {name: jnp.float32 if how.splits > 1 else m.dtype for name, m in sums.items()}
    results |= {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    scratch = {f"{name}_sum": pltpu.VMEM((how.group, SUBLANES, d), jnp.float32) for name in sums}
    operations = 9 + (shift is not None) + (dtotal is not None) + 3 * (gate is not None)
    made = _call(_backward, given, results, scratch, how, device, operations)
    gradients = {
        name: jnp.sum(made[name].reshape(b, how.splits, d), axis=1).astype(m.dtype) for name, m in sums.items()
    }
    optional = (gradients.get("dshift"), made.get("dx"), gradients.get("dgate"))
    return made["dresidual"], gradients["dscale"], *optional


def _call(kernel, given, results, scratch, how: Cut, device, operations: int) -> dict[str, jax.Array]:
    """`kernel` over all blocks, on the arrays that are there and into the results, by name.

    operations: on each element of `[B, T, D]`.
    """
    d = given["scale"].shape[-1]
    modulations = ("scale", "shift", "gate")
    given = {name: array for name, array in given.items() if array is not None}
    given |= {name: given[name].reshape(-1, how.group, d) for name in modulations if name in given}

    def spec(name: str) -> pl.BlockSpec:
        if name == "rstd":
            return pl.BlockSpec(
                (how.examples, 1, how.rows), lambda *place: (how.index(*place)[0], 0, how.index(*place)[1])
            )
        if name in modulations:
            return pl.BlockSpec((1, how.group, d), lambda part, *_: (part // how.splits, 0, 0))
        if name in ("dscale", "dshift", "dgate"):
            return pl.BlockSpec((1, how.group, d), lambda part, *_: (part, 0, 0))
        return pl.BlockSpec((how.examples, how.rows, d), lambda *place: (*how.index(*place), 0))

    scratch = {"column": pltpu.VMEM((how.rows, 1), jnp.float32), **scratch}
    scratch |= {f"wide_{name}": pltpu.VMEM((how.group, d), jnp.float32) for name in modulations if name in given}
    arrays = [*given.values(), *results.values()]
    elements = how.b * how.t * d
    specs = [spec(name) for name in (*given, *results)]
    pairs = zip(specs, arrays, strict=True)
    vmem = 2 * sum(math.prod(cast(tuple[int, ...], block.block_shape)) * array.dtype.itemsize for block, array in pairs)
    vmem += sum(math.prod(kept.shape[:-1]) * max(kept.shape[-1], LANES) * 4 for kept in scratch.values())
    made = launch(
        partial(kernel, names=(*given, *results, *scratch), how=how),
        list(given.values()),
        list(results.values()),
        name="ada_rms_norm_forward" if "normed" in results else "ada_rms_norm_backward",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=how.grid,
            in_specs=specs[: len(given)],
            out_specs=specs[len(given) :],
            scratch_shapes=list(scratch.values()),
        ),
        parallel=(True, False, False),
        cost=(operations * elements, sum(array.size * array.dtype.itemsize for array in arrays), how.b * how.t),
        vmem_limit_bytes=vmem + MARGIN if vmem > SCOPED_VMEM else None,
    )
    return dict(zip(results, made, strict=True))
