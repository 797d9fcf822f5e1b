"""Decoded images on disk. Decoding one random frame of a video costs far more than reading it, so a data set that is
small enough is decoded once, episode by episode, and every later run and worker process maps the same file."""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


class DecodeError(ValueError):
    """The images of an episode cannot be decoded."""


class FrameCache:
    """Images uint8 [n, cameras, height, width, 3] in the folder `folder`, as `write` left them; n frames.

    undecodable: episode → why its images are not there (they read as black).
    """

    def __init__(self, folder: Path):
        self._images = folder / "images.npy"
        undecodable = json.loads((folder / "undecodable.json").read_text())
        self.undecodable = {int(episode): reason for episode, reason in undecodable.items()}

    def __getitem__(self, frame: int) -> np.ndarray:
        """uint8 [cameras, height, width, 3], a copy."""
        return np.array(_mapped(self._images)[frame])

    @classmethod
    def write(
        cls,
        folder: Path,
        starts: np.ndarray,
        image_shape: tuple[int, ...],
        decode: Callable[[int], np.ndarray],
        tolerate: bool = False,
    ) -> "FrameCache":
        """Decode every episode into the new folder `folder`, which appears when complete.

        starts: [episodes + 1], the first frame of each episode and the number of frames. image_shape: (cameras, height,
        width, 3). decode: episode → its images uint8 [frames, *image_shape], or DecodeError, which is noted in
        `undecodable` if `tolerate`, and else raised. When two processes write the same folder, the first one's stays.
        """
        undecodable = {}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            building = Path(temporary) / "cache"
            building.mkdir()
            with open(building / "images.npy", "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (int(starts[-1]), *image_shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for episode, length in enumerate(np.diff(starts)):
                    try:
                        images = decode(episode)
                    except DecodeError as error:
                        if not tolerate:
                            raise
                        undecodable[episode] = str(error)
                        images = np.zeros((length, *image_shape), np.uint8)
                    file.write(images.tobytes())
            (building / "undecodable.json").write_text(json.dumps(undecodable))
            try:
                building.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        return cls(folder)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/pi0fast/frames`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pi0fast" / "frames"


@functools.lru_cache(maxsize=64)
def _mapped(path: Path) -> np.ndarray:
    # Not kept on the object: a memory map that is pickled for a worker process would be copied into the pickle.
    return np.load(path, mmap_mode="r")
