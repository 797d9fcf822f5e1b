"""Accelerators that are not there, to compile for: `h100:8`, `v5e:2x4`.

The TPU compiler is libtpu's, the GPU's is JAX's CUDA plugin; both run on any Linux machine. JAX may not look for a
device of its own while they do: `JAX_PLATFORMS=cpu`.
"""

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from pi0fast import mesh as meshes
from pi0fast.flops import DeviceSpec
from pi0fast.hlo import Collective

# XLA's descriptions of GPUs, in the shape of its gpu_target_config.proto. An H100 SXM's is what XLA reads there. Of the
# other two, processors, memory, its bandwidth and the boost clock are from the data sheets
# (https://www.nvidia.com/en-us/data-center/l40s, https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090),
# caches from the Ada architecture's whitepaper, limits of compute capability 8.9 from the CUDA programming guide.
GPUS = {name: Path(__file__).parent / "assets" / f"{name}.txtpb" for name in ("h100", "l40s", "rtx4090")}
GPUS_PER_NODE = 8
NETWORK = 50e9  # bytes/s of each GPU's port in a DGX H100, 400 Gbit/s (NVIDIA's data sheet)
# Compiling takes no TPU, so processes need not take turns, and nobody need be asked which TPU this machine has.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
TPUS = ("v5e", "v5p", "v6e")


def devices(target: str) -> list[Any]:
    """The devices of a target, as `jax.devices` gives them.

    target: `h100:N`, in nodes of eight; a TPU and its topology, e.g. `v5p:2x2x2`; `cpu:N`, virtual, one by default.

    Raises:
        ValueError: a target that is none of these, or a topology that does not exist.
        ModuleNotFoundError: the compiler for it is not installed.
    """
    kind, _, shape = target.partition(":")
    if kind == "cpu" and re.fullmatch(r"|[1-9]\d*", shape):
        meshes.make_cpu_devices(int(shape or 1))
        found = jax.devices("cpu")[: int(shape or 1)]
        if len(found) < int(shape or 1):
            raise ValueError(f"--target={target}: this process has {len(found)} CPU devices; ask before JAX starts")
        return found
    if kind in GPUS and re.fullmatch(r"[1-9]\d*", shape):
        return _gpu(kind, int(shape))
    if kind in TPUS and re.fullmatch(r"\d+(x\d+)+", shape):
        return _tpu(target)
    raise ValueError(
        f"--target={target!r} is not known; give {', '.join(GPUS)} with a count (h100:8), {', '.join(TPUS)} with a "
        "topology (v5e:2x4), or cpu"
    )


def link_seconds(target: str, spec: DeviceSpec, mesh: Mesh | AbstractMesh) -> Callable[[Collective], float]:
    """What a collective takes at the peak of the links that it has to cross: derived, latency left out.

    A TPU is taken to have as many links as the corners of the box that its group fills: two along an axis that wraps
    around, one along any other. GPUs talk over NVLink in their node and over one network port each between nodes.
    """
    kind, _, shape = target.partition(":")
    if kind in TPUS:
        assert isinstance(mesh, Mesh), "the group's places in the slice are needed"
        slice_shape = [int(size) for size in shape.split("x")]
        ports, placed = 2 * len(slice_shape), mesh.devices

        def over_links(collective: Collective) -> float:
            over = (
                collective.axes if set(collective.axes) <= set(meshes.AXES) else ()
            )  # the compiler names its own, too
            axes = tuple(slice(None) if not over or axis in over else 0 for axis in meshes.AXES)
            group = np.array([device.coords[: len(slice_shape)] for device in np.ravel(placed[axes])])
            sizes = [len(set(places)) for places in group.T]
            rings = [size == whole and _wraps(kind, size) for size, whole in zip(sizes, slice_shape, strict=True)]
            links = sum(0 if size == 1 else 1 + ring for size, ring in zip(sizes, rings, strict=True))
            return collective.sent_bytes / (spec.link * links / ports)

        return over_links

    def seconds(collective: Collective) -> float:
        stride = mesh.shape["fsdp"] if collective.axes == ("data",) else 1
        per_node = max(1, min(collective.group, GPUS_PER_NODE // stride))
        nodes = collective.group / per_node
        in_node = collective.sent_bytes / spec.link
        if nodes <= 1:
            return in_node
        between = collective.sent_bytes * (nodes - 1) / nodes * collective.group / (collective.group - 1) / per_node
        return max(in_node, between / NETWORK)

    return seconds


def _wraps(kind: str, size: int) -> bool:
    """Whether an axis of a slice is a ring: on v5e and v6e a whole pod's, on v5p those of whole cubes."""
    return size == 16 if kind in ("v5e", "v6e") else size % 4 == 0


def _gpu(kind: str, count: int) -> list[Any]:
    _need("jax_cuda13_plugin", "jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc")
    nodes, rest = divmod(count, GPUS_PER_NODE)
    if nodes and rest:
        raise ValueError(f"--target={kind}:{count} is not in nodes of {GPUS_PER_NODE}; use a multiple of it")
    shape = f"1x{nodes}x{GPUS_PER_NODE}" if nodes else f"1x1x{count}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=GPUS[kind].read_text(), topology=shape)
    return list(topology.devices)


def _tpu(target: str) -> list[Any]:
    _need("libtpu", "libtpu")
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    sizes = [int(size) for size in target.partition(":")[2].split("x")]
    single = {"chips_per_host_bounds": [1, 1, 1]} if set(sizes) == {1} else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target, **single).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--target={target!r}: there is no such slice: {error}") from error


def _need(module: str, packages: str) -> None:
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"compiling for this target needs {packages}; `uv sync --group aot` has them")
