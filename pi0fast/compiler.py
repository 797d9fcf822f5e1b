"""XLA's options for the training step, by device: one table, applied by default.

The collectives of FSDP have to run beside the compute. What each entry is for, as the compiled step of `pi0_base`
shows it (profiles/, `pi0fast.plan`; jax 0.11.2, libtpu 0.0.48):

v5e     Gathers are asynchronous without any option: the compiler runs them inside the products that follow.
        Reduce-scatters block; what should make them asynchronous did not compile.
v5p v6e Collectives block unless the SparseCores run them.
gpu     Collectives are asynchronous, and a layer's reduce-scatter runs beside the next one's backward pass, without any
        option. With two more, gathers are started a layer ahead, and loops hold two layers, so that what was gathered
        need not be copied: 8.6 ms of 94.7 are exposed on eight H100s, 13.8 of 103.1 without, 10.0 of 107.4 with the
        first alone (estimates).

An option is overridden by `--xla=name=value`, dropped by `--xla=name=`, and all are by `--xla=none`.
"""

import os
from collections.abc import Mapping

from jax.sharding import Mesh

# Of a GPU's memory: what the trainer lets JAX take, for the rest is CUDA's and NCCL's; and what JAX takes by itself.
GPU_MEMORY_SHARE, JAX_MEMORY_SHARE = 0.92, 0.75

SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}
SPARSE_CORE_3D = {
    **SPARSE_CORE,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
PIPELINED = {
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
    "xla_gpu_enable_while_loop_double_buffering": True,
}
# Parts of `jax.Device.device_kind`; the first that fits counts.
OPTIONS: dict[str, Mapping[str, bool | str]] = {
    "v5 lite": {},
    "v5e": {},
    "v5p": SPARSE_CORE_3D,
    "v5": SPARSE_CORE_3D,
    "v6 lite": SPARSE_CORE,
    "v6e": SPARSE_CORE,
    "NVIDIA": PIPELINED,
}


def take_gpu_memory() -> None:
    """For command lines, before a GPU is started: `GPU_MEMORY_SHARE`, unless the user said otherwise."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))


def options(mesh: Mesh, chosen: str) -> dict[str, bool | str]:
    """The table's for the devices of a mesh, changed by what was chosen: `name=value`, comma-separated.

    Raises:
        ValueError: a choice of another form.
    """
    kind = mesh.devices.flat[0].device_kind
    fitting = [options for part, options in OPTIONS.items() if part in kind and mesh.size > 1]
    found = dict(fitting[0]) if fitting else {}
    for part in filter(None, chosen.split(",")):
        name, equals, value = part.strip().partition("=")
        if part.strip() == "none":
            found.clear()
        elif not equals or not name.startswith("xla_"):
            raise ValueError(f"--xla: {part!r} is not of the form xla_option=value; give none to do without any option")
        elif value:
            found[name] = {"true": True, "false": False}.get(value.lower(), value)
        else:
            found.pop(name, None)
    return found
