"""Choose the implementation of an op: know the device, collect the reasons against each, raise or warn with them."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import lax

# Fallbacks that would hold more than this many bytes of logits say so.
LOUD_BYTES = 2 * 2**30

# The platform that each kernel is for.
PLATFORMS = {"triton": "cuda", "mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}

# What a device calls itself → its CUDA compute capability, for programs compiled where the device is not.
CAPABILITIES = {
    r"\bA100|\bA800|\bA30\b": 80,
    r"\bA10\b|\bA40\b|RTX A\d|RTX 30\d\d": 86,
    r"\bL4\b|\bL40|RTX 40\d\d|RTX \d+ Ada": 89,
    r"\bH100|\bH200|\bH800|\bH20\b|\bGH200": 90,
    r"\bB200|\bGB200": 100,
    r"RTX 50\d\d|RTX PRO \d+ Blackwell": 120,
}


@dataclass(frozen=True)
class Device:
    """What a program is traced for. capability: 90 for compute capability 9.0, None where there is none."""

    platform: str
    kind: str
    capability: int | None
    num_cores: int | None


def device() -> Device:
    """The device of the mesh in context (`jax.set_mesh`, `jax.shard_map`), else JAX's default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        platform = "cuda" if described.platform == "gpu" else described.platform
        return Device(platform, described.device_kind, _capability(described.device_kind), described.num_cores)
    found = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(found, str):
        found = jax.local_devices(backend=found)[0]
    version = str(getattr(found, "compute_capability", "")).replace(".", "")  # "9.0" on NVIDIA GPUs
    if version.isdigit():
        return Device("cuda", found.device_kind, int(version), found.core_count)
    return Device(found.platform, found.device_kind, None, None)


def _capability(kind: str) -> int | None:
    return next((capability for pattern, capability in CAPABILITIES.items() if re.search(pattern, kind)), None)


def choose(
    op: str,
    requested: str | None,
    reasons: Mapping[str, str | None],
    order: Sequence[str],
    *,
    fallback_bytes: int = 0,
) -> str:
    """The requested implementation; or, when that is None, the first in `order` that can run.

    reasons: name of every implementation → why it cannot run, or None.
    fallback_bytes: what the last resort, `reference`, would hold at once.

    Raises:
        ValueError: the name is unknown, or the implementation cannot run; the message has every reason.
    """
    if requested is not None and requested not in reasons:
        raise ValueError(f"{op} has no implementation {requested!r}; it has {', '.join(reasons)}")
    against = {}
    for name in [requested] if requested is not None else order:
        reason = reasons[name]
        if reason is None:
            if name == "reference" and requested is None and fallback_bytes > LOUD_BYTES:
                why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
                warnings.warn(
                    f"{op} falls back to its reference, whose logits take {fallback_bytes / 2**30:.1f} GiB ({why}). "
                    "Remove a reason, or pass implementation='reference' if that is meant",
                    stacklevel=3,
                )
            return name
        against[name] = reason
    raise ValueError(f"{op} cannot run: " + "; ".join(f"{name}: {reason}" for name, reason in against.items()))


def on_platform(platform: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` where the program is lowered for `platform`, `reference` anywhere else.

    The device is a guess made while tracing: on a machine with a GPU a program may still be compiled for its CPU.
    """

    def run(*arrays):
        return lax.platform_dependent(*arrays, default=reference, **{platform: kernel})

    return run


def fold_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, for which `jax.vmap` lengthens the leading batch axis that all its arrays and results have."""
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, batched, *arrays):
        whole = [
            array if has_axis else jax.numpy.broadcast_to(array, (axis_size, *array.shape))
            for array, has_axis in zip(arrays, batched, strict=True)
        ]
        results = function(*(array.reshape(-1, *array.shape[2:]) for array in whole))
        results = jax.tree.map(lambda result: result.reshape(axis_size, -1, *result.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return function


def once_differentiable(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """A pass of an op with its own derivative: where that is to be differentiated again, the error says what to do."""
    function = jax.custom_jvp(function)

    @function.defjvp
    def rule(*_):
        raise NotImplementedError(
            f"{op} has no second derivatives in its kernels; pass implementation='reference' where they are needed"
        )

    return function


def vary_alike(*arrays: jax.Array | None) -> list[Any]:
    """The arrays, all marked as varying over every mesh axis that one of them varies over (inside `shard_map`).

    A kernel's results vary over those axes; autodiff then sums gradients where an array did not.
    """
    axes = _varying(arrays)
    return [array if array is None else _vary(array, axes) for array in arrays]


def vary_as(results: Any, arrays: Sequence[jax.Array]) -> Any:
    """The results of a kernel that knows nothing of mesh axes, marked as varying like its arguments."""
    return jax.tree.map(partial(_vary, axes=_varying(arrays)), results)


def results_vary_as(results: Sequence[jax.ShapeDtypeStruct], arrays: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """The same for a kernel that is told: its results' types, varying like its arguments."""
    kind = jax.sharding.ManualAxisType(varying=_varying(arrays))
    return [jax.ShapeDtypeStruct(result.shape, result.dtype, manual_axis_type=kind) for result in results]


def _varying(arrays) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))


def _vary(array, axes: frozenset[str]):
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array
