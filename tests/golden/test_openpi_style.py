"""The baseline computes openpi's numbers, in float32: what it is timed for is the same computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import openpi_style
from pi0fast import flow
from tests.golden import golden
from tests.golden.test_golden import GRADIENT_TOLERANCE, VALUE_TOLERANCE, assert_close


@pytest.fixture(params=golden.NAMES, scope="module")
def case(request) -> golden.Golden:
    return golden.load(request.param)


def test_velocity(case):
    t, x_t = case.inputs["time"], flow.interpolate(*(case.inputs[name] for name in ("actions", "noise", "time")))
    velocity = jax.jit(lambda params: openpi_style.velocity(params, case.config, case.observation, x_t, t))
    assert_close(velocity(case.params), case.values["velocity"], VALUE_TOLERANCE)


def test_loss_and_gradients(case):
    inputs = (case.inputs[name] for name in ("actions", "noise", "time"))
    loss = functools.partial(_loss, case.config, case.observation, *inputs)
    (_, losses), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    assert_close(losses, case.values["loss"], VALUE_TOLERANCE)
    norms = np.array([np.linalg.norm(grads[path]) for path in sorted(case.params)])
    np.testing.assert_allclose(norms, case.values["grad_norms"], rtol=1e-5, atol=1e-7)
    for key, expected in case.values.items():
        if key.startswith("grad/"):
            assert_close(grads[key.removeprefix("grad/")], expected, GRADIENT_TOLERANCE)


def _loss(config, observation, actions, noise, t, params):
    losses = openpi_style.loss(params, config, observation, actions, noise, t)
    return jnp.mean(losses), losses


@pytest.mark.parametrize("num_steps", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 10))])
def test_samples(case, num_steps):
    sample = jax.jit(openpi_style.sample_actions, static_argnums=(1, 4))
    samples = sample(case.params, case.config, case.observation, case.inputs["noise"], num_steps)
    assert_close(samples, case.values[f"sampled_{num_steps}"], VALUE_TOLERANCE)
