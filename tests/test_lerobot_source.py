import dataclasses
import json
import logging
import pickle
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0fast.data import demo, lerobot_source
from pi0fast.data.demo_dataset import find_or_write, write_demo_dataset
from pi0fast.data.frames import DecodeError
from pi0fast.data.lerobot_format import find_dataset
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.robots import ROBOTS
from pi0fast.transforms import resize_with_pad
from tests.conftest import DEMO_EPISODES as EPISODES

DEMO = ROBOTS["demo"]
HORIZON = 8
TOP, WRIST = "observation.images.top", "observation.images.wrist"
CAMERA_OF = {key: camera for camera, key in DEMO.cameras.items()}


@pytest.fixture(scope="module")
def dataset(demo_dataset):
    return demo_dataset


@pytest.fixture(scope="module")
def demonstrations():
    """What the data set was made of: per episode, its (observation, action) pairs."""
    simulator, rng = demo.Simulator(0), np.random.default_rng(0)
    episodes = [demo.demonstrate(simulator, rng) for _ in range(EPISODES)]
    assert all(success for _, success in episodes)
    return [pairs for pairs, _ in episodes]


@pytest.fixture(scope="module")
def source(dataset, tmp_path_factory):
    return LeRobotSource(dataset, DEMO, HORIZON, 56, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def open_source(root, robot=DEMO, **options):
    """Without a cache, so without decoding anything."""
    return LeRobotSource(root, robot, HORIZON, 56, **{"cache_bytes": 0, **options})


def edit_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_column(path, key, edit):
    table = pq.read_table(path)
    values = table[key].to_pylist()
    edit(values)
    pq.write_table(table.set_column(table.column_names.index(key), key, pa.array(values)), path)


def data_file(root):
    return root / "data" / "chunk-000" / "file-000.parquet"


def break_video(root, episode):
    """Let an episode's wrist video be one that is not a video; returns its path."""
    edit_column(
        root / "meta/episodes/chunk-000/file-000.parquet",
        f"videos/{WRIST}/file_index",
        lambda values: values.__setitem__(episode, 7),
    )
    path = root / "videos" / WRIST / "chunk-000" / "file-007.mp4"
    path.write_bytes(b"not a video" * 100)
    return path


def assert_same(sample, expected):
    assert sample.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(sample[key], value, err_msg=key)


def test_samples_are_what_was_recorded(source, demonstrations):
    assert source.fps == demo.FPS and source.num_episodes == EPISODES and source.num_bad == 0
    assert len(source) == sum(map(len, demonstrations))
    index = 0
    for pairs in demonstrations:
        for frame, (observation, _) in enumerate(pairs):
            sample = source[index]
            np.testing.assert_array_equal(sample["state"], observation["observation.state"])
            chunk = [action for _, action in pairs[frame : frame + HORIZON]]
            padding = HORIZON - len(chunk)
            np.testing.assert_array_equal(sample["actions"], np.stack(chunk + [pairs[-1][1]] * padding))
            np.testing.assert_array_equal(sample["action_is_pad"], [False] * len(chunk) + [True] * padding)
            assert sample["state"].dtype == sample["actions"].dtype == np.float32
            assert sample["prompt"] == observation["prompt"]
            index += 1


def test_video_keeps_the_images(source, demonstrations):
    flat = [observation for pairs in demonstrations for observation, _ in pairs]
    for key in (TOP, WRIST):
        decoded = np.stack([source[i][f"image.{CAMERA_OF[key]}"] for i in range(len(source))])
        original = np.stack([observation[key] for observation in flat])
        assert decoded.dtype == np.uint8
        error = (decoded.astype(float) - original).reshape(len(flat), -1)
        psnr = 10 * np.log10(255**2 / np.square(error).mean(axis=1).clip(1e-9))
        assert psnr.min() > 42 and psnr.mean() > 50


def test_chunks_and_padding_are_lerobots(source, dataset):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    offsets = {"action": [step / demo.FPS for step in range(HORIZON)]}
    reference = LeRobotDataset("demo", root=dataset, delta_timestamps=offsets, video_backend="pyav", return_uint8=True)
    assert len(reference) == len(source)
    for index in range(0, len(source), 5):
        expected: Any = reference[index]
        sample = source[index]
        np.testing.assert_array_equal(sample["actions"], expected["action"].numpy())
        np.testing.assert_array_equal(sample["action_is_pad"], expected["action_is_pad"].numpy())
        np.testing.assert_array_equal(sample["state"], expected["observation.state"].numpy())
        np.testing.assert_array_equal(sample["image.base_0_rgb"], expected[TOP].permute(1, 2, 0).numpy())
        assert sample["prompt"] == expected["task"]


def test_cached_frames_are_the_decoded_ones(source, dataset):
    direct = open_source(dataset)
    for index in range(0, len(source), 7):
        assert_same(source[index], direct[index])


def test_cache_is_written_once_and_its_limit_holds(dataset, source, tmp_path, monkeypatch):
    size = len(source) * 2 * 28 * 28 * 3

    def resized(cache_bytes):
        return LeRobotSource(dataset, DEMO, HORIZON, 28, cache_bytes=cache_bytes, cache_dir=tmp_path)

    expected = resized(size - 1)[3]
    assert list(tmp_path.iterdir()) == []
    assert_same(resized(size)[3], expected)
    (folder,) = tmp_path.iterdir()
    assert (folder / "images.npy").stat().st_size == size + 128
    assert expected["image.base_0_rgb"].shape == (28, 28, 3)

    monkeypatch.setattr(lerobot_source, "_decode_video", lambda *_: pytest.fail("decoded again"))
    assert_same(resized(size)[3], expected)


def test_interrupted_cache_leaves_nothing(dataset, tmp_path, monkeypatch):
    calls = []

    def interrupted(path, timestamps):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return np.zeros((len(timestamps), 56, 56, 3), np.uint8)

    monkeypatch.setattr(lerobot_source, "_decode_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LeRobotSource(dataset, DEMO, HORIZON, 56, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pickled_source_gives_the_same_samples(source):
    pickled = pickle.dumps(source)
    assert len(pickled) < source._cache._images.stat().st_size / 4  # without the images
    assert_same(pickle.loads(pickled)[11], source[11])


def test_images_in_parquet(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (2,), "names": None}
    image = {"dtype": "image", "shape": (24, 32, 3), "names": ["height", "width", "channels"]}
    features = {TOP: image, WRIST: image, "observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create("demo", 10, features, root=tmp_path / "images", video_backend="pyav")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 24, 32, 3)).astype(np.uint8)
    for episode in images:
        for top, wrist in episode:
            zeros = np.zeros(2, np.float32)
            dataset.add_frame({TOP: top, WRIST: wrist, "observation.state": zeros, "action": zeros, "task": "look"})
        dataset.save_episode()
    dataset.finalize()
    cached = LeRobotSource(tmp_path / "images", DEMO, HORIZON, 20, cache_dir=tmp_path / "cache")
    direct = LeRobotSource(tmp_path / "images", DEMO, HORIZON, 20, cache_bytes=0)
    expected = resize_with_pad(images.reshape(-1, 2, 24, 32, 3), 20, 20)
    for index in range(6):
        assert_same(cached[index], direct[index])
        np.testing.assert_array_equal(cached[index]["image.base_0_rgb"], expected[index, 0])
        np.testing.assert_array_equal(cached[index]["image.left_wrist_0_rgb"], expected[index, 1])


def test_fingerprint_is_the_data_sets(copy, source):
    (copy / "meta" / "pi0fast").mkdir(exist_ok=True)  # another test may have trained on the original
    (copy / "meta" / "pi0fast" / "stats.json").write_text("{}")
    assert open_source(copy).fingerprint == source.fingerprint
    edit_info(copy, robot_type="other")
    assert open_source(copy).fingerprint != source.fingerprint


def test_fingerprint_sees_videos_and_data(copy, source):
    (video, *_) = (copy / "videos").rglob("*.mp4")
    video.write_bytes(video.read_bytes() + b"\0")
    assert open_source(copy).fingerprint != source.fingerprint
    shutil.rmtree(copy / "videos")
    without_videos = open_source(copy).fingerprint
    edit_column(data_file(copy), "action", lambda values: values.__setitem__(0, [0.123, 0.456]))
    assert open_source(copy).fingerprint != without_videos


def test_other_version_names_the_conversion(copy):
    edit_info(copy, codebase_version="v2.1")
    with pytest.raises(ValueError, match=r"version v2\.1, expected v3\.0; .*convert_dataset_v21_to_v30"):
        open_source(copy)


def test_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LeRobot data set"):
        open_source(tmp_path)


def test_find_dataset_looks_in_lerobots_home(dataset, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(dataset.parent))
    assert find_dataset("demo") == dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": ("observation.joints",)},
            r"has no \['observation.joints'\]; its features are .*'observation.state'",
        ),
        ({"action": ("action", "gripper")}, r"has no \['gripper'\]"),
        ({"cameras": {"base_0_rgb": "observation.images.left"}}, r"has no \['observation.images.left'\].*images.top"),
        ({"cameras": {}}, "no cameras"),
        ({"cameras": {"base_0_rgb": "action"}}, r"camera action is float32 \[2\]"),
        ({"state_dim": 3}, "observation.state has 2 dimensions, robot 'demo' has state_dim=3"),
    ],
)
def test_keys_that_do_not_fit(dataset, change, message):
    with pytest.raises(ValueError, match=message):
        open_source(dataset, dataclasses.replace(DEMO, **change))


