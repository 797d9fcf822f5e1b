"""Analytic floating-point operations and memory traffic of the model, and the peaks of devices: MFU and floors.

Counts multiply-adds of matrix products as two operations, and nothing else. Attention is counted over whole rows, as
the reference computes it; nothing is counted twice for rematerialisation.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pi0fast.config import Pi0Config, SiglipConfig, TransformerConfig

BF16 = 2  # bytes


@dataclass(frozen=True)
class DeviceSpec:
    """Peaks of one device.

    kind: a part of `jax.Device.device_kind`. flops: dense bf16 FLOP/s. bandwidth: bytes/s of its memory. memory: bytes.
    link: bytes/s that it can send, and receive, over all its links to its node or slice; 0 where we have no use for it.
    """

    kind: str
    flops: float
    bandwidth: float
    memory: float
    link: float = 0.0


# From NVIDIA's data sheets of these products, and from Google Cloud's pages on each TPU
# (https://docs.cloud.google.com/tpu/docs/v6e), which give links in both directions together; memory of H100, v5e, v5p
# and v6e is what XLA has of it. The first entry that fits counts: some kinds are parts of others.
GIB = 2**30
DEVICES = (
    DeviceSpec("H200", 989e12, 4.8e12, 141e9, 450e9),
    DeviceSpec("H100 80GB HBM3", 989e12, 3.35e12, 84_942_979_072, 450e9),  # SXM
    DeviceSpec("H100 PCIe", 756e12, 2.0e12, 80e9),
    DeviceSpec("A100-SXM4-80GB", 312e12, 2.039e12, 80e9, 300e9),
    DeviceSpec("A100 80GB PCIe", 312e12, 1.935e12, 80e9),
    DeviceSpec("A100-SXM4-40GB", 312e12, 1.555e12, 40e9, 300e9),
    DeviceSpec("L40S", 362e12, 864e9, 48e9),
    DeviceSpec("RTX 4090", 165e12, 1008e9, 24e9),
    DeviceSpec("v5 lite", 197e12, 819e9, 15.75 * GIB, 200e9),
    DeviceSpec("v5e", 197e12, 819e9, 15.75 * GIB, 200e9),
    DeviceSpec("v5p", 459e12, 2765e9, 95.74 * GIB, 600e9),
    DeviceSpec("v5", 459e12, 2765e9, 95.74 * GIB, 600e9),
    DeviceSpec("v6 lite", 918e12, 1638e9, 31.25 * GIB, 400e9),
    DeviceSpec("v6e", 918e12, 1638e9, 31.25 * GIB, 400e9),
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
class Part:
    """FLOPs of one example in each of the `count` copies of a part."""

    forward: float
    backward: float
    count: int = 1


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one example in one direction, by stage."""

    siglip: float
    prefix: float
    suffix: float

    @property
    def total(self) -> float:
        return self.siglip + self.prefix + self.suffix


