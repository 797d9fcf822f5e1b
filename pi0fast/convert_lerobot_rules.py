"""How each of openpi's parameters is made of lerobot's tensors, and what lerobot's shapes say of a model's sizes.

PyTorch stores a matrix as `[out, in]` and every layer by itself; openpi stores it as `[in, out]`, with the heads as an
axis of their own and the layers stacked. The map only stacks, transposes and reshapes, so that it holds for gradients
as well.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pi0fast import storage
from pi0fast.config import DType, Pi0Config, SiglipConfig, TransformerConfig
from pi0fast.convert_rules import IMG, LLM, Shape

Arrays = dict[str, np.ndarray]

PALIGEMMA = "paligemma_with_expert.paligemma"
LANGUAGE = f"{PALIGEMMA}.model.language_model"
VISION = f"{PALIGEMMA}.model.vision_tower.vision_model"
EXPERT = "paligemma_with_expert.gemma_expert"
EMBEDDING = f"{LANGUAGE}.embed_tokens.weight"
TIED = (
    f"{PALIGEMMA}.lm_head.weight"  # of the output; files hold it, EMBEDDING or both, and lerobot copies it to EMBEDDING
)
EXPERT_OUTPUT = f"{EXPERT}.lm_head.weight"  # no velocity depends on it, and openpi has none

HEADS, VISION_HEADS = 8, 16  # no shape tells them; lerobot's code and configuration have these


@dataclass(frozen=True)
class Source:
    """The tensors of one of openpi's parameters.

    path: openpi's. names: lerobot's, side by side along a first axis if they are several; `{}` is the layer.
    shape: of each tensor. view: the same with the heads apart. order: the axes of `view` in openpi's order.
    depth: layers, stacked in front; 0 if it is no layer's.
    """

    path: str
    names: tuple[str, ...]
    shape: Shape
    view: Shape
    order: tuple[int, ...]
    depth: int = 0

    def tensors(self) -> dict[str, Shape]:
        return {name.format(layer): self.shape for layer in range(self.depth or 1) for name in self.names}

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """lerobot's tensors → openpi's array."""

        def one(layer: int) -> np.ndarray:
            parts = [tensors[name.format(layer)].reshape(self.view).transpose(self.order) for name in self.names]
            return np.stack(parts) if len(parts) > 1 else parts[0]

        return np.stack([one(layer) for layer in range(self.depth)]) if self.depth else one(0)

    def write(self, array: np.ndarray) -> Arrays:
        """openpi's array → lerobot's tensors."""
        back, tensors = np.argsort(self.order), {}
        for layer, whole in enumerate(array if self.depth else array[None]):
            for name, part in zip(self.names, whole if len(self.names) > 1 else whole[None], strict=True):
                tensors[name.format(layer)] = np.ascontiguousarray(part.transpose(back).reshape(self.shape))
        return tensors


def sources(config: Pi0Config) -> dict[str, Source]:
    """Those of every parameter of openpi's model of this config, by openpi's path. LoRA has none."""
    vlm, action = config.vlm.width, config.action_expert.width
    found = [
        _whole(f"{LLM}/embedder/input_embedding", EMBEDDING, (config.vocab_size, vlm)),
        *_expert(config.vlm, LANGUAGE, "", adaptive=False),
        *_expert(config.action_expert, f"{EXPERT}.model", "_1", adaptive=config.pi05),
        *_siglip(config.siglip, config.tokens_per_image),
        *_linear(f"{IMG}/head", f"{PALIGEMMA}.model.multi_modal_projector.linear", config.siglip.width, vlm),
        *_linear("action_in_proj", "action_in_proj", config.action_dim, action),
        *_linear("action_out_proj", "action_out_proj", action, config.action_dim),
    ]
    if config.pi05:
        found += _linear("time_mlp_in", "time_mlp_in", action, action)
        found += _linear("time_mlp_out", "time_mlp_out", action, action)
    else:
        found += _linear("state_proj", "state_proj", config.action_dim, action)
        found += _linear("action_time_mlp_in", "action_time_mlp_in", 2 * action, action)
        found += _linear("action_time_mlp_out", "action_time_mlp_out", action, action)
    return {source.path: source for source in found}


def to_openpi(tensors: Mapping[str, np.ndarray], config: Pi0Config) -> Arrays:
    """lerobot's state dict, or one gradient per entry of it, by openpi's paths.

    Raises: ValueError, listing every tensor that is missing, extra or misshaped.
    """
    names = plain_names(tensors)
    check({name: tensors[names[name]].shape for name in names}, config)
    plain = {name: tensors[names[name]] for name in names}
    return {path: source.read(plain) for path, source in sources(config).items()}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of `sources` → the file's. A policy's file has `model.` in front, and may have the embedding twice.

    Then the input's counts: no velocity depends on the output's, and training leaves it behind.
    """
    found = {name.removeprefix("model."): name for name in names}
    if TIED in found:
        tied = found.pop(TIED)
        found.setdefault(EMBEDDING, tied)
    return found


