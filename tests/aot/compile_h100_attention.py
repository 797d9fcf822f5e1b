"""Compiles the Hopper attention for H100s that are not there, and prints what came of each kernel, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100_attention CASE...       one pass of each
    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100_attention sharded       gradients inside shard_map and checkpoint

CASE: a name in cases.py, with `:C` for another head dimension, or `:C:backward` for that pass, C empty for the case's
own. A process of its own: JAX may not look for a GPU, and what Mosaic is to write down it is told by the environment.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from pi0fast import targets
from pi0fast_kernels import ATTENTION_RESIDUALS, prefix_lm_attention
from pi0fast_kernels._dispatch import Device
from pi0fast_kernels.prefix_lm_attention import cases, mosaic_gpu

DEVICE = Device("cuda", "NVIDIA H100 80GB HBM3", 90, 132)


def compile_case(case: cases.Case, backward: bool) -> None:
    device = AbstractDevice(device_kind=DEVICE.kind, num_cores=DEVICE.num_cores, platform="cuda")
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(targets.devices("h100:1")[0]))
    q = array((case.batch, case.queries, case.heads, case.head_dim), jnp.bfloat16)
    k = array((case.batch, case.keys, case.kv_heads, case.head_dim), jnp.bfloat16)
    bound, lse = array(q.shape[:2], jnp.int32), array(q.shape[:3], jnp.float32)
    run = partial(mosaic_gpu.backward if backward else mosaic_gpu.forward, scale=case.scale, device=DEVICE)
    arrays = (q, k, k, bound, bound, *((q, lse, q) if backward else ()))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(run).trace(*arrays).lower()
    lowered.compile()


def figures(kernel: Path) -> dict[str, object]:
    """Of a kernel, by its report. tiles, rows: where in shared memory wgmma reads and copies write."""
    report, ptx, layout, resources = (
        kernel.with_suffix(f".{end}").read_text()
        for end in ("ptxas", "ptx", "after_layout_inference.txt", "resources.txt")
    )
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills is not None
    offset = r"slice_smem.*?offset = (\d+) .*?out_transforms = \[\[(.*?)\]\]"
    views = [(int(at), transforms) for at, transforms in re.findall(offset, layout) if "swizzle" in transforms]
    return {
        "stack, spilled": [int(x) for x in spills.groups()],
        "serialized": re.findall(r"C75\d\d", report),
        "shared": int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "copies": ptx.count("cp.async.bulk.tensor"),
        "tiles": sorted({at for at, transforms in views if "tile" in transforms}),
        "rows": sorted({at for at, transforms in views if "tile" not in transforms}),
    }


def sharded() -> dict[str, int]:
    """How often each kernel stands in a program for eight, whose remat policy saves the forward kernel's results."""
    mesh = Mesh(np.array(targets.devices("h100:8")), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")

    def loss(*inputs):
        out = prefix_lm_attention(*inputs, scale=1.0, implementation="mosaic_gpu")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))[None]

    remat = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS))
    losses = jax.shard_map(remat, mesh=mesh, in_specs=(data,) * 5, out_specs=data)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, data))
    q, k = array((16, 20, 8, 64), jnp.bfloat16), array((16, 100, 1, 64), jnp.bfloat16)
    bound = array((16, 20), jnp.int32)
    gradients = jax.grad(lambda *inputs: jnp.sum(losses(*inputs)), (0, 1, 2))
    program = jax.jit(gradients).lower(q, k, k, bound, bound).compile().as_text()
    calls = [line for line in str(program).splitlines() if 'custom_call_target="mosaic_gpu' in line]
    return Counter(re.findall(r"/(prefix_lm_attention_\w+?)(?:_\d+)?/", "\n".join(calls)))


def main(names: list[str]) -> None:
    if names == ["sharded"]:
        print(json.dumps(sharded()))
        return
    named = {case.name: case for case in cases.CASES}
    found = {}
    for name in names:
        case, head_dim, backward = (*name.split(":"), "", "")[:3]
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MOSAIC_GPU_DUMP_TO"] = folder
            case = dataclasses.replace(named[case], head_dim=int(head_dim or named[case].head_dim))
            compile_case(case, backward == "backward")
            found[name] = {kernel.stem: figures(kernel) for kernel in sorted(Path(folder).glob("*.ptxas"))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