def parts(
    config: Pi0Config, num_cameras: int, prompt_len: int, trained: Collection[str] | None = None
) -> dict[str, Part]:
    """All that holds matrix products, by the path of its weights; attention belongs to its layer.

    prompt_len: prompt tokens computed, padding included. trained: the paths of the weights that train; all by default.
    Backward, a product takes as much again for the gradient of its weights, where they train, and once more for that of
    its input, where something trains before it. A stack of layers counts as one: what trains in it trains before it.
    """
    siglip, vlm, expert, horizon = config.siglip, config.vlm, config.action_expert, config.action_horizon
    image_tokens = num_cameras * config.tokens_per_image
    prefix_len, suffix_len = image_tokens + prompt_len, config.suffix_len
    square = expert.width**2

    def trains(*paths: str) -> bool:
        return trained is None or any(x == path or x.startswith(f"{path}/") for x in trained for path in paths)

    def part(path: str, weights: dict[str, int], inside: bool, *, tokens: int = 1, count: int = 1, attention: int = 0):
        """weights: multiply-adds of one token with each. inside: its input needs a gradient. attention: multiply-adds
        of one token, in two products of activations."""
        forward, backward = 2.0 * attention, 4.0 * attention * inside
        for name, multiply_adds in weights.items():
            weight = f"{path}/{name}"
            needed = inside or (name.endswith("_lora/b") and trains(weight.replace("_lora/b", "_lora/a")))
            forward += 2.0 * multiply_adds
            backward += 2.0 * multiply_adds * (trains(weight) + needed)
        return Part(tokens * forward, tokens * backward, count)

    images = num_cameras > 0
    patches = images and trains("siglip/patches")
    encoder = patches or (images and trains("siglip/layers"))
    encoded = encoder or (images and trains("siglip/norm"))
    prefix = encoded or (images and trains("siglip/head")) or trains("embedding", "vlm/layers")
    cached = prefix or trains("vlm/last")
    time = trains("head/time_in")
    condition = config.pi05 and trains("head/time_in", "head/time_out")
    inputs = ("action_in",) if config.pi05 else ("action_in", "time_in", "time_out", "state_in")
    suffix = cached or condition or trains(*(f"head/{name}" for name in inputs), "action_expert/layers")

    patch_attention = 2 * config.tokens_per_image * siglip.width
    prefix_attention, suffix_attention = (_attention(expert, keys) for keys in (prefix_len, prefix_len + suffix_len))
    last = {name: size for name, size in _products(vlm).items() if name.startswith("kv")}
    found = {
        "siglip/patches": part("siglip/patches", {"proj/kernel": _patch_weights(config)}, False, tokens=image_tokens),
        "siglip/layers": part(
            "siglip/layers",
            _siglip_products(siglip),
            encoder,
            tokens=image_tokens,
            count=siglip.depth,
            attention=patch_attention,
        ),
        "siglip/head": part("siglip/head", {"kernel": siglip.width * vlm.width}, encoded, tokens=image_tokens),
        "vlm/layers": part(
            "vlm/layers",
            _products(vlm),
            prefix,
            tokens=prefix_len,
            count=vlm.depth - 1,
            attention=prefix_attention,
        ),
        "vlm/last": part("vlm/last", last, prefix, tokens=prefix_len),
    }
    layers = part(
        "action_expert/layers",
        _products(expert),
        suffix,
        tokens=suffix_len,
        count=expert.depth,
        attention=suffix_attention,
    )
    actions = {"kernel": config.action_dim * expert.width}
    found |= {
        "head/action_in": part("head/action_in", actions, False, tokens=horizon),
        "head/action_out": part("head/action_out", actions, suffix or trains("action_expert/norm"), tokens=horizon),
    }
    if config.pi05:
        modulation = {"modulation/kernel": 3 * square}
        norms = [part(f"action_expert/layers/{name}", modulation, condition) for name in ("attention_norm", "mlp_norm")]
        return found | {
            "action_expert/layers": _sum(layers, *norms),
            "action_expert/norm": part("action_expert/norm", modulation, condition),
            "head/time_in": part("head/time_in", {"kernel": square}, False),
            "head/time_out": part("head/time_out", {"kernel": square}, time),
        }
    tokens = trains("head/action_in")
    return found | {
        "action_expert/layers": layers,
        "head/time_in": _sum(  # of actions, and of time
            part("head/time_in", {"kernel": square}, tokens, tokens=horizon),
            part("head/time_in", {"kernel": square}, False),
        ),
        "head/time_out": part("head/time_out", {"kernel": square}, tokens or time, tokens=horizon),
        "head/state_in": part("head/state_in", actions, False),
    }


def forward(config: Pi0Config, num_cameras: int, prompt_len: int) -> StageFlops:
    return _by_stage(parts(config, num_cameras, prompt_len), lambda part: part.forward)


def backward(
    config: Pi0Config, num_cameras: int, prompt_len: int, trained: Collection[str] | None = None
) -> StageFlops:
    """trained: as `parts` takes it."""
    return _by_stage(parts(config, num_cameras, prompt_len, trained), lambda part: part.backward)


def train_step(
    config: Pi0Config,
    num_cameras: int,
    prompt_len: int,
    batch_size: int,
    trained: Collection[str] | None = None,
    flow_samples: int = 1,
) -> float:
    """FLOPs of one training step. trained: as `parts` takes it. flow_samples: draws behind each prefix."""
    sizes = config, num_cameras, prompt_len
    there, back = forward(*sizes), backward(*sizes, trained)
    once = there.siglip + there.prefix + back.siglip + back.prefix
    return batch_size * (once + flow_samples * (there.suffix + back.suffix))


def _sum(first: Part, *others: Part) -> Part:
    found = (first, *others)
    return Part(sum(part.forward for part in found), sum(part.backward for part in found), first.count)


