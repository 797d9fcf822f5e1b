"""How the pictures are drawn: rooflines, waterfalls of a step, scaling curves. Measured is filled, all else hollow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.figure
import matplotlib.patches
import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from pi0fast.flops import DeviceSpec

# Okabe and Ito's colours, told apart by the colour-blind (https://jfly.uni-koeln.de/color/).
BLUE, SKY, GREEN, ORANGE, RED, PINK, GREY = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#7f7f7f"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
INK = "#333333"
WIDTH = {1: 8.4, 2: 11.2}  # inches, by columns of panels


@dataclass(frozen=True)
class Point:
    """intensity: FLOPs a byte. rate: FLOP/s. kind: as the legend has it. side: of the point, where its name stands."""

    name: str
    intensity: float
    rate: float
    kind: str
    colour: str
    measured: bool
    marker: str = "o"
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Roof:
    """One panel. ceilings: what bounds the points, and how it is called; the first is drawn solid."""

    title: str
    ceilings: Sequence[tuple[str, DeviceSpec]]
    points: Sequence[Point]


@dataclass(frozen=True)
class Bar:
    """A part of a step. kind: a key of `KINDS`."""

    name: str
    milliseconds: float
    kind: str


KINDS = {
    "forward": SKY,
    "backward": BLUE,
    "update and other compute": GREEN,
    "communication": RED,
    "input": ORANGE,
    "host, idle": GREY,
    "step": INK,
}


@dataclass(frozen=True)
class Curve:
    """samples: per second and chip, by number of chips. batch: examples a chip, the same at each point."""

    name: str
    batch: float
    chips: Sequence[int]
    samples: Sequence[float]


def figure(title: str, caption: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its panels in one row."""
    made = matplotlib.figure.Figure(figsize=size, layout="constrained")
    made.suptitle(f"{title}\n", fontsize=13, fontweight="bold", color=INK)  # the legend comes into the second line
    made.supxlabel(caption, fontsize=8.5, color=INK)
    axes = made.subplots(rows, columns, squeeze=False).ravel()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
        each.set_axisbelow(True)
    return made, axes


