"""RMSNorm with residual, gate and modulation in Pallas, for TPUs from v5e up.

Why, in passes over `[B, T, D]`, one read or one write each:

                              XLA   here
    forward                     ?      2
    forward with residual       ?      4
    backward                    ?      3
    backward with residual      ?      4
    backward with gate          ?      6

Numerics: float32 arithmetic, one rounding to x's dtype; the new residual is rounded before it is normalised. The
backward pass starts from that rounded residual and from the forward pass's float32 `rstd`, `rsqrt(mean(y²) + eps)`.

Backend: Mosaic for TPUs. A program takes a block of tokens into VMEM, of several examples where they are short, and
computes a chunk of them at a time. `rstd` lies along the lanes in HBM, where a column would take 128 times the bytes,
and is turned in VMEM. The backward kernel walks over the tokens of an example in order and sums the gradients of scale,
shift and gate in VMEM on the way, so results are the same from run to run. A token lies whole in one block, so D ends
at 4096.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
FEWEST_PROGRAMS = 8


@dataclass(frozen=True)
class TuningConfig:
    """block: bytes of x in a program's block, about. chunk: tokens computed at once.

    align: a block that is a part of an example's tokens is a multiple of this. cores: TensorCores that share a call.
    """

    block: int
    chunk: int
    align: int
    cores: int


# TPU generation → blocks; None for the interpreter, which takes any alignment.
TUNING: dict[str | None, TuningConfig] = {
    "v5e": TuningConfig(2**20, 32, LANES, 1),
    "v5p": TuningConfig(2**20, 32, LANES, 2),
    "v6e": TuningConfig(2**20, 32, LANES, 1),
    None: TuningConfig(2**10, 4, 2, 2),
}


@dataclass(frozen=True)
class Blocks:
    """How a call is cut: `examples` × `rows` tokens a block, `chunk` tokens at once."""

    b: int
    t: int
    examples: int
    rows: int
    chunk: int
    splits: int

    @property
    def count(self) -> int:
        """Blocks of one example's tokens."""
        return pl.cdiv(self.t, self.rows)

    @property
    def steps(self) -> int:
        """Of them, those that one program of the parallel axis walks over."""
        return pl.cdiv(self.count, self.splits)

    def index(self, program: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which examples and which of their blocks; after the last one the same again."""
        return program // self.splits, jnp.minimum(program % self.splits * self.steps + step, self.count - 1)


def blocks(x: jax.Array, config: TuningConfig) -> Blocks:
    """Blocks of about `config.block` bytes for x `[B, T, D]`."""
    b, t, d = x.shape
    token = d * x.dtype.itemsize
    rows = max(config.block // token // config.align, 1) * config.align
    examples = 1
    if t <= rows:
        rows = t
        most = max(1, min(config.block // (token * t), b // FEWEST_PROGRAMS))
        examples = max(n for n in range(1, most + 1) if b % n == 0)
    splits = min(config.cores, pl.cdiv(t, rows)) if b == 1 else 1
    return Blocks(b, t, examples, rows, config.chunk, splits)


def _for_each_chunk(cut: Blocks, step: jax.Array, begin: Callable, chunk: Callable, end: Callable | None = None):
    """`begin(example)`, `chunk(example, rows)` for all its tokens that exist, `end(example)`; of each example in turn.

    step: of the blocks that this program walks over.
    """

    def block(tokens: int) -> None:
        def whole_chunk(example, i, _):
            chunk(example, pl.ds(pl.multiple_of(i * cut.chunk, cut.chunk), cut.chunk))

        def run(example, _):
            begin(example)
            lax.fori_loop(0, tokens // cut.chunk, partial(whole_chunk, example), None)
            if tokens % cut.chunk:
                chunk(example, slice(tokens - tokens % cut.chunk, tokens))
            if end is not None:
                end(example)

        lax.fori_loop(0, cut.examples, run, None)

    # A block past the last one exists where the splits do not divide the blocks.
    place = pl.program_id(0) % cut.splits * cut.steps + step
    rest = cut.t % cut.rows or cut.rows
    pl.when(place == cut.count - 1)(partial(block, rest))
    if cut.count > 1:
        pl.when(place < cut.count - 1)(partial(block, cut.rows))


def _forward(*refs, names: tuple[str, ...], cut: Blocks, eps: float):
    at = dict(zip(names, refs, strict=True))
    column = at["column"]

    def chunk(example, rows):
        y = at["x"][example, rows].astype(jnp.float32)
        if "gate" in at:
            y *= at["gate"][example].astype(jnp.float32)
        if "residual" in at:
            y += at["residual"][example, rows].astype(jnp.float32)
            rounded = y.astype(at["total"].dtype)
            at["total"][example, rows] = rounded
            y = rounded.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(y), axis=1, keepdims=True) + eps)
        column[rows] = inverse
        y *= inverse * (1.0 + at["scale"][example].astype(jnp.float32))
        if "shift" in at:
            y += at["shift"][example].astype(jnp.float32)
        at["normed"][example, rows] = y.astype(at["normed"].dtype)

    def end(example):
        at["rstd"][example] = jnp.transpose(column[...])

    _for_each_chunk(cut, pl.program_id(1), lambda _: None, chunk, end)


def _backward(*refs, names: tuple[str, ...], cut: Blocks):
    at = dict(zip(names, refs, strict=True))
    column = at["column"]
    sums = [name for name in ("dscale", "dshift", "dgate") if name in at]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        for name in sums:
            at[f"{name}_sum"][...] = jnp.zeros_like(at[f"{name}_sum"])

    def add(name, example, terms):
        """[rows, D], to the sums over every eighth token."""
        for first in range(0, terms.shape[0], SUBLANES):
            some = terms[first : first + SUBLANES]
            at[f"{name}_sum"][example, : some.shape[0]] += some

    def begin(example):
        column[...] = jnp.transpose(at["rstd"][example])

    def chunk(example, rows):
        inverse = column[rows]
        unit = at["total"][example, rows].astype(jnp.float32) * inverse
        dout = at["dnormed"][example, rows].astype(jnp.float32)
        add("dscale", example, dout * unit)
        if "dshift" in at:
            add("dshift", example, dout)
        dunit = dout * (1.0 + at["scale"][example].astype(jnp.float32))
        dy = inverse * (dunit - unit * jnp.mean(dunit * unit, axis=1, keepdims=True))
        if "dtotal" in at:
            dy += at["dtotal"][example, rows].astype(jnp.float32)
        at["dresidual"][example, rows] = dy.astype(at["dresidual"].dtype)
        if "dgate" in at:
            add("dgate", example, dy * at["x"][example, rows].astype(jnp.float32))
            dx = dy * at["gate"][example].astype(jnp.float32)
            at["dx"][example, rows] = dx.astype(at["dx"].dtype)

    _for_each_chunk(cut, step, begin, chunk)

    @pl.when(step == cut.steps - 1)
    def _():
        for name in sums:
            at[name][...] = jnp.sum(at[f"{name}_sum"][...], axis=1, keepdims=True)


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
    cut = blocks(x, config or TUNING[generation(device)])
    given = {"x": x, "residual": residual, "scale": scale, "shift": shift, "gate": gate}
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = {"normed": like_x, "rstd": jax.ShapeDtypeStruct((b, 1, t), jnp.float32)}
    if residual is not None:
        results["total"] = like_x
    operations = 4 + (shift is not None) + (residual is not None) + (gate is not None)
    made = _call(partial(_forward, eps=eps), given, results, {}, cut, device, operations)
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
    b, t, d = total.shape
    cut = blocks(total, config or TUNING[generation(device)])
    modulations = {"scale": scale, "shift": shift, "gate": gate}
    like_total = jax.ShapeDtypeStruct(total.shape, total.dtype)
    given = {"total": total, "dnormed": dnormed, "dtotal": dtotal, "x": x, "rstd": rstd[:, None]}
    given |= {"scale": scale, "gate": gate}
    results = {"dresidual": like_total} | ({} if gate is None else {"dx": like_total})
    sums = {f"d{name}": m for name, m in modulations.items() if m is not None}
    results |= {name: jax.ShapeDtypeStruct((b * cut.splits, 1, d), jnp.float32) for name in sums}
    scratch = {f"{name}_sum": pltpu.VMEM((cut.examples, SUBLANES, d), jnp.float32) for name in sums}
    operations = 9 + (shift is not None) + (dtotal is not None) + 3 * (gate is not None)
    made = _call(_backward, given, results, scratch, cut, device, operations)
    gradients = {
        name: jnp.sum(made[name].reshape(b, cut.splits, d), axis=1).astype(m.dtype) for name, m in sums.items()
    }
    optional = (gradients.get("dshift"), made.get("dx"), gradients.get("dgate"))
    return made["dresidual"], gradients["dscale"], *optional


def _call(kernel, given, results, scratch, cut: Blocks, device, operations: int) -> dict[str, jax.Array]:
    """`kernel` over all blocks, on the arrays that are there and into the results, by name.

    operations: on each element of `[B, T, D]`.
    """
    given = {name: array for name, array in given.items() if array is not None}
    given |= {name: array[:, None] for name, array in given.items() if array.ndim == 2}
    rows, d = cut.rows, given["scale"].shape[-1]

    def spec(name: str) -> pl.BlockSpec:
        if name == "rstd":
            return pl.BlockSpec((cut.examples, 1, rows), lambda p, s: (cut.index(p, s)[0], 0, cut.index(p, s)[1]))
        if name in ("scale", "shift", "gate"):
            return pl.BlockSpec((cut.examples, 1, d), lambda p, s: (cut.index(p, s)[0], 0, 0))
        if name in ("dscale", "dshift", "dgate"):
            return pl.BlockSpec((cut.examples, 1, d), lambda p, s: (p, 0, 0))
        return pl.BlockSpec((cut.examples, rows, d), lambda p, s: (*cut.index(p, s), 0))

    scratch = {"column": pltpu.VMEM((rows, 1), jnp.float32), **scratch}
    arrays = [*given.values(), *results.values()]
    elements = cut.b * cut.t * d
    made = launch(
        partial(kernel, names=(*given, *results, *scratch), cut=cut),
        list(given.values()),
        list(results.values()),
        name=f"ada_rms_norm{kernel.__name__ if kernel is _backward else '_forward'}",
        device=device,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(cut.b // cut.examples * cut.splits, cut.steps),
            in_specs=[spec(name) for name in given],
            out_specs=[spec(name) for name in results],
            scratch_shapes=list(scratch.values()),
        ),
        parallel=(True, False),
        cost=(operations * elements, sum(array.size * array.dtype.itemsize for array in arrays), cut.b * cut.t),
    )
    return dict(zip(results, made, strict=True))
