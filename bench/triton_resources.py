"""What the compiler makes of every Triton kernel that ships: registers, spills, shared memory, instructions.

    python -m bench.triton_resources                             prints the table
    python -m bench.triton_resources --out=profiles/<folder>     writes it there, with the raw figures

Compiles for GPUs that are not there, exactly as jax-triton does for those that are. Figures of a compiler: they show
that a kernel fits and uses the tensor cores, and say nothing of its speed.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import compiler_figures

ROOT = Path(__file__).parent.parent


class Target(NamedTuple):
    """A GPU as JAX describes it: (capability, device kind, streaming multiprocessors)."""

    capability: int
    kind: str
    num_cores: int


# NVIDIA's data sheets: A100 SXM, L40S, H100 SXM, GeForce RTX 5090.
TARGETS = (
    Target(80, "NVIDIA A100-SXM4-80GB", 108),
    Target(89, "NVIDIA L40S", 142),
    Target(90, "NVIDIA H100 80GB HBM3", 132),
    Target(120, "NVIDIA GeForce RTX 5090", 170),
)

INSTRUCTIONS = ("HGMMA", "HMMA", "LDL", "STL", "MUFU.EX2", "LDGSTS", "LDG.E.128", "STG.E.128", "BAR.SYNC", "SHFL")


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel of one case on one target.

    spilled: bytes of local memory in which registers are kept. shared: bytes. serialized: ptxas says that it waits for
    each wgmma before it issues the next. instructions: how many stand in the code.
    """

    target: str
    capability: int
    op: str
    case: str
    kernel: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    serialized: bool
    instructions: dict[str, int]


# ── Collected in a process of its own: Triton and jax-triton read their environment when they are imported ────────────


def collect_all() -> list[Resources]:
    """Every kernel of every case on every target, two targets at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [entry for entries in pool.map(collect, TARGETS) for entry in entries]


def collect(target: Target) -> list[Resources]:
    """Every kernel of every case, compiled for one target."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        environment["JAX_TRITON_DUMP_DIR"] = folder
        command = [sys.executable, "-m", "bench.triton_resources", "--collect", str(target.capability)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return [Resources(**entry) for entry in json.loads(done.stdout)]


def _collect_here(target: Target) -> Iterator[Resources]:
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind=target.kind, num_cores=target.num_cores, platform="cuda")
    dumped = Path(os.environ["JAX_TRITON_DUMP_DIR"])
    seen = set()
    for op, case, function, arguments in _programs():
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        for folder in sorted(set(dumped.iterdir()) - seen, key=lambda folder: folder.stat().st_mtime_ns):
            seen.add(folder)
            yield _read(folder, target, op, case)


def _programs() -> Iterator[tuple[str, str, Callable[..., Any], tuple[Any, ...]]]:
    """Programs that between them launch every kernel with every tile: (op, case, function, abstract arguments)."""
    import jax
    import jax.numpy as jnp

    from pi0fast_kernels import ada_rms_norm, prefix_lm_attention
    from pi0fast_kernels.ada_rms_norm import cases as norms
    from pi0fast_kernels.ada_rms_norm import triton as norm_kernels
    from pi0fast_kernels.prefix_lm_attention import cases as attentions

    def total(results: Any) -> jax.Array:
        return sum((jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(results)), jnp.zeros(()))

    named = {case.name: case for case in attentions.CASES}
    gqa, inference = named["causal_gqa"], named["pi0_inference"]
    smaller = [dataclasses.replace(gqa, name="causal_gqa_64", head_dim=64)]
    smaller += [dataclasses.replace(inference, name=f"pi0_inference_{c}", head_dim=c) for c in (64, 128)]
    for case in (*attentions.CASES, *smaller):

        def attend(*arrays, case=case):
            return prefix_lm_attention(*arrays, scale=case.scale, implementation="triton")

        function = attend if "inference" in case.name else jax.grad(lambda *x, f=attend: total(f(*x)), (0, 1, 2))
        yield "prefix_lm_attention", case.name, function, jax.eval_shape(case.inputs)

    adaptive = next(case for case in norms.CASES if case.adaptive)
    limits = sorted({limit for _, limit in norm_kernels.TUNING})
    wider = [dataclasses.replace(adaptive, name=f"adaptive_{width}", width=width) for width in limits]
    for case in (*norms.CASES, *wider):
        arguments = jax.eval_shape(case.inputs)

        def norm(*arrays, names=tuple(arguments)):
            return total(ada_rms_norm(**dict(zip(names, arrays, strict=True)), implementation="triton"))

        yield "ada_rms_norm", case.name, jax.grad(norm, tuple(range(len(arguments)))), tuple(arguments.values())


