"""The input pipeline, on the host: the demo's data set, real files on disk, written once for all benchmarks here.

    pytest bench/bench_data.py --benchmark-only --benchmark-json=data.json

*loader*: one batch, in this process without workers, decoded from the data set's own files or read from the frame
cache; *transform*: one sample; *norm_stats*: all statistics, from parquet columns alone. `samples_per_s` and
`frames_per_s` in `extra_info`; the target is 40 samples of three cameras a second for each GPU.
"""

import pytest

from bench import peers
from pi0fast import config, norm_stats
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.data.loader import Loader
from pi0fast.normalize import load, save
from pi0fast.robots import DEMO
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer
from pi0fast.transforms import SampleTransform

pytestmark = pytest.mark.skipif(
    bool(peers.missing("lerobot", gpu=False) or peers.missing("grain", gpu=False)), reason="lerobot or grain is missing"
)

EPISODES, BATCH, ROUNDS = 12, 32, 9
SIZE = config.pi0_tiny()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from pi0fast.data.demo_dataset import write_demo_dataset

    return write_demo_dataset(tmp_path_factory.mktemp("data") / "demo", episodes=EPISODES)


@pytest.fixture(scope="module")
def transform(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "norm_stats.json"
    save(path, norm_stats.compute_norm_stats(root, DEMO, SIZE.action_horizon))
    return SampleTransform(SIZE, DEMO, load(path), PromptTokenizer(DEMO_TOKENIZER, SIZE.max_token_len))


def source_of(root, tmp_path, cached: bool) -> LeRobotSource:
    how = {"cache_bytes": 2**30 if cached else 0, "cache_dir": tmp_path}
    return LeRobotSource(str(root), DEMO, SIZE.action_horizon, SIZE.image_size, **how)


@pytest.mark.parametrize("cached", [False, True], ids=["decoded", "cached"])
def test_loader(benchmark, root, transform, tmp_path, cached):
    loader = Loader(source_of(root, tmp_path, cached), transform, batch_size=BATCH, seed=0, workers=0)
    benchmark.group = "one batch"
    benchmark.extra_info.update(contender="cached" if cached else "decoded", batch=BATCH, num_cameras=len(DEMO.cameras))
    benchmark.pedantic(lambda: next(loader), rounds=ROUNDS, warmup_rounds=3)  # beyond what was made ahead
    loader.close()
    if benchmark.enabled:
        benchmark.extra_info["samples_per_s"] = BATCH / benchmark.stats.stats.median


def test_transform(benchmark, root, transform, tmp_path):
    sample = source_of(root, tmp_path, cached=False)[5]
    benchmark.group = "one sample"
    benchmark.extra_info["contender"] = "transform"
    benchmark.pedantic(lambda: transform(sample), rounds=100, warmup_rounds=3)
    if benchmark.enabled:
        benchmark.extra_info["samples_per_s"] = 1 / benchmark.stats.stats.median


def test_norm_stats(benchmark, root, tmp_path):
    frames = len(source_of(root, tmp_path, cached=False))
    benchmark.group = "statistics"
    benchmark.extra_info.update(contender="norm_stats", frames=frames)
    benchmark.pedantic(
        lambda: norm_stats.compute_norm_stats(root, DEMO, SIZE.action_horizon), rounds=ROUNDS, warmup_rounds=1
    )
    if benchmark.enabled:
        benchmark.extra_info["frames_per_s"] = frames / benchmark.stats.stats.median
