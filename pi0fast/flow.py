"""Flow matching: what is drawn, what is regressed, how actions are sampled. t = 1 is noise, t = 0 is data.

Lipman et al. 2023 (https://arxiv.org/abs/2210.02747); the time distribution is Pi0's (https://arxiv.org/abs/2410.24164).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, UInt32

Actions = Float[Array, "B H A"]


def draw(
    key: Key[Array, ""], example: UInt32[Array, " B"], shape: tuple[int, int]
) -> tuple[Actions, Float[Array, " B"]]:
    """Noise `N(0, 1)` `[B, H, A]` and time `Beta(1.5, 1) * 0.999 + 0.001` `[B]`.

    Each example draws from its own key, so that the numbers do not depend on how the batch is sharded.
    """

    def one(example):
        noise_key, time_key = jax.random.split(jax.random.fold_in(key, example))
        u = jax.random.uniform(time_key)  # Beta(a, 1) has the distribution function t^a
        return jax.random.normal(noise_key, shape), u ** (1 / 1.5) * 0.999 + 0.001

    return jax.vmap(one)(example)


def interpolate(actions: Actions, noise: Actions, t: Float[Array, " B"]) -> Actions:
    """`x_t`, on the straight line from the actions (t = 0) to the noise (t = 1)."""
    t = t[:, None, None]
    return t * noise + (1 - t) * actions


def loss(velocity: Actions, actions: Actions, noise: Actions) -> Float[Array, "B H"]:
    """Squared error against the line's velocity, mean over the action dimensions, padding included."""
    return jnp.mean(jnp.square(velocity - (noise - actions)), axis=-1)


def integrate(velocity: Callable[[Actions, Float[Array, " B"]], Actions], noise: Actions, num_steps: int) -> Actions:
    """Euler steps from noise at t = 1 to actions at t = 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: sampling needs at least one Euler step")
    dt = 1.0 / num_steps

    def step(i, x):
        t = jnp.full(x.shape[:1], 1.0 - i * dt, jnp.float32)
        return x - dt * velocity(x, t)

    return lax.fori_loop(0, num_steps, step, noise)


def time_embedding(t: Float[Array, " B"], width: int) -> Float[Array, "B width"]:
    """`[sin, cos]` of `2π t / period`, periods log-spaced from 4e-3 to 4."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    angle = t.astype(jnp.float32)[:, None] * (2 * jnp.pi / period)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
