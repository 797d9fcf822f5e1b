"""lerobot's names and layouts of Pi0's weights → openpi's, so that `pi0fast.convert` can read them.

PyTorch stores a matrix as `[out, in]`; openpi stores it as `[in, out]`, with the heads as an axis of their own and the
layers stacked. The map only stacks, transposes and reshapes, so that it holds for gradients as well.
"""

from collections.abc import Mapping

import numpy as np

from pi0fast.config import Pi0Config, TransformerConfig

Arrays = dict[str, np.ndarray]

PALIGEMMA = "paligemma_with_expert.paligemma"
EXPERT = "paligemma_with_expert.gemma_expert"
# Output embeddings, which no velocity depends on: PaliGemma's is tied to the input embedding, the expert's has no twin.
UNUSED = (f"{PALIGEMMA}.lm_head.weight", f"{EXPERT}.lm_head.weight")


def to_openpi(theirs: Mapping[str, np.ndarray], config: Pi0Config) -> Arrays:
    """lerobot's state dict, or one gradient per entry of it, by openpi's paths.

    Raises:
        KeyError: a weight is missing.
        ValueError: a weight has no place in openpi's model.
    """
    rest = {name: array for name, array in theirs.items() if name not in UNUSED}
    language, vision = f"{PALIGEMMA}.model.language_model", f"{PALIGEMMA}.model.vision_tower.vision_model"
    ours = {
        "PaliGemma/llm/embedder/input_embedding": rest.pop(f"{language}.embed_tokens.weight"),
        **_expert(rest, language, config.vlm, ""),
        **_expert(rest, f"{EXPERT}.model", config.action_expert, "_1"),
        **_siglip(rest, vision, config),
        **_linear(rest, f"{PALIGEMMA}.model.multi_modal_projector.linear", "PaliGemma/img/head"),
    }
    heads = (
        ("time_mlp_in", "time_mlp_out") if config.pi05 else ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    )
    for name in ("action_in_proj", "action_out_proj", *heads):
        ours |= _linear(rest, name, name)
    if rest:
        raise ValueError(f"no place for lerobot's {sorted(rest)}")
    return ours


def _expert(rest: Arrays, prefix: str, config: TransformerConfig, suffix: str) -> Arrays:
    n, k, c, d = config.num_heads, config.num_kv_heads, config.head_dim, config.width

    def projection(layer: str, name: str, *shape: int) -> np.ndarray:
        return rest.pop(f"{layer}.{name}.weight").reshape(shape)

    def layer(i: int) -> Arrays:
        theirs = f"{prefix}.layers.{i}"
        q = projection(theirs, "self_attn.q_proj", n, c, d)
        kv = np.stack([projection(theirs, f"self_attn.{name}", k, c, d) for name in ("k_proj", "v_proj")])
        out = projection(theirs, "self_attn.o_proj", d, n, c)
        gate, up, down = (rest.pop(f"{theirs}.mlp.{name}.weight").T for name in ("gate_proj", "up_proj", "down_proj"))
        return {
            f"attn/q_einsum{suffix}/w": q.swapaxes(-1, -2),
            f"attn/kv_einsum{suffix}/w": kv.swapaxes(-1, -2),
            f"attn/attn_vec_einsum{suffix}/w": out.transpose(1, 2, 0),
            f"mlp{suffix}/gating_einsum": np.stack([gate, up]),
            f"mlp{suffix}/linear": down,
            **_rms_norm(rest, f"{theirs}.input_layernorm", f"pre_attention_norm{suffix}"),
            **_rms_norm(rest, f"{theirs}.post_attention_layernorm", f"pre_ffw_norm{suffix}"),
        }

    return {
        **_stack([layer(i) for i in range(config.depth)], "PaliGemma/llm/layers"),
        **_rms_norm(rest, f"{prefix}.norm", f"PaliGemma/llm/final_norm{suffix}"),
    }


def _siglip(rest: Arrays, prefix: str, config: Pi0Config) -> Arrays:
    heads = (config.siglip.num_heads, config.siglip.width // config.siglip.num_heads)
    patches = f"{prefix}.embeddings.patch_embedding"

    def layer(i: int) -> Arrays:
        theirs, attn = f"{prefix}.encoder.layers.{i}", "MultiHeadDotProductAttention_0"
        ours = {
            **_layer_norm(rest, f"{theirs}.layer_norm1", "LayerNorm_0"),
            **_layer_norm(rest, f"{theirs}.layer_norm2", "LayerNorm_1"),
            **_linear(rest, f"{theirs}.mlp.fc1", "MlpBlock_0/Dense_0"),
            **_linear(rest, f"{theirs}.mlp.fc2", "MlpBlock_0/Dense_1"),
            **_linear(rest, f"{theirs}.self_attn.out_proj", f"{attn}/out"),
        }
        ours[f"{attn}/out/kernel"] = ours[f"{attn}/out/kernel"].reshape(*heads, -1)
        for name, short in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            ours |= {
                path: array.reshape(*array.shape[:-1], *heads)
                for path, array in _linear(rest, f"{theirs}.self_attn.{short}", f"{attn}/{name}").items()
            }
        return ours

    return {
        "PaliGemma/img/embedding/kernel": rest.pop(f"{patches}.weight").transpose(2, 3, 1, 0),
        "PaliGemma/img/embedding/bias": rest.pop(f"{patches}.bias"),
        "PaliGemma/img/pos_embedding": rest.pop(f"{prefix}.embeddings.position_embedding.weight")[None],
        **_stack([layer(i) for i in range(config.siglip.depth)], "PaliGemma/img/Transformer/encoderblock"),
        **_layer_norm(rest, f"{prefix}.post_layernorm", "PaliGemma/img/Transformer/encoder_norm"),
    }


def _stack(layers: list[Arrays], prefix: str) -> Arrays:
    return {f"{prefix}/{path}": np.stack([layer[path] for layer in layers]) for path in layers[0]}


def _linear(rest: Arrays, theirs: str, ours: str) -> Arrays:
    return {f"{ours}/kernel": rest.pop(f"{theirs}.weight").T, f"{ours}/bias": rest.pop(f"{theirs}.bias")}


def _layer_norm(rest: Arrays, theirs: str, ours: str) -> Arrays:
    return {f"{ours}/scale": rest.pop(f"{theirs}.weight"), f"{ours}/bias": rest.pop(f"{theirs}.bias")}


def _rms_norm(rest: Arrays, theirs: str, ours: str) -> Arrays:
    """Gemma's norm, or the adaptive one where lerobot has a dense layer."""
    if f"{theirs}.dense.weight" in rest:
        return _linear(rest, f"{theirs}.dense", f"{ours}/Dense_0")
    return {f"{ours}/scale": rest.pop(f"{theirs}.weight")}
