"""What the compiler makes of the attention kernels for Hopper, and of peers', and what follows for their speed.

    python -m bench.mosaic_gpu_resources                               prints the tables
    python -m bench.mosaic_gpu_resources --only=shipped                the kernels as they ship, no grid, no peers
    python -m bench.mosaic_gpu_resources --out=profiles/<folder>       writes them there, with the raw figures

Compiles for an H100 that is not there: JAX's own compiler, the assembler's report and the machine code. Registers,
spills and instructions are the compiler's figures. Cycles and times are derived from them by `bench.hopper.model`.
None was measured.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import compiler_figures
from bench.hopper import figures, report
from bench.hopper.figures import Collected, Figures, Refusal

ROOT = Path(__file__).parent.parent
GROUPS = ("shipped", "grid", "peers")


def collect(groups: Sequence[str] = GROUPS, case: str = "") -> Collected:
    """Every kernel of these groups; of one case, if that is given.

    In a process of its own, since what is dumped is read from the environment when JAX is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS": "1",
            "MOSAIC_GPU_DUMP_TO": str(Path(folder, "dump")),
            "CUDA_ROOT": str(_cuda_root(Path(folder, "cuda"))),
        }
        environment.pop("PI0FAST_MOSAIC_GPU_INTERPRET", None)
        Path(folder, "dump").mkdir()
        command = [sys.executable, "-m", "bench.mosaic_gpu_resources", "--collect", *groups, f"--case={case}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    entries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    refusals = [Refusal(**entry) for entry in entries if "reason" in entry]
    return Collected([Figures(**entry) for entry in entries if "reason" not in entry], refusals)


def _cuda_root(folder: Path) -> Path:
    """JAX's CUDA tools with a disassembler beside them, as Mosaic looks for one: its wheels have none, Triton's has."""
    wheel = importlib.util.find_spec("nvidia.cu13")
    places = list(wheel.submodule_search_locations or ()) if wheel else []
    source = Path(next((place for place in places if Path(place, "bin/ptxas").exists()), "/usr/local/cuda"))
    shutil.copytree(source, folder, copy_function=os.symlink, symlinks=True)
    if not (folder / "bin/nvdisasm").exists():
        triton = importlib.util.find_spec("triton")
        within = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm" if triton and triton.origin else None
        found = str(within) if within and within.exists() else shutil.which("nvdisasm")
        if found is None:
            raise FileNotFoundError("no nvdisasm; install triton, or nvidia-cuda-nvdisasm and put it on PATH")
        (folder / "bin/nvdisasm").symlink_to(found)
    return folder


def _collect_here(groups: Sequence[str], case: str) -> Iterator[Figures | Refusal]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from bench.hopper import programs
    from pi0fast import mesh, targets

    dumped = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    at = NamedSharding(mesh.make("fsdp:1", targets.devices("h100:1")), PartitionSpec())
    with programs.pretended():
        for program in (program for group in groups for program in programs.GROUPS[group]()):
            if case not in ("", program.case.name):
                continue
            before = set(dumped.glob("*.ptxas"))
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), program.arguments)
            try:
                with jax.sharding.use_abstract_mesh(programs.MESH):
                    lowered = jax.jit(program.function).trace(*arguments).lower(lowering_platforms=("cuda",))
                lowered.compile()
            except Exception as problem:  # of any kind: a peer's, Mosaic's or XLA's
                yield _refusal(program, problem)
                continue
            reports = sorted(set(dumped.glob("*.ptxas")) - before, key=_number)
            for path, kernel, tile, work in program.found(reports):
                yield figures.read(path, program, kernel, tile, work)


def _refusal(program: Any, problem: Exception) -> Refusal:
    tiles = [f"{kernel}: {figures.in_words(tile)}" for kernel, tile, _ in filter(None, program.kernels)]
    reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return Refusal(program.contender, program.case.name, tiles, program.shipped, reason)


def _number(path: Path) -> int:
    """Kernels are numbered as they are compiled."""
    return int(path.stem.rpartition("_")[2])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Figures of the compiler for every attention kernel for Hopper.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="all by default")
    parser.add_argument("--case", default="", help="all by default")
    parser.add_argument("--out", type=Path, help="the folder to write README.md and resources.json to")
    parser.add_argument("--learned", type=Path, help="a file of what was learned, in Markdown, for README.md")
    parser.add_argument("--collect", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.collect:
        for entry in _collect_here(chosen.collect, chosen.case):
            print(json.dumps(dataclasses.asdict(entry)), flush=True)
        return
    found = collect(chosen.only, chosen.case)
    source = compiler_figures.versions("jax", "jaxlib", "nvidia-cuda-nvcc", "triton", "tokamax")
    readme = report.report(found, source, chosen.learned.read_text() if chosen.learned else "")
    if chosen.out is None:
        print(readme)
    else:
        compiler_figures.write(chosen.out, source, [dataclasses.asdict(each) for each in found.figures], readme)
    if found.complaints:
        sys.exit("\n".join(found.complaints))


if __name__ == "__main__":
    main()
