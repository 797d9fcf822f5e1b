"""What the compiler makes of the attention kernels for Hopper, and of peers', and what follows for their speed.

    python -m bench.mosaic_gpu_resources                               prints the tables
    python -m bench.mosaic_gpu_resources --only=shipped                the kernels as they ship, no grid, no peers
    python -m bench.mosaic_gpu_resources --out=profiles/<folder>       writes them there, with the raw figures

Compiles for an H100 that is not there: JAX's own compiler, the assembler's report and the machine code. Registers,
spills and instructions are the compiler's figures. Cycles and times are derived from them by `bench.hopper_model`.
None was measured.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import compiler_figures, hopper_model, sass

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = 232_448  # that one program may use on sm_90 (CUDA C++ Programming Guide, technical specifications)
GROUPS = ("shipped", "grid", "peers")
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU.EX2", "LDS", "STS", "LDL", "STL", "BAR", "WARPGROUP.DEPBAR")


@dataclass(frozen=True)
class Figures:
    """One kernel, for one case. As the compiler says:

    registers: of a thread at launch; highest: the largest number of one in the code, after warpgroups have traded them.
    spilled: bytes of the stack, in local memory. shared: bytes. notes: of the assembler on wgmma (C75xx). instructions:
    in the whole kernel. loops: the innermost ones with wgmma.

    As derived: cycles of a block, and seconds of the case, by `hopper_model`; None where no loop has a matrix product.
    """

    contender: str
    kernel: str
    case: str
    tile: dict[str, int]
    shipped: bool
    registers: int
    highest: int
    spilled: int
    shared: int
    notes: list[str]
    instructions: dict[str, int]
    loops: list[dict[str, Any]]
    work: dict[str, Any]
    cycles: dict[str, Any] | None = None
    seconds: dict[str, Any] | None = None

    @property
    def complaints(self) -> list[str]:
        """What a kernel that ships may not do."""
        local = self.instructions["LDL"] + self.instructions["STL"]
        found = [f"spills {self.spilled} B"] if self.spilled else []
        found += [f"{local} accesses of local memory"] if local and not self.spilled else []
        found += [f"{self.shared} B of shared memory, of {SHARED_MEMORY}"] if self.shared > SHARED_MEMORY else []
        found += ["wgmma serialized"] if any("serialized" in note for note in self.notes) else []
        found += [f"no {name}" for name in ("HGMMA", "UTMALDG") if not self.instructions[name]]
        return found


@dataclass(frozen=True)
class Refusal:
    """A program that was not compiled, and why."""

    contender: str
    case: str
    tiles: list[str]
    shipped: bool
    reason: str


@dataclass(frozen=True)
class Collected:
    figures: list[Figures]
    refusals: list[Refusal]

    @property
    def complaints(self) -> list[str]:
        """Of what ships."""
        wrong = [f"{each.kernel} of {each.case}: {problem}" for each in self._ours for problem in each.complaints]
        return wrong + [f"{each.tiles} of {each.case}: {each.reason}" for each in self.refusals if each.shipped]

    @property
    def _ours(self) -> list[Figures]:
        return [each for each in self.figures if each.shipped and each.contender == "pi0fast"]


# ── Collected in a process of its own: what is dumped is read from the environment when JAX is imported ───────────────


def collect(groups: Sequence[str] = GROUPS, case: str = "") -> Collected:
    """Every kernel of these groups; of one case, if that is given."""
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

    from bench import hopper_programs
    from pi0fast import mesh, targets

    dumped = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    at = NamedSharding(mesh.make("fsdp:1", targets.devices("h100:1")), PartitionSpec())
    with hopper_programs.pretended():
        for group in groups:
            for program in hopper_programs.GROUPS[group]():
                if case not in ("", program.case.name):
                    continue
                before = set(dumped.glob("*.ptxas"))
                arguments = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), program.arguments
                )
                try:
                    with jax.sharding.use_abstract_mesh(hopper_programs.MESH):
                        lowered = jax.jit(program.function).trace(*arguments).lower(lowering_platforms=("cuda",))
                    lowered.compile()
                except Exception as problem:
                    reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
                    tiles = [f"{name}: {in_words(tile)}" for name, tile, _ in filter(None, program.kernels)]
                    yield Refusal(program.contender, program.case.name, tiles, program.shipped, reason)
                    continue
                reports = sorted(set(dumped.glob("*.ptxas")) - before, key=_number)
                assert len(reports) == len(program.kernels), [path.name for path in reports]
                for path, kernel in zip(reports, program.kernels, strict=True):
                    if kernel is not None:
                        assert program.contender != "pi0fast" or kernel[0] in path.stem, path
                        yield read(path, program, *kernel)


def _number(report: Path) -> int:
    """Kernels are numbered as they are compiled."""
    return int(report.stem.rpartition("_")[2])


def read(report: Path, program: Any, kernel: str, tile: dict[str, int], work: hopper_model.Work) -> Figures:
    """From what Mosaic GPU writes about a kernel."""
    said, resources = report.read_text(), report.with_suffix(".resources.txt").read_text()
    code = sass.Code(report.with_suffix(".sass_ctrl").read_text())
    loops = list(code.loops())
    cycles = seconds = None
    if loops:
        cycles = dataclasses.asdict(hopper_model.cycles(work, loops))
        masked = hopper_model.cycles(work, loops, masked=True)
        cycles |= {"masked": masked.bound, "bound": hopper_model.cycles(work, loops).bound}
        seconds = dataclasses.asdict(hopper_model.estimate(program.case, work, loops, 0))
    return Figures(
        contender=program.contender,
        kernel=kernel,
        case=program.case.name,
        tile=tile,
        shipped=program.shipped,
        registers=_one(r"Used (\d+) registers", said),
        highest=max(
            int(number) for number in re.findall(r"\bR(\d+)\b", " ".join(x.operands for x in code.instructions))
        ),
        spilled=_one(r"(\d+) bytes stack frame", said),
        shared=shared_memory(resources),
        notes=sorted(set(re.findall(r"\(C75\d+\) ([^\n]*)", said))),
        instructions={name: code.whole.count(name) for name in INSTRUCTIONS},
        loops=[{"least": described(loop.least), "most": described(loop.most)} for loop in loops],
        work=dataclasses.asdict(work),
        cycles=cycles,
        seconds=seconds,
    )


def shared_memory(resources: str) -> int:
    """Bytes: what a kernel keeps there, and eight for each barrier."""
    barriers = re.findall(r"num_barriers=(\d+)[^()]*\): (\d+)", resources)
    return _one(r"smem_scratch_bytes=(\d+)", resources) + 8 * sum(int(size) * int(count) for size, count in barriers)


def described(path: sass.Path) -> dict[str, Any]:
    products = {
        f"m{m}n{n}k{k}" + (" from registers" if registers else ""): count
        for (m, n, k, registers), count in sorted(path.matrix_products.items())
    }
    counts = {name: path.count(name) for name in INSTRUCTIONS}
    counts["LDS"] += path.count("LDSM")
    counts["STS"] += path.count("STSM")
    return {"instructions": len(path.instructions), "stalls": path.stalls, "products": products, **counts}


def _one(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return int(found[1])


# ── Reported ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(figures: Sequence[Figures]) -> str:
    """Markdown: what the compiler says of each kernel, and what is in one iteration of its loops."""
    lines = ["| | kernel | case | tiles | registers | spilled B | shared B | wgmma in each loop | instructions |"]
    lines[0] += " MUFU | LDS, STS | LDL, STL | UTMALDG | wrong |"
    lines.append("|---|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|---|")
    for each in figures:
        inner = [loop["least"] for loop in each.loops]
        products = "; ".join(_products(loop) for loop in inner)
        cells = (
            each.contender,
            each.kernel,
            each.case,
            in_words(each.tile),
            f"{each.registers}, R{each.highest}",
            str(each.spilled),
            str(each.shared),
            products or "none in a loop",
            "; ".join(_span(loop["least"]["instructions"], loop["most"]["instructions"]) for loop in each.loops),
            "; ".join(str(loop["MUFU.EX2"]) for loop in inner),
            "; ".join(f"{loop['LDS']}, {loop['STS']}" for loop in inner),
            "; ".join(f"{loop['LDL']}, {loop['STL']}" for loop in inner),
            str(each.instructions["UTMALDG"]),
            "; ".join(each.complaints),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(tile: Mapping[str, int]) -> str:
    """keys 64, stages 2"""
    return ", ".join(f"{name} {size}" for name, size in tile.items())


def _products(loop: dict[str, Any]) -> str:
    return " + ".join(f"{count} {shape}" for shape, count in loop["products"].items())


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least}–{most}"


def ranking(figures: Sequence[Figures]) -> str:
    """Markdown: derived times, the least first, of each kernel and case; what is wrong with a kernel puts it last."""
    lines = ["| kernel | case | tiles | tensor | issue | exp | shared | L2 | one warpgroup | limit | balance |"]
    lines[0] += " derived µs: overlapped, not within a warpgroup |"
    lines.append("|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|")
    for each in ranked(figures):
        assert each.cycles and each.seconds
        units = ("tensor", "issue", "exponential", "shared", "l2", "alone")
        times = f"{each.seconds['overlapped'] * 1e6:.0f}, {each.seconds['alone'] * 1e6:.0f}"
        name = f"**{in_words(each.tile)}**" if each.shipped else in_words(each.tile)
        cells = [each.kernel, each.case, name, *(f"{each.cycles[unit]:.0f}" for unit in units), each.seconds["limit"]]
        cells += [f"{each.seconds['balance']:.0%}", times + "".join(f"; {wrong}" for wrong in each.complaints)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranked(figures: Sequence[Figures]) -> list[Figures]:
    """Ours that have been estimated: by kernel and case in the order of the figures, then by derived time."""
    mine = [each for each in figures if each.contender == "pi0fast" and each.seconds]
    order = list(dict.fromkeys((each.case, each.kernel) for each in mine))

    def key(each: Figures) -> tuple[Any, ...]:
        assert each.seconds
        times = each.seconds["alone"] + each.seconds["overlapped"]
        return order.index((each.case, each.kernel)), bool(each.complaints), times

    return sorted(mine, key=key)


def report(found: Collected, source: Mapping[str, str], learned: str) -> str:
    """README.md of the record."""
    of = {
        contender: [x for x in found.figures if x.contender == contender] for contender in ("pi0fast", "jax", "tokamax")
    }
    peers = table([*of["jax"], *of["tokamax"]]) if of["jax"] else "None was compiled."
    absent = "" if of["tokamax"] else "\n\ntokamax was not installed, so its kernels are left out."
    refused = "\n".join(
        f"- {each.contender}, {each.case}, {'; '.join(each.tiles)}: {each.reason}" for each in found.refusals
    )
    return f"""# What the compiler makes of the attention kernels for Hopper

