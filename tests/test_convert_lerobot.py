"""lerobot's policies on disk, both ways: bit by bit, and as its own classes load them."""

import dataclasses
import importlib
import json
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from lerobot.processor import PolicyProcessorPipeline
from safetensors.numpy import load_file, save_file

from pi0fast import checkpoint, convert, convert_lerobot, normalize
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.config import Pi0Config, SiglipConfig
from pi0fast.convert_lerobot import convert_from_lerobot, convert_to_lerobot
from pi0fast.convert_lerobot_rules import EMBEDDING, EXPERT_OUTPUT, TIED, sources
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.robots import Robot
from pi0fast.sampling import sample_actions
from tests import lerobot_model
from tests.test_lerobot_parity import PI0, TOLERANCE, draw_inputs, our_time_embedding, relative_error

SIZES = dataclasses.replace(PI0, siglip=SiglipConfig(64, 2, 80, num_heads=16, patch_size=14))
CONFIGS = {"pi0": SIZES, "pi05": dataclasses.replace(SIZES, pi05=True, state_mode=None)}
CAMERAS = dict(
    zip(SIZES.cameras, ("observation.images.top", "left", "observation.images.right_wrist_0_rgb"), strict=True)
)
ROBOT = Robot("arm", ("observation.state",), ("action",), CAMERAS, delta_mask=(True, False, True))


@pytest.fixture(params=CONFIGS)
def config(request) -> Pi0Config:
    return CONFIGS[request.param]


def write_run(folder, config: Pi0Config):
    """A run with random weights and statistics."""
    rng = np.random.default_rng(0)
    shapes = convert.openpi_shapes(config)
    model = convert.from_openpi({path: _draw(rng, shape) for path, shape in shapes.items()}, config)
    q01 = rng.normal(size=3)
    stats = {key: NormStats(rng.normal(size=3), rng.random(3), q01, q01 + 1) for key in ("state", "actions")}
    RunConfig(config, ROBOT, "paligemma").save(folder)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, params={p: x[...] for p, x in flatten(model).items()}, norm_stats=stats)
    return folder


def _draw(rng, shape):
    std = 0.1 if len(shape) < 2 else 0.7 / np.sqrt(shape[-2])
    return (std * rng.standard_normal(shape)).astype(np.float32)


def write_policy(folder, config: Pi0Config, **settings):
    """A policy as lerobot in bfloat16 writes it: some tensors in bfloat16, some in float32."""
    rng = np.random.default_rng(1)
    tensors = {}
    for source in sources(config).values():
        for name, shape in source.tensors().items():
            dtype = np.float32 if "norm" in name or "embedding" in name else ml_dtypes.bfloat16
            tensors[f"model.{name}"] = rng.standard_normal(shape).astype(dtype)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[f"model.{TIED}"] = tensors.pop(embedding)
    output = rng.standard_normal((config.vocab_size, config.action_expert.width))
    tensors[f"model.{EXPERT_OUTPUT}"] = output.astype(ml_dtypes.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    given = {
        "type": "pi05" if config.pi05 else "pi0",
        "dtype": config.dtype,
        "chunk_size": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "tokenizer_max_length": config.max_token_len,
    }
    (folder / "config.json").write_text(json.dumps(given | settings))
    return tensors


def test_there_and_back_is_bit_exact(config, tmp_path, capsys):
    tensors = write_policy(tmp_path / "policy", config)
    convert_from_lerobot(tmp_path / "policy", tmp_path / "run")
    assert "has no statistics" in capsys.readouterr().out
    assert RunConfig.load(tmp_path / "run").model == config
    convert_to_lerobot(tmp_path / "run", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.slow
def test_a_run_and_its_statistics_come_back(config, tmp_path):
    run = write_run(tmp_path / "run", config)
    convert_to_lerobot(run, tmp_path / "policy")
    policy = convert_lerobot.describe_lerobot(tmp_path / "policy")
    assert policy.config == config and policy.delta_mask == ROBOT.delta_mask
    with pytest.raises(ValueError, match=r"actions are relative .*give --robot, with delta_mask="):
        convert_from_lerobot(tmp_path / "policy", tmp_path / "again")
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(ROBOT.to_dict()))
    convert_from_lerobot(tmp_path / "policy", tmp_path / "again", robot=str(tmp_path / "robot.yaml"))
    (step, again) = map(checkpoint.newest_checkpoint, (run, tmp_path / "again"))
    before, after = (checkpoint.load_item(folder, "params") for folder in (step, again))
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=path)
    assert normalize.to_dict(checkpoint.load_stats(again)) == normalize.to_dict(checkpoint.load_stats(step))


@pytest.mark.slow
def test_lerobots_own_class_loads_the_export_and_gives_the_same_actions(config, tmp_path, capsys):
    run, folder = write_run(tmp_path / "run", config), tmp_path / "policy"
    convert_to_lerobot(run, folder)
    module = lerobot_model.modeling(config)
    with (
        lerobot_model.resized(config),
        mock.patch.object(module, "create_sinusoidal_pos_embedding", our_time_embedding),
    ):
        policy = getattr(module, "PI05Policy" if config.pi05 else "PI0Policy").from_pretrained(str(folder))
        observation, _, noise, _ = draw_inputs(config)
        arguments = lerobot_model.arguments(config, observation)
        expected = policy.model.sample_actions(*arguments, noise=lerobot_model.to_torch(noise)).numpy()
    assert "All keys loaded successfully!" in capsys.readouterr().out
    model, _, _ = convert.load_model(run)
    samples = jax.jit(lambda model: sample_actions(model, observation, noise))(model)
    assert relative_error(samples, expected) < TOLERANCE

    policy.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    twice = theirs.pop(f"model.{EMBEDDING}")  # as the output embedding, which we write alone
    np.testing.assert_array_equal(twice, theirs[f"model.{TIED}"])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.slow
