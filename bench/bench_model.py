"""A training step's loss and gradients, of the tiny presets: seconds per call, compiled and warm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, config, flops

BATCH = 8


def example(size, batch):
    """Random inputs: images of noise, full prompts."""
    rng = np.random.default_rng(0)
    shape = (batch, size.image_size, size.image_size, 3)
    observation = Observation(
        images={camera: jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8)) for camera in size.cameras},
        image_masks={camera: jnp.ones(batch, bool) for camera in size.cameras},
        state=jnp.asarray(rng.standard_normal((batch, size.action_dim), dtype=np.float32)),
        tokenized_prompt=jnp.asarray(rng.integers(0, size.vocab_size, (batch, size.max_token_len), dtype=np.int32)),
        tokenized_prompt_mask=jnp.ones((batch, size.max_token_len), bool),
    )
    actions, noise = rng.standard_normal((2, batch, size.action_horizon, size.action_dim), dtype=np.float32)
    return observation, jnp.asarray(actions), jnp.asarray(noise), jnp.asarray(rng.uniform(size=batch), jnp.float32)


@pytest.mark.parametrize("preset", ["pi0_tiny", "pi05_tiny"])
def test_loss_and_gradients(benchmark, preset):
    size = config.PRESETS[preset]()
    model, inputs = Pi0(size, rngs=nnx.Rngs(0)), example(size, BATCH)
    run = nnx.jit(nnx.value_and_grad(lambda model, *inputs: jnp.mean(model.loss(*inputs))))
    benchmark.extra_info["flops"] = flops.train_step(size, len(size.cameras), size.max_token_len, BATCH)
    jax.block_until_ready(run(model, *inputs))
    benchmark(lambda: jax.block_until_ready(run(model, *inputs)))
