"""Compiling a training step, or the policy's call, from shapes alone: for devices that need not be here."""

import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pi0fast import compiler, fsdp, memory, policy, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.execution import Execution
from pi0fast.memory import Memory, capacity
from pi0fast.params import flatten, replace
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.sampling import Sampler, matmul_weights
from pi0fast.settings import Settings
from pi0fast.train_state import device_bytes


@dataclass(frozen=True)
class Compiled:
    """text: the program, None where it does not fit and the compiler gave up."""

    memory: Memory
    seconds: float
    text: str | None


def compile_step(model_config: Pi0Config, settings: Settings, mesh: Mesh, cameras: int) -> Compiled:
    """The trainer's step, for the devices of the mesh."""
    meshes.check_batch(settings.batch_size, mesh, settings.accum)
    with jax.set_mesh(mesh):
        check_kernels(model_config, fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels))
    graphdef, state, frozen = train_state.abstract_state(model_config, settings, mesh)
    step: Any = train.make_step(graphdef, model_config, settings, mesh, state, frozen)
    names, prompt_len = model_config.cameras[:cameras], settings.input.prompt_len
    lowered = step.lower(
        state, frozen, training_data.abstract_batch(model_config, settings.batch_size, names, mesh, prompt_len)
    )
    held = memory.held(state, frozen, mesh.devices.flat[0])
    return compile_lowered(lowered, held, mesh.devices.flat[0].platform)


def compile_policy(model_config: Pi0Config, settings: Settings, mesh: Mesh, cameras: int) -> Compiled:
    """The policy's call: one observation, the longest prompt, ten Euler steps."""
    execution = Execution(kernels=settings.kernels)
    sampler = abstract_sampler(model_config)
    weights, structure = jax.tree.flatten(sampler)
    prompt_len = settings.input.prompt_len or model_config.max_token_len
    inputs = policy.abstract_inputs(model_config, model_config.cameras[:cameras], 1, prompt_len)
    on_device = NamedSharding(mesh, PartitionSpec())
    weights, inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), (weights, inputs)
    )
    with jax.set_mesh(mesh):
        check_kernels(model_config, execution)
        lowered = policy.make_call(structure, execution).lower(weights, *inputs)
        held = Memory(device_bytes(weights), 0, 0, 0, capacity(mesh.devices.flat[0], compiler.JAX_MEMORY_SHARE))
        return compile_lowered(lowered, held, mesh.devices.flat[0].platform)


def abstract_sampler(model_config: Pi0Config) -> Sampler:
    """The weights as `Policy.load` reads them."""
    model = Pi0.abstract(model_config)
    cast = matmul_weights(model)
    weights: Any = {
        path: jax.ShapeDtypeStruct(weight.shape, model_config.dtype if path in cast else weight.dtype)
        for path, weight in flatten(model).items()
    }
    return jax.eval_shape(Sampler.of, replace(model, weights))


def compile_lowered(lowered: Any, held: Memory, platform: str) -> Compiled:
    """held: what is known before. A step too large for its device is a result, not an error."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(held.refused(error), time.perf_counter() - start, None)
    return Compiled(held.compiled(compiled, platform), time.perf_counter() - start, compiled.as_text())
