"""One direction of one case, compiled for one TPU: what its kernels take, and what XLA does around them.

A kernel takes the longer of two: the cycles of its code (`bench.tpu.bundles`), and what it copies at the bandwidth.
XLA's own instructions (padding, transposes, the scalars) are estimated as in `pi0fast.estimate`. The whole takes at
least its memory traffic at the bandwidth. Estimates by the compiler, or derived from its code; nothing is measured.

libtpu must have been told where to write what it makes: `bundles` says how.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench import provenance
from bench.tpu import bundles, peers
from bench.tpu.scalars import scalars, words
from pi0fast import flops, hlo, targets
from pi0fast.estimate import CLOCKS, estimate
from pi0fast.flops import DeviceSpec
from pi0fast_kernels import ada_rms_norm, prefix_lm_attention
from pi0fast_kernels.ada_rms_norm import cases as norms
from pi0fast_kernels.prefix_lm_attention import cases as attentions

OURS = "mosaic_tpu"
PEERS = {"flash": peers.flash, "splash": peers.splash}
MATMUL_ROWS = 16  # that one operation of a matrix unit multiplies, in bfloat16


class Target(NamedTuple):
    """One chip. kind: as JAX calls it. cores: that share a kernel's work. units, lanes: matrix units of a core, and
    rows and columns of each."""

    topology: str
    kind: str
    cores: int
    units: int
    lanes: int

    @property
    def spec(self) -> DeviceSpec:
        found = flops.device(self.kind)
        assert found is not None
        return found

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return CLOCKS[self.spec.kind]

    @property
    def matmul_cycles(self) -> int:
        """For which one operation keeps a matrix unit busy, by the chip's peak."""
        rate = self.spec.flops / self.clock / self.cores / self.units
        return round(2 * MATMUL_ROWS * self.lanes**2 / rate)


# https://docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e
TARGETS = {
    "v5e": Target("v5e:1x1", "TPU v5 lite", 1, 4, 128),
    "v5p": Target("v5p:1x1x1", "TPU v5", 2, 4, 128),
    "v6e": Target("v6e:1x1", "TPU v6 lite", 1, 2, 256),
}


class Job(NamedTuple):
    """target, op, case: their names. contender: one of `PEERS`, or an implementation of ours. blocks: of a peer, rows
    and keys; None elsewhere."""

    target: str
    op: str
    case: str
    backward: bool
    contender: Any
    blocks: Any = None


@dataclass(frozen=True)
class KernelFigures:
    """seconds: the longer of cycles and copies. vmem: bytes. bundles, spills: in the code; all else of
    `bundles.Run`."""

    name: str
    seconds: float
    vmem: int
    bundles: int
    spills: int
    cycles: int
    stalls: int
    bytes: int
    units: dict[str, int]


