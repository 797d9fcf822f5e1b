"""The policy on a run's checkpoint: the model's own samples in the robot's units, and errors that leave it usable."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, config, evaluate
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.data.demo import Simulator
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.policy import Policy
from pi0fast.robots import DEMO
from pi0fast.sampling import sample_actions
from pi0fast_kernels import _triton

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
        ({"observation.state": np.zeros(3, np.float32)}, "state"),
        ({"observation.state": np.full(2, np.nan, np.float32)}, "state"),
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


def test_named_kernels_give_the_same_actions(run, observation):
    ours, theirs = (
        Policy.load(run[0], seed=7, num_steps=2, kernels=kernels).infer(observation)["actions"]
        for kernels in ("triton", "reference")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_missing_camera_is_masked(policy, observation):
    del observation["observation.images.wrist"]
    assert np.isfinite(policy.infer(observation)["actions"]).all()


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


def test_prompt_shift_keeps_the_layout():
    plain, shifted = Simulator(seed=3), Simulator(seed=3)
    first, second = plain.reset(), shifted.reset(prompt_shift=1)
    np.testing.assert_array_equal(first["observation.images.top"], second["observation.images.top"])
    assert first["prompt"] != second["prompt"]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (90, 100, 0.8256, 0.9448)])
def test_wilson_interval(successes, trials, low, high):
    np.testing.assert_allclose(evaluate.wilson_interval(successes, trials), (low, high), atol=1e-3)
