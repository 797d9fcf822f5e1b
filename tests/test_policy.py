"""The policy on a run's checkpoint: the model's own samples in the robot's units, and errors that leave it usable."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, config, convert, evaluate
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.data.demo import PALETTES, Simulator
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.policy import Policy
from pi0fast.robots import DEMO
from pi0fast.rtc import RtcConfig
from pi0fast.sampling import sample_actions
from pi0fast.tokenizer import DEMO_TOKENIZER
from pi0fast_kernels import _triton
from tests.test_convert import STEP

STATS = {
    "state": NormStats(*np.array([[0.5, 0.5], [0.3, 0.2], [0.0, 0.0], [1.0, 1.0]])),
    "actions": NormStats(*np.array([[0.01, 0.0], [0.1, 0.2], [-0.3, -0.3], [0.3, 0.3]])),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained `pi0_tiny`, saved as a run."""
    folder = tmp_path_factory.mktemp("untrained")
    size = config.pi0_tiny()
    RunConfig(size, DEMO, tokenizer="demo").save(folder)
    model = Pi0(size, rngs=nnx.Rngs(0))
    with Checkpoints(folder) as checkpoints:
        params = {path: variable[...] for path, variable in flatten(model).items()}
        checkpoints.save(3, params=params, norm_stats=STATS)
    return folder, model


@pytest.fixture(scope="module")
def policy(run):
    return Policy.load(run[0])


@pytest.fixture
def observation():
    return Simulator(seed=5).reset()


