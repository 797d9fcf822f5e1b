"""One H100 that is not there, to compile for."""

import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, Sharding

from pi0fast import mesh as meshes

# XLA's description of the device: the shape of gpu_target_config.proto, with an H100 SXM's figures.
DESCRIPTION = Path(__file__).with_name("h100_sxm.txtpb")


def mesh() -> Mesh:
    topology = topologies.get_topology_desc(platform="cuda", target_config=DESCRIPTION.read_text(), topology="1x1x1")
    return Mesh(np.array(topology.devices).reshape(1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 2)


def place(tree, sharding: Sharding):
    """The abstract arrays of a tree, on the device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def triton_kernels(text: str) -> Counter[str]:
    """How often each of our kernels stands in a compiled program."""
    calls = [line for line in text.splitlines() if 'custom_call_target="triton_kernel_call"' in line]
    named = Counter(re.findall(r'op_name="[^"]*/(\w+)/triton_kernel_call', "\n".join(calls)))
    assert named.total() == len(calls), "a kernel without its name"
    return named
