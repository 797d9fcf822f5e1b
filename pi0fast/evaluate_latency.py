"""A policy that answers late, in the demo simulator: success rate and jerk with and without real-time chunking.

python -m pi0fast.evaluate_latency RUN --latency 2 4

A chunk that is asked for in control step i is there in step i + latency; until then the last one is executed. Both ways
play the same layouts, and their n-th chunks start from the same noise, so their differences are paired by episode.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pi0fast.checkpoint import RunConfig
from pi0fast.cli import one_line_errors
from pi0fast.data.demo import MAX_STEPS, Simulator
from pi0fast.evaluate import UNSEEN_SEED, wilson_interval
from pi0fast.execution import Kernels
from pi0fast.policy import Policy, keep_compiled_programs
from pi0fast.rtc import RtcConfig

MEASURES = ("success", "action_jerk", "position_jerk")


@dataclass(frozen=True)
class Episode:
    """One episode. The jerks are those of the executed actions and of the agent's positions (`jerk`)."""

    success: bool
    steps: int
    action_jerk: float
    position_jerk: float


def jerk(path: np.ndarray) -> float:
    """Mean squared norm of the third difference of `path [n, 2]`, in (table widths per step³)²; n is at least 4."""
    return float(np.square(np.diff(path, n=3, axis=0)).sum(axis=1).mean())


def check(latency: int, execute: int, horizon: int) -> None:
    """Raises: ValueError: no latency, or one that the chunks are too short for."""
    if not 1 <= latency <= execute <= horizon - latency:
        raise ValueError(
            f"latency={latency}, execute={execute}: give 1 <= latency <= execute <= horizon - latency, with the "
            f"model's horizon {horizon}; beyond, the robot would wait for chunks"
        )


def play(policy: Policy, episodes: int, *, latency: int, execute: int, rtc: bool, seed: int) -> list[Episode]:
    """Play episodes side by side; a chunk is asked for after each `execute` steps.

    rtc: ask with what is left of the chunk in execution, else switch hard. As many chunks are drawn either way.

    Raises:
        ValueError: as `check`.
    """
    check(latency, execute, policy.metadata["action_horizon"])
    simulators = [Simulator(seed + episode) for episode in range(episodes)]
    observations = [simulator.reset() for simulator in simulators]
    positions = [[simulator.agent] for simulator in simulators]
    actions: list[list[np.ndarray]] = [[] for _ in simulators]
    successes: dict[int, bool] = {}
    chunks, step = policy.infer_batch(observations), 0
    coming, asked, due = chunks, 0, -1
    for tick in range(MAX_STEPS):
        if tick == due:
            chunks, step = coming, step - asked
        if tick >= due and step >= execute:
            left = [{"rtc/previous_actions": chunk[step:], "rtc/delay": latency} if rtc else {} for chunk in chunks]
            coming = policy.infer_batch([seen | more for seen, more in zip(observations, left, strict=True)])
            asked, due = step, tick + latency
        for episode in set(range(episodes)) - set(successes):
            observations[episode], done, info = simulators[episode].step(chunks[episode, step])
            actions[episode].append(chunks[episode, step])
            positions[episode].append(simulators[episode].agent)
            if done:
                successes[episode] = info["success"]
        step += 1
    return [
        Episode(successes[i], len(actions[i]), jerk(np.stack(actions[i])), jerk(np.stack(positions[i])))
        for i in range(episodes)
    ]


def paired_difference(before: np.ndarray, after: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean of `after - before` `[n]`, and its 95 % confidence interval: percentiles of a seeded bootstrap of pairs."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    chosen = np.random.default_rng(0).integers(len(difference), size=(resamples, len(difference)))
    low, high = np.quantile(difference[chosen].mean(axis=1), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def paired_rates(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Difference of two success rates, bool `[n]` each, over the same n episodes, and its 95 % confidence interval.

    Wald's interval with half an episode added to each cell of the table, which no pair at odds does not make zero
    (Agresti & Min 2005, https://doi.org/10.1002/sim.1781).
    """
    gained, lost, n = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    centre = (gained - lost) / (n + 2)
    half = 1.96 * np.sqrt(((gained + lost + 1) / (n + 2) - centre**2) / (n + 2))
    return (gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half)


def compare(hard: list[Episode], guided: list[Episode]) -> dict:
    """Means of both ways, Wilson's interval of the success rates, differences with theirs, and every episode."""
    ways = {"hard": hard, "rtc": guided}
    values = {way: {name: np.array([getattr(e, name) for e in ways[way]]) for name in MEASURES} for way in ways}
    pairs = {name: (values["hard"][name], values["rtc"][name]) for name in MEASURES}
    intervals = {way: wilson_interval(int(of["success"].sum()), len(of["success"])) for way, of in values.items()}
    return {
        "mean": {way: {name: float(of[name].mean()) for name in MEASURES} for way, of in values.items()},
        "success_interval": intervals,
        "rtc_minus_hard": {
            name: (paired_rates if name == "success" else paired_difference)(*pair) for name, pair in pairs.items()
        },
        "episodes": {way: [asdict(episode) for episode in episodes] for way, episodes in ways.items()},
    }


def main(
    run: Annotated[Path, tyro.conf.Positional],
    latency: tuple[int, ...] = (2, 4),
    episodes: int = 100,
    execute: int = 4,
    seed: int = UNSEEN_SEED,
    noise_seed: int = 0,
    rtc: RtcConfig = RtcConfig(),
    out: Path | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Compare hard switches with real-time chunking under latency, in the demo simulator.

    Args:
        run: the folder of a run that was trained on the demo.
        latency: in control steps; several are played one after the other.
        episodes: how many for each, each with a layout that training has not seen.
        execute: steps of a chunk to execute before the next is asked for.
        seed: of the layouts.
        noise_seed: of the chunks' noise.
        out: JSON of the results and of every episode, RUN/latency.json by default.
        kernels: of attention and norms: auto, reference, triton, mosaic_gpu or mosaic_tpu.
    """
    config = RunConfig.load(run)
    if config.robot is None or config.robot.name != "demo":
        raise ValueError(f"{run} is for the robot {config.robot and config.robot.name!r}; the simulator is the demo's")
    for steps in latency:
        check(steps, execute, config.model.action_horizon)
    keep_compiled_programs()
    options = {"seed": noise_seed, "kernels": kernels, "batch_sizes": (episodes,)}
    hard, guided = Policy.load(run, **options), Policy.load(run, rtc=rtc, **options)
    out = out or run / "latency.json"
    settings = {"episodes": episodes, "execute": execute, "seed": seed, "noise_seed": noise_seed, "rtc": asdict(rtc)}
    results = {}
    for steps in latency:
        same = {"latency": steps, "execute": execute, "seed": seed}
        result = compare(play(hard, episodes, rtc=False, **same), play(guided, episodes, rtc=True, **same))
        results[steps] = result
        print(f"latency {steps}:")
        for way, (low, high) in result["success_interval"].items():
            values = result["mean"][way]
            print(
                f"  {way:4}  success {values['success']:.0%} ({low:.0%} to {high:.0%}), jerk of actions "
                f"{values['action_jerk']:.3g}, of positions {values['position_jerk']:.3g}"
            )
        for name, (mean, low, high) in result["rtc_minus_hard"].items():
            print(f"  rtc - hard, {name}: {mean:+.3g} (95 % confidence interval {low:+.3g} to {high:+.3g})")
        out.write_text(json.dumps({"settings": settings, "latency": results}, indent=1) + "\n")
    print(f"Results: {out}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m pi0fast.evaluate_latency")
