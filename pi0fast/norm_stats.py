"""Normalisation statistics of a LeRobot v3 data set, from its parquet columns alone: no video is decoded.

python -m pi0fast.norm_stats --data=lerobot/aloha_static_coffee --robot=aloha --action-horizon=50
"""

import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pi0fast import normalize
from pi0fast.normalize import NormStats
from pi0fast.robots import Robot, find_robot
from pi0fast.transforms import delta_actions

BLOCK_ACTIONS = 1 << 17  # actions of chunks made at a time


def compute_norm_stats(dataset_root: Path, robot: Robot, action_horizon: int) -> dict[str, NormStats]:
    """Statistics of "state", every frame's, and "actions", every frame's chunk, after the delta step.

    As openpi's compute_norm_stats.py: a frame's chunk is the actions of it and the next `action_horizon - 1` frames,
    the last one of the episode repeated beyond its end. Warns of every dimension that hardly moves.

    Raises FileNotFoundError when there is no data set, and ValueError when it is not of version 3, lacks a key of the
    robot, or holds values that are missing or not finite.
    """
    features = _features(dataset_root)
    stats = {
        "state": normalize.compute(state for state, _, _ in _read(dataset_root, features, robot.state, ())),
        "actions": normalize.compute(_chunks(dataset_root, features, robot, action_horizon)),
    }
    for key, value in stats.items():
        for dim, name, spread in normalize.narrow_dimensions(value):
            warnings.warn(
                f"{key}, dimension {dim}: {name} is {spread:.3g}, so small changes normalise to huge values; widen it "
                "by hand in the statistics if the dimension may move",
                stacklevel=2,
            )
    return stats


def norm_stats_path(dataset_root: Path, robot: Robot, action_horizon: int) -> Path:
    """Where a data set keeps the statistics of a robot: the name changes with what they depend on, its frames too."""
    frames = json.loads((Path(dataset_root) / "meta" / "info.json").read_text())["total_frames"]
    relevant = json.dumps([robot.state, robot.action, robot.delta_mask, frames])
    digest = hashlib.sha256(relevant.encode()).hexdigest()[:8]
    name = f"{robot.name}_h{action_horizon}_{digest}.json"
    return Path(dataset_root) / "meta" / "pi0fast" / "norm_stats" / name


