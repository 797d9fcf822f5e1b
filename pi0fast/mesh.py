"""`"data:2,fsdp:4"` → a device mesh, and the batch's place on it."""

import contextlib
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def parse(spec: str) -> dict[str, int]:
    """Axis sizes by name, missing axes 1, in the order of `AXES`. -1 stands for the devices that are left.

    Raises:
        ValueError: an unknown or repeated axis, or a size that is neither positive nor -1.
    """
    sizes = {}
    for part in spec.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in sizes:
            raise ValueError(
                f"--mesh={spec!r}: {name!r} must be one of {', '.join(AXES)}, each once, as in 'data:2,fsdp:4'"
            )
        if not size.removeprefix("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(
                f"--mesh={spec!r}: the size of {name!r} must be a positive integer, or -1 for what is left"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh={spec!r}: only one axis can be -1")
    return {name: sizes.get(name, 1) for name in AXES}


def make(spec: str) -> Mesh:
    """A mesh over all devices. On a machine with CPUs only, as many virtual devices are made as the mesh needs.

    Raises:
        ValueError: a malformed spec, or one that does not cover the devices.
    """
    sizes = parse(spec)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values():
        _make_cpu_devices(fixed)
    devices = jax.devices()
    if -1 in sizes.values():
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    shape = tuple(sizes.values())
    if math.prod(shape) > len(devices) or len(devices) % math.prod(shape):
        raise ValueError(
            f"--mesh={spec!r} needs {fixed} devices and there are {len(devices)}; use fsdp:-1 to take them all"
        )
    devices = devices[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _make_cpu_devices(count: int) -> None:
    """Has no effect on accelerators, nor where more are asked for already, nor once a backend runs."""
    if count > jax.config.jax_num_cpu_devices:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis lies over both mesh axes."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises: ValueError if the global batch does not divide over the mesh."""
    if batch_size % mesh.size:
        larger = math.ceil(batch_size / mesh.size) * mesh.size
        raise ValueError(f"--batch-size={batch_size} does not divide over {mesh.size} devices; use {larger}, say")
