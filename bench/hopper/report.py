"""What was found about the kernels for Hopper, as tables and as the text of a record."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bench import compiler_figures
from bench.hopper.figures import Collected, Figures, in_words


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
    by = f"`python -m bench.mosaic_gpu_resources` ({compiler_figures.told(source)})"
    made = (
        f"Made by {by}. **No GPU was there: nothing here was measured.** Registers, spills, shared memory and "
        "instructions are the compiler's figures; cycles and times are derived from them by `bench/hopper/model.py`, "
        "where each constant has its source."
    )
    return f"""# What the compiler makes of the attention kernels for Hopper

{textwrap.fill(made, 120)}

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

Cycles of one block on one SM, by unit; `one warpgroup`: if nothing overlaps within it. A block takes its busiest unit
at least (`limit`). Balance: how much of the time that the last SM takes the mean one has work. Times at 1.83 GHz, which
a long product does not sustain: if all units overlap, and if they do not within a warpgroup. Bold: as it ships. Last,
with what is wrong: tiles that are out. XLA's share of a call (hulls, delta, padding, launches) is not in it.

{ranking(found.figures)}

## Not compiled

{refused or "Nothing was refused."}
"""
