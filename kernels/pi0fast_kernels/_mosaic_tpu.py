"""Call Pallas TPU kernels from JAX: compiled by Mosaic for TPUs, elsewhere in Pallas's TPU interpreter.

Set PI0FAST_TPU_INTERPRET=1 before the first import to run the kernels on a CPU, slowly, with races looked for.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pi0fast_kernels import _dispatch

INTERPRET = os.environ.get("PI0FAST_TPU_INTERPRET") == "1"

# What a TPU calls itself (`jax.Device.device_kind`) → its generation; the first that fits counts.
GENERATIONS = {r"TPU v5 ?(lite|e)": "v5e", r"TPU v5": "v5p", r"TPU v6 ?(lite|e)": "v6e"}


def generation(device: _dispatch.Device) -> str | None:
    """`v5e`, `v5p`, `v6e`; None for any other device."""
    return next((name for pattern, name in GENERATIONS.items() if re.match(pattern, device.kind)), None)


def reason(device: _dispatch.Device, dtype: Any) -> str | None:
    """Why no TPU kernel can run on this device with this dtype, or None."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}; cast, or take the reference"
    if device.platform != "tpu":
        return None if INTERPRET else f"it needs a TPU and the program is for {device.kind or device.platform}"
    if generation(device) is None:
        return f"{device.kind} is not one of {', '.join(GENERATIONS.values())}"
    return None


def launch(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    device: _dispatch.Device,
    grid_spec: Any,
    parallel: Sequence[bool],
    cost: tuple[int, int, int],
    vmem_limit_bytes: int | None = None,
) -> list[jax.Array]:
    """`kernel` over the grid of a `pltpu.PrefetchScalarGridSpec` → results. Profiles show it as `name`.

    parallel: of each axis of the grid, whether its programs may run in any order.
    cost: floating-point operations, bytes from and to HBM, and transcendental functions of one call, for XLA's
        scheduler.
    vmem_limit_bytes: VMEM that the kernel may use; None for the compiler's default.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    flops, bytes_accessed, transcendentals = cost
    call = pl.pallas_call(
        kernel,
        out_shape=_dispatch.results_vary_as(results, arrays),
        grid_spec=grid_spec,
        name=name,
        interpret=device.platform != "tpu" and pltpu.InterpretParams(detect_races=True),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed, transcendentals=transcendentals),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=["parallel" if free else "arbitrary" for free in parallel],
            vmem_limit_bytes=vmem_limit_bytes,
        ),
    )
    with jax.named_scope(name):
        return call(*arrays)
