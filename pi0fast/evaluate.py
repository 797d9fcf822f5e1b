"""Run a trained policy closed-loop in the demo simulator: success rate, and a GIF of episodes.

python -m pi0fast.evaluate RUN
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

from pi0fast.cli import one_line_errors
from pi0fast.data.demo import MAX_STEPS, Palette, Simulator
from pi0fast.execution import Kernels
from pi0fast.policy import Policy, Step, keep_compiled_programs

UNSEEN_SEED = 1_000_000  # layouts that no data set of the writer's default seeds holds


@dataclass(frozen=True)
class Outcome:
    """One episode. touched: the colour of the block that the agent came to rest on, or None."""

    prompted: str
    touched: str | None
    frames: list[np.ndarray]

    @property
    def success(self) -> bool:
        return self.touched == self.prompted

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: without the frames."""
        return {"prompted": self.prompted, "touched": self.touched, "steps": len(self.frames) - 1}


def evaluate(
    policy: Policy,
    episodes: int,
    *,
    seed: int = UNSEEN_SEED,
    palette: Palette = "primary",
    prompt_shift: int = 0,
    execute: int = 4,
) -> list[Outcome]:
    """Play episodes side by side, `execute` actions of each chunk at a time.

    The layout of an episode depends on `seed` and its number alone; with another `prompt_shift` another of its blocks
    is prompted.
    """
    simulators = [Simulator(seed + episode, palette=palette) for episode in range(episodes)]
    observations = [simulator.reset(prompt_shift) for simulator in simulators]
    frames = [[observation["observation.images.top"]] for observation in observations]
    touched: dict[int, str | None] = {}
    while len(touched) < episodes:
        chunks = policy.infer_batch(observations)  # finished ones too: the policy is compiled for all of them
        for episode in set(range(episodes)) - set(touched):
            for action in chunks[episode][:execute]:
                observations[episode], done, info = simulators[episode].step(action)
                frames[episode].append(observations[episode]["observation.images.top"])
                if done:
                    touched[episode] = info["touched"]
                    break
    prompted = [simulator.colours[simulator.wanted] for simulator in simulators]
    return [Outcome(prompted[episode], touched[episode], frames[episode]) for episode in range(episodes)]


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a success rate (Wilson 1927)."""
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(outcomes: list[Outcome]) -> str:
    episodes, successes = len(outcomes), sum(outcome.success for outcome in outcomes)
    low, high = wilson_interval(successes, episodes)
    wrong = sum(outcome.touched is not None and not outcome.success for outcome in outcomes)
    return (
        f"{successes}/{episodes} = {successes / episodes:.0%} (95 % confidence interval {low:.0%} to {high:.0%}); "
        f"wrong block {wrong}, none within {MAX_STEPS} steps {episodes - successes - wrong}"
    )


def write_gif(outcomes: list[Outcome], path: Path, *, columns: int = 4, scale: int = 3) -> None:
    """The episodes side by side, each under its prompted colour, green when it succeeded."""
    size = outcomes[0].frames[0].shape[0] * scale
    label = 16
    rows = -(-len(outcomes) // columns)
    sheets = []
    for tick in range(max(len(outcome.frames) for outcome in outcomes)):
        sheet = Image.new("RGB", (columns * size, rows * (size + label)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, outcome in enumerate(outcomes):
            x, y = place % columns * size, place // columns * (size + label)
            frame = Image.fromarray(outcome.frames[min(tick, len(outcome.frames) - 1)])
            sheet.paste(frame.resize((size, size), Image.Resampling.NEAREST), (x, y + label))
            over = tick >= len(outcome.frames) - 1
            colour = ("green" if outcome.success else "red") if over else "black"
            draw.text((x + 4, y + 2), f"touch the {outcome.prompted} block", fill=colour)
        sheets.append(sheet)
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=100, loop=0)


def main(
    run: Annotated[Path, tyro.conf.Positional],
    step: Step | None = None,
    episodes: int = 100,
    seed: int = UNSEEN_SEED,
    palette: Palette = "primary",
    gif_episodes: int = 8,
    out: Path | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Run a policy closed-loop in the demo simulator.

    Args:
        run: the folder of a run that was trained on the demo.
        step: of the checkpoint, or `best`, that with the lowest validation loss; by default the newest.
        episodes: how many, each with a layout that training has not seen.
        seed: of the layouts.
        palette: the blocks' colours: primary is what the demo's own data set has, secondary has four others.
        gif_episodes: how many of them to draw, in RUN/episodes.gif; 0 for none.
        out: JSON of every episode, if given.
        kernels: of attention and norms: auto, reference, triton, mosaic_gpu or mosaic_tpu.
    """
    keep_compiled_programs()
    policy = Policy.load(run, step=step, kernels=kernels, batch_sizes=(episodes,))
    if policy.robot.name != "demo":
        raise ValueError(f"{run} is for the robot {policy.robot.name!r}; the simulator is the demo's")
    outcomes = evaluate(policy, episodes, seed=seed, palette=palette)
    print(f"success: {summary(outcomes)}")
    shifted = evaluate(policy, episodes, seed=seed, palette=palette, prompt_shift=1)
    print(f"the same layouts, another block prompted: {summary(shifted)}")
    if out:
        settings = {"run": str(run), "step": step, "episodes": episodes, "seed": seed, "palette": palette}
        played = {"own": outcomes, "another": shifted}
        of_block = {block: [outcome.to_dict() for outcome in each] for block, each in played.items()}
        out.write_text(json.dumps({"settings": settings, "block prompted": of_block}) + "\n")
    if gif_episodes:
        write_gif(outcomes[:gif_episodes], run / "episodes.gif")
        print(f"Episodes: {run / 'episodes.gif'}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m pi0fast.evaluate")
