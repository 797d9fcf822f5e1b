"""What training reads of a LeRobot v3 data set besides its images: metadata and numeric columns, with pyarrow alone.

Importing lerobot takes many times longer than reading these, so only decoding imports it (`lerobot_source`).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Frames:
    """The rows of a data set, one per frame, n in all; E episodes.

    values: per requested key float32 [n, dim]. timestamp: seconds since the start of the episode, float64 [n].
    task: index into the prompts, int64 [n]. starts: int64 [E + 1], episode e is rows starts[e] to starts[e + 1] - 1.
    """

    values: dict[str, np.ndarray]
    timestamp: np.ndarray
    task: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Video:
    """Where a camera's images of one episode are: `path`, from `start` seconds on."""

    path: Path
    start: float


def find_dataset(data: str | Path, *, videos: bool = True) -> Path:
    """The folder of a LeRobot data set: a path, a name below `$HF_LEROBOT_HOME`, or else a Hub id, which is downloaded.

    videos: download them too.

    Raises FileNotFoundError when it is none of these, ValueError when the Hub has no v3 version of it.
    """
    data = str(data)
    default_home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "lerobot"
    home = Path(os.environ.get("HF_LEROBOT_HOME", default_home)).expanduser()
    for root in (Path(data).expanduser(), home / data):
        if (root / "meta" / "info.json").is_file():
            return root
    if data.count("/") != 1 or data.startswith((".", "/", "~")) or Path(data).exists():
        raise FileNotFoundError(f"{data} holds no LeRobot data set (meta/info.json) and is no Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        patterns = None if videos else ["meta/*", "data/*"]
        return Path(
            snapshot_download(
                data, repo_type="dataset", revision="v3.0", cache_dir=home / "hub", allow_patterns=patterns
            )
        )
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hub has no version v3.0 of {data}; {_conversion(data)}") from error


class LeRobotFiles:
    """The metadata of the LeRobot v3 data set in the folder `root`.

    Raises FileNotFoundError when there is none, ValueError for another version.
    """

    def __init__(self, root: Path):
        self.root = root
        path = root / "meta" / "info.json"
        if not path.is_file():
            raise FileNotFoundError(f"{root} holds no LeRobot data set: there is no meta/info.json")
        try:
            self.info = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; copy or download the data set again") from error
        version = str(self.info.get("codebase_version"))
        if not version.startswith("v3."):
            raise ValueError(
                f"{root} is of LeRobot's version {version}, expected v3.0; {_conversion('<owner/name>', root)}"
            )
        self.features = self.info["features"]
        self.fps = self.info["fps"]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the data set does: a hash of all metadata (statistics of every episode included) and of the
        names and sizes of the data and video files. The same wherever the data set is copied."""
        digest = hashlib.sha256()
        for folder, read in (("meta", True), ("data", False), ("videos", False)):
            for path in sorted((self.root / folder).rglob("*")):
                if path.suffix in (".json", ".parquet", ".mp4") and "pi0fast" not in path.relative_to(self.root).parts:
                    digest.update(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n".encode())
                    if read:
                        digest.update(path.read_bytes())
        return digest.hexdigest()

    def prompts(self) -> dict[int, str]:
        """Task index → prompt."""
        table = pq.read_table(self.root / "meta" / "tasks.parquet")
        (text,) = (name for name in table.column_names if name != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

    def frames(self, keys: tuple[str, ...]) -> Frames:
        """Read the columns `keys`; values may be NaN or infinite.

        Raises ValueError for keys that are missing, values of another shape than the metadata says, and rows that are
        not whole episodes in order; FileNotFoundError when there are no data files.
        """
        if missing := [key for key in keys if key not in self.features]:
            raise ValueError(
                f"{self.root} has no {missing}; its features are {sorted(self.features)}: name the robot's keys so"
            )
        paths = sorted((self.root / "data").glob("*/*.parquet"))
        if not paths:
            raise FileNotFoundError(f"{self.root} has no data/*/*.parquet; copy or download its data folder")
        own = ("index", "episode_index", "frame_index", "timestamp", "task_index")
        tables = [pq.read_table(path, columns=[*dict.fromkeys((*keys, *own))]) for path in paths]
        index, episode, frame, timestamp, task = (
            np.concatenate([table[key].to_numpy() for table in tables]) for key in own
        )
        starts = np.flatnonzero(np.diff(episode, prepend=-1))
        lengths = np.diff(starts, append=len(episode))
        total = self.info["total_frames"]
        if (
            len(index) != total
            or (index != np.arange(total)).any()
            or (episode != np.repeat(np.arange(len(starts)), lengths)).any()
            or (frame != np.arange(total) - np.repeat(starts, lengths)).any()
        ):
            raise ValueError(
                f"{self.root}: the {len(index)} rows are not whole episodes in order, {total} rows in all (index, "
                "episode_index, frame_index, total_frames of info.json); write the data set again with lerobot"
            )
        values = {
            key: np.concatenate([self._column(table, key, path) for table, path in zip(tables, paths, strict=True)])
            for key in keys
        }
        return Frames(values, timestamp.astype(np.float64), task, np.append(starts, total))

    def videos(self, key: str) -> list[Video]:
        """Per episode, where the images of camera `key` are."""
        columns = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        table = pa.concat_tables([pq.read_table(path, columns=["episode_index", *columns]) for path in paths])
        rows = zip(*(table.sort_by("episode_index")[name].to_pylist() for name in columns), strict=True)
        return [
            Video(self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file), start)
            for chunk, file, start in rows
        ]

    def _column(self, table: pa.Table, key: str, path: Path) -> np.ndarray:
        """float32 [rows, dim]"""
        dim = int(np.prod(self.features[key]["shape"]))
        column = table[key].combine_chunks()
        even = True
        while pa.types.is_nested(column.type):
            even &= len(column.value_lengths().unique()) <= 1
            column = column.flatten()
        if not even or column.null_count or len(column) != table.num_rows * dim:
            raise ValueError(
                f"{path}: {key} has {len(column)} values, {column.null_count} of them null, in {table.num_rows} rows, "
                f"which are not {dim} a row as meta/info.json says; write the data set again with lerobot"
            )
        return column.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)


def _conversion(repo_id: str, root: Path | None = None) -> str:
    where = f" --root={root} --push-to-hub=false" if root else ""
    return f"convert it with `python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id}{where}`"