def find_dataset(data: str) -> Path:
    """The folder of a LeRobot data set, from its path or its Hub id.

    An id is looked for in LeRobot's home (`$HF_LEROBOT_HOME`), and else downloaded without its videos.

    Raises FileNotFoundError when `data` is neither a data set nor a Hub id.
    """
    default_home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "lerobot"
    home = Path(os.environ.get("HF_LEROBOT_HOME", default_home)).expanduser()
    for root in (Path(data).expanduser(), home / data):
        if (root / "meta" / "info.json").is_file():
            return root
    if data.count("/") != 1 or data.startswith((".", "/", "~")) or Path(data).exists():
        raise FileNotFoundError(f"{data} holds no LeRobot data set (meta/info.json) and is no Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            data, repo_type="dataset", revision="v3.0", cache_dir=home / "hub", allow_patterns=["meta/*", "data/*"]
        )
    )


def main(data: str, robot: str, action_horizon: int, out: Path | None = None) -> None:
    """Compute normalisation statistics and write them as openpi's norm_stats.json.

    Args:
        data: a LeRobot v3 data set: its folder, or its id on the Hub.
        robot: a ready robot's name, or a YAML file.
        action_horizon: actions per chunk, as in the model.
        out: the file to write; by default under the data set's meta/pi0fast/norm_stats/.
    """
    root, found_robot = find_dataset(data), find_robot(robot)
    start = time.perf_counter()
    stats = compute_norm_stats(root, found_robot, action_horizon)
    out = out or norm_stats_path(root, found_robot, action_horizon)
    normalize.save(out, stats)
    print(f"{out}: {time.perf_counter() - start:.1f} s")
    for key, value in stats.items():
        for field in dataclasses.fields(value):
            print(f"{key} {field.name}: {getattr(value, field.name).round(4)}")


def _features(root: Path) -> dict[str, dict]:
    path = Path(root) / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{root} holds no LeRobot data set: there is no meta/info.json")
    info = json.loads(path.read_text())
    version = info.get("codebase_version")
    if not str(version).startswith("v3."):
        raise ValueError(
            f"{root} is of LeRobot's version {version}, expected v3; convert it with `python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<owner/name> --root={root} --push-to-hub=false`"
        )
    return info["features"]


def _chunks(root: Path, features: dict[str, dict], robot: Robot, horizon: int) -> Iterator[np.ndarray]:
    """The chunks of all frames after the delta step, a block of frames at a time: `[n * H, d]`."""
    state_keys = robot.state if any(robot.delta_mask) else ()
    frames = max(1, BLOCK_ACTIONS // horizon)
    for actions, state, ends in _read(root, features, robot.action, state_keys):
        for start in range(0, len(actions), frames):
            first = np.arange(start, min(start + frames, len(actions)))
            steps = np.minimum(first[:, None] + np.arange(horizon), ends[first, None] - 1)
            chunks = delta_actions(actions[steps], state[first], robot.delta_mask if state_keys else ())
            yield chunks.reshape(-1, actions.shape[1])


def _read(
    root: Path, features: dict[str, dict], keys: tuple[str, ...], other_keys: tuple[str, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per data file: the columns of `keys` side by side `[n, d]`, those of `other_keys`, `_episode_ends`."""
    if missing := [key for key in (*keys, *other_keys) if key not in features]:
        raise ValueError(f"{root} has no {missing}; its features are {sorted(features)}: name the robot's keys so")
    paths = sorted((Path(root) / "data").glob("*/*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{root} has no data/*/*.parquet; copy or download its data folder")
    for path in paths:
        table = pq.read_table(path, columns=[*{*keys, *other_keys}, "episode_index", "frame_index"])
        yield (
            _columns(table, keys, features, path),
            _columns(table, other_keys, features, path),
            _episode_ends(table, path),
        )


def _columns(table: pa.Table, keys: tuple[str, ...], features: dict[str, dict], path: Path) -> np.ndarray:
    parts = [np.zeros((table.num_rows, 0), np.float32)]
    for key in keys:
        dim = int(np.prod(features[key]["shape"]))
        column = table[key].combine_chunks()
        while pa.types.is_nested(column.type):
            column = column.flatten()
        if column.null_count or len(column) != table.num_rows * dim:
            raise ValueError(
                f"{path}: {key} has {len(column)} values, {column.null_count} of them null, in {table.num_rows} rows "
                f"of {dim}; write the data set again"
            )
        values = column.to_numpy(zero_copy_only=False).reshape(-1, dim)
        if not np.isfinite(values).all():
            row, column_dim = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{path}: {key} is {values[row, column_dim]} in row {row}, dimension {column_dim}; repair or delete "
                "the episode"
            )
        parts.append(values)
    return np.concatenate(parts, axis=1)


def _episode_ends(table: pa.Table, path: Path) -> np.ndarray:
    """Per row, the row after the last of its episode. Raises ValueError unless episodes are whole and in order."""
    episode, frame = (table[key].to_numpy() for key in ("episode_index", "frame_index"))
    starts = np.flatnonzero(np.diff(episode, prepend=-1))
    lengths = np.diff(starts, append=len(episode))
    if (frame != np.arange(len(frame)) - np.repeat(starts, lengths)).any():
        raise ValueError(
            f"{path}: the frames of an episode are not in one run in order (frame_index); write the data set again"
        )
    return np.repeat(starts + lengths, lengths)


if __name__ == "__main__":
    tyro.cli(main)
