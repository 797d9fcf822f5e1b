"""Our numbers are lerobot's, in float32: the velocity, loss, gradients and samples of its PyTorch Pi0 and Pi0.5.

One thing differs: lerobot computes the time embedding in float64, openpi and pi0fast in float32, where rounding an
angle of up to 2π / 4e-3 moves its sine by up to 2e-4. `test_time_embedding` bounds that; everywhere else lerobot's
model is given our embedding. With its own, velocities differ by up to 1.2e-5, samples 4e-6 and gradients 4e-5.
"""

import dataclasses
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from pi0fast import Observation, Pi0, convert, convert_lerobot_rules, flow
from pi0fast.config import BASE_CAMERAS, Pi0Config, SiglipConfig, TransformerConfig
from pi0fast.sampling import sample_actions
from tests import lerobot_model
from tests.lerobot_model import to_torch

TOLERANCE = 5e-6
FAULT = 1e-2  # the least that a planted fault changes

PI0 = Pi0Config(  # lerobot's code takes 8 heads for granted
    vlm=TransformerConfig(width=64, depth=3, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=32),
    action_expert=TransformerConfig(width=48, depth=3, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=32),
    siglip=SiglipConfig(width=48, depth=2, mlp_dim=80, num_heads=3, patch_size=14),
    action_horizon=10,
    action_dim=8,
    max_token_len=16,
    vocab_size=512,
    image_size=56,
    dtype="float32",
)
CONFIGS = {"pi0": PI0, "pi05": dataclasses.replace(PI0, pi05=True, state_mode=None)}

# openpi's path → an axis whose reversal swaps weights: keys and values, gate and up, layers, positions.
SWAPS = {
    "PaliGemma/llm/layers/attn/kv_einsum/w": 1,
    "PaliGemma/llm/layers/mlp_1/gating_einsum": 1,
    "PaliGemma/llm/layers/attn/q_einsum_1/w": 0,
    "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": 0,
    "PaliGemma/img/pos_embedding": 1,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model by openpi's names, its inputs, and what lerobot computes from them."""

    config: Pi0Config
    params: dict[str, np.ndarray]
    observation: Observation
    actions: jax.Array
    noise: jax.Array
    t: jax.Array
    velocity: np.ndarray
    loss: np.ndarray
    grads: dict[str, np.ndarray]
    samples: np.ndarray

    def model(self) -> Pi0:
        return convert.from_openpi(self.params, self.config)


@pytest.fixture(params=CONFIGS, scope="module")
def case(request) -> Case:
    config = CONFIGS[request.param]
    model = lerobot_model.build(config)
    observation, actions, noise, t = draw_inputs(config)
    arguments = lerobot_model.arguments(config, observation)
    velocities = []
    model.action_out_proj.register_forward_hook(lambda _module, _args, out: velocities.append(out.detach().numpy()))
    modeling = lerobot_model.modeling(config)
    with mock.patch.object(modeling, "create_sinusoidal_pos_embedding", our_time_embedding):
        loss = model.forward(*arguments, *map(to_torch, (actions, noise, t)))
        loss.mean().backward()
        samples = model.sample_actions(*arguments, noise=to_torch(noise))

    weights = lerobot_model.weights(model)
    grads = {name: np.zeros_like(weight) for name, weight in weights.items()}
    grads |= {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}
    return Case(
        config=config,
        params=convert_lerobot_rules.to_openpi(weights, config),
        observation=observation,
        actions=actions,
        noise=noise,
        t=t,
        velocity=velocities[0],
        loss=loss.detach().numpy().mean(axis=-1),
        grads=convert_lerobot_rules.to_openpi(grads, config),
        samples=samples.numpy(),
    )


def draw_inputs(config: Pi0Config) -> tuple[Observation, jax.Array, jax.Array, jax.Array]:
    """Observation, actions, noise and time of three examples: complete; a padded prompt; also a masked camera."""
    rng = np.random.default_rng(0)
    batch, size, length = 3, config.image_size, config.max_token_len

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)

    prompt_mask = np.arange(length) < np.array([[length], [11], [6]])
    observation = Observation(
        images={camera: jnp.clip(normal(size, size, 3) / 2, -1, 1) for camera in BASE_CAMERAS},
        image_masks={camera: jnp.array([True, True, camera != "left_wrist_0_rgb"]) for camera in BASE_CAMERAS},
        state=normal(config.action_dim),
        tokenized_prompt=jnp.asarray(rng.integers(1, config.vocab_size, (batch, length)) * prompt_mask, jnp.int32),
        tokenized_prompt_mask=jnp.asarray(prompt_mask),
    )
    actions, noise = (normal(config.action_horizon, config.action_dim) for _ in range(2))
    return observation, actions, noise, jnp.array([0.9, 0.35, 0.02])


