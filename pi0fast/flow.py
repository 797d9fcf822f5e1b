"""Flow matching: what is drawn, what is regressed, how actions are sampled. t = 1 is noise, t = 0 is data.

Lipman et al. 2023 (https://arxiv.org/abs/2210.02747); the time distribution is Pi0's (https://arxiv.org/abs/2410.24164).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt32

Actions = Float[Array, "B H A"]

Solver = Literal["euler", "midpoint", "heun"]

# Where in its step a solver evaluates the velocity, as fractions of the step (Hairer, Nørsett & Wanner, II.1).
EVALUATIONS = {"euler": (0.0,), "midpoint": (0.0, 0.5), "heun": (0.0, 1.0)}


def draw(
    key: Key[Array, ""], example: UInt32[Array, " examples"], shape: tuple[int, int], samples: int = 1
) -> tuple[Actions, Float[Array, " B"]]:
    """Noise `N(0, 1)` `[B, H, A]` and time `Beta(1.5, 1) * 0.999 + 0.001` `[B]`: `samples` in turn for each example.

    Each example draws from its own key, so that the numbers do not depend on how the batch is sharded, and the first of
    its samples not on how many there are.
    """

    def one(key, example):
        noise_key, time_key = jax.random.split(jax.random.fold_in(key, example))
        u = jax.random.uniform(time_key)  # Beta(a, 1) has the distribution function t^a
        return jax.random.normal(noise_key, shape), u ** (1 / 1.5) * 0.999 + 0.001

    if samples == 1:
        return jax.vmap(partial(one, key))(example)
    # Further keys are counted from the end of what can be folded in, where no example's number is.
    keys = [key, *(jax.random.fold_in(key, 2**32 - sample) for sample in range(1, samples))]
    drawn = [jax.vmap(partial(one, key))(example) for key in keys]
    return jax.tree.map(lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:]), *drawn)


def interpolate(actions: Actions, noise: Actions, t: Float[Array, " B"]) -> Actions:
    """`x_t`, on the straight line from the actions (t = 0) to the noise (t = 1)."""
    t = t[:, None, None]
    return t * noise + (1 - t) * actions


def loss(
    velocity: Actions, actions: Actions, noise: Actions, weights: Float[Array, " A"] | None = None
) -> Float[Array, "B H"]:
    """Squared error against the line's velocity, mean over the action dimensions, padding included.

    weights: of each dimension in that mean.
    """
    squared = jnp.square(velocity - (noise - actions))
    return jnp.mean(squared, axis=-1) if weights is None else jnp.sum(squared * (weights / jnp.sum(weights)), axis=-1)


def counted_steps(is_pad: Bool[Array, "B H"], mask_padding: bool) -> Bool[Array, "B H"]:
    """Which steps the loss is the mean over: all, or those that are no padding."""
    return ~is_pad if mask_padding else jnp.ones_like(is_pad)


def evaluation_times(num_steps: int, solver: str) -> np.ndarray:
    """The times `[num_steps, evaluations]` at which a solver asks for the velocity, from t = 1 to t = 0.

    Raises:
        ValueError: no step, or an unknown solver.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: sampling needs at least one step")
    if solver not in EVALUATIONS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(EVALUATIONS)}")
    step = 1.0 / num_steps
    return 1.0 - step * (np.arange(num_steps)[:, None] + np.array(EVALUATIONS[solver]))


type Velocity[Condition, State] = Callable[[Actions, Condition, State], tuple[Actions, State]]


def integrate[Condition, State](
    velocity: Velocity[Condition, State],
    noise: Actions,
    conditions: Condition,
    state: State,
    *,
    num_steps: int,
    solver: Solver = "euler",
    first: Velocity[Condition, State] | None = None,
) -> Actions:
    """Steps of one size from noise at t = 1 to actions at t = 0.

    velocity: actions, condition and state → velocity, and the state that the next evaluation gets.
    conditions: what `velocity` needs to know of each of `evaluation_times`: arrays `[num_steps, evaluations, ...]`.
    first: the velocity's very first evaluation, where that does more than the others; its step is not in the loop.
    """
    step = 1.0 / num_steps
    later = EVALUATIONS[solver][1:]

    def advance(carry, conditions, begin=velocity):
        x, state = carry
        at = [jax.tree.map(lambda leaf, i=i: leaf[i], conditions) for i in range(1 + len(later))]
        slope, state = begin(x, at[0], state)
        for fraction, condition in zip(later, at[1:], strict=True):
            second, state = velocity(x - fraction * step * slope, condition, state)
            slope = second if solver == "midpoint" else (slope + second) / 2
        return (x - step * slope, state), None

    carry = noise, state
    if first is not None:
        carry, _ = advance(carry, jax.tree.map(lambda leaf: leaf[0], conditions), first)
        conditions = jax.tree.map(lambda leaf: leaf[1:], conditions)
    (x, _), _ = lax.scan(advance, carry, conditions, length=num_steps - (first is not None))
    return x


def time_embedding(t: Float[Array, " B"], width: int) -> Float[Array, "B width"]:
    """`[sin, cos]` of `2π t / period`, periods log-spaced from 4e-3 to 4."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    angle = t.astype(jnp.float32)[:, None] * (2 * jnp.pi / period)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def guided[State](
    velocity: Callable[[Actions], tuple[Actions, State]],
    x_t: Actions,
    t: Float[Array, ""],
    target: Actions,
    weight: Float[Array, "B H"],
    max_guidance: float | Float[Array, ""],
) -> tuple[Actions, State]:
    """The velocity at `x_t`, t in [0, 1], pulled so that sampling ends near `target` as `weight`, in [0, 1], says.

    Real-time chunking (Black, Galliker & Levine 2025, https://arxiv.org/abs/2506.07339), where time is τ = 1 - t and
    velocity u = -v. The actions that `x_t` points at are Â = x + (1-τ) u = x - t v. To u, ΠGDM adds
    min(β, (1-τ) / (τ r²)) (∂Â/∂x)ᵀ W (target - Â) with r² = (1-τ)² / (τ² + (1-τ)²). So v loses it, and the factor is
    (t² + (1-t)²) / (t (1-t)): infinite at both ends, 2 in the middle, clipped at β = `max_guidance`.

    velocity: actions → velocity and anything else, which is passed on. One forward and one backward pass through it.
    """

    def predicted(x):
        v, state = velocity(x)
        return x - t * v, (v, state)

    actions, pull, (v, state) = jax.vjp(predicted, x_t, has_aux=True)
    (correction,) = pull(weight[..., None] * (target - actions))
    tiny = jnp.finfo(jnp.float32).tiny
    factor = jnp.minimum(max_guidance, (t**2 + (1 - t) ** 2) / jnp.maximum(t * (1 - t), tiny))
    return v - factor * correction, state
