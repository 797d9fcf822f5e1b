import dataclasses
import json
import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0fast import normalize
from pi0fast.data.lerobot_format import find_dataset
from pi0fast.norm_stats import compute_norm_stats, find_or_compute, main, norm_stats_path
from pi0fast.robots import DEMO, Robot

H = 5
LENGTHS = (7, 3, 12)  # one episode shorter than the horizon
ARM = Robot("arm", ("joints", "gripper"), ("action",), {}, delta_mask=(True, True, False))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A LeRobot v3 data set with images, two state keys (one of shape [1]), and its state and actions per episode."""
    from lerobot.datasets import LeRobotDataset

    root = tmp_path_factory.mktemp("lerobot") / "arm"
    features = {
        "joints": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "gripper": {"dtype": "float32", "shape": (1,), "names": ["open"]},
        "action": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "open"]},
        "observation.images.top": {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channel"]},
    }
    written = LeRobotDataset.create("local/arm", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    episodes = []
    for length in LENGTHS:
        state, actions = rng.standard_normal((2, length, 3)).astype(np.float32)
        for frame in range(length):
            written.add_frame(
                {
                    "joints": state[frame, :2],
                    "gripper": state[frame, 2:],
                    "action": actions[frame],
                    "observation.images.top": np.zeros((8, 8, 3), np.uint8),
                    "task": "touch the red block",
                }
            )
        written.save_episode()
        episodes.append((state, actions))
    written.finalize()
    return root, episodes


@pytest.fixture
def copy(dataset, tmp_path):
    """The data set to spoil: its root, and a function that rewrites its one data file."""
    root = shutil.copytree(dataset[0], tmp_path / "arm")
    (path,) = (root / "data").glob("*/*.parquet")
    original = pq.read_table(path)
    return root, lambda change: pq.write_table(change(original), path)


def with_gripper(table: pa.Table, values: list) -> pa.Table:
    return table.set_column(table.column_names.index("gripper"), "gripper", pa.array(values, pa.float32()))


def chunks_of(episodes, mask) -> np.ndarray:
    """Frame by frame, as LeRobot's delta_timestamps give them."""
    rows = []
    for state, actions in episodes:
        for t in range(len(actions)):
            for step in range(H):
                rows.append(actions[min(t + step, len(actions) - 1)] - np.where(mask, state[t], 0))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("mask", [(True, True, False), ()])
def test_matches_a_loop_over_frames(dataset, mask):
    root, episodes = dataset
    stats = compute_norm_stats(root, dataclasses.replace(ARM, delta_mask=mask), H)
    for key, rows in (
        ("state", np.concatenate([state for state, _ in episodes])),
        ("actions", chunks_of(episodes, mask or (False,) * 3)),
    ):
        assert len(rows) == sum(LENGTHS) * (H if key == "actions" else 1)
        np.testing.assert_allclose(stats[key].mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats[key].std, rows.std(axis=0, dtype=np.float64), rtol=1e-5)
        np.testing.assert_allclose(stats[key].q01, np.quantile(rows, 0.01, axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats[key].q99, np.quantile(rows, 0.99, axis=0), rtol=1e-5)


def test_chunks_are_the_ones_that_lerobot_gives(dataset):
    from lerobot.datasets import LeRobotDataset

    root, _ = dataset
    read: Any = LeRobotDataset("local/arm", root=root, delta_timestamps={"action": [step / 10 for step in range(H)]})
    rows = np.concatenate([np.asarray(read[frame]["action"]) for frame in range(len(read))])
    stats = compute_norm_stats(root, dataclasses.replace(ARM, delta_mask=()), H)
    np.testing.assert_allclose(stats["actions"].mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-7)


def test_blocks_and_files_make_no_difference(copy, monkeypatch):
    root, _ = copy
    whole = compute_norm_stats(root, ARM, H)
    monkeypatch.setattr("pi0fast.norm_stats.BLOCK_ACTIONS", 4 * H)
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 10), path)
    pq.write_table(table.slice(10), path.with_name("file-001.parquet"))
    parts = compute_norm_stats(root, ARM, H)
    for key in ("state", "actions"):
        np.testing.assert_allclose(parts[key].std, whole[key].std, rtol=1e-12)
        np.testing.assert_array_equal(parts[key].q99, whole[key].q99)


