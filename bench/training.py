"""What is timed when training is compared: loss and gradients, or a whole step with its optimizer."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench import openpi_fsdp, openpi_style, peers
from bench.inference import Params, draw_params
from pi0fast import Observation, Pi0, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.execution import Execution, Remat
from pi0fast.settings import Settings

Gradients = Callable[[], tuple[float, float]]  # computes all gradients; the loss and their norm


def batch(config: Pi0Config, size: int) -> dict[str, Any]:
    """As the trainer's loader gives it: images of noise from every camera, prompts as long as the model takes."""
    rng = np.random.default_rng(0)
    pixels, tokens = (size, config.image_size, config.image_size, 3), (size, config.max_token_len)
    return {
        "images": {camera: rng.integers(0, 256, pixels, np.uint8) for camera in config.cameras},
        "image_masks": {camera: np.ones(size, bool) for camera in config.cameras},
        "state": rng.standard_normal((size, config.action_dim), np.float32),
        "tokenized_prompt": rng.integers(0, config.vocab_size, tokens, np.int32),
        "tokenized_prompt_mask": np.ones(tokens, bool),
        "actions": rng.standard_normal((size, config.action_horizon, config.action_dim), np.float32),
        "action_is_pad": np.zeros((size, config.action_horizon), bool),
        "example": np.arange(size),
    }


# ── Loss and gradients ────────────────────────────────────────────────────────────────────────────────────────────────

Flow = tuple[np.ndarray, np.ndarray, np.ndarray]  # actions, noise, t


def ours(model: Pi0, observation: Observation, flow: Flow, remat: Remat) -> Gradients:
    graphdef, weights = nnx.split(model)

    def loss(weights, *inputs):
        return jnp.mean(nnx.merge(graphdef, weights).loss(*inputs, execution=Execution(remat=remat)))

    return _gradients(loss, weights, (observation, *flow))


def baseline(params: Params, config: Pi0Config, observation: Observation, flow: Flow) -> Gradients:
    def loss(params, *inputs):
        return jnp.mean(openpi_style.loss(params, config, *inputs))

    return _gradients(loss, params, (observation, *flow))


def _gradients(loss: Callable[..., jax.Array], weights: Any, inputs: Any) -> Gradients:
    """Loss and all gradients, compiled; the gradients stay on the device."""
    weights, inputs = jax.device_put((weights, inputs))
    run = jax.jit(jax.value_and_grad(loss))
    norm = jax.jit(optax.tree.norm)

    def step() -> tuple[float, float]:
        value, gradients = run(weights, *inputs)
        return float(value), float(norm(gradients))

    return step


def lerobot_gradients(model: Any, config: Pi0Config, observation: Observation, flow: Flow) -> Gradients:
    from tests import lerobot_model

    torch = peers.torch()
    arguments = (*lerobot_model.arguments(config, observation), *map(torch.tensor, flow))

    def step() -> tuple[float, float]:
        model.zero_grad()
        loss = model.forward(*arguments).mean()
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))

    return step


# ── A whole step ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """run: one step, its loss waited for. first_s: seconds from nothing compiled to the first step's end.

    temporaries: bytes on each device beside what the program is given. loss: of the first step. text: the program.
    """

    run: Callable[[], None]
    first_s: float
    temporaries: int
    loss: float
    text: str


def our_step(config: Pi0Config, settings: Settings) -> Step:
    """The trainer's, of random weights."""
    mesh = meshes.make(settings.mesh)
    graphdef, _, _ = train_state.abstract_state(config, settings, mesh)
    state, frozen, _ = train_state.initialize(config, settings, mesh)
    step: Any = train.make_step(graphdef, config, settings, mesh, state, frozen)
    given = training_data.to_device(batch(config, settings.batch_size), mesh)
    return _compiled(lambda: step.lower(state, frozen, given), state, (frozen, given))


def openpi_step(config: Pi0Config, settings: Settings) -> Step:
    """openpi's way, of random weights."""
    mesh = meshes.make(settings.mesh)
    params = draw_params(dataclasses.replace(config, dtype="float32"))
    where = jax.tree.map(lambda x: x.sharding, openpi_fsdp.abstract_state(config, settings, mesh))
    initial = partial(openpi_fsdp.State.initial, settings=settings)
    state = jax.jit(initial, out_shardings=where, donate_argnums=0)(params)
    step: Any = openpi_fsdp.make_step(config, settings, mesh)
    given = training_data.to_device(batch(config, settings.batch_size), mesh)
    return _compiled(lambda: step.lower(state, given), state, (given,))


def _compiled(lower: Callable[[], Any], state: Any, rest: tuple) -> Step:
    start = time.perf_counter()
    compiled = lower().compile()
    state, metrics = compiled(state, *rest)
    loss = float(metrics["loss"])
    first_s = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)

    return Step(run, first_s, compiled.memory_analysis().temp_size_in_bytes, loss, compiled.as_text())