def check(shapes: Mapping[str, Shape], config: Pi0Config) -> None:
    """Raises: ValueError, listing every tensor that is missing, extra or misshaped."""
    expected = {name: shape for source in sources(config).values() for name, shape in source.tensors().items()}
    found = {name: tuple(shape) for name, shape in shapes.items() if name != EXPERT_OUTPUT}
    if problems := storage.shape_problems(found, expected):
        raise ValueError(
            f"{len(problems)} tensors are not those of lerobot's {'Pi0.5' if config.pi05 else 'Pi0'} of these sizes; "
            "was the file written by another policy, or by lerobot before 0.4?\n  " + "\n  ".join(problems)
        )


def infer_config(
    shapes: Mapping[str, Shape], *, pi05: bool, dtype: DType, action_horizon: int, max_token_len: int
) -> Pi0Config:
    """The config of tensors of these shapes, with the numbers of heads that lerobot has.

    Raises: ValueError: a tensor that tells a size is missing.
    """

    def expert(prefix: str) -> TransformerConfig:
        rows, width = shapes[f"{prefix}.layers.0.self_attn.q_proj.weight"]
        return TransformerConfig(
            width=width,
            depth=sum(name.startswith(f"{prefix}.") and name.endswith(".q_proj.weight") for name in shapes),
            mlp_dim=shapes[f"{prefix}.layers.0.mlp.gate_proj.weight"][0],
            num_heads=HEADS,
            num_kv_heads=shapes[f"{prefix}.layers.0.self_attn.k_proj.weight"][0] // (rows // HEADS),
            head_dim=rows // HEADS,
        )

    try:
        width, _, patch_size, _ = shapes[f"{VISION}.embeddings.patch_embedding.weight"]
        siglip = SiglipConfig(
            width=width,
            depth=sum(name.startswith(VISION) and name.endswith(".q_proj.weight") for name in shapes),
            mlp_dim=shapes[f"{VISION}.encoder.layers.0.mlp.fc1.weight"][0],
            num_heads=VISION_HEADS,
            patch_size=patch_size,
        )
        return Pi0Config(
            vlm=expert(LANGUAGE),
            action_expert=expert(f"{EXPERT}.model"),
            siglip=siglip,
            pi05=pi05,
            action_dim=shapes["action_in_proj.weight"][1],
            vocab_size=shapes[EMBEDDING][0],
            image_size=patch_size * math.isqrt(shapes[f"{VISION}.embeddings.position_embedding.weight"][0]),
            dtype=dtype,
            action_horizon=action_horizon,
            max_token_len=max_token_len,
        )
    except KeyError as missing:
        raise ValueError(f"these are not the weights of lerobot's Pi0: there is no tensor {missing}") from None


