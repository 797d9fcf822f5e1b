"""How each of our weights is made of openpi's parameters, and what an openpi checkpoint's shapes say of its sizes.

Paths are openpi's, joined by "/", e.g. `PaliGemma/llm/layers/mlp/linear`; the second expert's end in `_1`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pi0fast.config import DType, LoraConfig, Pi0Config, SiglipConfig, StateMode, TransformerConfig

Shape = tuple[int, ...]
Params = dict[str, Array]

LLM = "PaliGemma/llm"
IMG = "PaliGemma/img"
FINAL_NORM = f"{LLM}/final_norm/scale"


@dataclass(frozen=True)
class Rule:
    """How one of our weights is made of openpi's: side by side, axes reordered, then flattened to a matrix or vector.

    ours: our path. In a rule of the VLM's layers, the weight of all layers but the last.
    theirs: openpi path → shape of one layer.
    order: openpi's axes in our order; the first `rows` become one axis, the others another.
    depth: length of openpi's leading layer axis; 0 if there is none.
    last: our path for the last layer, where that is a module of its own; None if the last layer's weight is dead.
    peeled: the last layer is apart (the VLM's).
    """

    ours: str
    theirs: Mapping[str, Shape]
    order: tuple[int, ...]
    rows: int
    depth: int = 0
    last: str | None = None
    peeled: bool = False

    def read(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """openpi's arrays, in the order of `theirs` → our weights by path."""
        if not self.peeled:
            return {self.ours: self._join(arrays)}
        weights = {self.ours: self._join([array[:-1] for array in arrays])}
        if self.last:
            weights[self.last] = self._join([array[-1] for array in arrays])
        return weights

    def source_axis(self, axis: int) -> int:
        """The axis of openpi's layer whose blocks are blocks along our last axis (-1) or the one before (-2)."""
        return self.order[0 if axis == -2 else self.rows]

    def write(self, weights: Mapping[str, Array], dead: Mapping[str, Array]) -> Params:
        """Our weights by path → openpi's arrays; dead slices that are not given are zeros."""
        arrays = self._divide(weights[self.ours])
        if not self.peeled:
            return arrays
        if self.last:
            last = self._divide(weights[self.last])
        else:
            last = {path: dead.get(path, jnp.zeros(shape, arrays[path].dtype)) for path, shape in self.theirs.items()}
        return {path: jnp.concatenate([array, last[path][None]]) for path, array in arrays.items()}

    def _join(self, arrays: Sequence[Array]) -> Array:
        parts = []
        for array, shape in zip(arrays, self.theirs.values(), strict=True):
            lead = array.ndim - len(shape)
            moved = jnp.moveaxis(array, [lead + axis for axis in self.order], range(lead, array.ndim))
            parts.append(moved.reshape(*array.shape[:lead], *self._matrix(shape)))
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def _divide(self, weight: Array) -> Params:
        arrays = {}
        parts = jnp.split(weight, len(self.theirs), axis=-1)
        for part, (path, shape) in zip(parts, self.theirs.items(), strict=True):
            lead = part.ndim - len(self._matrix(shape))
            moved = part.reshape(*part.shape[:lead], *(shape[axis] for axis in self.order))
            arrays[path] = jnp.moveaxis(moved, range(lead, moved.ndim), [lead + axis for axis in self.order])
        return arrays

    def _matrix(self, shape: Shape) -> Shape:
        sizes = [shape[axis] for axis in self.order]
        return tuple(math.prod(group) for group in (sizes[: self.rows], sizes[self.rows :]) if group)


def rules(config: Pi0Config) -> list[Rule]:
    """Every weight of our model, each in exactly one rule."""
    vlm, action = config.vlm.width, config.action_expert.width
    found = [
        Rule("embedding", {f"{LLM}/embedder/input_embedding": (config.vocab_size, vlm)}, (0, 1), 1),
        *_expert(config.vlm, "", "vlm", adaptive=False, peeled=True),
        *_expert(config.action_expert, "_1", "action_expert", adaptive=config.pi05, peeled=False),
        *_norm(f"{LLM}/final_norm_1", action, "action_expert/norm", adaptive=config.pi05),
        *_siglip(config.siglip, vlm, config.tokens_per_image),
        *_linear("action_in_proj", (config.action_dim, action), "head/action_in"),
        *_linear("action_out_proj", (action, config.action_dim), "head/action_out"),
    ]
    if config.pi05:
        found += _linear("time_mlp_in", (action, action), "head/time_in")
        found += _linear("time_mlp_out", (action, action), "head/time_out")
    else:
        found += _linear("state_proj", (config.action_dim, action), "head/state_in")
        found += _linear("action_time_mlp_in", (2 * action, action), "head/time_in")
        found += _linear("action_time_mlp_out", (action, action), "head/time_out")
    return found


def _expert(config: TransformerConfig, suffix: str, ours: str, *, adaptive: bool, peeled: bool) -> list[Rule]:
    n, k, c, d, f = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.mlp_dim
    layers: dict[str, Any] = {"depth": config.depth, "peeled": peeled}
    attn, mlp = f"{LLM}/layers/attn", f"{LLM}/layers/mlp{suffix}"
    last = f"{ours}/last" if peeled else None
    return [
        Rule(f"{ours}/layers/q", {f"{attn}/q_einsum{suffix}/w": (n, d, c)}, (1, 0, 2), 1, **layers),
        Rule(
            f"{ours}/layers/kv",
            {f"{attn}/kv_einsum{suffix}/w": (2, k, d, c)},
            (2, 0, 1, 3),
            1,
            last=last and f"{last}/kv",
            **layers,
        ),
        Rule(f"{ours}/layers/out", {f"{attn}/attn_vec_einsum{suffix}/w": (n, c, d)}, (0, 1, 2), 2, **layers),
        Rule(f"{ours}/layers/gate_up", {f"{mlp}/gating_einsum": (2, d, f)}, (1, 0, 2), 1, **layers),
        Rule(f"{ours}/layers/down", {f"{mlp}/linear": (f, d)}, (0, 1), 1, **layers),
        *_lora(config, suffix, ours, last, layers),
        *_norm(
            f"{LLM}/layers/pre_attention_norm{suffix}",
            d,
            f"{ours}/layers/attention_norm",
            adaptive=adaptive,
            last=last and f"{last}/attention_norm/scale",
            **layers,
        ),
        *_norm(f"{LLM}/layers/pre_ffw_norm{suffix}", d, f"{ours}/layers/mlp_norm", adaptive=adaptive, **layers),
    ]


def _lora(config: TransformerConfig, suffix: str, ours: str, last: str | None, layers: dict[str, Any]) -> list[Rule]:
    """Of each update, a `[D, outputs * rank]` and b `[outputs * rank, C]`."""
    if config.lora is None:
        return []
    n, k, c, d, f = config.num_heads, config.num_kv_heads, config.head_dim, config.width, config.mlp_dim
    r = config.lora.rank
    attn, mlp = f"{LLM}/layers/attn", f"{LLM}/layers/mlp{suffix}"
    q, kv, out = (f"{attn}/{name}_einsum{suffix}/lora" for name in ("q", "kv", "attn_vec"))
    gating, linear = f"{mlp}/gating_einsum_lora", f"{mlp}/linear_lora"
    attention = [
        Rule(f"{ours}/layers/q_lora/a", {f"{q}_a": (n, d, r)}, (1, 0, 2), 1, **layers),
        Rule(f"{ours}/layers/q_lora/b", {f"{q}_b": (n, r, c)}, (0, 1, 2), 2, **layers),
        *(
            Rule(
                f"{ours}/layers/kv_lora/{name}",
                {f"{kv}_{name}": shape},
                order,
                rows,
                last=last and f"{last}/kv_lora/{name}",
                **layers,
            )
            for name, shape, order, rows in (
                ("a", (2, k, d, r), (2, 0, 1, 3), 1),
                ("b", (2, k, r, c), (0, 1, 2, 3), 3),
            )
        ),
        Rule(f"{ours}/layers/out_lora/a", {f"{out}_a": (n, c, r)}, (0, 1, 2), 2, **layers),
        Rule(f"{ours}/layers/out_lora/b", {f"{out}_b": (n, r, d)}, (0, 1, 2), 2, **layers),
    ]
    gated = [
        Rule(f"{ours}/layers/gate_up_lora/a", {f"{gating}_a": (2, d, r)}, (1, 0, 2), 1, **layers),
        Rule(f"{ours}/layers/gate_up_lora/b", {f"{gating}_b": (2, r, f)}, (0, 1, 2), 2, **layers),
        Rule(f"{ours}/layers/down_lora/a", {f"{linear}_a": (f, r)}, (0, 1), 1, **layers),
        Rule(f"{ours}/layers/down_lora/b", {f"{linear}_b": (r, d)}, (0, 1), 1, **layers),
    ]
    return attention * config.lora.attention + gated * config.lora.mlp


def _siglip(config: SiglipConfig, vlm_width: int, num_tokens: int) -> list[Rule]:
    d, f, heads = config.width, config.mlp_dim, (config.num_heads, config.width // config.num_heads)
    layers: dict[str, Any] = {"depth": config.depth}
    block, ours = f"{IMG}/Transformer/encoderblock", "siglip/layers"
    attn = f"{block}/MultiHeadDotProductAttention_0"
    qkv = ("query", "key", "value")
    patch = (config.patch_size, config.patch_size, 3, d)
    return [
        Rule("siglip/patches/proj/kernel", {f"{IMG}/embedding/kernel": patch}, (0, 1, 2, 3), 3),
        Rule("siglip/patches/proj/bias", {f"{IMG}/embedding/bias": (d,)}, (0,), 0),
        Rule("siglip/patches/position", {f"{IMG}/pos_embedding": (1, num_tokens, d)}, (0, 1, 2), 2),
        *_layer_norm(f"{block}/LayerNorm_0", d, f"{ours}/attention_norm", **layers),
        Rule(f"{ours}/qkv/kernel", {f"{attn}/{p}/kernel": (d, *heads) for p in qkv}, (0, 1, 2), 1, **layers),
        Rule(f"{ours}/qkv/bias", {f"{attn}/{p}/bias": heads for p in qkv}, (0, 1), 0, **layers),
        Rule(f"{ours}/out/kernel", {f"{attn}/out/kernel": (*heads, d)}, (0, 1, 2), 2, **layers),
        Rule(f"{ours}/out/bias", {f"{attn}/out/bias": (d,)}, (0,), 0, **layers),
        *_layer_norm(f"{block}/LayerNorm_1", d, f"{ours}/mlp_norm", **layers),
        *_linear(f"{block}/MlpBlock_0/Dense_0", (d, f), f"{ours}/up", **layers),
        *_linear(f"{block}/MlpBlock_0/Dense_1", (f, d), f"{ours}/down", **layers),
        *_layer_norm(f"{IMG}/Transformer/encoder_norm", d, "siglip/norm"),
        *_linear(f"{IMG}/head", (d, vlm_width), "siglip/head"),
    ]


def _linear(theirs: str, shape: tuple[int, int], ours: str, **layers) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", {f"{theirs}/kernel": shape}, (0, 1), 1, **layers),
        Rule(f"{ours}/bias", {f"{theirs}/bias": shape[1:]}, (0,), 0, **layers),
    ]


def _layer_norm(theirs: str, width: int, ours: str, **layers) -> list[Rule]:
    return [Rule(f"{ours}/{p}", {f"{theirs}/{p}": (width,)}, (0,), 0, **layers) for p in ("scale", "bias")]


def _norm(theirs: str, width: int, ours: str, *, adaptive: bool, **layers) -> list[Rule]:
    if adaptive:
        return _linear(f"{theirs}/Dense_0", (width, 3 * width), f"{ours}/modulation", **layers)
    return [Rule(f"{ours}/scale", {f"{theirs}/scale": (width,)}, (0,), 0, **layers)]


def infer_config(
    shapes: Mapping[str, Shape],
    dtype: DType,
    *,
    lora_alpha: float | None = None,
    state_mode: StateMode | None = None,
    **unseen: int,
) -> Pi0Config:
    """The config of openpi parameters of these shapes.

    lora_alpha: of LoRA checkpoints; None is the rank, as in all of openpi's configs.
    state_mode: as `Pi0Config` has it.
    unseen: `action_horizon`, `max_token_len`; no parameter depends on them. The released models' are the default.

    Raises:
        ValueError: a parameter that tells a size is missing.
    """
    try:
        layers = f"{LLM}/layers"
        depth, num_heads, _, head_dim = shapes[f"{layers}/attn/q_einsum/w"]
        num_kv_heads = shapes[f"{layers}/attn/kv_einsum/w"][2]
        attention: dict[str, int] = {
            "depth": depth,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        (_, vlm_mlp, vlm), (_, action_mlp, action) = (shapes[f"{layers}/mlp{suffix}/linear"] for suffix in ("", "_1"))
        vision_depth, vision_width, vision_mlp = shapes[f"{IMG}/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
        vision_heads = shapes[f"{IMG}/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"][2]
        patch_size = shapes[f"{IMG}/embedding/kernel"][0]
        pi05 = "time_mlp_in/kernel" in shapes
        return Pi0Config(
            vlm=TransformerConfig(vlm, mlp_dim=vlm_mlp, lora=_infer_lora(shapes, "", lora_alpha), **attention),
            action_expert=TransformerConfig(
                action, mlp_dim=action_mlp, lora=_infer_lora(shapes, "_1", lora_alpha), **attention
            ),
            siglip=SiglipConfig(vision_width, vision_depth, vision_mlp, vision_heads, patch_size),
            pi05=pi05,
            action_dim=shapes["action_in_proj/kernel"][0],
            vocab_size=shapes[f"{LLM}/embedder/input_embedding"][0],
            image_size=patch_size * math.isqrt(shapes[f"{IMG}/pos_embedding"][1]),
            dtype=dtype,
            state_mode=state_mode,
            max_token_len=unseen.get("max_token_len", 200 if pi05 else 48),
            action_horizon=unseen.get("action_horizon", 50),
        )
    except KeyError as missing:
        raise ValueError(f"this is no openpi Pi0 checkpoint: it has no parameter {missing}") from None


def _infer_lora(shapes: Mapping[str, Shape], suffix: str, alpha: float | None) -> LoraConfig | None:
    attention = shapes.get(f"{LLM}/layers/attn/q_einsum{suffix}/lora_a")
    mlp = shapes.get(f"{LLM}/layers/mlp{suffix}/linear_lora_a")
    if (found := attention or mlp) is None:
        return None
    return LoraConfig(found[-1], alpha, attention is not None, mlp is not None)
