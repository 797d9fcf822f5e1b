"""Compiles the inference call of a full-size model for one H100 that is not there, and prints what it holds, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100_policy PRESET auto|reference|triton [plain|guided] [HLO]

One observation with three cameras and the longest prompt, ten Euler steps, weights as `Policy.load` reads them. PRESET:
pi0_base or pi05_base. guided: by what is left of the last chunk (real-time chunking). HLO: a file for the compiled
program. A process of its own, as `compile_h100`.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pi0fast import Observation, Pi0, config
from pi0fast.execution import Execution
from pi0fast.params import flatten, replace
from pi0fast.pi0 import check_kernels
from pi0fast.sampling import Guidance, Sampler, matmul_weights
from tests import hlo
from tests.aot import h100

STAGES = ("siglip", "prefix", "state")


def main(preset: str, kernels: str, kind: str = "plain", written: str | None = None) -> None:
    size = config.PRESETS[preset]()
    mesh, execution = h100.mesh(), Execution(kernels=kernels)  # pyright: ignore[reportArgumentType]
    guide = () if kind == "plain" else abstract_guidance(size)
    arguments = (abstract_sampler(size), *abstract_inputs(size), *guide)
    arguments = h100.place(arguments, NamedSharding(mesh, PartitionSpec()))

    def call(sampler, observation, noise, *guide):
        guidance = Guidance(*guide, max_guidance=5.0) if guide else None
        return sampler(observation, noise, guidance, execution=execution)

    with jax.set_mesh(mesh):
        check_kernels(size, execution)
        lowered = jax.jit(call, donate_argnums=2).lower(*arguments)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    if written:
        Path(written).write_text(text)
    program = hlo.Program(text)
    (body,) = program.bodies
    step, once = (hlo.launches(program.computations[name]) for name in (body, program.entry))
    stages = Counter(next((stage for stage in STAGES if f"/{stage}/" in x.scope), "other") for x in once)
    cache_size = (size.suffix_len + prefix_len(size)) * size.vlm.num_kv_heads * size.vlm.head_dim
    figures = {
        "preset": preset,
        "kernels": kernels,
        "call": kind,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "triton_kernels": h100.triton_kernels(text),
        "step_launches": Counter(x.kind for x in step),
        "launches_before_the_loop": stages,
        "cache_sized_in_the_loop": Counter(
            "update in place" if "dynamic_update_slice" in line else line
            for line in hlo.loop_instructions(text, cache_size)
        ),
        "dots_in_the_loop": Counter(x.scope.split("/body/")[-1] for x in program.inside(body) if x.opcode == "dot"),
        "host_callbacks": text.count("callback"),
        "largest_in_the_loop": hlo.largest_results(step, 25),
        "largest_before_the_loop": hlo.largest_results(once, 40),
    }
    print(json.dumps(figures, indent=1))


def prefix_len(size: config.Pi0Config) -> int:
    return len(size.cameras) * size.tokens_per_image + size.max_token_len


def abstract_sampler(size: config.Pi0Config) -> Sampler:
    model = nnx.eval_shape(lambda: Pi0(size, rngs=nnx.Rngs(0)))
    cast = matmul_weights(model)
    weights = {
        path: jax.ShapeDtypeStruct(weight.shape, size.dtype if path in cast else weight.dtype)
        for path, weight in flatten(model).items()
    }
    return jax.eval_shape(Sampler.of, replace(model, weights))  # pyright: ignore[reportArgumentType]


def abstract_inputs(size: config.Pi0Config) -> tuple[Observation, jax.ShapeDtypeStruct]:
    """One observation, and noise."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    fields = {
        "images": {camera: array(size.image_size, size.image_size, 3, dtype=jnp.uint8) for camera in size.cameras},
        "image_masks": {camera: array(dtype=jnp.bool_) for camera in size.cameras},
        "state": array(size.action_dim),
        "tokenized_prompt": array(size.max_token_len, dtype=jnp.int32),
        "tokenized_prompt_mask": array(size.max_token_len, dtype=jnp.bool_),
    }
    return Observation(**fields), array(size.action_horizon, size.action_dim)


def abstract_guidance(size: config.Pi0Config) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The target, and each step's weight."""
    shape = (1, size.action_horizon, size.action_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