def test_lerobots_processors_normalise_as_we_do(config, tmp_path):
    name = "pi05" if config.pi05 else "pi0"
    importlib.import_module(f"lerobot.policies.{name}.processor_{name}")  # which makes its steps known by name
    run = write_run(tmp_path / "run", config)
    convert_to_lerobot(run, tmp_path / "policy")
    stats = checkpoint.load_stats(checkpoint.newest_checkpoint(run))
    before, after = (
        PolicyProcessorPipeline.from_pretrained(
            tmp_path / "policy",
            config_filename=f"policy_{name}processor.json",
            overrides={"tokenizer_processor": {"tokenizer": object()}} if name == "pre" else None,
        )
        for name in ("pre", "post")
    )
    rename, relative, normalizer = (
        next(_any(step) for step in before.steps if type(step).__name__ == name)
        for name in ("RenameObservationsProcessorStep", "RelativeActionsProcessorStep", "NormalizerProcessorStep")
    )
    images = {
        "observation.images.base_0_rgb": 0,
        "observation.images.left_wrist_0_rgb": 1,
        CAMERAS["right_wrist_0_rgb"]: 2,
    }
    assert rename.observation({key: i for i, key in enumerate(CAMERAS.values())}) == images
    assert relative.enabled and tuple(relative._build_mask(3)) == ROBOT.delta_mask

    state, actions = np.array([[0.3, -0.2, 0.9]]), np.array([[0.5, 0.1, -2.0]])
    observation = {"observation.state": torch.tensor(state, dtype=torch.float32)}
    normalized = normalizer._normalize_observation(observation, inverse=False)["observation.state"]
    expected = normalize.normalize(state, stats["state"], quantiles=config.pi05)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-4, atol=1e-5)
    restored = _any(after.steps[0])._normalize_action(torch.tensor(actions, dtype=torch.float32), inverse=True)
    expected = normalize.unnormalize(actions, stats["actions"], quantiles=config.pi05)
    np.testing.assert_allclose(restored.numpy(), expected, rtol=1e-4, atol=1e-5)


def _any(step: Any) -> Any:
    return step


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = write_policy(tmp_path / "policy", SIZES)
    name = "model.action_in_proj.bias"
    del tensors["model.state_proj.bias"]
    save_file(tensors | {name: tensors[name][1:], "model.extra": tensors[name]}, tmp_path / "policy/model.safetensors")
    problems = (
        r"missing: state_proj.bias \(48,\)(.|\n)*extra: extra(.|\n)*action_in_proj.bias is \(47,\), expected \(48,\)"
    )
    with pytest.raises(ValueError, match=rf"3 tensors are not(.|\n)*{problems}"):
        convert_from_lerobot(tmp_path / "policy", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "smolvla"}, "of type 'smolvla'; only pi0 and pi05"),
        ({"max_state_dim": 16}, "max_state_dim=16 is not max_action_dim=8"),
        ({"min_period": 1e-3}, "min_period=0.001 of the time embedding is not supported"),
    ],
)
def test_settings_that_we_do_not_compute(tmp_path, settings, message):
    write_policy(tmp_path / "policy", SIZES, **settings)
    with pytest.raises(ValueError, match=message):
        convert_from_lerobot(tmp_path / "policy", tmp_path / "run")


def test_errors_come_before_anything_is_written(tmp_path):
    run = write_run(tmp_path / "run", SIZES)
    policy = tmp_path / "policy"
    convert_to_lerobot(run, policy)
    with pytest.raises(FileExistsError, match="new folder"):
        convert_to_lerobot(run, policy)
    with pytest.raises(ValueError, match=r"'demo' has delta_mask=\[True, True\], the policy \[True, False, True\]"):
        convert_from_lerobot(policy, tmp_path / "out", robot="demo")
    processor = json.loads((policy / "policy_preprocessor.json").read_text())
    processor["steps"][-1]["config"]["norm_map"]["STATE"] = "MIN_MAX"
    (policy / "policy_preprocessor.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="normalises STATE by MIN_MAX, and Pi0 here by MEAN_STD"):
        convert_from_lerobot(policy, tmp_path / "out")
    (policy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        convert_from_lerobot(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    fewer = dataclasses.replace(SIZES, siglip=PI0.siglip)
    with pytest.raises(ValueError, match="its SigLIP 16, this model 8 and 3"):
        convert_to_lerobot(write_run(tmp_path / "fewer", fewer), tmp_path / "out")
    half = dataclasses.replace(SIZES, dtype="float16")
    with pytest.raises(ValueError, match="this model in float16"):
        convert_to_lerobot(write_run(tmp_path / "half", half), tmp_path / "out")
