"""Compiles pi0_base's training step for one H100 that is not there, and prints what the program holds, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100 auto|reference|triton

A process of its own: the tests' has Triton's interpreter, and JAX may not look for a GPU.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pi0fast import config, fsdp, train
from pi0fast import mesh as meshes
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.settings import DEFAULTS
from tests.aot import h100

BATCH = 32


def main(kernels: str) -> None:
    mesh = h100.mesh()
    model_config = config.pi0_base()
    settings = dataclasses.replace(DEFAULTS["pi0_base"], batch_size=BATCH, kernels=kernels)
    with jax.set_mesh(mesh):
        check_kernels(model_config, fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels))

    def initial():
        model = Pi0(model_config, rngs=nnx.Rngs(0))
        _, weights = nnx.split(model)
        state = train.TrainState(jnp.zeros((), jnp.int32), weights, None, settings.optim.optimizer().init(weights))
        return fsdp.place(state, mesh)

    state = jax.eval_shape(initial)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Pi0(model_config, rngs=nnx.Rngs(0))))
    frozen = nnx.State({})
    step: Any = train.make_step(graphdef, model_config, settings, mesh, state, frozen)
    state = jax.tree.map(lambda sharding, tree: h100.place(tree, sharding), fsdp.shardings(state, mesh), state)
    batch = h100.place(abstract_batch(model_config), meshes.batch_sharding(mesh))
    compiled = step.lower(state, frozen, batch).compile()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    print(
        json.dumps(
            {
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "kernels": h100.triton_kernels(text),
                "shapes": sorted(shapes),
            }
        )
    )


def abstract_batch(model_config: config.Pi0Config) -> dict:
    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((BATCH, *shape), dtype)

    size, prompt = model_config.image_size, model_config.max_token_len
    return {
        "images": {camera: array(size, size, 3, dtype=jnp.uint8) for camera in model_config.cameras},
        "image_masks": {camera: array(dtype=jnp.bool_) for camera in model_config.cameras},
        "state": array(model_config.action_dim),
        "tokenized_prompt": array(prompt, dtype=jnp.int32),
        "tokenized_prompt_mask": array(prompt, dtype=jnp.bool_),
        "actions": array(model_config.action_horizon, model_config.action_dim),
        "action_is_pad": array(model_config.action_horizon, dtype=jnp.bool_),
        "example": array(dtype=jnp.uint32),
    }


if __name__ == "__main__":
    main(sys.argv[1])