@dataclass(frozen=True)
class Figures:
    """bound_s: the case's matrix products at the peak, zero for a norm. traffic_s: its least traffic at the bandwidth.

    around_s: of XLA's instructions around the kernels. copies_s: all traffic at the bandwidth. error: why there is
    nothing else.
    """

    job: Job
    commit: str | None
    bound_s: float
    traffic_s: float
    kernels: tuple[KernelFigures, ...] = ()
    around_s: float = 0.0
    copies_s: float = 0.0
    error: str | None = None

    @property
    def kernel_s(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """Of the whole op."""
        return max(self.kernel_s + self.around_s, self.copies_s)

    @property
    def floor_s(self) -> float:
        return max(self.bound_s, self.traffic_s)


def read(entry: dict[str, Any]) -> Figures:
    """From JSON."""
    kernels = tuple(KernelFigures(**x) for x in entry["kernels"])
    return Figures(**{**entry, "job": job(entry["job"]), "kernels": kernels})


def job(names: list[Any]) -> Job:
    """From JSON."""
    job = Job(*names)
    return job._replace(blocks=job.blocks and tuple(job.blocks))


def figures(job: Job, dumped: Path) -> Figures:
    """dumped: the folder where libtpu writes; what is there is removed first.

    Raises:
        ValueError: code that `bundles` cannot run, or products faster than the peak.
    """
    target = TARGETS[job.target]
    spec = target.spec
    case = find(job)
    products = 0 if job.op == "ada_rms_norm" else case.flops(job.backward)
    found = Figures(job, provenance.commit(), products / spec.flops, case.bytes(job.backward) / spec.bandwidth)
    for path in dumped.iterdir():
        path.unlink()
    try:
        text, prefetched = _compile(job, case, target)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return dataclasses.replace(found, error=f"{type(error).__name__}: {str(error)[:400]}")
    program = hlo.Program(text)
    kernels = []
    for name, instructions in program.computations.items():
        types = {x.name: x.type for x in instructions}
        calls = [x for x in instructions if 'custom_call_target="tpu_custom_call"' in x.line]
        program.computations[name] = [x for x in instructions if x not in calls]
        for call in calls:
            given = next((x for kernel, x in prefetched.items() if re.fullmatch(rf"{kernel}(\.\d+)?", call.name)), [])
            prefix = [words(x, types[operand]) for x, operand in zip(given, call.operands, strict=False)]
            (path,) = (path for path in dumped.glob(f"*-{call.name}-*") if "schedule-analysis" not in path.name)
            code = bundles.Kernel(path.read_text())
            run = code.run(prefix, target.matmul_cycles)
            seconds = max(run.cycles / target.clock, run.bytes / spec.bandwidth)
            kernels.append(KernelFigures(call.name, seconds, _vmem(call.line), code.bundles, code.spills, *run))
    around = estimate(program, spec, lambda collective: 0.0)
    copies = around.hbm_bytes + sum(kernel.bytes for kernel in kernels)
    found = dataclasses.replace(
        found, kernels=tuple(kernels), around_s=around.compute_s, copies_s=copies / spec.bandwidth
    )
    if found.seconds < found.bound_s:
        raise ValueError(f"{job} would be faster than the peak: {found.seconds} s for {found.bound_s} s of products")
    return found


def find(job: Job) -> Any:
    """The job's case."""
    named = norms.CASES if job.op == "ada_rms_norm" else attentions.CASES
    return next(case for case in named if case.name == job.case)


def _compile(job: Job, case: Any, target: Target) -> tuple[str, dict[str, list[Any]]]:
    """The optimised program, and the prefetched scalars of its kernels."""
    chip = jax.sharding.SingleDeviceSharding(targets.devices(target.topology)[0])
    described = jax.sharding.AbstractDevice(device_kind=target.kind, num_cores=target.cores, platform="tpu")

    def trace(function: Callable[..., Any], arguments: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
            return jax.jit(function).trace(*shapes)

    function, inputs, ranges = _op(job, case)
    known = [None] * len(inputs) + jax.tree.leaves(ranges)
    if not job.backward:
        traced = trace(lambda inputs, ranges: function(*inputs, *ranges), (inputs, ranges))
    else:  # what the forward pass saves is given, so that only the backward pass is compiled
        forward = trace(lambda inputs, ranges: jax.vjp(lambda *x: function(*x, *ranges), *inputs), (inputs, ranges))
        known, _ = scalars(forward.jaxpr, known)
        traced = trace(lambda out, pullback: pullback(out), forward.out_info)
    _, prefetched = scalars(traced.jaxpr, known)
    return str(traced.lower(lowering_platforms=("tpu",)).compile().as_text()), prefetched


def _op(job: Job, case: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """The op on arrays, the shapes of those that have gradients, and the others, which are known."""
    shapes = jax.eval_shape(case.inputs)
    if job.op == "ada_rms_norm":

        def norm(*arrays):
            return ada_rms_norm(**dict(zip(shapes, arrays, strict=True)), implementation=job.contender)

        return norm, tuple(shapes.values()), ()
    ranges = jax.jit(lambda: case.inputs()[3:])()
    if job.contender in PEERS:
        assert job.blocks is not None
        return PEERS[job.contender](case, peers.Blocks(*job.blocks)), shapes[:3], ranges

    def attend(*arrays):
        return prefix_lm_attention(*arrays, scale=case.scale, implementation=job.contender)

    return attend, shapes[:3], ranges


def _vmem(line: str) -> int:
    """Bytes that an instruction uses, beside arrays that XLA keeps in VMEM."""
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
    return int(used[1]) if used else 0