def our_time_embedding(t: torch.Tensor, width: int, **_) -> torch.Tensor:
    return to_torch(flow.time_embedding(jnp.asarray(t.numpy()), width))


def relative_error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@jax.jit
def velocity(model: Pi0, observation: Observation, x_t: jax.Array, t: jax.Array) -> jax.Array:
    return model.velocity(observation, x_t, t)


def velocity_error(case: Case, model: Pi0, observation: Observation) -> float:
    x_t = flow.interpolate(case.actions, case.noise, case.t)
    return relative_error(velocity(model, observation, x_t, case.t), case.velocity)


def test_velocity(case):
    assert velocity_error(case, case.model(), case.observation) < TOLERANCE


def test_loss_and_gradients(case):
    def mean_loss(model):
        loss = model.loss(case.observation, case.actions, case.noise, case.t)
        return jnp.mean(loss), loss

    model = case.model()
    (_, loss), grads = nnx.jit(nnx.value_and_grad(mean_loss, has_aux=True))(model)
    assert relative_error(loss, case.loss) < TOLERANCE

    grads = convert.to_openpi(nnx.merge(nnx.graphdef(model), grads))
    assert sorted(grads) == sorted(case.grads)
    for path, expected in case.grads.items():
        # The constant is for SigLIP's key bias, to which softmax is blind: its gradient is rounding only.
        bound = TOLERANCE * np.linalg.norm(expected) + 1e-7
        assert np.linalg.norm(grads[path] - expected) < bound, path


def test_samples(case):
    samples = jax.jit(lambda model: sample_actions(model, case.observation, case.noise))(case.model())
    assert relative_error(samples, case.samples) < TOLERANCE


@pytest.mark.parametrize("path", SWAPS)
def test_agreement_breaks_when_weights_are_swapped(case, path):
    params = case.params | {path: np.flip(case.params[path], SWAPS[path])}
    assert velocity_error(case, convert.from_openpi(params, case.config), case.observation) > FAULT


@pytest.mark.parametrize("masks", ["image_masks", "tokenized_prompt_mask"])
def test_agreement_breaks_without_masks(case, masks):
    nothing_masked = jax.tree.map(jnp.ones_like, getattr(case.observation, masks))
    observation = dataclasses.replace(case.observation, **{masks: nothing_masked})
    assert velocity_error(case, case.model(), observation) > FAULT


def test_time_embedding():
    """Equal up to a few float32 roundings of the angle, which is all that lerobot's float64 changes."""
    vla_utils = importlib.import_module("lerobot.policies.common.vla_utils")
    t, width = jnp.linspace(0, 1, 101), 1024
    expected = vla_utils.create_sinusoidal_pos_embedding(to_torch(t), width, 4e-3, 4.0, torch.device("cpu")).numpy()
    angle = np.tile(np.asarray(t)[:, None] * 2 * np.pi / np.geomspace(4e-3, 4.0, width // 2), 2)
    error = np.abs(np.asarray(flow.time_embedding(t, width)) - expected)
    assert np.all(error < 4 * np.finfo(np.float32).eps * (1 + angle))
