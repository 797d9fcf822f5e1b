"""The pictures of the records, drawn anew from what is committed.

    python -m bench.pictures [--profiles=FOLDER] [--out=FOLDER]

- roofline_estimated.png: each stage of the planned training steps, over what it has to compute and read.
- roofline_<record>.png: each kernel and stage of a record's results, measured, with the ceilings of its device.
- waterfall_estimated.png: the planned steps, part by part; waterfall_<record>_<n>.png: what a record's traces tell.
- scaling_estimated.png: planned samples/s from 8 to 256 chips.

Plans (`bench.plans`) are the compilers' estimates and what is derived from them, and say so in the picture.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.style

from bench import plots, results
from bench.plots import Bar, Curve, Point, Roof
from bench.record import PROFILES
from bench.results import Result
from pi0fast import config, flops
from pi0fast.flops import DeviceSpec

NOT_MEASURED = (
    "Not measured: the training step of {}, compiled for devices that were not there. Times at their peaks, "
    "of TPUs estimated by the compiler, of GPUs derived."
)
SMALL = 0.005  # of a step: stages below it are drawn together


def plans(profiles: Path) -> list[dict[str, Any]]:
    """The newest record's plans of training steps as we run them: files like h100-8.json."""
    folders = sorted(profiles.glob("*_sharded_step_plans"))
    if not folders:
        return []
    paths = sorted(path for path in folders[-1].glob("*.json") if path.stem.count("-") == 1)
    found = [json.loads(path.read_text()) for path in paths]
    return [plan for plan in found if plan.get("kind") == "training step" and plan.get("time")]


def name_of(plan: dict[str, Any]) -> str:
    kind = plan["target"].partition(":")[0]
    return f"TPU {kind}" if kind.startswith("v") else kind.upper()


def title_of(plan: dict[str, Any]) -> str:
    return f"{plan['devices']} × {name_of(plan)}, batch {plan['settings']['batch_size']}"


