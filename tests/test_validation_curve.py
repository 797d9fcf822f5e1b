"""The curves of a run: what is counted, and what is drawn."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from bench import validation_curve
from pi0fast import Pi0
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.data.demo import PALETTES
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.robots import DEMO
from tests.mini import MINI

HIT, MISS, NONE = ({"prompted": "red", "touched": touched} for touched in ("red", "blue", None))


def test_success_counts_the_prompted_block_alone():
    rate, low, high = validation_curve.success([HIT, HIT, MISS, NONE])
    assert rate == 0.5 and low == pytest.approx(0.15, abs=5e-3) and high == pytest.approx(0.85, abs=5e-3)


def test_both_curves_are_drawn_with_their_intervals():
    record = {
        "palette": "secondary",
        "training": [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)],
        "validation": [{"step": 2, "loss": 0.6}, {"step": 4, "loss": 0.5}],
        "checkpoints": [{"step": 2, "episodes": [HIT, MISS]}, {"step": 4, "episodes": [HIT, HIT]}],
    }
    made = validation_curve.draw(record)
    losses, rates = made.axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in losses.lines}
    assert drawn["training"] == [[1, 1], [2, 1 / 2], [3, 1 / 3], [4, 1 / 4]]
    assert drawn["validation"] == [[2, 0.6], [4, 0.5]]
    curve, lower, upper = (np.asarray(line.get_xydata()).tolist() for line in rates.lines)
    assert curve == [[2, 0.5], [4, 1.0]]
    for (_, rate), (_, low), (_, high) in zip(curve, lower, upper, strict=True):
        assert 0 < low < rate <= high <= 1
    assert "2 episodes" in made.get_supxlabel() and "secondary" in made.get_supxlabel()


def test_every_checkpoint_is_played_alike(tmp_path):
    """Two checkpoints with the same untrained weights."""
    run, out = tmp_path / "run", tmp_path / "out"
    RunConfig(MINI, DEMO, tokenizer="demo", train={"steps": 4}).save(run)
    with pytest.raises(FileNotFoundError, match="--val.fraction"):
        validation_curve.main(run, out, episodes=2)
    unit = NormStats(*np.array([[0.0, 0.0], [0.1, 0.1], [-1.0, -1.0], [1.0, 1.0]]))
    params = {path: variable[...] for path, variable in flatten(Pi0(MINI, rngs=nnx.Rngs(0))).items()}
    with Checkpoints(run) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, params=params, norm_stats={"state": unit, "actions": unit})
    lines = [{"step": step, "loss": 1 / step} for step in (2, 4)]
    for name in ("metrics.jsonl", "validation.jsonl"):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation_curve.main(run, out, episodes=2, palette="secondary")
    record = json.loads((out / "validation.json").read_text())
    assert record["validation"] == record["training"] == lines and record["settings"] == {"steps": 4}
    first, second = record["checkpoints"]
    assert (first["step"], second["step"]) == (2, 4) and first["episodes"] == second["episodes"]
    assert len(first["episodes"]) == 4  # each layout twice
    assert {episode["prompted"] for episode in first["episodes"]} <= set(PALETTES["secondary"])
    with Image.open(out / "validation.png") as picture:
        assert picture.size == (1456, 598)
