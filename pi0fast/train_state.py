"""What training changes: made from a seed, or from another run's weights, saved, and restored; always in shards."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from pi0fast import checkpoint, fsdp, init_from
from pi0fast.checkpoint import Checkpoints
from pi0fast.config import Pi0Config
from pi0fast.data.loader import Loader
from pi0fast.normalize import NormStats
from pi0fast.params import flatten, replace_state
from pi0fast.pi0 import Pi0
from pi0fast.settings import Settings
from pi0fast.tuning import frozen_filter

HOST = "pinned_host"  # the kind of memory that a device reads and writes by itself


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes. Sharded over `fsdp`, in float32; frozen weights are apart, in the model's dtype."""

    step: Array
    weights: nnx.State
    average: nnx.State | None
    opt_state: Any

    @property
    def averaged(self) -> nnx.State:
        """The trained weights that inference uses: the average, when there is one."""
        return self.weights if self.average is None else self.average

    def for_inference(self, frozen: nnx.State) -> dict[str, Array]:
        """All weights that inference uses, by path."""
        return {path: variable.get_value() for path, variable in (flatten(self.averaged) | flatten(frozen)).items()}


def device_bytes(tree: Any) -> int:
    """What each device holds of arrays, abstract ones too; what lies in the host's memory is not there."""
    held = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held)


def make_state(model: Pi0, settings: Settings, mesh: Mesh) -> tuple[TrainState, nnx.State]:
    """The train state and the frozen weights at step 0, every weight's place on the mesh in its metadata."""
    _, frozen, weights = nnx.split(model, frozen_filter(model, settings), ...)
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    frozen = jax.tree.map(lambda x: x.astype(model.config.dtype), frozen)
    average = weights if settings.optim.ema_decay is not None else None
    opt_state = settings.optim.optimizer().init(weights)
    return fsdp.place((TrainState(jnp.zeros((), jnp.int32), weights, average, opt_state), frozen), mesh)


def abstract_state(
    model_config: Pi0Config, settings: Settings, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
    """graphdef, train state and frozen weights as shapes, dtypes and shardings: nothing is made.

    Raises: ValueError: the average cannot lie in the host's memory.
    """
    model = Pi0.abstract(model_config)
    graphdef, _, _ = nnx.split(model, frozen_filter(model, settings), ...)
    whole, weights = nnx.split(model)
    made = jax.eval_shape(lambda weights: make_state(nnx.merge(whole, weights), settings, mesh), weights)
    state, frozen = on_mesh(made, mesh)
    if settings.optim.ema_on_host and state.average is None:
        raise ValueError("--optim.ema-on-host with --optim.ema-decay=None: there is no average to hold; drop one")
    if settings.optim.ema_on_host:
        average = jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind(HOST)), state.average)
        if any(x.sharding.memory_kind != HOST for x in jax.tree.leaves(average)):
            kind = mesh.devices.flat[0].device_kind
            raise ValueError(
                f"--optim.ema-on-host: JAX knows no {HOST} memory beside this {kind}, nor beside any device that is "
                "not here; leave it out, or give --optim.ema-decay=None"
            )
        state = dataclasses.replace(state, average=average)
    return graphdef, state, frozen


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """A placed tree of shapes and dtypes, with shardings."""

    def put(sharding, part):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

    return jax.tree.map(put, fsdp.shardings(tree, mesh), tree)


def initialize(
    model_config: Pi0Config, settings: Settings, mesh: Mesh
) -> tuple[TrainState, nnx.State, dict[str, Array]]:
    """Train state, frozen weights, and openpi's dead parameters where `settings.init_from` has them.

    Each weight is made or read (`pi0fast.init_from`) where it lies on the mesh. Weights that were read become the
    state's own.
    """
    _, state, frozen = abstract_state(model_config, settings, mesh)
    where = jax.tree.map(lambda x: x.sharding, (state, frozen))
    if settings.init_from is None:
        make = lambda key: make_state(Pi0(model_config, rngs=nnx.Rngs(key)), settings, mesh)  # noqa: E731
        return *jax.jit(make, out_shardings=where)(jax.random.key(settings.seed)), {}
    dtypes = {path: variable.dtype for path, variable in (flatten(state.weights) | flatten(frozen)).items()}
    model, dead = init_from.load(settings.init_from, model_config, mesh, dtypes, settings.seed)
    whole, given = nnx.split(model)
    make = lambda weights: make_state(nnx.merge(whole, weights), settings, mesh)  # noqa: E731
    return *jax.jit(make, out_shardings=where, donate_argnums=0)(given), dead


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    frozen: nnx.State,
    loader: Loader,
    stats: dict[str, NormStats],
    validation: dict[str, float] | None = None,
) -> None:
    """Starts writing; the arrays are copied off the device before it returns."""
    weights = None if state.average is None else state.weights
    checkpoints.save(
        int(state.step),
        params=state.for_inference(frozen),
        train_state=(state.step, weights, state.opt_state),
        loader=loader.state(),
        norm_stats=stats,
        validation=validation,
    )


def restore(run: Path, step: int, state: TrainState, frozen: nnx.State, loader: Loader) -> tuple[TrainState, nnx.State]:
    """State, frozen weights and the loader's position as they were after `step`, placed as the (abstract) ones are."""
    weights = None if state.average is None else state.weights
    like = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
    params, (count, weights, opt_state), position = checkpoint.restore(
        run, step, like(state.for_inference(frozen)), like((state.step, weights, state.opt_state))
    )
    loader.restore(position)
    averaged = replace_state(state.weights, params)
    if weights is None:
        return TrainState(count, averaged, None, opt_state), replace_state(frozen, params)
    return TrainState(count, weights, averaged, opt_state), replace_state(frozen, params)
