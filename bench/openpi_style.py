"""The baseline: Pi0 and Pi0.5 computed as openpi computes them, so that both can be timed in one run.

Written for this project from `openpi`'s published behaviour (https://github.com/Physical-Intelligence/openpi, commit
15a9616, `models/{pi0,gemma,siglip}.py`); it gives openpi's golden values. What it does as openpi does, and pi0fast does
not:

- One transformer over both experts' tokens, their q, k and v concatenated in every layer; one scan over all layers, so
  the last layer of the prefix computes what nothing reads.
- Attention by two einsums with a dense `[B, T, S]` mask from a cumulative sum.
- Prompts padded to `max_token_len`; masked cameras computed; one pass of SigLIP per camera.
- Training keeps the inputs of each layer and recomputes all else. Under a mesh (`bench.openpi_fsdp`) activations are
  constrained where openpi's are.
- Sampling: a while loop over a float time; every step concatenates the prefix's keys and values with its own, and
  computes time embedding, AdaRMS modulations and Pi0's state token again.

Left out, since it is not the model: augmentation, sharding of parameters, host transforms. Parameters are a flat
dictionary by openpi's names (`pi0fast.convert.to_openpi`), in any dtype; letters as in `pi0fast.pi0`, experts by the
end of their parameters' names ("" the VLM, "_1" the action expert).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pi0fast.config import Pi0Config
from pi0fast.observation import Observation

Params = Mapping[str, Array]
Tokens = dict[str, Float[Array, "B T D"]]
Cache = tuple[Float[Array, "layers B P K C"], Float[Array, "layers B P K C"]]

LLM, IMG = "PaliGemma/llm", "PaliGemma/img"
VLM, ACTION = "", "_1"
MASKED = -2.3819763e38  # Gemma's, representable in bfloat16


# ── What is called ────────────────────────────────────────────────────────────────────────────────────────────────────


def velocity(
    params: Params,
    config: Pi0Config,
    observation: Observation,
    x_t: Float[Array, "B H A"],
    t: Float[Array, " B"],
) -> Float[Array, "B H A"]:
    """The velocity at `x_t`; t: 1 is noise. One joint pass over prefix and suffix."""
    prefix, prefix_valid = _embed_prefix(params, config, observation)
    suffix, suffix_flags, cond = _embed_suffix(params, config, observation.state, x_t, t)
    valid = jnp.concatenate([prefix_valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
    flags = jnp.concatenate([jnp.zeros(prefix.shape[1], jnp.int32), suffix_flags])
    tokens, _ = _transformer(
        params, config, {VLM: prefix, ACTION: suffix}, _positions(valid), _mask(valid, flags), cond, None
    )
    return _linear(params, "action_out_proj", tokens[ACTION][:, -config.action_horizon :].astype(jnp.float32))


def loss(
    params: Params,
    config: Pi0Config,
    observation: Observation,
    actions: Float[Array, "B H A"],
    noise: Float[Array, "B H A"],
    t: Float[Array, " B"],
) -> Float[Array, "B H"]:
    """The flow-matching loss of each example and step."""
    weight = t[:, None, None]
    v = velocity(params, config, observation, weight * noise + (1 - weight) * actions, t)
    return jnp.mean(jnp.square(v - (noise - actions)), axis=-1)


def sample_actions(
    params: Params, config: Pi0Config, observation: Observation, noise: Float[Array, "B H A"], num_steps: int = 10
) -> Float[Array, "B H A"]:
    """Actions from noise by Euler steps against the keys and values of one prefix pass."""
    prefix, prefix_valid = _embed_prefix(params, config, observation)
    flags = jnp.zeros(prefix.shape[1], jnp.int32)
    _, cache = _transformer(
        params, config, {VLM: prefix}, _positions(prefix_valid), _mask(prefix_valid, flags), None, None
    )
    dt = -1.0 / num_steps

    def step(carry):
        x_t, t = carry
        suffix, suffix_flags, cond = _embed_suffix(
            params, config, observation.state, x_t, jnp.broadcast_to(t, noise.shape[:1])
        )
        suffix_valid = jnp.ones(suffix.shape[:2], bool)
        sees_prefix = jnp.broadcast_to(prefix_valid[:, None], (*suffix.shape[:2], prefix.shape[1]))
        mask = jnp.concatenate([sees_prefix, _mask(suffix_valid, suffix_flags)], axis=-1)
        positions = jnp.sum(prefix_valid, axis=1)[:, None] + _positions(suffix_valid)
        tokens, _ = _transformer(params, config, {ACTION: suffix}, positions, mask, cond, cache)
        out = tokens[ACTION][:, -config.action_horizon :].astype(jnp.float32)
        return x_t + dt * _linear(params, "action_out_proj", out), t + dt

    actions, _ = lax.while_loop(lambda carry: carry[1] >= -dt / 2, step, (noise, jnp.float32(1.0)))
    return actions


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _embed_prefix(
    params: Params, config: Pi0Config, observation: Observation
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
    tokens, valid = [], []
    for camera in config.cameras:
        tokens.append(_siglip(params, config, observation.images[camera]))
        valid.append(jnp.broadcast_to(observation.image_masks[camera][:, None], tokens[-1].shape[:2]))
    prompt = params[f"{LLM}/embedder/input_embedding"][observation.tokenized_prompt]
    tokens.append((prompt * jnp.asarray(config.vlm.width**0.5, prompt.dtype)).astype(config.dtype))
    valid.append(observation.tokenized_prompt_mask)
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)


def _embed_suffix(
    params: Params, config: Pi0Config, state: Float[Array, "B A"], x_t: Float[Array, "B H A"], t: Float[Array, " B"]
) -> tuple[Float[Array, "B S D"], Int[Array, " S"], Float[Array, "B D"] | None]:
    """Suffix tokens (Pi0's state first), their autoregressive flags, and Pi0.5's time condition."""
    width = config.action_expert.width
    periods = 4e-3 * (4.0 / 4e-3) ** jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    angle = t[:, None] * (2 * jnp.pi / periods)
    time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    actions = _linear(params, "action_in_proj", x_t)
    flags = (jnp.arange(config.action_horizon) == 0).astype(jnp.int32)
    if config.pi05:
        hidden = jax.nn.silu(_linear(params, "time_mlp_in", time))
        return actions, flags, jax.nn.silu(_linear(params, "time_mlp_out", hidden))
    both = jnp.concatenate([actions, jnp.broadcast_to(time[:, None], actions.shape)], axis=-1)
    actions = _linear(params, "action_time_mlp_out", jax.nn.silu(_linear(params, "action_time_mlp_in", both)))
    state_token = _linear(params, "state_proj", state)[:, None]
    return jnp.concatenate([state_token, actions], axis=1), jnp.concatenate([jnp.ones(1, jnp.int32), flags]), None


def _mask(valid: Bool[Array, "B T"], flags: Int[Array, " T"]) -> Bool[Array, "B T T"]:
    """Token i sees valid token j iff `cumsum(flags)[j] <= cumsum(flags)[i]`."""
    block = jnp.cumsum(flags)
    return (block[None, :] <= block[:, None]) & valid[:, None, :] & valid[:, :, None]


def _positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.cumsum(valid, axis=1) - 1


# ── The two-expert transformer ────────────────────────────────────────────────────────────────────────────────────────


def _transformer(
    params: Params,
    config: Pi0Config,
    tokens: Tokens,
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    cond: Float[Array, "B D"] | None,
    cache: Cache | None,
) -> tuple[Tokens, Cache]:
    """Normed outputs of the experts that have tokens, and the keys and values of all layers."""

    def layer(tokens: Tokens, inputs):
        weights, cached = inputs
        return _layer(weights, tokens, positions, mask, cond, cached)

    # Nothing saved but the carry: openpi's `nothing_saveable`.
    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    tokens = {expert: x.astype(config.dtype) for expert, x in tokens.items()}
    tokens, keys_values = lax.scan(body, tokens, (_below(params, f"{LLM}/layers"), cache))
    final = _below(params, LLM)
    return {expert: _rms_norm(final, f"final_norm{expert}", x, cond)[0] for expert, x in tokens.items()}, keys_values


def _layer(weights: Params, tokens: Tokens, positions: Array, mask: Array, cond: Array | None, cached):
    """One layer; weights by openpi's names below `layers`, without the layer axis."""
    gates, parts = {}, []
    tokens = {expert: _split(x) for expert, x in tokens.items()}
    for expert, x in tokens.items():
        h, gates[expert] = _rms_norm(weights, f"pre_attention_norm{expert}", x, cond)
        h = _split(h)
        q = jnp.einsum("btd,ndc->btnc", h, weights[f"attn/q_einsum{expert}/w"].astype(h.dtype))
        k, v = jnp.einsum("bsd,zkdc->zbskc", h, weights[f"attn/kv_einsum{expert}/w"].astype(h.dtype))
        parts.append((q, k, v))
    q, k, v = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    q, k = _rope(q, positions) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), _rope(k, positions)
    if cached is not None:
        k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(cached, (k, v), strict=True))
    attended = _attention(q, k, v, mask)

    out, start = {}, 0
    for expert, x in tokens.items():
        own = attended[:, start : start + x.shape[1]]
        start += x.shape[1]
        y = jnp.einsum("btnc,ncd->btd", own, weights[f"attn/attn_vec_einsum{expert}/w"].astype(x.dtype))
        x = _split(_gated(x, _split(y), gates[expert]))
        h, gate = _rms_norm(weights, f"pre_ffw_norm{expert}", x, cond)
        gating = weights[f"mlp{expert}/gating_einsum"].astype(x.dtype)
        hidden = jax.nn.gelu(h @ gating[0], approximate=True) * (h @ gating[1])
        y = _split(hidden @ weights[f"mlp{expert}/linear"].astype(x.dtype))
        out[expert] = _split(_gated(x, y, gate))
    return out, (k, v)


