"""`"data:2,fsdp:4"` → a device mesh, and the batch's place on it."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
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


def make(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over these devices, or over all that there are.

    On a machine with CPUs only, as many virtual devices are made as the mesh needs.

    Raises:
        ValueError: a malformed spec, or one that does not divide the devices.
    """
    sizes = parse(spec)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices is None:
        if -1 not in sizes.values():
            make_cpu_devices(fixed)
        devices = jax.devices()
    count = len(devices)
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    size = math.prod(shape)
    if size == 0 or count % size or (-1 in sizes.values() and size != count):
        divisor = next((d for d in range(2, count + 1) if count % d == 0), 1)
        raise ValueError(
            f"--mesh={spec!r} does not divide the {count} devices there are ({devices[0].device_kind}); use "
            f"fsdp:{count} or data:{divisor},fsdp:{count // divisor}, say"
        )
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and size < count:
        raise ValueError(
            f"--mesh={spec!r} leaves out some of the {count} devices of {hosts} processes; use fsdp:{count}"
        )
    return _arrange(shape, devices[:size])


def _arrange(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """`fsdp`, which carries the most, runs inside a node as far as it can; `data` runs over nodes.

    A node: devices that a fast network connects, a slice of TPUs or a machine's GPUs; where JAX does not say, as on
    CPUs, those of a process, for JAX numbers devices process by process.
    """
    nodes = len({getattr(device, "slice_index", 0) for device in devices})
    axis_types = (AxisType.Auto,) * len(AXES)
    if nodes == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types)
    data, fsdp = shape
    over_data = math.gcd(data, nodes)
    over_fsdp = nodes // over_data
    if fsdp % over_fsdp:
        raise ValueError(f"a mesh of data:{data},fsdp:{fsdp} does not divide over {nodes} nodes; use data:{nodes}")
    inside = (data // over_data, fsdp // over_fsdp)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, (over_data, over_fsdp), devices), AXES, axis_types)


def make_cpu_devices(count: int) -> None:
    """Has no effect on accelerators, nor where more are asked for already, nor once a backend runs."""
    if count > jax.config.jax_num_cpu_devices:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis lies over both mesh axes."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch(batch_size: int, mesh: Mesh, accum: int = 1) -> None:
    """Raises: ValueError if the global batch does not divide over the mesh and into `accum` microbatches."""
    if accum < 1:
        raise ValueError(f"--accum={accum}: a step has at least one microbatch; use 1 to do without accumulation")
    unit = mesh.size * accum
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit
        nearest = f"{lower} or {lower + unit}" if lower > 0 else f"{unit}"
        over = f"{mesh.size} devices" if accum == 1 else f"{mesh.size} devices and --accum={accum} microbatches"
        raise ValueError(f"--batch-size={batch_size} does not divide over {over}; use {nearest}, say")