def test_concatenated_keys(dataset, source):
    robot = dataclasses.replace(DEMO, state=("observation.state", "action"), state_dim=4)
    sample = open_source(dataset, robot)[4]
    np.testing.assert_array_equal(sample["state"], [*source[4]["state"], *source[4]["actions"][0]])


def test_values_of_another_shape(copy):
    edit_column(data_file(copy), "action", lambda values: values.__setitem__(3, [0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="action has .* values.* not 2 a row as meta/info.json says"):
        open_source(copy)


def test_rows_out_of_order(copy):
    edit_column(data_file(copy), "frame_index", lambda values: values.reverse())
    with pytest.raises(ValueError, match="not whole episodes in order"):
        open_source(copy)


@pytest.mark.parametrize(("key", "value"), [("observation.state", float("nan")), ("action", float("inf"))])
def test_not_finite_is_an_error_that_names_the_frame(copy, demonstrations, key, value):
    row = len(demonstrations[0]) + 2
    edit_column(data_file(copy), key, lambda values: values.__setitem__(row, [0.5, value]))
    with pytest.raises(ValueError, match=rf"{key} is .*{value}.* in episode 1, frame 2; .*on_bad_sample='replace'"):
        open_source(copy)


def test_not_finite_is_replaced(copy, source, demonstrations, caplog):
    """A bad state spoils its sample, a bad action all samples whose chunk it is in, back to the episode's start."""
    start = len(demonstrations[0])
    edit_column(data_file(copy), "observation.state", lambda values: values.__setitem__(1, [0.5, float("nan")]))
    edit_column(data_file(copy), "action", lambda values: values.__setitem__(start + 4, [float("inf"), 0.5]))
    with caplog.at_level(logging.WARNING):
        replacing = open_source(copy, on_bad_sample="replace")
    bad = {1, *range(start, start + 5)}
    assert replacing.num_bad == len(bad) and f"6 of {len(source)} samples are bad" in caplog.text
    originals = [source[index] for index in range(len(source))]
    for index in range(len(source)):
        sample = replacing[index]
        assert np.isfinite(sample["state"]).all() and np.isfinite(sample["actions"]).all()
        if index in bad:
            matches = [i for i in range(len(source)) if np.array_equal(sample["state"], originals[i]["state"])]
            assert len(matches) == 1 and matches[0] not in bad
            assert_same(sample, originals[matches[0]])
        else:
            assert_same(sample, originals[index])
    assert replacing.replaced == len(bad)


def test_undecodable_episode_is_an_error(copy, tmp_path, demonstrations):
    path = break_video(copy, episode=2)
    message = rf"episode 2 of .*{path.name} cannot be decoded .*on_bad_sample='replace'"
    with pytest.raises(DecodeError, match=message):
        LeRobotSource(copy, DEMO, HORIZON, 56, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    direct = open_source(copy)
    row = len(demonstrations[0]) + len(demonstrations[1])
    direct[row - 1]
    with pytest.raises(DecodeError, match=message):
        direct[row]
    path.unlink()
    with pytest.raises(DecodeError, match="no such file"):
        direct[row]


def test_undecodable_episode_is_replaced_whatever_the_order(copy, tmp_path, demonstrations, caplog):
    break_video(copy, episode=2)
    first = len(demonstrations[0]) + len(demonstrations[1])
    bad = range(first, first + len(demonstrations[2]))
    options = {"on_bad_sample": "replace", "cache_dir": tmp_path / "cache"}
    with caplog.at_level(logging.WARNING):
        cached = LeRobotSource(copy, DEMO, HORIZON, 56, **options)
    assert "episode 2" in caplog.text and cached.num_bad == len(bad)
    reopened = LeRobotSource(copy, DEMO, HORIZON, 56, **options)
    forward, backward = open_source(copy, **options), open_source(copy, **options)
    assert forward.num_bad == 0  # not known before decoding
    expected = {index: cached[index] for index in bad}
    backwards = {index: backward[index] for index in reversed(bad)}
    for index in bad:
        assert_same(forward[index], expected[index])
        assert_same(backwards[index], expected[index])
        assert_same(reopened[index], expected[index])
    assert cached.replaced == forward.replaced == backward.replaced == len(bad)
    with pytest.raises(DecodeError, match="episode 2 .*remove that folder to decode again"):
        LeRobotSource(copy, DEMO, HORIZON, 56, cache_dir=tmp_path / "cache")


def test_an_episode_that_decodes_in_part_is_replaced_whatever_the_order(copy, caplog):
    (path,) = (copy / "videos" / WRIST).rglob("*.mp4")
    video = bytearray(path.read_bytes())
    middle = len(video) // 2
    video[middle : middle + len(video) // 20] = bytes(len(video) // 20)
    path.write_bytes(video)

    strict, undecodable = open_source(copy), []
    for index in range(len(strict)):
        try:
            strict[index]
        except DecodeError:
            undecodable.append(index)
    episodes = {strict._episode(index) for index in undecodable}
    frames = [index for index in range(len(strict)) if strict._episode(index) in episodes]
    assert 0 < len(undecodable) < len(frames)
    forward, backward = (open_source(copy, on_bad_sample="replace") for _ in range(2))
    backwards = {index: backward[index] for index in reversed(range(len(backward)))}
    for index in range(len(forward)):
        assert_same(forward[index], backwards[index])
    assert forward.replaced == len(undecodable)
    said = [record.message for record in caplog.records if "cannot be decoded" in record.message]
    assert len(said) == 2 * len(episodes)  # once by each source


def test_nothing_good_left(copy):
    edit_column(
        data_file(copy), "action", lambda values: values.__setitem__(slice(None), [[float("nan")] * 2] * len(values))
    )
    with pytest.raises(ValueError, match="no good sample"):
        open_source(copy, on_bad_sample="replace")


def test_malformed_arguments(dataset, source):
    with pytest.raises(ValueError, match="'error' or 'replace'"):
        open_source(dataset, on_bad_sample="skip")
    with pytest.raises(ValueError, match="action_horizon=0"):
        LeRobotSource(dataset, DEMO, 0, 56)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=r"not in \[0, "):
            source[index]


def test_writer_refuses_an_existing_folder(dataset):
    with pytest.raises(FileExistsError, match="exists; use that data set"):
        write_demo_dataset(dataset, episodes=1)
    with pytest.raises(ValueError, match="at least 1"):
        write_demo_dataset(dataset.parent / "none", episodes=0)


def test_writer_takes_a_palette(tmp_path):
    root = write_demo_dataset(tmp_path / "demo", episodes=3, size=16, palette="secondary")
    prompts = set(open_source(root).prompts.values())
    assert prompts <= {f"touch the {colour} block" for colour in demo.PALETTES["secondary"]} and prompts


def test_find_or_write(tmp_path):
    root = find_or_write(tmp_path / "new" / "demo", episodes=1, size=16)
    written = (root / "meta" / "info.json").stat().st_mtime_ns
    assert find_or_write(root, episodes=1, size=16) == root
    assert (root / "meta" / "info.json").stat().st_mtime_ns == written
    assert open_source(root).num_episodes == 1


def test_find_or_write_when_another_process_is_faster(tmp_path, monkeypatch):
    demonstrate, root = demo.demonstrate, tmp_path / "demo"

    def overtaken(*args):
        root.mkdir()
        (root / "another").touch()
        return demonstrate(*args)

    monkeypatch.setattr(demo, "demonstrate", overtaken)
    assert find_or_write(root, episodes=1, size=16) == root
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert [path.name for path in root.iterdir()] == ["another"]


def test_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    demonstrate, calls = demo.demonstrate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return demonstrate(*args)

    monkeypatch.setattr(demo, "demonstrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demo_dataset(tmp_path / "demo", episodes=4, size=16)
    assert list(tmp_path.iterdir()) == []
