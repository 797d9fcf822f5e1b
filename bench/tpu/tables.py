"""The tables of a record that `bench.tpu_resources` and `bench.tpu_steps` made.

python -m bench.tpu.tables profiles/<folder>
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.tpu.figures import OURS, PEERS, TARGETS, Figures, Job
from bench.tpu_resources import RAW, XLA, load
from bench.tpu_steps import BATCH, STEPS
from pi0fast_kernels.ada_rms_norm import cases as norms
from pi0fast_kernels.prefix_lm_attention import cases as attentions

ATTENTION, NORM = "prefix_lm_attention", "ada_rms_norm"
CHIPS = 8  # of a recorded step
GOALS = {False: 1.3, True: 1.6}  # times the MXU bound, forward and backward
# Units whose operations are shown for each cycle, and what of `bundles.UNITS` they run.
SHOWN = {
    "arithmetic": ("arithmetic",),
    "transcendental": ("transcendental",),
    "cross-lane": ("cross-lane",),
    "loads": ("loads", "spill loads"),
    "stores": ("stores", "spill stores"),
    "of them spills": ("spill stores",),
}

Found = dict[Job, Figures]


def best(found: Found, target: str, op: str, case: str, backward: bool, contender: str) -> Figures | None:
    """Of a peer's blocks, those whose kernels are the fastest; None where nothing was compiled."""
    made = [x for job, x in found.items() if job[:5] == (target, op, case, backward, contender) and x.error is None]
    return min(made, key=lambda x: (x.kernel_s, x.seconds), default=None)


def goals(found: Found) -> str:
    """Ours at Pi0's training shape: against `GOALS`, and against the faster peer's kernels."""
    header = ["chip", "case", "pass", "× MXU bound", "goal", "met", "faster peer", "ours takes, of its time"]

    def rows() -> Iterable[list[str]]:
        for x in _ours(found, ATTENTION, ["pi0_prefix", "pi0_suffix"]):
            peers = [y for peer in PEERS if (y := best(found, *x.job[:4], peer))]
            ratio, goal = x.kernel_s / x.bound_s, GOALS[x.job.backward]
            row = [*_name(x), f"{ratio:.2f}", f"{goal}", "yes" if ratio <= goal else "no"]
            if peers:
                fastest = min(peers, key=lambda y: y.kernel_s)
                row += [fastest.job.contender, f"{x.kernel_s / fastest.kernel_s:.0%}"]
            yield row

    return _markdown(header, rows())


def comparison(found: Found) -> str:
    """Attention beside its peers."""
    names = (OURS, *PEERS)
    header = [
        "chip",
        "case",
        "pass",
        "MXU bound",
        *(f"{x} kernels" for x in names),
        *(f"{x}, whole" for x in names),
        XLA,
    ]

    def rows() -> Iterable[list[str]]:
        for target in TARGETS:
            for case in (case.name for case in attentions.CASES):
                for backward in (False, True):
                    of = {x: best(found, target, ATTENTION, case, backward, x) for x in (*names, XLA)}
                    bound = next((x.bound_s for x in of.values() if x), None)
                    if bound is None:
                        continue
                    kernels = [_times(x and x.kernel_s, bound) for x in (of[name] for name in names)]
                    whole = [_us(x and x.seconds) for x in of.values()]
                    yield [target, case, _pass(backward), _us(bound), *kernels, *whole]

    return _markdown(header, rows())


def attention(found: Found) -> str:
    """Ours, every case."""
    header = ["chip", "case", "pass", "floor", "by", "kernel", "× floor", "MXU share"]
    header += ["cycles", "stalled", "copied", "VMEM", "spills"]

    def rows() -> Iterable[list[str]]:
        for x in _ours(found, ATTENTION, [case.name for case in attentions.CASES]):
            by = "MXU" if x.bound_s > x.traffic_s else "memory"
            share = f"{x.bound_s / x.kernel_s:.0%}"
            yield [*_name(x), _us(x.floor_s), by, _us(x.kernel_s), f"{x.kernel_s / x.floor_s:.2f}", share, *_code(x)]

    return _markdown(header, rows())


def norm(found: Found) -> str:
    """Ours, every case, beside XLA's."""
    header = ["chip", "case", "pass", "least traffic", "kernel", "whole", f"{XLA}, whole"]
    header += ["cycles", "stalled", "copied", "VMEM", "spills"]

    def rows() -> Iterable[list[str]]:
        for x in _ours(found, NORM, [case.name for case in norms.CASES]):
            xla = best(found, x.job.target, NORM, x.job.case, x.job.backward, XLA)
            times = [_us(x.traffic_s), _us(x.kernel_s), _us(x.seconds), _us(xla and xla.seconds)]
            yield [*_name(x), *times, *_code(x)]

    return _markdown(header, rows())