Made by `python -m bench.mosaic_gpu_resources` ({compiler_figures.told(source)}). **No GPU was there: nothing here was
measured.** Registers, spills, shared memory and instructions are the compiler's figures; cycles and times are derived
from them by `bench/hopper_model.py`, where each constant has its source.

{learned.strip()}

## Figures of the compiler: the kernels as they ship

Registers of a thread at launch, and the highest number in the code after warpgroups have traded them. Then, of each
innermost loop with wgmma, what one iteration runs on its shortest way; two numbers of instructions are the shortest and
the longest way, a block without and with a mask. UTMALDG (TMA loads): in the whole kernel.

{table([each for each in of["pi0fast"] if each.shipped])}

## The same of peers

Compiled the same way, with the tiles that they take untuned. JAX's kernels take no ranges, and lengths in multiples of
their tiles: 896 tokens instead of 816 or 4096, which changes no loop.

{peers}{absent}

## Derived: the grid, ranked

Cycles of one block on one SM, by unit; `one warpgroup`: if nothing overlaps within it. A block takes its busiest unit at
least (`limit`). Balance: how much of the time that the last SM takes the mean one has work. Times at 1.83 GHz, which a
long product does not sustain: if all units overlap, and if they do not within a warpgroup. Bold: as it ships. Last, with
what is wrong: tiles that are out. XLA's share of a call (hulls, delta, padding, launches) is not in it.

{ranking(found.figures)}

## Not compiled

{refused or "Nothing was refused."}
"""


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
    readme = report(found, source, chosen.learned.read_text() if chosen.learned else "")
    if chosen.out is None:
        print(readme)
    else:
        compiler_figures.write(chosen.out, source, [dataclasses.asdict(each) for each in found.figures], readme)
    if found.complaints:
        sys.exit("\n".join(found.complaints))


if __name__ == "__main__":
    main()