def _attention(
    q: Float[Array, "B T N C"], k: Float[Array, "B S K C"], v: Float[Array, "B S K C"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N C"]:
    """Scaled queries; N/K of them share a key/value head."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("btkgc,bskc->bkgts", grouped, k, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", probabilities, v).reshape(q.shape)


def _rope(x: Float[Array, "B T heads C"], positions: Int[Array, "B T"]) -> Float[Array, "B T heads C"]:
    half = x.shape[-1] // 2
    timescale = 10_000.0 ** (jnp.arange(half, dtype=jnp.float32) / half)
    radians = positions[..., None, None].astype(jnp.float32) / timescale
    sin, cos = jnp.sin(radians), jnp.cos(radians)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rms_norm(weights: Params, name: str, x: Array, cond: Array | None) -> tuple[Array, Array | None]:
    """The normed x, and AdaRMS's gate where that norm is adaptive."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if f"{name}/scale" in weights:
        return (normed * (1 + weights[f"{name}/scale"].astype(jnp.float32))).astype(x.dtype), None
    assert cond is not None
    modulation = _linear(weights, f"{name}/Dense_0", cond.astype(x.dtype))[:, None]
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def _gated(x: Array, y: Array, gate: Array | None) -> Array:
    return x + y if gate is None else x + y * gate


# ── SigLIP ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _siglip(params: Params, config: Pi0Config, images: Array) -> Float[Array, "B T D"]:
    """uint8 in [0, 255], or float in [-1, 1] → tokens of the VLM's width. Patch and position embedding in float32."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    stride = (config.siglip.patch_size,) * 2
    kernel = params[f"{IMG}/embedding/kernel"].astype(jnp.float32)
    patches = lax.conv_general_dilated(images, kernel, stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = patches.reshape(images.shape[0], -1, config.siglip.width) + params[f"{IMG}/embedding/bias"]
    x = (x + params[f"{IMG}/pos_embedding"]).astype(config.dtype)
    body = jax.checkpoint(_encoder_layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    x, _ = lax.scan(body, x, _below(params, f"{IMG}/Transformer/encoderblock"))
    return _linear(params, f"{IMG}/head", _layer_norm(params, f"{IMG}/Transformer/encoder_norm", x))


def _encoder_layer(x: Float[Array, "B T D"], weights: Params) -> tuple[Float[Array, "B T D"], None]:
    attn = "MultiHeadDotProductAttention_0"
    x = _split(x)
    h = _layer_norm(weights, "LayerNorm_0", x)
    q, k, v = (
        jnp.einsum("btd,dnc->btnc", h, weights[f"{attn}/{part}/kernel"].astype(x.dtype))
        + weights[f"{attn}/{part}/bias"].astype(x.dtype)
        for part in ("query", "key", "value")
    )
    logits = jnp.einsum("btnc,bsnc->bnts", q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k)
    attended = jnp.einsum("bnts,bsnc->btnc", jax.nn.softmax(logits, axis=-1), v)
    out = jnp.einsum("btnc,ncd->btd", attended, weights[f"{attn}/out/kernel"].astype(x.dtype))
    x = x + _split(out + weights[f"{attn}/out/bias"].astype(x.dtype))
    h = jax.nn.gelu(_linear(weights, "MlpBlock_0/Dense_0", _layer_norm(weights, "LayerNorm_1", x)), approximate=True)
    return _split(x + _split(_linear(weights, "MlpBlock_0/Dense_1", h))), None


def _layer_norm(weights: Params, name: str, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean, variance = jnp.mean(wide, axis=-1, keepdims=True), jnp.var(wide, axis=-1, keepdims=True)
    normed = (wide - mean) * lax.rsqrt(variance + 1e-6)
    return (normed * weights[f"{name}/scale"] + weights[f"{name}/bias"]).astype(x.dtype)


def _linear(weights: Params, name: str, x: Array) -> Array:
    return x @ weights[f"{name}/kernel"].astype(x.dtype) + weights[f"{name}/bias"].astype(x.dtype)


def _below(params: Params, prefix: str) -> Params:
    return {path.removeprefix(f"{prefix}/"): array for path, array in params.items() if path.startswith(f"{prefix}/")}


def _split(x: Array) -> Array:
    """x, its batch constrained to lie over all axes of the mesh in context, if there is one."""
    axes = jax.sharding.get_abstract_mesh().axis_names
    return lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x