def units(found: Found, cases: Iterable[str] = ("pi0_prefix", "pi0_suffix")) -> str:
    """What the kernels issue in each cycle of a core."""
    header = ["chip", "case", "pass", "kernels of", "blocks", "matrix units busy", *SHOWN]

    def rows() -> Iterable[list[str]]:
        for target, chip in TARGETS.items():
            for case in cases:
                for backward in (False, True):
                    for contender in (OURS, *PEERS):
                        x = best(found, target, ATTENTION, case, backward, contender)
                        if x is None:
                            continue
                        cycles = chip.cores * sum(kernel.cycles for kernel in x.kernels)

                        def issued(*names: str, x: Figures = x) -> int:
                            return sum(kernel.units.get(name, 0) for kernel in x.kernels for name in names)

                        busy = issued("matmul") * chip.matmul_cycles / chip.units / cycles
                        blocks = "×".join(map(str, x.job.blocks or ()))
                        shares = [f"{issued(*names) / cycles:.2f}" for names in SHOWN.values()]
                        yield [target, case, _pass(backward), contender, blocks, f"{busy:.0%}", *shares]

    return _markdown(header, rows())


def steps(found: Found, made: dict) -> str:
    """The training step, attention's kernels with the cycles of their code: an eighth of those for all examples."""
    header = ["chips", "kernels", "peak", "compute", "exposed", "attention kernels", "step", "at the peak instead"]

    def rows() -> Iterable[list[str]]:
        for step in made.values():
            timed, peak = step["plan"]["time"], step["plan"]["memory"]["peak"]
            kernels = 1e3 * sum(
                times * seconds(found, step["target"], name)
                for name, times in step["runs"].items()
                if ATTENTION in name
            )
            more = kernels - step["attention_ms"]
            yield [
                f"8 × {step['target']}",
                step["kernels"],
                f"{peak / 1e9:.1f} GB",
                f"{timed['compute_ms'] + more:.1f} ms",
                f"{timed['exposed_ms']:.1f} ms",
                f"{kernels:.1f} ms" if kernels else "",
                f"{timed['step_ms'] + more:.1f} ms",
                f"{timed['step_ms']:.1f} ms" if kernels else "",
            ]

    return _markdown(header, rows())


def seconds(found: Found, target: str, kernel: str) -> float:
    """Of one run of an attention kernel of a step, by its name and the shape of its largest operand.

    Raises:
        ValueError: no case has that shape.
    """
    name, shape = kernel.split(" ")
    for case in attentions.CASES:
        if case.batch % CHIPS == 0 and shape in _shapes(case):
            backward = name.endswith("backward")
            figures = best(found, target, ATTENTION, case.name, backward, OURS)
            assert figures is not None, case.name
            return figures.kernel_s / CHIPS
    raise ValueError(f"no case has the shape of {kernel}, for {BATCH} examples on {CHIPS} chips")


def _shapes(case: attentions.Case) -> set[str]:
    heads = case.batch // CHIPS * case.kv_heads
    tokens = case.queries * case.heads // case.kv_heads, case.keys
    sides = [(length, case.head_dim) for length in tokens] + [(case.head_dim, length) for length in tokens]
    return {"×".join(map(str, (heads, *side))) for side in sides}  # either may lie along lanes


def _ours(found: Found, op: str, names: list[str]) -> Iterable[Figures]:
    for target in TARGETS:
        for name in names:
            for backward in (False, True):
                x = best(found, target, op, name, backward, OURS)
                if x is not None:
                    yield x


def _code(x: Figures) -> list[str]:
    (kernel,) = x.kernels
    stalled = f"{kernel.stalls / kernel.cycles:.0%}"
    sizes = f"{kernel.bytes / 1e6:.1f} MB", f"{kernel.vmem / 2**20:.1f} MiB"
    return [f"{kernel.cycles:,}", stalled, *sizes, str(kernel.spills)]


def _name(x: Figures) -> list[str]:
    return [x.job.target, x.job.case, _pass(x.job.backward)]


def _pass(backward: bool) -> str:
    return "backward" if backward else "forward"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f} µs" if seconds > 1e-5 else f"{seconds * 1e6:.1f} µs"


def _times(seconds: float | None, bound: float) -> str:
    return "" if seconds is None else f"{_us(seconds)} ({seconds / bound:.2f} ×)"


def _markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * 3 + ["--:"] * (len(header) - 3), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(folder: Path) -> None:
    found = load(folder / RAW)
    tables: dict[str, Callable[[Found], str]] = {
        "Pi0's training shape": goals,
        "Attention beside its peers": comparison,
        "Attention": attention,
        "What is issued in a cycle": units,
        "Norms": norm,
    }
    for title, table in tables.items():
        print(f"## {title}\n\n{table(found)}\n")
    if (folder / STEPS).exists():
        print(f"## The training step\n\n{steps(found, json.loads((folder / STEPS).read_text()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
