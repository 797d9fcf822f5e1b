"""Call Pallas Mosaic GPU kernels from JAX: compiled for Hopper, elsewhere in Pallas's GPU interpreter.

Set PI0FAST_MOSAIC_GPU_INTERPRET=1 before the first import to run the kernels on a CPU, slowly, with races looked for.
JAX 0.11.2's interpreter lacks stores to an accumulator and wgmma with an operand in registers: where a kernel uses
those, only tests, which teach it both, can run it there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pi0fast_kernels import _dispatch

INTERPRET = os.environ.get("PI0FAST_MOSAIC_GPU_INTERPRET") == "1"

# Shared memory that one block may use, bytes (CUDA C++ programming guide, table of technical specifications).
SHARED_MEMORY = 232_448


def reason(device: _dispatch.Device, dtype: Any) -> str | None:
    """Why no Mosaic GPU kernel can run on this device with this dtype, or None."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes bfloat16, not {jnp.dtype(dtype).name}; cast, or take the reference"
    if device.platform != "cuda":
        return None if INTERPRET else f"it needs an NVIDIA GPU and the program is for {device.kind or device.platform}"
    if device.capability != 90:
        return f"{device.kind} has compute capability {device.capability}; wgmma is in 9.0 (H100, H200) alone"
    return None


def launch(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    device: _dispatch.Device,
    grid: Mapping[str, int],
    warpgroups: int,
    scratch: Sequence[Any],
    cluster: Mapping[str, int] | None = None,
) -> list[jax.Array]:
    """`kernel(*arrays, *results, *scratch)`, all of them references, over a grid → results. Profiles show it as `name`.

    grid: name of each axis → programs along it; `lax.axis_index` gives where a program is.
    warpgroups: of 128 threads each, in one program; axis `warpgroup`.
    cluster: axis → programs that share their shared memory.

    Pallas adds no barriers of its own around uses of shared memory (`unsafe_no_auto_barriers`): a warpgroup that reads
    what its threads wrote has to commit it first.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    cluster = cluster or {}
    call = plgpu.kernel(
        kernel,
        out_type=list(results),
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if device.platform != "cuda" else None,
        kernel_name=name,
    )
    with jax.named_scope(name):
        return _dispatch.vary_as(call(*arrays), arrays)


def swizzled(shape: Sequence[int], dtype: Any, device: _dispatch.Device) -> Any:
    """Shared memory as wide as its swizzle (16, 32 or 64 bfloat16): the first view is for wgmma, the last for TMA.

    wgmma takes tiles of eight rows, and what is copied as tiles has to be whole tiles. In memory as wide as its swizzle
    tiles follow each other as rows do: copied as rows, what lies past an array's end is zeros on the way in and left
    out on the way out. That both views begin at the same byte is not promised by Pallas; a test reads it from what is
    compiled. The interpreter knows neither tiles nor two views of one memory: there they are the same.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # pyright takes these for abstract
    swizzle = plgpu.SwizzleTransform(shape[-1] * jnp.dtype(dtype).itemsize)  # pyright: ignore[reportAbstractUsage]
    tiling = plgpu.TilingTransform((8, shape[-1]))  # pyright: ignore[reportAbstractUsage]
    tiles = plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, swizzle))
    if device.platform != "cuda":
        return [tiles]
    return plgpu.RefUnion(tiles, plgpu.SMEM(tuple(shape), dtype, transforms=(swizzle,)))