def _legend(made: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the title, in one row."""
    below = (0.5, 1 - 0.27 / made.get_figheight())
    made.legend(
        handles, names, loc="upper center", bbox_to_anchor=below, ncols=len(names), fontsize=9, frameon=False
    ).set_in_layout(False)


def rooflines(title: str, caption: str, roofs: Sequence[Roof]) -> matplotlib.figure.Figure:
    columns = min(2, len(roofs))
    rows = -(-len(roofs) // columns)
    made, axes = figure(title, caption, rows, columns, (WIDTH[columns], (3.9 if columns > 1 else 5.0) * rows + 0.8))
    kinds = {}
    for roof, panel in zip(roofs, axes, strict=False):
        kinds |= _roofline(panel, roof)
    for panel in axes[len(roofs) :]:
        panel.set_visible(False)
    _legend(made, list(kinds.values()), list(kinds))
    return made


def _roofline(panel: Any, roof: Roof) -> dict[str, Any]:
    """Drawn; what the legend shows, by kind."""
    intensities = [point.intensity for point in roof.points]
    ridges = [spec.flops / spec.bandwidth for _, spec in roof.ceilings]
    x = np.geomspace(min([*intensities, *ridges]) / 3, max([*intensities, *ridges]) * 3, 400)
    for number, (name, spec) in enumerate(roof.ceilings):
        style = (
            {"color": INK, "linewidth": 1.6} if number == 0 else {"color": GREY, "linewidth": 1.2, "linestyle": "--"}
        )
        panel.plot(x, np.minimum(spec.flops, x * spec.bandwidth) / 1e12, **style)
        said = f"{name}: {spec.flops / 1e12:.3g} TFLOP/s, {spec.bandwidth / 1e9:.4g} GB/s"
        above = 4 if number == 0 else -11
        panel.annotate(
            said, (x[-1], spec.flops / 1e12), (0, above), textcoords="offset points", ha="right", fontsize=8, color=INK
        )
    kinds = {}
    for point in roof.points:
        drawn = panel.scatter(
            point.intensity,
            point.rate / 1e12,
            s=38,
            marker=point.marker,
            linewidths=1.4,
            facecolors=point.colour if point.measured else "none",
            edgecolors=point.colour,
            zorder=3,
        )
        kinds.setdefault(point.kind, drawn)
        offset, align = ((6, -3), "left") if point.side == "right" else ((-6, -3), "right")
        at = point.intensity, point.rate / 1e12
        panel.annotate(point.name, at, offset, textcoords="offset points", ha=align, fontsize=7.5, color=INK)
    lowest = min(point.rate for point in roof.points) / 1e12
    highest = max(spec.flops for _, spec in roof.ceilings) / 1e12
    panel.set(xscale="log", yscale="log", ylim=(lowest / 2, highest * 1.7))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest / lowest < 300 and axis is panel.yaxis else (1,)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    panel.set_title(roof.title, fontsize=10.5)
    panel.set_xlabel("FLOPs per byte", fontsize=9)
    panel.set_ylabel("TFLOP/s of a chip", fontsize=9)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    return kinds


def waterfalls(title: str, caption: str, steps: Sequence[tuple[str, Sequence[Bar]]]) -> matplotlib.figure.Figure:
    """steps: a panel each: its title, its parts in order, and last the step, which starts anew from 0."""
    columns = min(2, len(steps))
    rows = -(-len(steps) // columns)
    tallest = max(len(bars) for _, bars in steps)
    made, axes = figure(title, caption, rows, columns, (WIDTH[columns], rows * (1.3 + 0.23 * tallest) + 0.8))
    used = dict.fromkeys(bar.kind for _, bars in steps for bar in bars if bar.kind != "step")
    for (name, bars), panel in zip(steps, axes, strict=False):
        _waterfall(panel, name, bars)
    for panel in axes[len(steps) :]:
        panel.set_visible(False)
    patches = [matplotlib.patches.Patch(color=KINDS[kind]) for kind in used]
    _legend(made, patches, list(used))
    return made


def _waterfall(panel: Any, title: str, bars: Sequence[Bar]) -> None:
    left = longest = 0.0
    for row, bar in enumerate(bars):
        start = 0.0 if bar.kind == "step" else left
        panel.barh(row, bar.milliseconds, left=start, color=KINDS[bar.kind], height=0.72)
        end = start + bar.milliseconds
        said = f"{bar.milliseconds:.3g} ms" if bar.milliseconds < 1000 else f"{bar.milliseconds:.0f} ms"
        panel.annotate(said, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        left, longest = end, max(longest, end)
    panel.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8.5)
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(0, 1.16 * longest)
    panel.set_title(title, fontsize=10.5)
    panel.set_xlabel("milliseconds", fontsize=9)
    panel.grid(True, axis="x", color="#dddddd", linewidth=0.6)


def scaling(title: str, caption: str, curves: Sequence[Curve]) -> matplotlib.figure.Figure:
    """Beside each other: samples/s of one chip, and its part of what one chip does in the smallest group."""
    made, (rates, efficiencies) = figure(title, caption, 1, 2, (WIDTH[2], 4.6))
    chips = sorted({count for curve in curves for count in curve.chips})
    names = list(dict.fromkeys(curve.name for curve in curves))
    colours = dict(zip(names, COLOURS, strict=False))
    for curve in curves:
        label = f"{curve.name}, {curve.batch:g} examples"
        style = {"color": colours[curve.name], "marker": "o", "markerfacecolor": "none", "linestyle": ":"}
        if len(curve.chips) == 1:
            style |= {"marker": "s", "linestyle": "none"}
            at, said = (curve.chips[0], curve.samples[0]), f"{curve.batch:g} examples on each"
            rates.annotate(said, at, (0, 9), textcoords="offset points", ha="center", fontsize=8.5, color=INK)
        rates.plot(curve.chips, curve.samples, label=label, **style)
        if len(curve.chips) > 1:
            parts = [100 * each / curve.samples[0] for each in curve.samples]
            efficiencies.plot(curve.chips, parts, label=label, **style)
            end = f"{parts[-1]:.0f} %"
            efficiencies.annotate(
                end, (curve.chips[-1], parts[-1]), (7, -3), textcoords="offset points", fontsize=9, color=INK
            )
    efficiencies.axhline(100, color=GREY, linewidth=1.2, linestyle="--")
    efficiencies.set_ylim(0, 125)
    rates.set_ylim(0, 1.15 * max(each for curve in curves for each in curve.samples))
    for panel, said in ((rates, "samples/s of a chip, at most"), (efficiencies, f"% of linear from {chips[0]} chips")):
        panel.set_xscale("log", base=2)
        panel.set_xlim(chips[0] / 2, chips[-1] * 2)
        panel.set_xticks(chips, [str(count) for count in chips])
        panel.minorticks_off()
        panel.set_xlabel("chips", fontsize=9)
        panel.set_ylabel(said, fontsize=9)
        panel.grid(True, color="#dddddd", linewidth=0.6)
    _legend(made, *rates.get_legend_handles_labels())
    return made


def save(made: matplotlib.figure.Figure, path: Path) -> None:
    """The same figure gives the same bytes with the same matplotlib, which the file names."""
    made.savefig(path, dpi=130)
