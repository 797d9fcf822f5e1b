"""Write demonstrations of the demo task as a real LeRobot v3 data set (parquet and video), with lerobot itself.

python -m pi0fast.data.demo_dataset --root=data/secondary --episodes=1000 --palette=secondary
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np

from pi0fast.data import demo
from pi0fast.data.demo import Palette


def write_demo_dataset(
    root: str | Path, episodes: int = 300, seed: int = 0, size: int = 56, palette: Palette = "primary"
) -> Path:
    """Record `episodes` successful demonstrations of `Simulator(seed, size, palette)` in the new folder `root`; returns
    it.

    Features: `observation.images.top` and `observation.images.wrist` (video, [size, size, 3]), `observation.state` and
    `action` (float32 [2]); the task is the prompt. About 14 frames an episode, at `demo.FPS`; about 0.1 s an episode.

    The data set is built beside `root` and renamed when complete, so `root` never holds half of one. Raises
    FileExistsError if `root` exists, ValueError unless `episodes` is positive.
    """
    root = Path(root)
    if episodes < 1:
        raise ValueError(f"episodes={episodes} must be at least 1")
    if root.exists():
        raise FileExistsError(f"{root} exists; use that data set, remove it, or write to another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        _record(Path(folder) / "dataset", episodes, seed, size, palette)
        (Path(folder) / "dataset").rename(root)
    return root


def find_or_write(root: str | Path, episodes: int = 300, seed: int = 0, size: int = 56) -> Path:
    """The data set in the folder `root`, first written there with `write_demo_dataset` if there is no such folder.

    Processes may call it at the same time: the first to finish leaves its data set, which all have made alike.
    """
    root = Path(root)
    if not root.exists():
        print(f"Recording {episodes} demonstrations in {root}", flush=True)
        try:
            write_demo_dataset(root, episodes, seed, size)
        except OSError:
            if not root.exists():
                raise
    return root


def _record(root: Path, episodes: int, seed: int, size: int, palette: Palette) -> None:
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    dataset = LeRobotDataset.create(
        repo_id="pi0fast/demo",
        root=root,
        fps=demo.FPS,
        robot_type="demo",
        features={
            "observation.images.top": image,
            "observation.images.wrist": image,
            "observation.state": vector,
            "action": vector,
        },
        # Full chroma resolution: 4:2:0 blurs the colours of images as small as these (PSNR 35 dB instead of 57).
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", crf=12, g=10, preset="ultrafast"),
        encoder_threads=1,
        streaming_encoding=True,
        # lerobot drops frames when an encoder's queue is full; this one holds a whole episode.
        encoder_queue_maxsize=demo.MAX_STEPS + 1,
        # An episode is appended by copying the file it goes to, so keep the files small.
        video_files_size_in_mb=1,
        video_backend="pyav",
    )
    simulator, rng = demo.Simulator(seed, size, palette), np.random.default_rng(seed)
    recorded = 0
    with _quiet():
        try:
            while recorded < episodes:
                pairs, success = demo.demonstrate(simulator, rng)
                if not success:
                    continue
                for observation, action in pairs:
                    frame = {key: value for key, value in observation.items() if key != "prompt"}
                    dataset.add_frame({**frame, "action": action, "task": observation["prompt"]})
                dataset.save_episode()
                recorded += 1
        finally:
            dataset.finalize()  # after an interrupt, too: else its destructor writes into a folder that is gone


@contextlib.contextmanager
def _quiet():
    """Without the progress bar and the encoder's log lines that lerobot prints for every episode."""
    import av.logging
    import datasets

    bars_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    av.logging.set_libav_level(av.logging.ERROR)
    try:
        yield
    finally:
        av.logging.set_libav_level(av.logging.INFO)
        if not bars_disabled:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    import tyro  # the trainer needs this module, and no command line

    try:
        print(tyro.cli(write_demo_dataset))
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
