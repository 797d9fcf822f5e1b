"""The pictures of the records: what is drawn is what the records say, and the committed ones are theirs."""

import json
from pathlib import Path

import pytest
from matplotlib.style import context
from PIL import Image

from bench import pictures, plots
from bench.results import Result

PROFILES = Path(__file__).parent.parent / "profiles"
PLANS = {plan["case"]: plan for plan in pictures.plans(PROFILES)}


def test_committed_pictures(tmp_path):
    """Drawn anew they are the same, byte for byte where matplotlib is."""
    pictures.main([f"--profiles={PROFILES}", f"--out={tmp_path}"])
    drawn = {path.name: path for path in tmp_path.iterdir()}
    committed = {path.name: path for path in (PROFILES / "pictures").glob("*.png")}
    assert (
        {"roofline_estimated.png", "waterfall_estimated.png", "scaling_estimated.png"} <= set(drawn) == set(committed)
    )
    for name, path in drawn.items():
        with Image.open(path) as new, Image.open(committed[name]) as old:
            same = new.info["Software"] == old.info["Software"]
            assert new.size == old.size
        assert not same or path.read_bytes() == committed[name].read_bytes(), f"run python -m bench.pictures: {name}"


def test_no_records(tmp_path):
    assert pictures.draw(tmp_path) == {}


def test_plans():
    assert {"h100-8", "h100-256", "v5e-8"} <= set(PLANS) and not any("openpi" in case for case in PLANS)
    assert {plan["devices"] for plan in pictures.few_chips(list(PLANS.values()))} == {8}


def test_planned_roof():
    """By hand: 4 examples a chip, the prefix's FLOPs over 16.55 ms; its weights in bfloat16."""
    roof = pictures.planned_roof(PLANS["h100-8"])
    assert roof.title == "8 × H100, batch 32" and [name for name, _ in roof.ceilings] == ["datasheet"]
    assert len(roof.points) == 6 and not any(point.measured for point in roof.points)
    prefix, backward = (point for point in roof.points if point.name == "prefix")
    layers = 17 * (2048 * 256 * 18 + 3 * 2048 * 16384) + 2 * 2048 * 256  # of the last one, keys and values
    attention = 17 * 2 * 816 * 8 * 256
    assert prefix.intensity == pytest.approx(4 * 2 * 816 * (layers + attention) / (2 * layers), rel=1e-6)
    assert prefix.rate == pytest.approx(4 * 2 * 816 * (layers + attention) / 16.551781344e-3, rel=1e-6)
    assert backward.rate == pytest.approx(2 * prefix.rate * 16.551781344 / 43.763509093, rel=1e-6)
    assert all(point.rate < roof.ceilings[0][1].flops for point in roof.points)


def test_planned_steps():
    for plan in PLANS.values():
        *bars, step = pictures.planned_step(plan)
        times = plan["time"]
        assert step.milliseconds == times["step_ms"] and step.kind == "step"
        assert sum(bar.milliseconds for bar in bars) == pytest.approx(times["step_ms"], rel=pictures.SMALL)
        compute = [bar.milliseconds for bar in bars if bar.kind not in ("communication", "input")]
        assert sum(compute) == pytest.approx(times["compute_ms"], rel=1e-6)
    names = [bar.name for bar in pictures.planned_step(PLANS["h100-8"])]
    assert names[:4] == ["siglip", "prefix", "suffix", "suffix, backward"]
    assert {"reduce-scatter, exposed", "all-gather, exposed"} < set(names) and names[-2:] == ["input, exposed", "step"]


def test_traced_step():
    seconds = {
        "prefix, backward": 0.5,
        "siglip": 0.25,
        "communication": 0.125,
        "optimizer": 0.05,
        "embed_prompt": 0.001,
    }
    trace = {"seconds": 1.0, "stages": [{"name": name, "seconds": each} for name, each in seconds.items()]}
    found = {bar.name: bar for bar in pictures.traced_step(trace)}
    expected = {
        "siglip": 250, "prefix, backward": 500, "optimizer": 50, "other": 1, "communication": 125, "host, idle": 74,
        "step": 1000,
    }  # fmt: skip
    assert {name: bar.milliseconds for name, bar in found.items()} == pytest.approx(expected)
    assert list(found) == list(expected) and found["siglip"].kind == "forward"
    overlapping = {bar.name: bar.milliseconds for bar in pictures.traced_step({**trace, "seconds": 0.9})}
    assert (overlapping["host, idle"], overlapping["step"]) == (0, 900)


