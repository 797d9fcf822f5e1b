"""Compiles pi0_base's training step for one H100 that is not there, and prints what the program holds, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100 auto|reference|triton

A process of its own: the tests' has Triton's interpreter, and JAX may not look for a GPU.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from pi0fast import config, fsdp, train
from pi0fast import mesh as meshes
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.settings import DEFAULTS

BATCH = 32
# XLA's description of the device: the shape of gpu_target_config.proto, with an H100 SXM's figures.
H100 = Path(__file__).with_name("h100_sxm.txtpb")


def main(kernels: str) -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(topology.devices).reshape(1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 2)
    model_config = config.pi0_base()
    settings = dataclasses.replace(DEFAULTS["pi0_base"], batch_size=BATCH, kernels=kernels)
    with jax.set_mesh(mesh):
        check_kernels(model_config, fsdp.execution(mesh, remat=settings.remat, kernels=settings.kernels))

    def initial():
        model = Pi0(model_config, rngs=nnx.Rngs(0))
        _, weights = nnx.split(model)
        state = train.TrainState(jnp.zeros((), jnp.int32), weights, None, settings.optim.optimizer().init(weights))
        return fsdp.place(state, mesh)

    def place(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    state = jax.eval_shape(initial)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Pi0(model_config, rngs=nnx.Rngs(0))))
    frozen = nnx.State({})
    step: Any = train.make_step(graphdef, model_config, settings, mesh, state, frozen)
    state = jax.tree.map(lambda sharding, tree: place(tree, sharding), fsdp.shardings(state, mesh), state)
    batch = place(abstract_batch(model_config), meshes.batch_sharding(mesh))
    compiled = step.lower(state, frozen, batch).compile()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    calls = [line for line in text.splitlines() if 'custom_call_target="triton_kernel_call"' in line]
    launched = Counter(re.findall(r'op_name="[^"]*/(\w+)/triton_kernel_call', "\n".join(calls)))
    assert launched.total() == len(calls), "a kernel without its name"
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    print(
        json.dumps(
            {
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "kernels": launched,
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
