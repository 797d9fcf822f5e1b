"""The machine code of TPU kernels, as libtpu dumps it: how many cycles a kernel takes at least, and what it spills.

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"

must be set before libtpu loads; DIR then has `*-<op>-NN-final_bundles.txt` of every operation compiled. A bundle takes
one cycle; stalls, and copies from and to HBM, are left out.
"""

import re
from dataclasses import dataclass

DELAY = 5  # bundles from a branch to the first that is skipped


# ── Machine code ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Branch:
    at: int
    to: int


class Bundles:
    """A kernel's final bundles as libtpu writes them with `--xla_jf_dump_llo_text`."""

    def __init__(self, text: str):
        lines = re.findall(
            r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:(.*?)(?=^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:|\Z)", text, re.M | re.S
        )
        self.bundles = [body for _, body in lines]
        starts = {}
        for at, body in enumerate(self.bundles):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", body):
                starts.setdefault(int(region), at)
        branches = [
            Branch(at, starts[int(region)])
            for at, body in enumerate(self.bundles)
            for region in re.findall(r"sbr\.rel .*?target = \$region(\d+)", body)
            if int(region) in starts
        ]
        self.loops = sorted(((x.to, x.at + DELAY) for x in branches if x.to <= x.at), key=lambda x: (x[0], -x[1]))
        self.skips = sorted(
            ((x.at + DELAY, x.to) for x in branches if x.to > x.at + DELAY), key=lambda x: (x[0], -x[1])
        )
        self.spills = sum(bool(re.search(r"vst \[vmem:\[#allocation\d+_spill\]", body)) for body in self.bundles)

    def trips(self, start: int, end: int) -> int | None:
        """How often a loop runs; None where only the running program knows. A pipeline's first and last turns, in which
        nothing is computed, are not counted."""
        for body in reversed(self.bundles[start:end]):
            if found := re.search(r"scmp\.ge\.s32\.totalorder %\S+, (\S+) /\* loop exit test", body):
                if not found[1].isdigit():
                    return None
                stages = any("stage = 2" in x for x in self.bundles[start:end])
                return int(found[1]) - 2 * stages
        return None

    def multiplies(self, start: int, end: int) -> bool:
        return any(re.search(r"\bvmat(mul|push)|\bvmatres", body) for body in self.bundles[start:end])


def kernel_cycles(code: Bundles, *, visited: float = 1.0, rows: int = 1, dynamic: int | None = None) -> int | None:
    """Cycles of a kernel, one for each bundle as often as it runs; None where a loop's trips are not known.

    visited: the share of the grid's steps in which regions with matrix products run. Of several such beside each other,
    one runs, and the longest is taken. rows: beside them, regions without any run once in so many steps. dynamic: trips
    of loops whose bound is not in the code.
    """

    def cost(start: int, end: int) -> float:
        total, at, regions = 0.0, start, []
        loops = [x for x in code.loops if start <= x[0] and x[1] <= end and x != (start, end)]
        skips = [x for x in code.skips if start <= x[0] and x[1] <= end and x != (start, end)]
        while at < end:
            loop = next((x for x in loops if x[0] == at), None)
            skip = next((x for x in skips if x[0] == at), None)
            if skip and (loop is None or skip[1] >= loop[1]):
                regions.append((cost(*skip), code.multiplies(*skip)))
                at = skip[1]
            elif loop:
                trips = code.trips(*loop)
                total += (dynamic if trips is None else trips) * cost(*loop)
                at = loop[1]
            else:
                total, at = total + 1, at + 1
        work = [cycles for cycles, multiplies in regions if multiplies]
        if not work:
            return total + sum(cycles for cycles, _ in regions)
        return total + visited * max(work) + sum(cycles for cycles, multiplies in regions if not multiplies) / rows

    try:
        return round(cost(0, len(code.bundles)))
    except TypeError:  # trips times cost, of unknown trips
        return None
