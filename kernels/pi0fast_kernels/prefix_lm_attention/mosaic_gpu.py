"""Interval-masked attention in Pallas Mosaic GPU, for Hopper (H100, H200): how the kernels are called and tuned.

The forward kernel is in mosaic_gpu_forward.py, with why it exists; the backward pass in mosaic_gpu_backward.py.

Few rows (inference) leave most of the GPU idle: there the keys are split over blocks of threads, and XLA combines the
parts. In bytes (derived): 408 rows of head dimension 256 against 867 keys, each block of 64 keys apart, make parts of
6.4 MB, which the GPU's 50 MB of L2 cache hold; in turn 98 of 132 processors have work instead of 7.
"""

import itertools
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import SHARED_MEMORY
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_backward import backward
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_forward import attend, combine
from pi0fast_kernels.prefix_lm_attention.mosaic_gpu_schedule import Plan, Tile

__all__ = ["TuningConfig", "backward", "candidates", "forward", "forward_plan", "tuning"]

NUM_CORES = 132  # of an H100 SXM or H200 (NVIDIA's data sheets), where the device does not tell


@dataclass(frozen=True)
class TuningConfig:
    """Tiles of the forward kernel, and of the forward kernel with few rows."""

    forward: Tile
    few_rows: Tile


# Head dimension up to → tiles: those that compile without spills and have most products for each wait. Nothing here has
# been timed.
TUNING: dict[int, TuningConfig] = {
    64: TuningConfig(Tile(128, 2, 2, queries=2), Tile(64, 2, 1)),
    128: TuningConfig(Tile(128, 2, 2, queries=2), Tile(64, 2, 1)),
    256: TuningConfig(Tile(64, 2, 2), Tile(64, 2, 1)),
}


def tuning(head_dim: int) -> TuningConfig:
    """The tiles for a head dimension."""
    return TUNING[min(limit for limit in TUNING if limit >= head_dim)]


def candidates(head_dim: int) -> list[Tile]:
    """The tuning grid of the forward kernel: tiles that fit shared memory. Not all compile without spills."""
    tiles = (Tile(*sizes) for sizes in itertools.product((64, 128, 192), (2, 3, 4), (1, 2, 3), (1, 2)))
    return [tile for tile in tiles if tile.shared_memory(head_dim) <= SHARED_MEMORY]


def forward_plan(q: Float[Array, "B T N C"], k: Float[Array, "B S K C"], config: TuningConfig, num_cores: int) -> Plan:
    """How the forward pass is cut up: with few rows, the keys too."""
    plan = Plan.of(q, k, config.few_rows, num_cores=num_cores)
    splits = min(plan.key_blocks, num_cores // plan.items)
    if splits > 1:
        return Plan.of(q, k, config.few_rows, num_cores=num_cores, splits=splits)
    return Plan.of(q, k, config.forward, num_cores=num_cores)


def forward(
    q: Float[Array, "B T N C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    key_start: Int[Array, "B T"],
    key_end: Int[Array, "B T"],
    *,
    scale: float,
    device: _dispatch.Device,
    config: TuningConfig | None = None,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """The attended values, and the logsumexp of each row's logits."""
    if scale <= 0:  # the kernel takes maxima before it scales
        q, scale = (-q, -scale) if scale else (jnp.zeros_like(q), 1.0)
    plan = forward_plan(q, k, config or tuning(q.shape[3]), device.num_cores or NUM_CORES)
    out, lse = attend(q, k, v, key_start, key_end, plan, scale=scale, device=device)
    if plan.splits > 1:
        out, lse = combine(out, lse)
        out = jnp.moveaxis(out[:, :, : plan.packed, : plan.head_dim], 1, 2).astype(v.dtype)
    lse = jnp.moveaxis(lse[:, :, : plan.packed], 1, 2).reshape(q.shape[:3])
    return out.reshape(q.shape), lse
