"""Analytic floating-point operations and memory traffic of the model, and the peaks of devices: MFU and floors.

Counts multiply-adds of matrix products as two operations, and nothing else. Attention is counted over whole rows, as
the reference computes it; nothing is counted twice for rematerialisation.
"""

from dataclasses import dataclass

from pi0fast.config import Pi0Config, TransformerConfig

BF16 = 2  # bytes


@dataclass(frozen=True)
class DeviceSpec:
    """Peaks of one device. kind: a part of `jax.Device.device_kind`; flops: dense bf16 FLOP/s; bandwidth: bytes/s."""

    kind: str
    flops: float
    bandwidth: float


# From NVIDIA's data sheets of these products, and from Google Cloud's pages on each TPU
# (https://docs.cloud.google.com/tpu/docs/v6e). The first entry that fits counts: some kinds are parts of others.
DEVICES = (
    DeviceSpec("H200", 989e12, 4.8e12),
    DeviceSpec("H100 80GB HBM3", 989e12, 3.35e12),  # SXM
    DeviceSpec("H100 PCIe", 756e12, 2.0e12),
    DeviceSpec("A100-SXM4-80GB", 312e12, 2.039e12),
    DeviceSpec("A100 80GB PCIe", 312e12, 1.935e12),
    DeviceSpec("A100-SXM4-40GB", 312e12, 1.555e12),
    DeviceSpec("L40S", 362e12, 864e9),
    DeviceSpec("RTX 4090", 165e12, 1008e9),
    DeviceSpec("v5 lite", 197e12, 800e9),
    DeviceSpec("v5e", 197e12, 800e9),
    DeviceSpec("v5p", 459e12, 2765e9),
    DeviceSpec("v5", 459e12, 2765e9),
    DeviceSpec("v6 lite", 918e12, 1600e9),
    DeviceSpec("v6e", 918e12, 1600e9),
)


def device(kind: str) -> DeviceSpec | None:
    """The peaks of a `jax.Device.device_kind`, or None if it is not in `DEVICES`."""
    return next((spec for spec in DEVICES if spec.kind in kind), None)


def peak(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, or None if it is not in `DEVICES`."""
    spec = device(device_kind)
    return None if spec is None else spec.flops


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    prefix_len = image_tokens + prompt_len
    return ForwardFlops(
        siglip=_siglip(config, image_tokens),
        prefix=_prefix(config.vlm, prefix_len),
        suffix=_suffix(config, config.suffix_len, prefix_len),
    )


def train_step(config: Pi0Config, num_cameras: int, prompt_len: int, batch_size: int) -> float:
    """FLOPs of one training step with every weight trained: the backward pass costs two forward passes."""
    return 3 * batch_size * forward(config, num_cameras, prompt_len).total


# ── Inference ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of memory traffic."""

    flops: float
    bytes: float

    def floor_seconds(self, device: DeviceSpec) -> float:
        """The least time that the device's peaks allow, arithmetic and traffic at once."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclass(frozen=True)
class InferenceCost:
    """One inference call by stage. state: Pi0's state token, once; step: one evaluation of the velocity.

    What depends on time only is computed once per sampler, not once per call, and is no part of it.
    """

    vision: Cost
    prefix: Cost
    state: Cost
    step: Cost
    evaluations: int

    def floor_seconds(self, device: DeviceSpec) -> float:
        """The least time that the device's peaks allow, one stage after the other."""
        once = sum(stage.floor_seconds(device) for stage in (self.vision, self.prefix, self.state))
        return once + self.evaluations * self.step.floor_seconds(device)


def inference(
    config: Pi0Config, num_cameras: int, prompt_len: int, *, batch_size: int = 1, evaluations: int = 10
) -> InferenceCost:
    """FLOPs and bytes of one call. prompt_len: prompt tokens computed, padding included.

    Bytes are the stage's weights in bfloat16, read once each time that it runs, and in every evaluation the prefix's
    keys and values and Pi0.5's modulations. Activations, the prompt's embeddings and the observation are not counted.
    """
    image_tokens, expert = num_cameras * config.tokens_per_image, config.action_expert
    prefix_len = image_tokens + prompt_len
    layer_cache = 2 * prefix_len * expert.num_kv_heads * expert.head_dim

    def cost(flops: float, weights: int, cached: int = 0) -> Cost:
        return Cost(batch_size * flops, BF16 * (weights + batch_size * cached))

    state, modulations = Cost(0.0, 0.0), _num_norms(config) * 3 * expert.width
    if not config.pi05:
        weights, modulations = config.action_dim * expert.width + _keys_values_weights(expert), 0
        attention = (expert.depth - 1) * _attention(expert, prefix_len + 1)
        state = cost(2.0 * (weights + attention), weights, (expert.depth - 1) * layer_cache)
    # Of Pi0's first layer over action and time, the time's part is computed before.
    weights = expert.depth * _layer_weights(expert) + 2 * config.action_dim * expert.width
    weights += 0 if config.pi05 else 2 * expert.width**2
    attention = expert.depth * _attention(expert, prefix_len + config.suffix_len)
    step = cost(2.0 * config.action_horizon * (weights + attention), weights, expert.depth * layer_cache)
    return InferenceCost(
        vision=cost(_siglip(config, image_tokens), _siglip_weights(config) if num_cameras else 0),
        prefix=cost(_prefix(config.vlm, prefix_len), _keys_values_weights(config.vlm)),
        state=state,
        step=Cost(step.flops, step.bytes + BF16 * modulations),
        evaluations=evaluations,
    )


# ── Parts: weights of matrix products, and FLOPs of `tokens` of one example ───────────────────────────────────────────


def _siglip_weights(config: Pi0Config) -> int:
    siglip = config.siglip
    per_layer = 4 * siglip.width**2 + 2 * siglip.width * siglip.mlp_dim
    patch = siglip.patch_size**2 * 3 * siglip.width
    return siglip.depth * per_layer + patch + siglip.width * config.vlm.width


def _siglip(config: Pi0Config, tokens: int) -> float:
    attention = config.siglip.depth * 2 * config.tokens_per_image * config.siglip.width
    return 2.0 * tokens * (_siglip_weights(config) + attention)


def _layer_weights(config: TransformerConfig) -> int:
    projections = config.width * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return projections + 3 * config.width * config.mlp_dim


def _keys_values_weights(config: TransformerConfig) -> int:
    """All that keys and values of every layer need: of the last layer, their own projections alone."""
    return (config.depth - 1) * _layer_weights(config) + 2 * config.width * config.num_kv_heads * config.head_dim


def _attention(config: TransformerConfig, keys: int) -> int:
    return 2 * keys * config.num_heads * config.head_dim


def _prefix(config: TransformerConfig, tokens: int) -> float:
    return 2.0 * tokens * (_keys_values_weights(config) + (config.depth - 1) * _attention(config, tokens))


def _num_norms(config: Pi0Config) -> int:
    """Norms of the action expert."""
    return 2 * config.action_expert.depth + 1


def _suffix(config: Pi0Config, tokens: int, prefix_len: int) -> float:
    expert = config.action_expert
    whole = _layer_weights(expert) + _attention(expert, prefix_len + tokens)
    heads = 2 * config.action_dim * expert.width
    if config.pi05:
        once = (_num_norms(config) * 3 + 2) * expert.width**2
        return 2.0 * (tokens * (expert.depth * whole + heads) + once)
    return 2.0 * tokens * (expert.depth * whole + heads + 3 * expert.width**2)
