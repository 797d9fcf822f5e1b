"""How the loss of held-out episodes and the success in the simulator go together: each checkpoint of one run, played.

    python -m pi0fast.train --val.fraction=0.1 --output.save-every=200 --output.keep-every=200
    python -m bench.validation_curve --run=RUN --out=FOLDER [--episodes=100] [--palette=primary]

FOLDER/validation.json has the run's settings, its losses, and every episode of every checkpoint, each checkpoint played
on the same layouts from the same noise. FOLDER/validation.png is drawn from it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure

from bench import plots
from bench.provenance import provenance
from pi0fast import checkpoint
from pi0fast.checkpoint import RunConfig
from pi0fast.data.demo import Palette
from pi0fast.evaluate import UNSEEN_SEED, evaluate, wilson_interval
from pi0fast.policy import Policy, keep_compiled_programs


def play(run: Path, step: int, episodes: int, palette: Palette) -> list[dict[str, Any]]:
    """Every layout with its own block prompted, then every one with another."""
    policy = Policy.load(run, step=step, batch_sizes=(episodes,))
    return [
        outcome.to_dict()
        for shift in (0, 1)
        for outcome in evaluate(policy, episodes, palette=palette, prompt_shift=shift)
    ]


def success(episodes: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Its rate, and the 95 % confidence interval."""
    count = sum(episode["touched"] == episode["prompted"] for episode in episodes)
    return count / len(episodes), *wilson_interval(count, len(episodes))


def draw(record: dict[str, Any]) -> matplotlib.figure.Figure:
    """Losses and success beside each other, over the step."""
    played = record["checkpoints"]
    caption = (
        f"Measured. Success: {len(played[0]['episodes'])} episodes of each checkpoint on layouts that no training has "
        f"seen, {record['palette']} colours, the same for all; bars: 95 % (Wilson)."
    )
    made, (losses, rates) = plots.figure("Validation and success", caption, 1, 2, (plots.WIDTH[2], 4.6))
    for name, colour, style in (("training", plots.SKY, "-"), ("validation", plots.BLUE, "o-")):
        steps, values = ([line[key] for line in record[name]] for key in ("step", "loss"))
        losses.plot(steps, values, style, color=colour, markersize=4, linewidth=1.2, label=name)
    losses.set(yscale="log", ylabel="flow-matching loss")
    losses.legend(fontsize=9, frameon=False)
    shares = [success(each["episodes"]) for each in played]
    reach = [(rate - low, high - rate) for rate, low, high in shares]
    rates.errorbar(
        [each["step"] for each in played],
        [rate for rate, _, _ in shares],
        list(zip(*reach, strict=True)),
        color=plots.ORANGE,
        marker="o",
        markersize=4,
        capsize=3,
    )
    rates.set(ylim=(0, 1.03), ylabel="success in the simulator")
    for panel in (losses, rates):
        panel.set_xlabel("step", fontsize=9)
        panel.grid(True, color="#dddddd", linewidth=0.6)
    return made


def main(run: Path, out: Path, episodes: int = 100, palette: Palette = "primary") -> None:
    """Play every checkpoint of a run and draw the curves.

    run: a run of the demo, trained with --val.fraction.
    out: the folder of the results.
    episodes: layouts, each played twice.
    palette: the blocks' colours, those of the run's data set.
    """
    lines = {"training": run / "metrics.jsonl", "validation": run / "validation.jsonl"}
    if not lines["validation"].exists():
        raise FileNotFoundError(f"{run} has no validation.jsonl; train it with --val.fraction")
    config = RunConfig.load(run)
    keep_compiled_programs()
    record = {
        **provenance(),
        "settings": config.train,
        "palette": palette,
        "seed": UNSEEN_SEED,
        **{name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in lines.items()},
        "checkpoints": [],
    }
    for step in checkpoint.steps(run):
        played = play(run, step, episodes, palette)
        record["checkpoints"].append({"step": step, "episodes": played})
        rate, low, high = success(played)
        print(f"step {step}: success {rate:.1%} ({low:.1%} to {high:.1%})", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "validation.json").write_text(json.dumps(record) + "\n")
    plots.save(draw(record), out / "validation.png")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