def _by_stage(found: dict[str, Part], flops: Callable[[Part], float]) -> StageFlops:
    def total(*modules: str) -> float:
        return sum(part.count * flops(part) for path, part in found.items() if path.split("/")[0] in modules)

    return StageFlops(siglip=total("siglip"), prefix=total("vlm"), suffix=total("action_expert", "head"))


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
    """One inference call by stage. step: one evaluation of the velocity. state: what Pi0's state adds to the first.

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
    LoRA is merged.
    """
    config = config.without_lora()
    siglip, expert = config.siglip, config.action_expert
    prefix_len = num_cameras * config.tokens_per_image + prompt_len
    once = forward(config, num_cameras, prompt_len)
    layer_cache = 2 * prefix_len * expert.num_kv_heads * expert.head_dim

    def cost(flops: float, weights: int, cached: int = 0) -> Cost:
        return Cost(batch_size * flops, BF16 * (weights + batch_size * cached))

    state, modulations = Cost(0.0, 0.0), (2 * expert.depth + 1) * 3 * expert.width
    if not config.pi05:
        own, modulations = config.action_dim * expert.width, 0
        attention = (expert.depth - 1) * _attention(expert, prefix_len + config.suffix_len)
        state = cost(2.0 * (own + _keys_values_weights(expert) + attention), own)
    # Of Pi0's first layer over action and time, the time's part is computed before.
    weights = expert.depth * _layer_weights(expert) + 2 * config.action_dim * expert.width
    weights += 0 if config.pi05 else 2 * expert.width**2
    attention = expert.depth * _attention(expert, prefix_len + config.suffix_len)
    step = cost(2.0 * config.action_horizon * (weights + attention), weights, expert.depth * layer_cache)
    vision = siglip.depth * _siglip_layer_weights(siglip) + _patch_weights(config) + siglip.width * config.vlm.width
    return InferenceCost(
        vision=cost(once.siglip, vision if num_cameras else 0),
        prefix=cost(once.prefix, _keys_values_weights(config.vlm)),
        state=state,
        step=Cost(step.flops, step.bytes + BF16 * modulations),
        evaluations=evaluations,
    )


# ── Weights of matrix products, and multiply-adds of one token ────────────────────────────────────────────────────────


def _patch_weights(config: Pi0Config) -> int:
    return config.siglip.patch_size**2 * 3 * config.siglip.width


def _siglip_products(config: SiglipConfig) -> dict[str, int]:
    """Of one layer, by weight."""
    width, mlp = config.width, config.width * config.mlp_dim
    return {"qkv/kernel": 3 * width**2, "out/kernel": width**2, "up/kernel": mlp, "down/kernel": mlp}


def _siglip_layer_weights(config: SiglipConfig) -> int:
    return sum(_siglip_products(config).values())


def _products(config: TransformerConfig) -> dict[str, int]:
    """Of one layer, by weight, LoRA's thin factors among them."""
    width, mlp, lora = config.width, config.mlp_dim, config.lora
    heads, channels = config.num_heads, config.num_heads * config.head_dim
    kv_heads, kv_channels = 2 * config.num_kv_heads, 2 * config.num_kv_heads * config.head_dim
    attention = {"q": (width, channels, heads), "kv": (width, kv_channels, kv_heads), "out": (channels, width, 1)}
    gated = {"gate_up": (width, 2 * mlp, 2), "down": (mlp, width, 1)}
    found = {name: rows * columns for name, (rows, columns, _) in (attention | gated).items()}
    if lora is not None:
        updated = (attention if lora.attention else {}) | (gated if lora.mlp else {})
        for name, (rows, columns, blocks) in updated.items():
            found[f"{name}_lora/a"] = rows * blocks * lora.rank
            found[f"{name}_lora/b"] = lora.rank * columns
    return found


def _layer_weights(config: TransformerConfig) -> int:
    return sum(_products(config).values())


def _own_keys_values_weights(config: TransformerConfig) -> int:
    """Of one layer's keys and values."""
    return 2 * config.width * config.num_kv_heads * config.head_dim


def _keys_values_weights(config: TransformerConfig) -> int:
    """All that keys and values of every layer need: of the last layer, their own projections alone."""
    return (config.depth - 1) * _layer_weights(config) + _own_keys_values_weights(config)


def _attention(config: TransformerConfig, keys: int) -> int:
    return 2 * keys * config.num_heads * config.head_dim
