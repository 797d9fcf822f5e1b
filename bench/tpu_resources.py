"""What the TPU compiler makes of our kernels and of JAX's: cycles, copies, VMEM, beside each other.

    python -m bench.tpu_resources --out=profiles/<folder>              all that is not there yet
    python -m bench.tpu_resources --out=… --again=ours --only=v6e      ours once more, for one generation
    python -m bench.tpu_resources --out=… --tables                     the tables, from what is there

Compiles for single chips that are not there, one generation in one process, and runs the control flow of each kernel's
code (`bench.tpu_bundles`). A kernel takes the longer of its cycles and its copies at the bandwidth; what XLA does
around it (padding, transposes, copies of scalars) is estimated as in `pi0fast.estimate`. Nothing here is a measurement.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import tpu_bundles

ROOT = Path(__file__).parent.parent
RESULTS = "results.jsonl"
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


class Target(NamedTuple):
    """One chip. kind: as JAX calls it. cores: that share a kernel's work. units, lanes: matrix units of a core, and
    the rows and columns of each."""

    name: str
    topology: str
    kind: str
    cores: int
    units: int
    lanes: int


# https://docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e.
TARGETS = (
    Target("v5e", "v5e:1x1", "TPU v5 lite", 1, 4, 128),
    Target("v5p", "v5p:1x1x1", "TPU v5", 2, 4, 128),
    Target("v6e", "v6e:1x1", "TPU v6 lite", 1, 2, 256),
)
MATMUL_ROWS = 16  # of one operation of a matrix unit, in bfloat16

OURS = "mosaic_tpu"
# Peers are compiled for these cases, with each of these rows and keys of a block; the others are alike.
COMPARED = ("pi0_prefix", "pi0_suffix", "siglip", "causal")
PEERS = ("flash", "splash")
XLA = ("reference", "xla")
BLOCKS = ((256, 512), (512, 512), (256, 1024), (512, 1024), (1024, 1024))


class Job(NamedTuple):
    """One direction of one case by one contender. blocks: of a peer, rows and keys."""

    target: str
    op: str
    case: str
    backward: bool
    contender: str
    blocks: tuple[int, int] | None = None


@dataclass(frozen=True)
class KernelFigures:
    """seconds: the longer of cycles and copies. vmem: bytes. bundles, spills: in the code; the rest as in
    `tpu_bundles.Run`."""

    name: str
    seconds: float
    cycles: int
    stalls: int
    bytes: int
    vmem: int
    bundles: int
    spills: int
    units: dict[str, int]


@dataclass(frozen=True)
class Figures:
    """around_s: of XLA's instructions around the kernels. bytes: from and to HBM in all.

    bound_s, traffic_s: the case's operations at the peak, its least traffic at the bandwidth. flops: those operations.
    error: why there is nothing else.
    """

    job: Job
    commit: str
    flops: int
    bound_s: float
    traffic_s: float
    kernels: tuple[KernelFigures, ...] = ()
    around_s: float = 0.0
    bytes: float = 0.0
    bandwidth: float = 0.0
    error: str | None = None

    @property
    def kernel_s(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """Of the whole op."""
        return max(self.kernel_s + self.around_s, self.bytes / self.bandwidth)

    @property
    def floor_s(self) -> float:
        return max(self.bound_s, self.traffic_s)


def jobs(target: str) -> Iterator[Job]:
    """All of a generation, ours first."""
    from pi0fast_kernels.ada_rms_norm import cases as norms
    from pi0fast_kernels.prefix_lm_attention import cases as attentions

    both = (False, True)
    for case, backward in itertools.product(attentions.CASES, both):
        yield Job(target, "prefix_lm_attention", case.name, backward, OURS)
    for case, backward in itertools.product(norms.CASES, both):
        yield Job(target, "ada_rms_norm", case.name, backward, OURS)
    for name, backward, contender in itertools.product(COMPARED, both, XLA):
        yield Job(target, "prefix_lm_attention", name, backward, contender)
    for case, backward in itertools.product(norms.CASES, both):
        yield Job(target, "ada_rms_norm", case.name, backward, "reference")
    for name, backward, contender in itertools.product(COMPARED, both, PEERS):
        (case,) = [case for case in attentions.CASES if case.name == name]
        from bench.tpu_peers import blocks

        for sizes in dict.fromkeys(blocks(case, *sizes) for sizes in BLOCKS):
            yield Job(target, "prefix_lm_attention", name, backward, contender, tuple(sizes))


# ── Collected in a process of its own: libtpu reads its flags when it is loaded ───────────────────────────────────────


def collect(target: str, chosen: list[Job]) -> Iterator[dict[str, Any]]:
    """Figures of the jobs, one after the other, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": FLAGS.format(folder)}
        command = [sys.executable, "-m", "bench.tpu_resources", "--collect", folder, "--only", target]
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(json.dumps(chosen))
        run.stdin.close()
        for line in run.stdout:
            yield json.loads(line)
        if run.wait():
            raise subprocess.CalledProcessError(run.returncode, command)


def figures(job: Job, dumped: Path) -> Figures:
    """Compiles the job's program. dumped: the folder where libtpu writes."""
    import jax

    from bench import provenance
    from pi0fast import flops, hlo, targets
    from pi0fast.estimate import CLOCKS, estimate

    (target,) = [target for target in TARGETS if target.name == job.target]
    spec = flops.device(target.kind)
    assert spec is not None
    case, function, arguments = program(job)
    cost, least = case.flops(job.backward), case.bytes(job.backward)
    found = Figures(job, provenance.commit() or "", cost, cost / spec.flops, least / spec.bandwidth)
    for path in dumped.iterdir():
        path.unlink()
    chip = jax.sharding.SingleDeviceSharding(targets.devices(target.topology)[0])
    described = jax.sharding.AbstractDevice(device_kind=target.kind, num_cores=target.cores, platform="tpu")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments)
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
            traced = jax.jit(function).trace(*shapes)
        text = str(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return dataclasses.replace(found, error=f"{type(error).__name__}: {str(error)[:300]}")
    compiled = hlo.Program(text)
    scalars = _scalars(traced.jaxpr, _known(job, case, arguments))
    clock = CLOCKS[spec.kind]
    rate = 2 * target.lanes**2 * target.units * target.cores * clock / spec.flops
    matmul_cycles = round(MATMUL_ROWS * rate)
    kernels = []
    for name, instructions in compiled.computations.items():
        types = {x.name: x.type for x in instructions}
        calls = [x for x in instructions if 'custom_call_target="tpu_custom_call"' in x.line]
        for call in calls:
            given = next((some for kernel, some in scalars.items() if call.name.startswith(kernel)), [])
            words = [
                tpu_bundles.words(array, types[operand])
                for array, operand in zip(given, call.operands, strict=False)
            ]
            (path,) = dumped.glob(f"*-{call.name}-*[0-9]-final_bundles.txt")
            code = tpu_bundles.Kernel(path.read_text())
            run = code.run(words, matmul_cycles)
            seconds = max(run.cycles / clock, run.bytes / spec.bandwidth)
            kernels.append(KernelFigures(call.name, seconds, run.cycles, run.stalls, run.bytes, _vmem(call.line),
                                         code.bundles, code.spills, run.units))  # fmt: skip
        compiled.computations[name] = [x for x in instructions if x not in calls]
    around = estimate(compiled, spec, lambda collective: 0.0)
    return dataclasses.replace(
        found,
        kernels=tuple(kernels),
        around_s=around.compute_s,
        bytes=around.hbm_bytes + sum(kernel.bytes for kernel in kernels),
        bandwidth=spec.bandwidth,
    )
