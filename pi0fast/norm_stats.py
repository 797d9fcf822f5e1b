"""Normalisation statistics of a LeRobot v3 data set, from its parquet columns alone: no video is decoded.

python -m pi0fast.norm_stats --data=lerobot/aloha_static_coffee --robot=aloha --action-horizon=50
"""

import dataclasses
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pi0fast import normalize
from pi0fast.cli import one_line_errors
from pi0fast.data.lerobot_format import LeRobotFiles, find_dataset
from pi0fast.normalize import NormStats
from pi0fast.robots import Robot, find_robot
from pi0fast.transforms import delta_actions

logger = logging.getLogger(__name__)

BLOCK_ACTIONS = 1 << 17  # actions of chunks made at a time


def compute_norm_stats(
    dataset_root: Path, robot: Robot, action_horizon: int, *, tolerate: bool = False
) -> dict[str, NormStats]:
    """Statistics of "state", every frame's, and "actions", every frame's chunk, after the delta step.

    As openpi's compute_norm_stats.py: a frame's chunk is the actions of it and the next `action_horizon - 1` frames,
    the last one of the episode repeated beyond its end. Warns of every dimension that hardly moves.

    tolerate: leave out states and chunks of which a value is not finite; training replaces such samples.

    Raises FileNotFoundError when there is no data set, and ValueError when it is not of version 3, lacks a key of the
    robot, or holds values that are missing or, unless tolerated, not finite.
    """
    if action_horizon < 1:
        raise ValueError(f"action_horizon={action_horizon} must be positive")
    files = LeRobotFiles(Path(dataset_root))
    frames = files.frames((*robot.state, *robot.action))
    if not tolerate:
        for key, values in frames.values.items():
            _check_finite(files.root, key, values, frames.starts)
    state, actions = (np.concatenate([frames.values[key] for key in keys], 1) for keys in (robot.state, robot.action))
    stats = {
        "state": normalize.compute([state[np.isfinite(state).all(axis=1)]]),
        "actions": normalize.compute(_chunks(actions, state, frames.starts, robot, action_horizon)),
    }
    for key, value in stats.items():
        for dim, name, spread in normalize.narrow_dimensions(value):
            warnings.warn(
                f"{key}, dimension {dim}: {name} is {spread:.3g}, so small changes normalise to huge values; widen it "
                "by hand in the statistics if the dimension may move",
                stacklevel=2,
            )
    return stats


def find_or_compute(
    dataset_root: Path, robot: Robot, action_horizon: int, *, tolerate: bool = False
) -> dict[str, NormStats]:
    """The statistics that the data set keeps; where it has none, they are computed, and kept if they can be written.

    Raises as `compute_norm_stats`, and ValueError when the file that is there cannot be read.
    """
    path = norm_stats_path(dataset_root, robot, action_horizon)
    if path.exists():
        return normalize.load(path)
    stats = compute_norm_stats(dataset_root, robot, action_horizon, tolerate=tolerate)
    try:
        normalize.save(path, stats)
    except OSError as error:
        logger.warning("the statistics cannot be kept beside the data, so the next run computes them anew: %s", error)
    return stats


def norm_stats_path(dataset_root: Path, robot: Robot, action_horizon: int) -> Path:
    """Where a data set keeps the statistics of a robot: the name changes with what they depend on, its frames too."""
    frames = json.loads((Path(dataset_root) / "meta" / "info.json").read_text())["total_frames"]
    relevant = json.dumps([robot.state, robot.action, robot.delta_mask, frames])
    digest = hashlib.sha256(relevant.encode()).hexdigest()[:8]
    name = f"{robot.name}_h{action_horizon}_{digest}.json"
    return Path(dataset_root) / "meta" / "pi0fast" / "norm_stats" / name


def main(data: str, robot: str, action_horizon: int, out: Path | None = None) -> None:
    """Compute normalisation statistics and write them as openpi's norm_stats.json.

    Args:
        data: a LeRobot v3 data set: its folder, or its id on the Hub.
        robot: a ready robot's name, or a YAML file.
        action_horizon: actions per chunk, as in the model.
        out: the file to write; by default under the data set's meta/pi0fast/norm_stats/.
    """
    root, found_robot = find_dataset(data, videos=False), find_robot(robot)
    start = time.perf_counter()
    stats = compute_norm_stats(root, found_robot, action_horizon)
    out = out or norm_stats_path(root, found_robot, action_horizon)
    normalize.save(out, stats)
    print(f"{out}: {time.perf_counter() - start:.1f} s")
    for key, value in stats.items():
        for field in dataclasses.fields(value):
            print(f"{key} {field.name}: {getattr(value, field.name).round(4)}")


def _chunks(
    actions: np.ndarray, state: np.ndarray, starts: np.ndarray, robot: Robot, horizon: int
) -> Iterator[np.ndarray]:
    """The chunks of all frames after the delta step, a block of frames at a time: `[n * H, d]`; only finite ones."""
    ends = np.repeat(starts[1:], np.diff(starts))
    finite_states, finite_actions = (np.all(np.isfinite(values), axis=1) for values in (state, actions))
    block = max(1, BLOCK_ACTIONS // horizon)
    for start in range(0, len(actions), block):
        first = np.arange(start, min(start + block, len(actions)))
        steps = np.minimum(first[:, None] + np.arange(horizon), ends[first, None] - 1)
        good = finite_states[first] & finite_actions[steps].all(axis=1)
        chunks = delta_actions(actions[steps[good]], state[first[good]], robot.delta_mask)
        yield chunks.reshape(-1, actions.shape[1])


def _check_finite(root: Path, key: str, values: np.ndarray, starts: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, dim = bad[0]
        episode = np.searchsorted(starts, row, side="right") - 1
        frame = row - starts[episode]
        raise ValueError(
            f"{root}: {key} is {values[row, dim]} in episode {episode}, frame {frame}, dimension {dim}; repair or "
            "delete the episode"
        )


if __name__ == "__main__":
    import tyro

    with one_line_errors():
        tyro.cli(main, prog="python -m pi0fast.norm_stats")
