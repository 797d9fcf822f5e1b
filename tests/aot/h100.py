"""One H100 that is not there, to compile for."""

import re
from collections import Counter

import jax
from jax.sharding import Mesh, Sharding

from pi0fast import mesh as meshes
from pi0fast import targets


def mesh() -> Mesh:
    return meshes.make("fsdp:1", targets.devices("h100:1"))


def place(tree, sharding: Sharding):
    """The abstract arrays of a tree, on the device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def triton_kernels(text: str) -> Counter[str]:
    """How often each of our kernels stands in a compiled program."""
    calls = [line for line in text.splitlines() if 'custom_call_target="triton_kernel_call"' in line]
    named = Counter(re.findall(r'op_name="[^"]*/(\w+)/triton_kernel_call', "\n".join(calls)))
    assert named.total() == len(calls), "a kernel without its name"
    return named
