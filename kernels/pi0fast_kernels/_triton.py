"""Launch Triton kernels from JAX: on NVIDIA GPUs through jax-triton, elsewhere in Triton's interpreter.

Set TRITON_INTERPRET=1 before the first import to run the kernels on a CPU, slowly, for tests and debugging.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pi0fast_kernels import _dispatch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps its state in globals

# Shared memory that one program may use, bytes (CUDA C++ programming guide, table of technical specifications).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Launch:
    """How many warps run one program, and how deep its loops are pipelined."""

    num_warps: int = 4
    num_stages: int = 1


def cdiv(n: int, m: int) -> int:
    """n / m, rounded up."""
    return -(-n // m)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def reason(device: _dispatch.Device, dtype: Any) -> str | None:
    """Why no Triton kernel can run on this device with this dtype, or None."""
    if INTERPRET:
        return None if np.dtype(dtype).itemsize != 2 or dtype == np.float16 else "the interpreter's bfloat16 is wrong"
    if device.platform != "cuda":
        return f"it needs an NVIDIA GPU and the program is for {device.kind or device.platform}"
    if device.capability not in SHARED_MEMORY:
        return f"{device.kind} (compute capability {device.capability}) is not one of {sorted(SHARED_MEMORY)}"
    if np.dtype(dtype).itemsize != 2:
        return f"it takes bfloat16 and float16, not {np.dtype(dtype).name}; cast, or take the reference"
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} missing; install pi0fast[cuda]" if missing else None


def launch(
    kernel: Any,
    arrays: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: int,
    how: Launch,
    capability: int | None,
    **constants: Any,
) -> list[jax.Array]:
    """`kernel(*arrays, *results, **constants)` in `grid` programs → results. Profiles show it as OP_KERNEL."""
    name = kernel.fn.__module__.split(".")[-2] + kernel.fn.__name__
    with jax.named_scope(name):
        if INTERPRET:
            run = functools.partial(_interpret, kernel, results, grid, constants)
            made = jax.pure_callback(run, list(results), *arrays)
        else:
            import jax_triton

            made = jax_triton.triton_call(
                *arrays,
                kernel=kernel,
                out_shape=list(results),
                grid=grid,
                name=name,
                num_warps=how.num_warps,
                num_stages=how.num_stages,
                compute_capability=capability,
                **constants,
            )
    return _dispatch.vary_as(made, arrays)


def _interpret(kernel, results, grid, constants, *arrays) -> list[np.ndarray]:
    made = [np.empty(result.shape, result.dtype) for result in results]
    pointers = [_Pointer(np.array(array)) for array in arrays] + [_Pointer(array) for array in made]
    with _ONE_AT_A_TIME:
        kernel[(grid,)](*pointers, **constants)
    return made


class _Pointer:
    """What Triton's interpreter asks of a tensor, for a contiguous array that already lies on the host."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def itself(self, *_: Any, **__: Any) -> "_Pointer":
        return self

    # The interpreter copies tensors to the host and their storage back: nothing to do.
    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = itself