def _read(folder: Path, target: Target, op: str, case: str) -> Resources:
    """From what jax-triton writes about a kernel that it compiled."""
    config = (folder / "config").read_text()
    (ptx,) = folder.glob("*.ptx")
    shared = int((folder / f"{ptx.stem}.compile_info").read_text().rsplit(":", 1)[1])
    registers, spilled, serialized, sass = _assemble(ptx)

    def constant(name: str) -> int | None:
        found = re.search(rf"\('{name}', (\d+)\)", config)
        return int(found[1]) if found else None

    def option(name: str) -> int:
        found = re.search(rf"{name}=(\d+)", config)
        assert found, f"{folder}/config has no {name}"
        return int(found[1])

    tile = " × ".join(str(size) for size in (constant("ROWS"), constant("KEYS"), constant("WIDE")) if size is not None)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in INSTRUCTIONS}
    return Resources(
        target.kind,
        target.capability,
        op,
        case,
        ptx.stem.lstrip("_"),
        tile,
        option("num_warps"),
        option("num_stages"),
        registers,
        spilled,
        shared,
        serialized,
        counts,
    )


def _assemble(ptx: Path) -> tuple[int, int, bool, str]:
    """Registers a thread, bytes of stack and local memory, whether wgmma is serialized, and the machine code.

    By the ptxas that comes with Triton; JAX uses the one of its CUDA libraries.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = re.search(r"\.target (sm_\w+)", ptx.read_text())
    assert found, f"{ptx} names no target"
    architecture = found[1]
    ptxas = tools / ("ptxas-blackwell" if architecture.startswith(("sm_10", "sm_12")) else "ptxas")
    binary = ptx.with_suffix(".cubin")
    said = subprocess.run(
        [ptxas, f"-arch={architecture}", "-o", binary, ptx], check=True, capture_output=True, text=True
    )
    cuobjdump = tools / "cuobjdump"
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True).stdout
    sass = subprocess.run([cuobjdump, "-sass", binary], capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers, usage
    registers, stack, local = map(int, numbers.groups())
    return registers, stack + local, "instructions are serialized" in said.stderr, sass


# ── Reported ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(resources: list[Resources]) -> str:
    """Markdown, one table for each target."""
    lines = []
    for target, group in itertools.groupby(resources, key=lambda entry: (entry.target, entry.capability)):
        lines += [f"## {target[0]}, sm_{target[1]}", ""]
        lines.append("| op | case | kernel | tile | warps | stages | registers | spilled B | shared B | instructions |")
        lines.append("|---|---|---|---|--:|--:|--:|--:|--:|---|")
        for entry in group:
            used = ", ".join(f"{name} {count}" for name, count in entry.instructions.items() if count)
            used += "; wgmma serialized" if entry.serialized else ""
            figures = (entry.num_warps, entry.num_stages, entry.registers, entry.spilled, entry.shared)
            cells = (entry.op, entry.case, entry.kernel, entry.tile, *map(str, figures), used)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the compiler for every Triton kernel.")
    parser.add_argument("--out", type=Path, help="the folder to write README.md and resources.json to")
    parser.add_argument("--collect", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.collect:
        (target,) = [target for target in TARGETS if target.capability == arguments.collect]
        json.dump([dataclasses.asdict(entry) for entry in _collect_here(target)], sys.stdout)
        return
    resources = collect_all()
    if arguments.out is None:
        print(table(resources))
        return
    write(resources, arguments.out)


def write(resources: list[Resources], folder: Path) -> None:
    """The table and the raw figures, with the versions that they are of."""
    source = compiler_figures.versions("jax", "jax-triton", "triton")
    heading = "# What the compiler makes of the Triton kernels\n\n"
    heading += (
        f"Figures of the compiler ({compiler_figures.told(source)}), made by `python -m bench.triton_resources`; "
    )
    heading += "no GPU was there.\n\n"
    entries = [dataclasses.asdict(entry) for entry in resources]
    compiler_figures.write(folder, source, entries, heading + table(resources))


if __name__ == "__main__":
    main()