def test_waterfall_is_drawn():
    bars = [plots.Bar("siglip", 2.0, "forward"), plots.Bar("input", 1.0, "input"), plots.Bar("step", 3.0, "step")]
    (panel,) = plots.waterfalls("title", "caption", [("one", bars)]).axes
    ends = [patch.get_extents().transformed(panel.transData.inverted()).intervalx for patch in panel.patches]
    assert [list(each) for each in ends] == [pytest.approx(each) for each in ([0, 2], [2, 3], [0, 3])]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["siglip", "input", "step"]


def test_curves():
    found = {(curve.name, curve.batch): curve for curve in pictures.curves(list(PLANS.values()))}
    v5p = found["TPU v5p", 4.0]
    assert v5p.chips == (8, 256)
    assert v5p.samples == pytest.approx([PLANS[f"v5p-{n}"]["time"]["samples_per_s"] / n for n in (8, 256)])
    _, efficiencies = plots.scaling("title", "caption", list(found.values())).axes
    lines = {str(line.get_label()): line.get_ydata() for line in efficiencies.lines}
    assert lines["TPU v5p, 4 examples"] == pytest.approx([100, 100 * v5p.samples[1] / v5p.samples[0]])


def test_plans_with_other_batches_are_not_compared():
    many = {**PLANS["h100-256"], "settings": {**PLANS["h100-256"]["settings"], "batch_size": 25856}}
    found = pictures.curves([PLANS["h100-8"], many])
    assert {(curve.batch, curve.chips) for curve in found} == {(4.0, (8,)), (101.0, (256,))}
    _, efficiencies = plots.scaling("title", "caption", found).axes
    assert not any("H100" in str(line.get_label()) for line in efficiencies.lines)


def result(contender, seconds, ours=True, **info):
    info = {"device": "NVIDIA H100 80GB HBM3", "op": "norm", "case": "pi0", "direction": "forward", **info}
    return Result(contender, "norm pi0 forward", (seconds,), {"contender": contender, "ours": ours, **info})


def test_measured_roof():
    cost = {"flops": 1e12, "bytes": 1e10, "ceilings": {"flops": 800e12, "bandwidth": 3e12}}
    found = [
        result("reference", 9e-3, **cost),
        result("triton", 4e-3, **cost),
        result("sdpa", 5e-3, ours=False, **cost),
        result("flex", 7e-3, ours=False, **cost),
    ]
    roof = pictures.measured_roof(found)
    assert roof is not None and all(point.measured and point.intensity == 100 for point in roof.points)
    assert [(point.name, point.marker, point.rate) for point in roof.points] == [("pi0", "o", 2.5e14), ("", "^", 2e14)]
    assert [(name, spec.flops) for name, spec in roof.ceilings] == [("measured", 800e12), ("datasheet", 989e12)]
    assert pictures.measured_roof([result("load", 1.0)]) is None


def test_records_are_drawn(tmp_path):
    """A record with results and a trace gets both pictures, and the same bytes each time."""
    folder = tmp_path / "2026-11-24_h100_norms"
    folder.mkdir()
    info = {"device": "NVIDIA H100", "versions": {"jax": "1"}, "commit": "1", "date": "2026-11-24", "flops": 1e12}
    line = {"name": "a", "group": "norm", "seconds": [1e-3], **info, "bytes": 1e9, "contender": "triton"}
    line["ceilings"] = {"flops": 8e14, "bandwidth": 3e12}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    trace = {"program": "jit_step", "device": "NVIDIA H100", "devices": 1, "calls": 3, "seconds": 0.5, "stages": []}
    (folder / "stages_0.json").write_text(json.dumps(trace))
    for out in ("once", "again"):
        with context({"axes.facecolor": "red"}):  # of whoever draws
            pictures.main([f"--profiles={tmp_path}", f"--out={tmp_path / out}"])
    for name in ("roofline_2026-11-24_h100_norms.png", "waterfall_2026-11-24_h100_norms_0.png"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
