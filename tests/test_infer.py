"""One observation from a data set or from files: the policy's actions, what was recorded, and where the time goes."""

import json
import re

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pi0fast import Pi0, config, infer
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.data.lerobot_format import LeRobotFiles
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.norm_stats import compute_norm_stats
from pi0fast.params import flatten
from pi0fast.policy import Policy
from pi0fast.robots import DEMO
from pi0fast.stages import Stages

HORIZON = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_dataset):
    """An untrained `pi0_tiny`, saved as a run."""
    folder, size = tmp_path_factory.mktemp("untrained"), config.pi0_tiny()
    RunConfig(size, DEMO, tokenizer="demo").save(folder)
    with Checkpoints(folder) as checkpoints:
        params = {path: weight[...] for path, weight in flatten(Pi0(size, rngs=nnx.Rngs(0))).items()}
        checkpoints.save(1, params=params, norm_stats=compute_norm_stats(demo_dataset, DEMO, HORIZON))
    return folder


@pytest.fixture(scope="module")
def policy(run):
    return Policy.load(run)


@pytest.fixture(scope="module")
def frames(demo_dataset):
    return LeRobotFiles(demo_dataset).frames(("observation.state", "action"))


@pytest.fixture
def folder(tmp_path, policy, demo_dataset):
    """A frame of the data set as files: one image in PNG, one in NPY."""
    observation, _ = infer.read_sample(policy, str(demo_dataset), 1, 2)
    Image.fromarray(observation["observation.images.top"]).save(tmp_path / "observation.images.top.png")
    np.save(tmp_path / "observation.images.wrist.npy", observation["observation.images.wrist"])
    values = {"observation.state": observation["observation.state"].tolist(), "prompt": observation["prompt"]}
    (tmp_path / "observation.json").write_text(json.dumps(values))
    return tmp_path


def numbers(printed: str) -> np.ndarray:
    """The chunk that was printed: [H, d]."""
    block = re.search(r"\[\[.*?\]\]", printed, re.S)
    assert block
    return np.array([row.split() for row in re.findall(r"\[+([^\[\]]+)\]", block[0])], float)


def test_a_frame_of_a_data_set(policy, demo_dataset, frames):
    observation, truth = infer.read_sample(policy, str(demo_dataset), 1, 2)
    row = frames.starts[1] + 2
    np.testing.assert_array_equal(observation["observation.state"], frames.values["observation.state"][row])
    np.testing.assert_array_equal(truth, frames.values["action"][row : row + HORIZON])
    sample = LeRobotSource(demo_dataset, DEMO, HORIZON, 56)[int(row)]
    np.testing.assert_array_equal(observation["observation.images.wrist"], sample["image.left_wrist_0_rgb"])
    assert observation["prompt"] == sample["prompt"]


def test_the_actions_end_with_the_episode(policy, demo_dataset, frames):
    length = int(frames.starts[2] - frames.starts[1])
    _, truth = infer.read_sample(policy, str(demo_dataset), 1, length - 3)
    np.testing.assert_array_equal(truth, frames.values["action"][frames.starts[2] - 3 : frames.starts[2]])


def test_the_command_prints_and_draws(run, policy, demo_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "keep_compiled_programs", lambda: None)  # the tests keep theirs elsewhere
    monkeypatch.setattr(infer.trace, "keep_scopes", lambda: None)
    out = tmp_path / "new" / "chunk.png"
    infer.main(str(run), data=str(demo_dataset), episode=1, frame=2, repeat=3, profile=2, out=out)
    printed = capsys.readouterr().out
    observation, truth = infer.read_sample(policy, str(demo_dataset), 1, 2)
    expected = Policy.load(run).infer(observation)["actions"]
    np.testing.assert_allclose(numbers(printed), expected, atol=6e-5)  # four digits are printed
    error = re.search(r"mean absolute error of each dimension: \[(.*)\]", printed)
    assert error
    np.testing.assert_allclose(np.array(error[1].split(), float), np.abs(expected - truth).mean(0), atol=6e-5)
    assert re.search(r"3 calls: p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms", printed)
    for part in ("prepare", "device call", "rest", "vision", "prefix", "steps", "each of 10 steps", "together"):
        assert part in printed
    with Image.open(tmp_path / "new" / "chunk.png") as image:
        assert image.size[0] > 500 and len(np.unique(np.asarray(image.convert("L")))) > 50
    (path,) = (tmp_path / "new" / "chunk_profile").rglob("stages.json")
    traced = json.loads(path.read_text())
    assert (traced["program"], traced["calls"]) == ("jit_sample", 2) and list(path.parent.glob("*.xplane.pb"))
    share = {stage["name"]: stage["share"] for stage in traced["stages"]}
    assert {"siglip", "prefix", "suffix"} <= share.keys() and share.get("other", 0) < 0.1
    assert sum(share.values()) == pytest.approx(1)
    assert "Measured by the trace, 2 x jit_sample" in printed