def _expert(config: TransformerConfig, prefix: str, suffix: str, *, adaptive: bool) -> list[Source]:
    n, k, c, d, f = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.mlp_dim
    layer, depth = f"{prefix}.layers.{{}}", config.depth
    attn, mlp = f"{LLM}/layers/attn", f"{LLM}/layers/mlp{suffix}"
    q, k_and_v, out = (
        tuple(f"{layer}.self_attn.{name}_proj.weight" for name in names) for names in ("q", ("k", "v"), "o")
    )
    gate_and_up = f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"
    return [
        Source(f"{attn}/q_einsum{suffix}/w", q, (n * c, d), (n, c, d), (0, 2, 1), depth),
        Source(f"{attn}/kv_einsum{suffix}/w", k_and_v, (k * c, d), (k, c, d), (0, 2, 1), depth),
        Source(f"{attn}/attn_vec_einsum{suffix}/w", out, (d, n * c), (d, n, c), (1, 2, 0), depth),
        Source(f"{mlp}/gating_einsum", gate_and_up, (f, d), (f, d), (1, 0), depth),
        Source(f"{mlp}/linear", (f"{layer}.mlp.down_proj.weight",), (d, f), (d, f), (1, 0), depth),
        *_rms_norm(f"{LLM}/layers/pre_attention_norm{suffix}", f"{layer}.input_layernorm", d, adaptive, depth),
        *_rms_norm(f"{LLM}/layers/pre_ffw_norm{suffix}", f"{layer}.post_attention_layernorm", d, adaptive, depth),
        *_rms_norm(f"{LLM}/final_norm{suffix}", f"{prefix}.norm", d, adaptive),
    ]


def _siglip(config: SiglipConfig, num_tokens: int) -> list[Source]:
    d, f, patch, depth = config.width, config.mlp_dim, config.patch_size, config.depth
    h, c = config.num_heads, config.width // config.num_heads
    block, layer = f"{IMG}/Transformer/encoderblock", f"{VISION}.encoder.layers.{{}}"
    attn, patches = f"{block}/MultiHeadDotProductAttention_0", f"{VISION}.embeddings.patch_embedding"
    position = f"{VISION}.embeddings.position_embedding.weight"
    conv = (d, 3, patch, patch)
    found = [
        Source(f"{IMG}/embedding/kernel", (f"{patches}.weight",), conv, conv, (2, 3, 1, 0)),
        _whole(f"{IMG}/embedding/bias", f"{patches}.bias", (d,)),
        Source(f"{IMG}/pos_embedding", (position,), (num_tokens, d), (1, num_tokens, d), (0, 1, 2)),
        *_layer_norm(f"{block}/LayerNorm_0", f"{layer}.layer_norm1", d, depth),
        *_layer_norm(f"{block}/LayerNorm_1", f"{layer}.layer_norm2", d, depth),
        *_linear(f"{block}/MlpBlock_0/Dense_0", f"{layer}.mlp.fc1", d, f, depth),
        *_linear(f"{block}/MlpBlock_0/Dense_1", f"{layer}.mlp.fc2", f, d, depth),
        Source(f"{attn}/out/kernel", (f"{layer}.self_attn.out_proj.weight",), (d, d), (d, h, c), (1, 2, 0), depth),
        _whole(f"{attn}/out/bias", f"{layer}.self_attn.out_proj.bias", (d,), depth),
        *_layer_norm(f"{IMG}/Transformer/encoder_norm", f"{VISION}.post_layernorm", d),
    ]
    for name in ("query", "key", "value"):
        theirs = f"{layer}.self_attn.{name[0]}_proj"
        found.append(Source(f"{attn}/{name}/kernel", (f"{theirs}.weight",), (d, d), (h, c, d), (2, 0, 1), depth))
        found.append(Source(f"{attn}/{name}/bias", (f"{theirs}.bias",), (d,), (h, c), (0, 1), depth))
    return found


def _whole(path: str, name: str, shape: Shape, depth: int = 0) -> Source:
    return Source(path, (name,), shape, shape, tuple(range(len(shape))), depth)


def _linear(ours: str, theirs: str, d_in: int, d_out: int, depth: int = 0) -> list[Source]:
    return [
        Source(f"{ours}/kernel", (f"{theirs}.weight",), (d_out, d_in), (d_out, d_in), (1, 0), depth),
        _whole(f"{ours}/bias", f"{theirs}.bias", (d_out,), depth),
    ]


def _layer_norm(ours: str, theirs: str, width: int, depth: int = 0) -> list[Source]:
    return [
        _whole(f"{ours}/scale", f"{theirs}.weight", (width,), depth),
        _whole(f"{ours}/bias", f"{theirs}.bias", (width,), depth),
    ]


def _rms_norm(ours: str, theirs: str, width: int, adaptive: bool, depth: int = 0) -> list[Source]:
    if adaptive:
        return _linear(f"{ours}/Dense_0", f"{theirs}.dense", width, 3 * width, depth)
    return [_whole(f"{ours}/scale", f"{theirs}.weight", (width,), depth)]