def test_what_training_replaces_is_left_out(copy, dataset):
    """A bad state takes its frame's state and chunk, a bad action all chunks that it is in, back to the start."""
    root, rewrite = copy
    rewrite(lambda table: with_gripper(table, [*table["gripper"].to_pylist()[:-1], float("inf")]))
    action = np.concatenate([actions for _, actions in dataset[1]])
    action[2, 1] = np.nan
    rewritten = pa.array(action.tolist(), pa.list_(pa.float32()))
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", rewritten), path)
    with pytest.raises(ValueError, match="gripper is inf in episode 2, frame 11"):
        find_or_compute(root, ARM, H)
    stats = find_or_compute(root, ARM, H, tolerate=True)
    state = np.concatenate([state for state, _ in dataset[1]])
    chunks = chunks_of(dataset[1], ARM.delta_mask).reshape(-1, H, 3)
    np.testing.assert_allclose(stats["state"].mean, state[:-1].mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(stats["actions"].std, chunks[3:-1].reshape(-1, 3).std(axis=0), rtol=1e-5)


def test_program_writes_beside_the_data(copy, tmp_path, capsys):
    root, _ = copy
    robot = tmp_path / "arm.yaml"
    robot.write_text(json.dumps(ARM.to_dict()))
    main(str(root), str(robot), H)
    path = norm_stats_path(root, ARM, H)
    assert path.name.startswith("arm_h5_") and path.is_relative_to(root / "meta")
    assert str(path) in capsys.readouterr().out
    np.testing.assert_array_equal(
        normalize.load(path)["actions"].mean, compute_norm_stats(root, ARM, H)["actions"].mean
    )
    main(str(root), str(robot), H, out=tmp_path / "mine.json")
    assert normalize.load(tmp_path / "mine.json").keys() == {"state", "actions"}


def test_the_file_name_follows_what_the_statistics_depend_on(copy):
    root, _ = copy
    absolute = dataclasses.replace(ARM, delta_mask=())
    other_camera = dataclasses.replace(ARM, cameras={"base_0_rgb": "top"})
    before = norm_stats_path(root, ARM, H)
    assert norm_stats_path(root, absolute, H) != before
    assert norm_stats_path(root, other_camera, H) == before
    info = root / "meta" / "info.json"
    info.write_text(info.read_text().replace('"total_frames": 22', '"total_frames": 23'))
    assert norm_stats_path(root, ARM, H) != before


def test_warns_of_a_dimension_that_hardly_moves(copy):
    root, rewrite = copy
    rewrite(lambda table: with_gripper(table, [0.5] * 22))
    with pytest.warns(UserWarning) as warned:
        compute_norm_stats(root, ARM, H)
    assert [str(warning.message).split(",")[0:2] for warning in warned] == [
        ["state", " dimension 2: std is 0"],
        ["state", " dimension 2: q99 - q01 is 0"],
    ]


def test_a_data_set_that_cannot_be_written_gives_its_statistics_all_the_same(copy, caplog):
    root, _ = copy
    (root / "meta" / "pi0fast").write_text("a file where the folder would be")
    stats = find_or_compute(root, ARM, H)
    np.testing.assert_array_equal(stats["actions"].mean, compute_norm_stats(root, ARM, H)["actions"].mean)
    assert "cannot be kept beside the data" in caplog.text


def test_planted_errors(copy):
    root, rewrite = copy
    info = root / "meta" / "info.json"
    original = info.read_text()
    info.write_text(original.replace('"v3.0"', '"v2.1"'))
    with pytest.raises(ValueError, match=r"version v2.1, expected v3.0; .*convert_dataset_v21_to_v30 .*--root="):
        compute_norm_stats(root, ARM, H)
    info.write_text(original)

    with pytest.raises(ValueError, match=r"has no \['observation.state'\]; its features are .*'joints'"):
        compute_norm_stats(root, DEMO, H)

    rewrite(lambda table: with_gripper(table, [0.5] * 20 + [float("nan"), 0.5]))
    with pytest.raises(ValueError, match=r"gripper is nan in episode \d+, frame \d+, dimension 0"):
        compute_norm_stats(root, ARM, H)
    rewrite(lambda table: with_gripper(table, [0.5] * 21 + [None]))
    with pytest.raises(ValueError, match="gripper has 22 values, 1 of them null"):
        compute_norm_stats(root, ARM, H)

    rewrite(lambda table: table.take([1, 0, *range(2, 22)]))
    with pytest.raises(ValueError, match="not whole episodes in order"):
        compute_norm_stats(root, ARM, H)

    shutil.rmtree(root / "data")
    with pytest.raises(FileNotFoundError, match=r"no data/\*/\*.parquet"):
        compute_norm_stats(root, ARM, H)
    with pytest.raises(FileNotFoundError, match=r"no meta/info.json"):
        compute_norm_stats(root / "data", ARM, H)


def test_find_dataset(copy, tmp_path, monkeypatch):
    root, _ = copy
    assert find_dataset(str(root)) == root
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    (tmp_path / "owner").mkdir()
    shutil.copytree(root, tmp_path / "owner" / "arm")
    assert find_dataset("owner/arm") == tmp_path / "owner" / "arm"
    for data in ("./elsewhere/arm", "arm_typo", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"no LeRobot data set .*no Hub id"):
            find_dataset(data)


def test_unknown_id_is_downloaded_without_videos(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    assert find_dataset("owner/arm", videos=False) == tmp_path
    assert (asked["repo_id"], asked["repo_type"]) == ("owner/arm", "dataset")
    assert asked["allow_patterns"] == ["meta/*", "data/*"]


def test_command_line_without_torch_or_backend(dataset, tmp_path):
    root, _ = dataset
    (tmp_path / "arm.yaml").write_text(json.dumps(ARM.to_dict()))
    program = (
        "import sys, runpy; runpy.run_module('pi0fast.norm_stats', run_name='__main__');"
        "loaded = {'torch', 'lerobot'} & set(sys.modules); assert not loaded, loaded"
    )
    options = [
        f"--data={root}",
        f"--robot={tmp_path / 'arm.yaml'}",
        f"--action-horizon={H}",
        f"--out={tmp_path / 'o.json'}",
    ]
    environment = os.environ | {"PYTHONWARNINGS": "error", "JAX_PLATFORMS": "none"}  # a backend would raise
    subprocess.run([sys.executable, "-c", program, *options], check=True, env=environment)
    assert normalize.load(tmp_path / "o.json")["actions"].dim == 3
