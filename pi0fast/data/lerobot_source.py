"""Training samples of a LeRobot v3 data set. lerobot decodes the images; nothing else here imports it, or torch."""

import copy
import functools
import hashlib
import json
import logging
import operator
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pi0fast.data.frames import DecodeError, FrameCache, default_cache_dir
from pi0fast.data.lerobot_format import LeRobotFiles, find_dataset
from pi0fast.robots import Robot
from pi0fast.transforms import resize_with_pad

MAX_REPLACEMENTS = 100  # candidates tried for one bad sample
_REPLACE = "pass on_bad_sample='replace' (--input.on-bad-sample=replace)"
TOLERANCE_S = 1e-4  # between a frame's time and its image's, lerobot's own default

logger = logging.getLogger(__name__)


class LeRobotSource:
    """Random access to the samples of a data set, one per frame. Picklable: worker processes get a copy.

    data: a folder, or an id on the Hub (downloaded if need be).
    robot: which keys make up the state, the actions and the cameras.
    action_horizon: H, actions per sample: this frame's and the following ones'.
    image_size: s, every image is resized and padded to s × s.
    on_bad_sample: a state or action that is not finite, or an image that cannot be decoded (where images are kept on
        disk: one of its episode), is an "error", or the sample is replaced by a good one that is a function of its
        index alone ("replace"). It is never skipped: skipping would shift the order of the samples behind it.
    cache_bytes: the decoded images are kept on disk if they are no larger than this; 0 decodes at every access.
    cache_dir: where they are kept (`frames.default_cache_dir()`).

    Numeric columns are read and checked at construction, before anything is decoded. Raises FileNotFoundError when
    there is no data set; ValueError for one of another version, missing keys, wrong shapes, and bad samples ("error").

    fps, num_episodes: of the data set. dims: of each of the robot's state and action keys. fingerprint: changes when
    the data set does. frames: the data set's number of each sample. num_bad: samples known to be bad. replaced: samples
    that this process has replaced so far.
    """

    def __init__(
        self,
        data: str | Path,
        robot: Robot,
        action_horizon: int,
        image_size: int,
        on_bad_sample: Literal["error", "replace"] = "error",
        cache_bytes: int = 2 << 30,
        cache_dir: Path | None = None,
    ):
        if on_bad_sample not in ("error", "replace"):
            raise ValueError(f"on_bad_sample={on_bad_sample!r} must be 'error' or 'replace'")
        if action_horizon < 1 or image_size < 1:
            raise ValueError(f"action_horizon={action_horizon} and image_size={image_size} must be positive")
        files = LeRobotFiles(find_dataset(data))
        self.root, self.fps, self.fingerprint = files.root, files.fps, files.fingerprint
        self.cameras = dict(robot.cameras)
        self._check_cameras(files.features)
        frames = files.frames((*robot.state, *robot.action))
        self._state = np.concatenate([frames.values[key] for key in robot.state], axis=1)
        self._actions = np.concatenate([frames.values[key] for key in robot.action], axis=1)
        self.dims = {key: values.shape[1] for key, values in frames.values.items()}
        self._check_dims(robot)
        self.state_dim = self._state.shape[1]
        self._timestamp, self._task, self._starts = frames.timestamp, frames.task, frames.starts
        self.prompts = files.prompts()
        self._horizon, self._image_size = action_horizon, image_size
        self._tolerate = on_bad_sample == "replace"
        self.frames = np.arange(len(self._timestamp))
        self._bad = np.zeros(len(self), bool)
        self._undecodable: set[int] = set()  # episodes
        self.replaced = 0
        for keys in (robot.state, robot.action):
            for key in keys:
                self._find_not_finite(key, frames.values[key], self._horizon if keys is robot.action else 1)
        self._videos = {
            key: files.videos(key) for key in self.cameras.values() if files.features[key]["dtype"] == "video"
        }
        self._cache = None
        image_shape = (len(self.cameras), image_size, image_size, 3)
        if len(self) * np.prod(image_shape) <= cache_bytes:
            self._cache = self._open_cache(Path(cache_dir or default_cache_dir()), image_shape)
        self._check_any_good()
        if self._bad.any():
            logger.warning("%s: %d of %d samples are bad and will be replaced", self.root, self.num_bad, len(self))

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def num_episodes(self) -> int:
        return len(self._starts) - 1

    @property
    def num_bad(self) -> int:
        return int(self._bad[self.frames].sum())

    def part(self, episodes: Collection[int]) -> "LeRobotSource":
        """The samples of these episodes, as a source with a fingerprint of its own; a bad one is replaced by another of
        them. What has been read and decoded is shared. Raises ValueError when none of them is good."""
        part = copy.copy(self)
        chosen = np.isin(np.arange(self.num_episodes), sorted(episodes))
        part.frames = np.flatnonzero(np.repeat(chosen, np.diff(self._starts)))
        part.fingerprint = hashlib.sha256(f"{self.fingerprint} {sorted(episodes)}".encode()).hexdigest()
        part._check_any_good()
        return part

    def index(self, episode: int, frame: int) -> int:
        """The index of a frame of an episode of the whole data set. Raises ValueError where there is none."""
        if not 0 <= episode < self.num_episodes:
            raise ValueError(f"{self.root} has no episode {episode}; it has 0 to {self.num_episodes - 1}")
        start, end = map(int, self._starts[episode : episode + 2])
        if not 0 <= frame < end - start:
            raise ValueError(f"episode {episode} of {self.root} has no frame {frame}; it has 0 to {end - start - 1}")
        return start + frame

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample of frame `frames[index]`.

        Returns "image.{camera}" uint8 [s, s, 3], "state" float32 [d], "actions" float32 [H, d], as in the data set;
        "action_is_pad" bool [H], True behind the end of the episode, where its last action is repeated; "prompt" str.

        Raises IndexError, DecodeError (a ValueError) if the images cannot be decoded, and FileNotFoundError if the
        whole data set has vanished.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in [0, {len(self)})")
        frame = int(self.frames[index])
        for candidate in self._candidates(frame):
            if self._bad[candidate]:
                continue
            try:
                images = self._images(candidate)
            except DecodeError as error:
                if not self._tolerate:
                    raise
                # Others of its episode may decode, and be drawn before it or after it, here or in another process.
                self._mark_undecodable(candidate, candidate + 1, str(error))
                continue
            self.replaced += candidate != frame
            return self._sample(candidate, images)
        raise ValueError(f"sample {frame} is bad and so are {MAX_REPLACEMENTS} others tried; repair {self.root}")

    def _sample(self, index: int, images: np.ndarray) -> dict[str, Any]:
        end = self._starts[self._episode(index) + 1]
        steps = index + np.arange(self._horizon)
        return {
            **{f"image.{camera}": image for camera, image in zip(self.cameras, images, strict=True)},
            "state": self._state[index],
            "actions": self._actions[np.minimum(steps, end - 1)],
            "action_is_pad": steps >= end,
            "prompt": self.prompts[int(self._task[index])],
        }

    def _candidates(self, frame: int) -> Iterator[int]:
        """The frame, then its replacements: any of the source's, so that no frame is drawn much more often."""
        yield frame
        rng = np.random.default_rng(frame)
        for _ in range(MAX_REPLACEMENTS):
            yield int(self.frames[rng.integers(len(self))])

    def _episode(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _images(self, index: int) -> np.ndarray:
        """uint8 [cameras, s, s, 3]"""
        if self._cache is not None:
            return self._cache[index]
        return self._decode(self._episode(index), index, index + 1)[0]

    def _decode(self, episode: int, start: int, stop: int) -> np.ndarray:
        """Images of the frames `start` to `stop - 1`, which are in `episode`: uint8 [frames, cameras, s, s, 3]."""
        per_camera = []
        for key in self.cameras.values():
            if key in self._videos:
                video = self._videos[key][episode]
                what = f"the video {video.path}"
                read = functools.partial(_decode_video, video.path, video.start + self._timestamp[start:stop])
            else:
                what = f"the images {key}"
                read = functools.partial(_decode_images, self.root, key, start, stop)
            _import_lerobot()
            try:
                images = read()
            except Exception as error:  # lerobot's backends raise their own, without a common base
                if not (self.root / "meta" / "info.json").is_file():  # no sample is bad, so none may be replaced
                    raise FileNotFoundError(
                        f"the data set {self.root} vanished while it was being read; bring it back, and go on with "
                        "--resume"
                    ) from error
                raise DecodeError(
                    f"episode {episode} of {self.root}: {what} cannot be decoded ({type(error).__name__}: {error}); "
                    f"replace the file, delete the episode, or {_REPLACE}"
                ) from error
            per_camera.append(resize_with_pad(images, self._image_size, self._image_size))
        return np.stack(per_camera, axis=1)

    def _open_cache(self, cache_dir: Path, image_shape: tuple[int, ...]) -> FrameCache:
        digest = hashlib.sha256(json.dumps([*self.cameras.values(), *image_shape]).encode()).hexdigest()
        folder = cache_dir / f"{self.fingerprint[:16]}-{digest[:8]}"
        if folder.is_dir():
            cache = FrameCache(folder)
        else:
            logger.info("decoding the %d episodes of %s into %s", self.num_episodes, self.root, folder)
            starts = self._starts
            cache = FrameCache.write(
                folder, starts, image_shape, lambda e: self._decode(e, starts[e], starts[e + 1]), self._tolerate
            )
        for episode, reason in cache.undecodable.items():
            if not self._tolerate:
                raise DecodeError(f"{reason} (noted in {folder}; remove that folder to decode again)")
            self._mark_undecodable(self._starts[episode], self._starts[episode + 1], reason)
        return cache

    def _mark_undecodable(self, start: int, stop: int, reason: str) -> None:
        """Frames of one episode; the first of it, with a warning."""
        if (episode := self._episode(start)) not in self._undecodable:
            self._undecodable.add(episode)
            logger.warning("%s", reason)
        self._bad[start:stop] = True

    def _find_not_finite(self, key: str, values: np.ndarray, horizon: int) -> None:
        """Mark the samples whose state (horizon 1) or actions hold a value that is not finite."""
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            episode = self._episode(row)
            if not self._tolerate:
                raise ValueError(
                    f"{self.root}: {key} is {values[row]} in episode {episode}, frame {row - self._starts[episode]}; "
                    f"repair or delete the episode, or {_REPLACE}"
                )
            self._bad[max(row - horizon + 1, self._starts[episode]) : row + 1] = True

    def _check_any_good(self) -> None:
        if self._bad[self.frames].all():
            raise ValueError(f"{self.root} has no good sample among {len(self)}; repair the data set")

    def _check_cameras(self, features: dict[str, dict]) -> None:
        if not self.cameras:
            raise ValueError("the robot has no cameras; name at least one")
        if missing := [key for key in self.cameras.values() if key not in features]:
            raise ValueError(
                f"{self.root} has no {missing}; its features are {sorted(features)}: name the robot's keys so"
            )
        for key in self.cameras.values():
            dtype, shape = features[key]["dtype"], features[key]["shape"]
            if dtype not in ("video", "image") or len(shape) != 3 or 3 not in shape:
                raise ValueError(
                    f"{self.root}: the camera {key} is {dtype} {shape}, expected images or video of 3 channels"
                )

    def _check_dims(self, robot: Robot) -> None:
        for name, values, keys, dim in (
            ("state", self._state, robot.state, robot.state_dim),
            ("action", self._actions, robot.action, robot.action_dim),
        ):
            if dim is not None and values.shape[1] != dim:
                raise ValueError(
                    f"{self.root}: {' + '.join(keys)} has {values.shape[1]} dimensions, robot {robot.name!r} has "
                    f"{name}_dim={dim}; name other keys in the robot, or correct {name}_dim"
                )


def _import_lerobot() -> None:
    try:
        import lerobot.datasets  # noqa: F401
    except ImportError as error:
        raise ImportError("decoding needs lerobot; install `pi0fast[lerobot]`") from error


@functools.cache
def _video_backend() -> str:
    """torchcodec where it can be loaded. lerobot makes the same choice, and logs a page when it cannot."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"


def _decode_video(path: Path, timestamps: np.ndarray) -> np.ndarray:
    """uint8 [frames, h, w, 3]"""
    from lerobot.datasets.video_utils import decode_video_frames

    if not path.is_file():
        raise FileNotFoundError("no such file")
    frames = decode_video_frames(path, timestamps.tolist(), TOLERANCE_S, _video_backend(), return_uint8=True)
    return frames.permute(0, 2, 3, 1).numpy()


def _decode_images(root: Path, key: str, start: int, stop: int) -> np.ndarray:
    """uint8 [frames, h, w, 3]"""
    images = _image_column(root, key)[start:stop][key]
    return np.stack([np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for image in images])


@functools.lru_cache(maxsize=16)
def _image_column(root: Path, key: str):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(root.name, root=root, video_backend="pyav").select_columns(key)