def test_actions_are_the_models_samples_in_the_robots_units(run, policy, observation):
    _, model = run
    actions = Policy.load(run[0], seed=7).infer(observation)["actions"]
    assert actions.shape == (8, 2)
    transform = policy._transform
    cameras = {f"image.{camera}": observation[key] for camera, key in DEMO.cameras.items()}
    sample = transform({**cameras, "state": observation["observation.state"], "prompt": observation["prompt"]})
    batch = Observation(**jax.tree.map(lambda x: jnp.asarray(x)[None], sample))
    noise = np.random.default_rng((7, 1)).standard_normal((1, 8, 2), np.float32)
    normalised = np.asarray(jax.jit(sample_actions)(model, batch, noise))[0]
    deltas = normalised * (STATS["actions"].std + 1e-6) + STATS["actions"].mean
    np.testing.assert_allclose(actions, deltas + observation["observation.state"], rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_actions(run, observation):
    first, second = (Policy.load(run[0], seed=1).infer(observation)["actions"] for _ in range(2))
    other = Policy.load(run[0], seed=2).infer(observation)["actions"]
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation.state": None}, r"no \['observation.state'\]; it has"),
        ({"prompt": None}, r"no \['prompt'\]; it has"),
        ({"prompt": b"touch"}, "prompt is bytes, expected a string"),
        ({"observation.state": np.zeros(3, np.float32)}, "observation.state: 3 state dimensions, expected 2"),
        ({"observation.state": [[1], [2, 3]]}, "observation.state is a list of rows of different lengths"),
        ({"observation.images.top": [[1], [2, 3]]}, "observation.images.top is a list of rows of different lengths"),
        ({"observation.state": np.array([0, np.nan])}, "observation.state is not finite: nan at 1"),
        ({"observation.state": np.array(["a", "b"])}, r"observation.state is <U1 \(2,\), expected numbers"),
        ({"observation.images.top": np.zeros((1, 5000, 3), np.uint8)}, "top is 1 x 5000 pixels; send at most 4096"),
        ({"observation.images.wrist": np.zeros((56, 56, 3))}, r"observation.images.wrist is float64 \(56, 56, 3\)"),
        ({"observation.images.top": np.zeros((56, 56), np.uint8)}, "observation.images.top is uint8"),
    ],
)
def test_errors_name_the_key_and_leave_the_policy_usable(policy, observation, change, message):
    spoiled = {key: value for key, value in {**observation, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        policy.infer(spoiled)
    assert np.isfinite(policy.infer(observation)["actions"]).all()


def test_kernels_that_cannot_run_are_refused(run, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRET", False)
    with pytest.raises(ValueError, match="cannot run: triton: it needs an NVIDIA GPU"):
        Policy.load(run[0], kernels="triton")


@pytest.mark.long
def test_named_kernels_give_the_same_actions(run, observation):
    """Guided by the last chunk too, which runs the kernels backwards."""
    ours, theirs = (
        Policy.load(run[0], seed=7, num_steps=2, kernels=kernels, rtc=RtcConfig())
        for kernels in ("triton", "reference")
    )
    guided = {**observation, "rtc/previous_actions": np.full((6, 2), 0.5, np.float32), "rtc/delay": 2}
    for given in (observation, guided):
        expected = theirs.infer(given)["actions"]
        np.testing.assert_allclose(ours.infer(given)["actions"], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def batching(run):
    return Policy.load(run[0], seed=3, batch_sizes=(4, 1))


def test_no_request_compiles(batching, observation, caplog):
    batching.warmup()
    with jax.log_compiles():
        for count in (1, 3, 4):
            batching.run([batching.prepare(observation)] * count)
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]
        jax.jit(lambda x: x + count)(1.0)  # so that the test is known to see one
        assert [record for record in caplog.records if "ompil" in record.getMessage()]


def test_actions_do_not_depend_on_batching(run, batching):
    """The n-th request gets the n-th noise; padding the batch to a compiled size changes nothing."""
    observations = [Simulator(seed).reset() for seed in range(7)]
    first = batching._count
    batched = batching.infer_batch(observations)  # four, then three
    alone = Policy.load(run[0], seed=3)
    alone._count = first
    singles = [alone.infer(observation)["actions"] for observation in observations]
    np.testing.assert_allclose(batched, singles, rtol=1e-5, atol=1e-5)


def test_given_noise_is_used_and_left_alone(policy, observation):
    noise = np.random.default_rng(0).standard_normal((8, 2), np.float32)
    kept = noise.copy()
    first, second = (policy.infer(observation, noise=noise)["actions"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(noise, kept)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 2\), expected \(1, 8, 2\)"):
        policy.infer(observation, noise=noise[:3])


def test_too_many_requests(batching, observation):
    with pytest.raises(ValueError, match="5 requests; one call takes 1 to 4"):
        batching.run([batching.prepare(observation)] * 5)


def test_openpis_keys_and_channels_first_mean_the_same(policy, observation):
    noise = np.zeros((8, 2), np.float32)
    expected = policy.infer(observation, noise=noise)["actions"]
    images = {name: observation[f"observation.images.{name}"] for name in ("top", "wrist")}
    flat = {"observation/state": observation["observation.state"], "prompt": observation["prompt"]}
    flat |= {f"observation/images/{name}": image for name, image in images.items()}
    nested = {
        "state": observation["observation.state"].tolist(),
        "images": {name: np.moveaxis(image, 2, 0) for name, image in images.items()},
        "prompt": observation["prompt"],
        "something/else": 3,
    }
    for spelled in (flat, nested):
        np.testing.assert_array_equal(policy.infer(spelled, noise=noise)["actions"], expected)


def test_prompt_lengths_that_are_asked_for(run, observation):
    policy = Policy.load(run[0], prompt_buckets=(5, 4))
    assert policy.prompt_buckets == (4, 5)
    assert np.isfinite(policy.infer({**observation, "prompt": "touch"})["actions"]).all()
    with pytest.raises(ValueError, match="prompt has 6 tokens; the policy is compiled for 5 at most"):
        policy.infer({**observation, "prompt": "touch the red block"})
    with pytest.raises(ValueError, match=r"prompt_buckets=\(9,\): give at least one, each from 1 to 8 tokens"):
        Policy.load(run[0], prompt_buckets=(9,))


def test_a_run_takes_the_values_at_inference_that_it_took_in_training(run, policy, observation, tmp_path):
    far = {**observation, "observation.state": np.array([0.5, 50.0])}
    with pytest.raises(ValueError, match="beyond ±100"):
        policy.infer(far)
    folder = shutil.copytree(run[0], tmp_path / "run")
    RunConfig(config.pi0_tiny(), DEMO, "demo", {"input": {"max_normalized": None}}).save(folder)
    for robot in (None, "demo"):
        actions = Policy.load(folder, robot=robot, prompt_buckets=(8,)).infer(far)["actions"]
        assert np.isfinite(actions).all()


def test_default_prompt(run, observation):
    noise = np.zeros((8, 2), np.float32)
    prompt = observation.pop("prompt")
    expected = Policy.load(run[0]).infer({**observation, "prompt": prompt}, noise=noise)["actions"]
    named = Policy.load(run[0], default_prompt=prompt)
    np.testing.assert_array_equal(named.infer(observation, noise=noise)["actions"], expected)


def test_timings_and_metadata(policy, observation):
    timing = policy.infer(observation)["policy_timing"]
    assert timing["prepare_ms"] > 0 and timing["device_ms"] > 0
    assert timing["prepare_ms"] + timing["device_ms"] < timing["infer_ms"]
    assert policy.metadata | {"model": "pi0", "robot": "demo", "action_horizon": 8, "action_dim": 2} == policy.metadata
    assert msgpack.unpackb(msgpack.packb(policy.metadata)) == policy.metadata


def test_an_openpi_checkpoint_is_the_run_converted_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PI0FAST_TOKENIZER", str(DEMO_TOKENIZER))
    run = tmp_path / "run"
    lengths: dict[str, Any] = {"action_horizon": 10, "dtype": "float32"}
    convert.convert_from_openpi(str(STEP), run, robot="libero", **lengths)
    rng = np.random.default_rng(0)
    images = {f"observation/{name}": rng.integers(0, 256, (128, 96, 3), np.uint8) for name in ("image", "wrist_image")}
    observation = {**images, "observation/state": rng.standard_normal(8), "prompt": "lift the lid"}
    options: dict[str, Any] = {"num_steps": 2, "seed": 1}
    ours, theirs = Policy.load(run, **options), Policy.load(STEP, robot="libero", **lengths, **options)
    actions = ours.infer(observation)["actions"]
    assert actions.shape == (10, 7)
    np.testing.assert_array_equal(actions, theirs.infer(observation)["actions"])
    with pytest.raises(ValueError, match="which does not say which robot it is for; give robot"):
        Policy.load(STEP)
    with pytest.raises(ValueError, match="which does not say how long its chunks are; give the action_horizon"):
        Policy.load(STEP, robot="libero")


def test_a_missing_camera_is_masked(policy, observation):
    del observation["observation.images.wrist"]
    assert np.isfinite(policy.infer(observation)["actions"]).all()


def test_an_observation_without_images_is_refused(policy, observation):
    blind = {key: value for key, value in observation.items() if "images" not in key}
    with pytest.raises(ValueError, match=r"has none of the images \['observation.images"):
        policy.infer(blind | {"observation.images.rist": np.zeros((8, 8, 3), np.uint8)})


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        Policy.load(tmp_path)
    RunConfig(config.pi0_tiny(), None, tokenizer="demo").save(tmp_path)
    with pytest.raises(ValueError, match="--robot"):
        Policy.load(tmp_path)
    RunConfig(config.pi0_tiny(), DEMO, tokenizer="demo").save(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        Policy.load(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model"] == {**dataclasses.asdict(config.pi0_tiny()), "cameras": list(config.pi0_tiny().cameras)}


def test_an_untrained_policy_fails(run, tmp_path):
    outcomes = evaluate.evaluate(Policy.load(run[0], batch_sizes=(40,)), 40)
    assert sum(outcome.success for outcome in outcomes) <= 8
    evaluate.write_gif(outcomes[:3], tmp_path / "episodes.gif")
    assert (tmp_path / "episodes.gif").read_bytes().startswith(b"GIF89a")


def test_an_evaluation_keeps_every_episode(run, tmp_path, capsys):
    evaluate.main(run[0], episodes=3, palette="secondary", gif_episodes=0, out=tmp_path / "episodes.json")
    written = json.loads((tmp_path / "episodes.json").read_text())
    own, another = (written["block prompted"][block] for block in ("own", "another"))
    assert len(own) == len(another) == 3
    assert {episode["prompted"] for episode in own + another} <= set(PALETTES["secondary"])
    assert all(mine["prompted"] != other["prompted"] for mine, other in zip(own, another, strict=True))
    for said, episodes in zip(capsys.readouterr().out.splitlines(), (own, another), strict=True):
        assert f" {sum(episode['touched'] == episode['prompted'] for episode in episodes)}/3 = " in said


def test_prompt_shift_keeps_the_layout():
    plain, shifted = Simulator(seed=3), Simulator(seed=3)
    first, second = plain.reset(), shifted.reset(prompt_shift=1)
    np.testing.assert_array_equal(first["observation.images.top"], second["observation.images.top"])
    assert first["prompt"] != second["prompt"]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (90, 100, 0.8256, 0.9448)])
def test_wilson_interval(successes, trials, low, high):
    np.testing.assert_allclose(evaluate.wilson_interval(successes, trials), (low, high), atol=1e-3)
