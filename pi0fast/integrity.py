"""Is a checkpoint what was saved? One 32-bit checksum for each array, computed where the array lies.

A checksum is the sum, modulo 2^32, of a hash of each element's bits and of its place in the whole array. Integer
addition does not depend on the order, so an array has one checksum on any mesh, over any number of processes, and
nothing is gathered. For a given place the hash is one-to-one: one changed element always changes the sum; any other
damage goes unseen once in 2^32. It costs one read of the array's memory. orbax needs it: the chunks on disk are
compressed without a checksum of their own, and a flipped bit there can read back as other numbers.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import lax
from jaxtyping import Array, UInt32

GROUP_BYTES = 2**28
"""Arrays are read, checked and converted in groups of at most this many bytes, a larger array by itself."""


class CorruptCheckpointError(ValueError):
    """A checkpoint that cannot be read, or that holds other values than were saved."""


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """The checksum of each array. Every process of a run calls this, and gets the same."""
    sums = {}
    for group in groups({path: array.nbytes for path, array in arrays.items()}):
        sums |= dict(zip(group, _sums([arrays[path] for path in group]), strict=True))
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def json_checksum(value: Any) -> int:
    """Of what a JSON file holds, however it is written."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in their order, in groups of at most `GROUP_BYTES`; a larger one is a group of its own."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = GROUP_BYTES
        found[-1].append(name)
        room -= size
    return found


@jax.jit
def _sums(arrays: Sequence[Array]) -> list[UInt32[Array, ""]]:
    return [_sum(array) for array in arrays]


def _sum(x: Array) -> UInt32[Array, ""]:
    """The last steps are the finalizer of MurmurHash3 (Appleby, https://github.com/aappleby/smhasher)."""
    x = jax.device_put(x, jax.memory.Space.Device)  # from the host's memory, where the average may lie
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")  # of 8 bytes, it adds an axis of 2
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def cause(error: BaseException) -> str:
    """The first error of a chain, in one line, without tensorstore's specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split(" [tensorstore_spec=")[0].replace("\\'", "'").split())
    return f"{type(error).__name__}: {text}"


def damaged(folder: epath.Path | Path, what: str) -> CorruptCheckpointError:
    """Also says what to do: the checkpoint before it, if it is a run's."""
    step = next((place for place in (folder, *folder.parents) if place.parent.name == "checkpoints"), None)
    if step is None or not step.name.isdigit():
        return CorruptCheckpointError(f"{folder} is damaged: {what}. Copy it again from where it came")
    earlier = [int(place.name) for place in step.parent.iterdir() if place.name.isdigit()]
    earlier = sorted(number for number in earlier if number < int(step.name))
    if not earlier:
        remedy = "There is no checkpoint before it: bring the folder back from a backup, or train again"
    else:
        remedy = (
            f"The checkpoint before it is that of step {earlier[-1]}: train on from there with --resume "
            f"--resume-step={earlier[-1]}, or move this folder away to use that one; nothing is deleted"
        )
    return CorruptCheckpointError(f"{folder} is damaged: {what}. {remedy}")
