"""Validation on episodes that training never sees: the flow-matching loss, and how far sampled actions are off.

Which episodes are held out is a function of each one's number alone, so it is the same for any order, batch, mesh and
number of processes, and a data set that grows keeps its old episodes where they were. Samples, noise and times are the
same at every evaluation: what changes from one to the next is the model.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pi0fast import compiler, flow, fsdp
from pi0fast import mesh as meshes
from pi0fast.data.loader import Loader
from pi0fast.observation import Observation
from pi0fast.settings import Settings

NUM_STEPS = 10  # of Euler, from noise to actions

Sums = dict[str, Array]
Step = Callable[[nnx.State, nnx.State, dict[str, Any]], Sums]


def held_out(num_episodes: int, fraction: float) -> set[int]:
    """The episodes whose hash, as a number in [0, 1), is less than `fraction`.

    Raises:
        ValueError: none is, or none is left to train on.
    """
    hashes = [hashlib.sha256(str(episode).encode()).digest() for episode in range(num_episodes)]
    held = {episode for episode, digest in enumerate(hashes) if int.from_bytes(digest[:8]) < fraction * 2**64}
    if not held or len(held) == num_episodes:
        verdict = "leaves none to train on; give less" if held else "holds out none; give more, or 0"
        raise ValueError(f"--val.fraction={fraction} of {num_episodes} episodes {verdict}")
    return held


def make_step(
    graphdef: nnx.GraphDef,
    settings: Settings,
    mesh: Mesh,
    weights: nnx.State,
    frozen: nnx.State,
    action_dim: int,
    action_weights: tuple[float, ...] | None = None,
) -> Step:
    """`sums = step(weights, frozen, batch)`: of losses and of absolute action errors over a batch, and what to divide
    each by.

    Loss and samples share one pass over the prefix. An example's noise and time depend on its number alone.

    batch: as in training, "example" the number in the data set, and "counts" bool [B], which examples count.
    action_dim: so many of the model's action dimensions, the first, are the robot's.
    action_weights: of all of them in the loss, as in training.
    """
    execution = fsdp.execution(mesh, remat="none", kernels=settings.kernels)
    loss_key, sample_key = jax.random.split(jax.random.key(settings.val.seed))
    of_dims = None if action_weights is None else jnp.array(action_weights, jnp.float32)

    def sums(weights, frozen, batch):
        observation, actions, example = Observation.of(batch), batch["actions"], batch["example"]
        model = nnx.merge(graphdef, weights, frozen)
        cache, layout = model.prefix(observation, execution)

        def velocity(x_t, t, state):
            return model.suffix(observation.state, x_t, t, cache, layout, execution), state

        noise, t = flow.draw(loss_key, example, actions.shape[1:])
        predicted, _ = velocity(flow.interpolate(actions, noise, t), t, None)
        losses = flow.loss(predicted, actions, noise, of_dims)
        noise, _ = flow.draw(sample_key, example, actions.shape[1:])
        times = jnp.asarray(flow.evaluation_times(NUM_STEPS, "euler"), jnp.float32)
        times = jnp.broadcast_to(times[..., None], (*times.shape, len(example)))
        sampled = flow.integrate(velocity, noise, times, None, num_steps=NUM_STEPS)
        errors = jnp.mean(jnp.abs(sampled - actions)[..., :action_dim], axis=-1)

        counts, is_pad = batch["counts"][:, None], batch["action_is_pad"]
        in_loss, real = counts & flow.counted_steps(is_pad, settings.loss.mask_padding), counts & ~is_pad
        found = {
            "loss": jnp.sum(losses * in_loss),
            "loss_steps": jnp.sum(in_loss, dtype=jnp.float32),
            "action_error": jnp.sum(errors * real),
            "action_error_steps": jnp.sum(real, dtype=jnp.float32),
        }
        return lax.psum(found, meshes.AXES)

    sharded, replicated = PartitionSpec(meshes.AXES), PartitionSpec()
    specs = fsdp.specs(weights), fsdp.specs(frozen), sharded
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=replicated)

    def step(weights, frozen, batch):
        return mapped(jax.device_put(weights, jax.memory.Space.Device), frozen, batch)  # they may lie on the host

    return jax.jit(step, compiler_options=compiler.options(mesh, settings.xla))


class Validation:
    """Evaluates weights on the first samples of a loader of held-out episodes, each sample once."""

    def __init__(self, loader: Loader, batches: int, step: Step, place: Callable[[dict[str, Any]], Any]):
        """batches: so many at most. place: this process's part of a batch → global arrays on the mesh."""
        self._loader, self._batches, self._step, self._place = loader, batches, step, place
        self._first = loader.state()

    def __call__(self, weights: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """The mean "loss", and "action_error", the mean absolute error of sampled chunks.

        The latter is over the robot's own dimensions and the steps before the end of the episode. It is normalised, as
        the model's actions are, so that dimensions of several units count alike.
        """
        totals: dict[str, float] = {}
        samples = self._loader.num_samples
        for _ in range(min(self._batches, -(-samples // self._loader.batch_size))):
            batch = next(self._loader)
            once = {"example": batch.pop("index"), "counts": batch["example"] < samples}
            for name, value in self._step(weights, frozen, self._place({**batch, **once})).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        self._loader.restore(self._first)
        return {name: totals[name] / totals[f"{name}_steps"] for name in ("loss", "action_error")}
