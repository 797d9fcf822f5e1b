"""openpi's way of training over several devices, to compile beside `pi0fast.train`'s: one `jax.jit` over whole arrays.

Written for this project from openpi's published behaviour (https://github.com/Physical-Intelligence/openpi,
`training/sharding.py`, `training/optimizer.py`, `scripts/train.py`). Every array of the train state that has two axes
or more and at least 4 MiB is sharded along its largest axis that divides over `fsdp`, and everything else is
replicated; the batch lies over both mesh axes; the compiler finds the collectives. Parameters, AdamW's moments and the
average are float32, the model is `bench.openpi_style`.

The same work as a step of pi0fast's, for the same numbers: its augmentation, noise, time, loss, optimizer and average.
openpi's norm of the parameters, which it reports too, is left out. All parameters are trained.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from bench import openpi_style
from pi0fast import augment, convert, flow, optim
from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.observation import Observation
from pi0fast.settings import Settings

MIN_BYTES = 4 * 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """params: openpi's, by path. ema: their average, or None."""

    step: Array
    params: Mapping[str, Array]
    ema: Mapping[str, Array] | None
    opt_state: Any

    @staticmethod
    def initial(params: Mapping[str, Array], settings: Settings) -> "State":
        ema = params if settings.optim.ema_decay is not None else None
        return State(jnp.zeros((), jnp.int32), params, ema, settings.optim.optimizer().init(params))


def partition(array: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
    """How openpi lays out one array. Of axes of one size it takes the last."""
    shards = mesh.shape["fsdp"]
    bytes_ = math.prod(array.shape) * array.dtype.itemsize
    if shards == 1 or len(array.shape) < 2 or bytes_ < MIN_BYTES:
        return PartitionSpec()
    dividing = [axis for axis, size in enumerate(array.shape) if size % shards == 0]
    if not dividing:
        return PartitionSpec()
    largest = max(dividing, key=lambda axis: (array.shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(array.shape))))


def abstract_state(config: Pi0Config, settings: Settings, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings; nothing is made."""
    params = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in convert.openpi_shapes(config).items()}
    state = jax.eval_shape(partial(State.initial, settings=settings), params)
    return jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, partition(x, mesh))), state)


def make_step(
    config: Pi0Config, settings: Settings, mesh: Mesh
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Array]]]:
    """`state, metrics = step(state, batch)`, a batch of the trainer's; the state is donated."""
    optimizer = settings.optim.optimizer()
    noise_key, augment_key = jax.random.split(jax.random.key(settings.seed))

    def loss(params, batch):
        observation = Observation.of(batch)
        example, actions = batch["example"], batch["actions"]
        if settings.input.augment:
            observation = augment.augment(observation, jax.vmap(partial(jax.random.fold_in, augment_key))(example))
        noise, t = flow.draw(noise_key, example, actions.shape[1:])
        losses = openpi_style.loss(params, config, observation, actions, noise, t)
        if settings.loss.mask_padding:
            counted = ~batch["action_is_pad"]
            return jnp.sum(losses * counted) / jnp.sum(counted)
        return jnp.mean(losses)

    def step(state: State, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where openpi_style constrains activations
            value, gradients = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and settings.optim.ema_decay is not None:
            ema = optim.update_average(ema, params, settings.optim.ema_decay)
        return State(state.step + 1, params, ema, opt_state), {"loss": value, "grad_norm": optax.tree.norm(gradients)}

    where = jax.tree.map(lambda x: x.sharding, abstract_state(config, settings, mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step, in_shardings=(where, meshes.batch_sharding(mesh)), out_shardings=(where, replicated), donate_argnums=0
    )