def test_files_give_what_the_data_set_gives(run, policy, demo_dataset, folder):
    read = infer.read_observation(folder)
    observation, _ = infer.read_sample(policy, str(demo_dataset), 1, 2)
    ours, expected = (Policy.load(run).infer(each)["actions"] for each in (read, observation))
    np.testing.assert_array_equal(ours, expected)


def test_a_masked_camera_is_told(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "keep_compiled_programs", lambda: None)
    (folder / "observation.images.wrist.npy").unlink()
    infer.main(str(run), observation=folder, repeat=1, out=tmp_path / "chunk.png")
    assert "without observation.images.wrist: masked" in capsys.readouterr().out


def test_keys_with_a_slash_are_files_in_folders(folder):
    (folder / "observation").mkdir()
    (folder / "observation.images.top.png").rename(folder / "observation" / "image.png")
    assert infer.read_observation(folder)["observation/image"].shape == (56, 56, 3)


def test_the_stages_are_the_call(policy, demo_dataset):
    """The last stage gives what the whole call gives, from the results of the others."""
    observation, _ = infer.read_sample(policy, str(demo_dataset), 0, 0)
    request = policy.prepare(observation)
    noise = np.random.default_rng(0).standard_normal((1, HORIZON, 2), np.float32)
    batch = policy.batch([request])
    normalised = np.asarray(Stages.of(policy.sampler, batch, noise, execution=policy.execution).steps())[0]
    expected = policy.infer(observation, noise=noise[0])["actions"]
    ours = policy._transform.invert_actions(normalised, request.state)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("episode", "frame", "message"),
    [(6, 0, "no episode 6; it has 0 to 5"), (-1, 0, "no episode -1"), (0, 999, r"no frame 999; it has 0 to \d+$")],
)
def test_frames_that_are_not_there(policy, demo_dataset, episode, frame, message):
    with pytest.raises(ValueError, match=message):
        infer.read_sample(policy, str(demo_dataset), episode, frame)


def test_data_of_another_robot(run, demo_dataset, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(
        "name: other\nstate: [observation.state]\naction: [action]\ncameras: {base_0_rgb: observation.images.front}\n"
    )
    with pytest.raises(ValueError, match=r"has no \['observation.images.front'\]; its features are"):
        infer.read_sample(Policy.load(run, robot=str(other)), str(demo_dataset), 0, 0)
    other.write_text(
        "name: other\nstate: [observation.state]\naction: [action, observation.state]\n"
        "cameras: {base_0_rgb: observation.images.top}\n"
    )
    with pytest.raises(ValueError, match="have 4 dimensions, robot 'other' of the policy 2"):
        infer.read_sample(Policy.load(run, robot=str(other)), str(demo_dataset), 0, 0)


def test_what_the_files_may_lack(run, policy, folder):
    values = json.loads((folder / "observation.json").read_text())
    (folder / "observation.json").write_text(json.dumps({"prompt": values["prompt"]}))
    with pytest.raises(ValueError, match=r"no \['observation.state'\]; it has"):
        infer.main(str(run), observation=folder, repeat=1)
    (folder / "observation.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        infer.read_observation(folder)
    (folder / "observation.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        infer.read_observation(folder)
    (folder / "observation.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no observation.json"):
        infer.read_observation(folder)
    with pytest.raises(ValueError, match="either --data or --observation"):
        infer.main(str(run))
    with pytest.raises(ValueError, match="repeat=0"):
        infer.main(str(run), observation=folder, repeat=0)
    with pytest.raises(ValueError, match="--profile=-1 must be at least 0"):
        infer.main(str(run), observation=folder, profile=-1)
