"""Analytic floating-point operations of the model, and the peak of the device: MFU.

Counts multiply-adds of matrix products as two operations, and nothing else. Attention is counted over whole rows, as
the reference computes it; nothing is counted twice for rematerialisation.
"""

from dataclasses import dataclass

from pi0fast.config import Pi0Config, TransformerConfig

# Dense bf16 peak in FLOP/s from the vendors' data sheets, by a part of `jax.Device.device_kind`.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
}


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one example's forward pass, by stage."""

    siglip: float
    prefix: float
    suffix: float

    @property
    def total(self) -> float:
        return self.siglip + self.prefix + self.suffix


def forward(config: Pi0Config, num_cameras: int, prompt_len: int) -> ForwardFlops:
    """FLOPs per example. prompt_len: prompt tokens computed, padding included."""
    image_tokens = num_cameras * config.tokens_per_image
    prefix_len, suffix_len = image_tokens + prompt_len, config.suffix_len
    return ForwardFlops(
        siglip=_siglip(config, image_tokens),
        prefix=_prefix(config.vlm, prefix_len),
        suffix=_suffix(config, suffix_len, prefix_len),
    )


def train_step(config: Pi0Config, num_cameras: int, prompt_len: int, batch_size: int) -> float:
    """FLOPs of one training step with every weight trained: the backward pass costs two forward passes."""
    return 3 * batch_size * forward(config, num_cameras, prompt_len).total


def peak(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, or None if it is not in `PEAK_FLOPS`."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_kind), None)


def _siglip(config: Pi0Config, tokens: int) -> float:
    siglip, per_image = config.siglip, config.tokens_per_image
    per_layer = 4 * siglip.width**2 + 2 * siglip.width * siglip.mlp_dim + 2 * per_image * siglip.width
    patch = siglip.patch_size**2 * 3 * siglip.width
    return 2.0 * tokens * (siglip.depth * per_layer + patch + siglip.width * config.vlm.width)


def _projections(config: TransformerConfig) -> int:
    return config.width * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)


def _attention(config: TransformerConfig, keys: int) -> int:
    return 2 * keys * config.num_heads * config.head_dim


def _prefix(config: TransformerConfig, tokens: int) -> float:
    whole = _projections(config) + _attention(config, tokens) + 3 * config.width * config.mlp_dim
    last = 2 * config.width * config.num_kv_heads * config.head_dim
    return 2.0 * tokens * ((config.depth - 1) * whole + last)


def _suffix(config: Pi0Config, tokens: int, prefix_len: int) -> float:
    expert = config.action_expert
    whole = _projections(expert) + _attention(expert, prefix_len + tokens) + 3 * expert.width * expert.mlp_dim
    heads = 2 * config.action_dim * expert.width
    if config.pi05:
        modulation = 3 * expert.width**2
        once = (2 * expert.depth + 1) * modulation + 2 * expert.width**2
        return 2.0 * (tokens * (expert.depth * whole + heads) + once)
    return 2.0 * tokens * (expert.depth * whole + heads + 3 * expert.width**2)
