"""One kernel for Hopper as the compiler sees it, from what Mosaic GPU and the assembler write about it."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.hopper import model, sass
from pi0fast_kernels._mosaic_gpu import SHARED_MEMORY

INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "MUFU.EX2", "LDS", "STS", "LDL", "STL", "BAR", "WARPGROUP.DEPBAR")


@dataclass(frozen=True)
class Figures:
    """One kernel, for one case. As the compiler says:

    registers: of a thread at launch; highest: the largest number of one in the code, after warpgroups have traded them.
    spilled: bytes of the stack, in local memory. shared: bytes. notes: of the assembler on wgmma (C75xx). instructions:
    in the whole kernel. loops: the innermost ones with wgmma.

    As derived: cycles of a block, and seconds of the case, by `model`; None where no loop has a matrix product.
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
    """All that was compiled, or was not."""

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


def read(report: Path, program: Any, kernel: str, tile: dict[str, int], work: model.Work) -> Figures:
    """From what Mosaic GPU writes about a kernel."""
    said, resources = report.read_text(), report.with_suffix(".resources.txt").read_text()
    code = sass.Code(report.with_suffix(".sass_ctrl").read_text())
    loops = list(code.loops())
    cycles = seconds = None
    if loops:
        plain, masked = model.cycles(work, loops), model.cycles(work, loops, masked=True)
        cycles = dataclasses.asdict(plain) | {"bound": plain.bound, "masked": masked.bound}
        seconds = dataclasses.asdict(model.estimate(program.case, work, loops))
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


def in_words(tile: Mapping[str, int]) -> str:
    """keys 64, stages 2"""
    return ", ".join(f"{name} {size}" for name, size in tile.items())