def few_chips(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those on the fewest chips."""
    fewest = min(plan["devices"] for plan in found)
    return [plan for plan in found if plan["devices"] == fewest]


# ── Rooflines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def planned_roof(plan: dict[str, Any]) -> Roof:
    """The model's FLOPs by stage over its estimated time, and over its bytes of weights, read once in bfloat16."""
    size, batch = config.PRESETS[plan["preset"]](), plan["settings"]["batch_size"] / plan["devices"]
    cost = flops.inference(size, plan["cameras"], size.max_token_len)
    forward = flops.forward(size, plan["cameras"], size.max_token_len)
    stages = {
        "siglip": (forward.siglip, cost.vision.bytes),
        "prefix": (forward.prefix, cost.prefix.bytes),
        "suffix": (forward.suffix, cost.step.bytes),
    }
    points = []
    for stage, (work, read) in stages.items():
        for ending, times, colour in (("", 1, plots.SKY), (", backward", 2, plots.BLUE)):
            seconds = plan["time"]["stages_ms"][stage + ending] / 1e3
            kind = f"{'backward' if ending else 'forward'}, estimate"
            side = "left" if ending else "right"
            rate = times * batch * work / seconds
            points.append(Point(stage, batch * work / read, rate, kind, colour, measured=False, side=side))
    spec = flops.device(plan["device"])
    assert spec is not None, f"a plan has times, but {plan['device']} has no peaks"
    return Roof(title_of(plan), [("datasheet", spec)], points)


def measured_roof(found: Sequence[Result]) -> Roof | None:
    """Of each group the fastest of ours and of the peers; None without counts of FLOPs and bytes."""
    counted = [result for result in found if result.info.get("flops") and result.info.get("bytes")]
    if not counted:
        return None
    best: dict[tuple[str, bool], Result] = {}
    for result in counted:
        key = result.group, result.peer
        best[key] = min(best.get(key, result), result, key=lambda result: result.median)
    kinds = list(dict.fromkeys(_kind(result) for result in best.values()))
    points = [
        Point(
            "" if result.peer else result.info.get("case", result.group),
            result.info["flops"] / result.info["bytes"],
            result.info["flops"] / result.median,
            _kind(result),
            plots.COLOURS[kinds.index(_kind(result)) % len(plots.COLOURS)],
            measured=True,
            marker="^" if result.peer else "o",
        )
        for result in best.values()
    ]
    ceilings = []
    if measured := counted[0].info.get("ceilings"):
        ceilings.append(("measured", DeviceSpec("", measured["flops"], measured["bandwidth"], 0.0)))
    if spec := flops.device(counted[0].info["device"]):
        ceilings.append(("datasheet", spec))
    return Roof("", ceilings, points) if ceilings else None


def _kind(result: Result) -> str:
    return f"{result.info.get('op', 'stage')} {result.info.get('direction', '')}".strip()


# ── Steps and scaling ─────────────────────────────────────────────────────────────────────────────────────────────────


def planned_step(plan: dict[str, Any]) -> list[Bar]:
    """The data's way through a step: forwards, backwards, the update, and what nothing covers; without what is left of
    the smallest collectives, if that is small too."""
    times = plan["time"]
    bars = _stages(times["stages_ms"])
    exposed = defaultdict(float)
    for collective in plan["collectives"]:
        small = collective["exposed_ms"] < SMALL * times["step_ms"]
        exposed["other collectives" if small else collective["kind"]] += collective["exposed_ms"]
    if exposed["other collectives"] < SMALL * times["step_ms"]:
        del exposed["other collectives"]
    bars += [Bar(f"{kind}, exposed", ms, "communication") for kind, ms in exposed.items()]
    return [*bars, Bar("input, exposed", times["input_ms"], "input"), Bar("step", times["step_ms"], "step")]


def traced_step(trace: dict[str, Any]) -> list[Bar]:
    """From a trace's stages. Operations that overlap may together exceed the step."""
    milliseconds = {stage["name"]: 1e3 * stage["seconds"] for stage in trace["stages"]}
    communication = milliseconds.pop("communication", 0.0)
    idle = 1e3 * trace["seconds"] - communication - sum(milliseconds.values())
    bars = [*_stages(milliseconds), Bar("communication", communication, "communication")]
    return [*bars, Bar("host, idle", max(0.0, idle), "host, idle"), Bar("step", 1e3 * trace["seconds"], "step")]


def _stages(milliseconds: dict[str, float]) -> list[Bar]:
    """Forwards in the model's order, backwards the other way, then the rest; the smallest in one bar."""
    order = ("siglip", "embed_prompt", "prefix", "suffix")
    ways = [(name, "forward") for name in order] + [(f"{name}, backward", "backward") for name in reversed(order)]
    small, total = milliseconds.get("other", 0.0), sum(milliseconds.values())
    ways += [(name, "update and other compute") for name in milliseconds if name not in dict(ways) and name != "other"]
    bars = []
    for name, kind in ways:
        taken = milliseconds.get(name, 0.0)
        if taken > SMALL * total:
            bars.append(Bar(name, taken, kind))
        else:
            small += taken
    return [*bars, Bar("other", small, "update and other compute")]


def curves(found: Sequence[dict[str, Any]]) -> list[Curve]:
    """One for each kind of chip and examples a chip: only such points can be compared."""
    points = defaultdict(list)
    for plan in found:
        batch = plan["settings"]["batch_size"] / plan["devices"]
        points[name_of(plan), batch].append((plan["devices"], plan["time"]["samples_per_s"] / plan["devices"]))
    return [Curve(name, batch, *zip(*sorted(each), strict=True)) for (name, batch), each in sorted(points.items())]


# ── All of them ───────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(profiles: Path) -> dict[str, matplotlib.figure.Figure]:
    """Every picture that the records have the figures for, by file name."""
    found = {}
    if planned := plans(profiles):
        few, caption = few_chips(planned), NOT_MEASURED.format(planned[0]["preset"])
        found["roofline_estimated.png"] = plots.rooflines(
            "Stages of the training step under the roofline",
            f"{caption}\nFLOPs (derived): the model's, nothing counted that is computed again; over the estimated "
            "time. Bytes (derived): the weights, read once.",
            [planned_roof(plan) for plan in few],
        )
        found["waterfall_estimated.png"] = plots.waterfalls(
            "Where the training step's time goes",
            f"{caption}\nReal steps take longer. Collectives that together take less than {SMALL:.1%} are left out; "
            "the host is not planned.",
            [(title_of(plan), planned_step(plan)) for plan in few],
        )
        found["scaling_estimated.png"] = plots.scaling(
            "Planned scaling of the training step",
            f"{caption}\nExamples: on each chip. Squares have no second plan with as many. Meshes differ between "
            "sizes, so that a curve may exceed 100 %.",
            curves(planned),
        )
    for path in sorted(profiles.glob(f"*/{results.RAW}")):
        measured = results.read(path)
        if roof := measured_roof(measured):
            hardware, title = results.source(measured).hardware, path.parent.name
            caption = f"Measured on {hardware}; circles: the fastest of ours, triangles: the fastest peer."
            caption += "\nFLOPs and bytes: the least that each needs, derived."
            found[f"roofline_{title}.png"] = plots.rooflines("Under the roofline", caption, [roof])
    for path in sorted(profiles.glob("*/stages_*.json")):
        trace = json.loads(path.read_text())
        caption = f"Measured by a trace on {trace['devices']} × {trace['device']}, {trace['calls']} calls."
        step = (trace["program"], traced_step(trace))
        found[f"waterfall_{path.parent.name}_{path.stem.removeprefix('stages_')}.png"] = plots.waterfalls(
            "Where the time goes", caption, [step]
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the committed records.")
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--out", type=Path, help="by default pictures/ of --profiles")
    chosen = parser.parse_args(arguments)
    out = chosen.out or chosen.profiles / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context("default"):
        for name, made in draw(chosen.profiles).items():
            plots.save(made, out / name)
            print(out / name)


if __name__ == "__main__":
    main()
