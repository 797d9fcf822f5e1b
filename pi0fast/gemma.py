"""The two-expert Gemma transformer: one pass over the prefix, then passes over the suffix against its keys and values.

Prefix tokens (the VLM's) never attend to the suffix, so training and inference share one path: the prefix pass gives
the keys and values of every layer, the suffix pass (the action expert's) attends to them and to its own. Freezing the
VLM, several suffixes behind one prefix, and the loop of inference all cut at that same place.

The action expert's norms are adaptive in Pi0.5 (AdaRMS, conditioned on time) and plain in Pi0. Gemma:
https://arxiv.org/abs/2403.08295; RoPE: https://arxiv.org/abs/2104.09864; GeGLU: https://arxiv.org/abs/2002.05202.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from pi0fast.config import TransformerConfig
from pi0fast.execution import Execution
from pi0fast.layout import PrefixLayout, repeat
from pi0fast.lora import Lora, product
from pi0fast.params import Linear, param, stack, zeros
from pi0fast_kernels import ada_rms_norm, prefix_lm_attention


class Rotation(NamedTuple):
    """RoPE's sines and cosines at the positions of some tokens."""

    sin: Float[Array, "B T 1 half"]
    cos: Float[Array, "B T 1 half"]

    @staticmethod
    def at(positions: Int[Array, "B T"], head_dim: int) -> "Rotation":
        period = 10_000.0 ** (jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim))
        radians = positions.astype(jnp.float32)[..., None, None] / period
        return Rotation(jnp.sin(radians), jnp.cos(radians))

    def __call__(self, x: Float[Array, "B T heads C"]) -> Float[Array, "B T heads C"]:
        """Rotates channel i against channel i + C/2, in float32."""
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
    """Keys (after RoPE) and values: S free places in front for the suffix, then the prefix.

    Of all layers along a first axis where the layers are stacked; else of one layer, in a list of them.
    """

    k: Float[Array, "*layers B S+P K C"]
    v: Float[Array, "*layers B S+P K C"]


class Modulation(NamedTuple):
    """What a norm scales and shifts with; the gate belongs to the branch that starts at the norm. D, or B D."""

    scale: Float[Array, "*B D"]
    shift: Float[Array, "*B D"] | None = None
    gate: Float[Array, "*B D"] | None = None


class Modulations(NamedTuple):
    """Those of one layer's two norms."""

    attention: Modulation
    mlp: Modulation


class Places(NamedTuple):
    """The suffix, or its first tokens: their rotation, and the keys that their queries see."""

    rotation: Rotation
    key_start: Int[Array, "B T"]
    key_end: Int[Array, "B T"]

    @staticmethod
    def of(layout: PrefixLayout, head_dim: int, tokens: int | None = None) -> "Places":
        """The first `tokens` of the suffix, all by default."""
        rotation = Rotation.at(layout.suffix_positions[:, :tokens], head_dim)
        return Places(rotation, layout.suffix_start[:, :tokens], layout.suffix_end[:, :tokens])


class RMSNorm(nnx.Module):
    """Scale from a weight, or scale, shift and gate from a condition when `adaptive`."""

    def __init__(self, width: int, adaptive: bool, *, rngs: nnx.Rngs):
        if adaptive:
            self.modulation = Linear(width, 3 * width, ("embed", "mlp"), rngs=rngs, init=zeros)
        else:
            self.scale = param(rngs, (width,), (None,), zeros)
        self.adaptive = adaptive

    def modulate(self, cond: Float[Array, "B D"] | None) -> Modulation:
        if not self.adaptive:
            return Modulation(self.scale[...])
        assert cond is not None, "an adaptive norm needs its condition"
        return Modulation(*jnp.split(self.modulation(cond), 3, axis=-1))


class KeyValue(nnx.Module):
    """What a layer needs to give keys and values: its first norm and the k, v projections."""

    def __init__(self, config: TransformerConfig, adaptive: bool, *, rngs: nnx.Rngs):
        self.heads = (config.num_kv_heads, config.head_dim)
        self.attention_norm = RMSNorm(config.width, adaptive, rngs=rngs)
        shape, axes = (config.width, 2 * config.num_kv_heads * config.head_dim), ("embed", "heads")
        self.kv = param(rngs, shape, axes)
        if (lora := config.lora) and lora.attention:
            heads = 2 * config.num_kv_heads
            self.kv_lora = Lora(shape, axes, lora, outputs=heads, scale=lora.attention_scale, rngs=rngs)

    def keys_values(self, h: Float[Array, "B T D"], rotation: Rotation) -> tuple[Array, Array]:
        k, v = jnp.split(product(self, "kv", h), 2, axis=-1)
        k, v = (x.reshape(*x.shape[:2], *self.heads) for x in (k, v))
        return checkpoint_name(rotation(k), "key"), checkpoint_name(v, "value")


class Layer(KeyValue):
    """One layer of one expert."""

    def __init__(self, config: TransformerConfig, adaptive: bool, *, rngs: nnx.Rngs):
        super().__init__(config, adaptive, rngs=rngs)
        width, attended = config.width, config.num_heads * config.head_dim
        self.query_heads = heads, _ = (config.num_heads, config.head_dim)
        self.q = param(rngs, (width, attended), ("embed", "heads"))
        self.out = param(rngs, (attended, width), ("heads", "embed"))
        self.mlp_norm = RMSNorm(width, adaptive, rngs=rngs)
        self.gate_up = param(rngs, (width, 2 * config.mlp_dim), ("embed", "mlp"))
        self.down = param(rngs, (config.mlp_dim, width), ("mlp", "embed"))
        if (lora := config.lora) and lora.attention:
            scale = lora.attention_scale
            self.q_lora = Lora((width, attended), ("embed", "heads"), lora, outputs=heads, scale=scale, rngs=rngs)
            self.out_lora = Lora((attended, width), ("heads", "embed"), lora, summed=heads, scale=scale, rngs=rngs)
        if lora and lora.mlp:
            self.gate_up_lora = Lora((width, 2 * config.mlp_dim), ("embed", "mlp"), lora, outputs=2, rngs=rngs)
            self.down_lora = Lora((config.mlp_dim, width), ("mlp", "embed"), lora, rngs=rngs)

    def modulate(self, cond: Float[Array, "B D"] | None) -> Modulations:
        return Modulations(self.attention_norm.modulate(cond), self.mlp_norm.modulate(cond))

    def project(
        self, h: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N C"], Float[Array, "B T K C"], Float[Array, "B T K C"]]:
        """Queries, keys and values."""
        q = product(self, "q", h).reshape(*h.shape[:2], *self.query_heads)
        return checkpoint_name(rotation(q), "query"), *self.keys_values(h, rotation)

    def __call__(self, x, modulations: Modulations, rotation, key_start, key_end, place_keys, execution):
        """x `[B, T, D]` → x, and the keys and values that it attended to.

        place_keys: this layer's own keys or values → those to attend to.
        """
        scale, shift, gate = modulations.attention
        h = ada_rms_norm(x, scale, shift, implementation=execution.norm)
        q, *own = self.project(h, rotation)
        k, v = (place(x) for place, x in zip(place_keys, own, strict=True))
        attended = prefix_lm_attention(
            q, k, v, key_start, key_end, scale=self.query_heads[1] ** -0.5, implementation=execution.attention
        )
        y = product(self, "out", attended.reshape(*x.shape[:2], -1))

        scale, shift, mlp_gate = modulations.mlp
        h, x = ada_rms_norm(y, scale, shift, residual=x, gate=gate, implementation=execution.norm)
        x = checkpoint_name(x, "residual")
        gate_in, up = jnp.split(product(self, "gate_up", h), 2, axis=-1)
        y = product(self, "down", jax.nn.gelu(gate_in, approximate=True) * up)
        if mlp_gate is not None:
            y = y * (mlp_gate if mlp_gate.ndim == 1 else mlp_gate[:, None])
        return x + y, KVCache(k, v)


class Vlm(nnx.Module):
    """The expert of the prefix. Its last layer gives keys and values only: training and inference discard the rest."""

    def __init__(self, config: TransformerConfig, dtype: DTypeLike, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.dtype = jnp.dtype(dtype)
        self.layers = stack(config.depth - 1, rngs, lambda rngs: Layer(config, False, rngs=rngs))
        self.last = KeyValue(config, False, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"], layout: PrefixLayout, execution: Execution) -> KVCache | list[KVCache]:
        rotation = Rotation.at(layout.prefix_positions, self.head_dim)
        free = (0, 0), (layout.suffix_positions.shape[1], 0), (0, 0), (0, 0)

        def cached(k, v):
            return KVCache(jnp.pad(k, free), jnp.pad(v, free))

        def step(layer: Layer, x, _):
            place = layout.order_keys, layout.order_keys
            starts, ends = layout.prefix_start, layout.prefix_end
            x, kv = layer(x, layer.modulate(None), rotation, starts, ends, place, execution)
            return x, cached(*kv)

        def finish(last: KeyValue, x):
            h = ada_rms_norm(x, last.attention_norm.modulate(None).scale, implementation=execution.norm)
            return cached(*map(layout.order_keys, last.keys_values(h, rotation)))

        x, cache = execution.scan(self.layers, step, x.astype(self.dtype), dtype=self.dtype)
        last = execution.apply(self.last, finish, x, dtype=self.dtype)
        if isinstance(cache, list):
            return [*cache, last]
        return jax.tree.map(lambda stacked, one: jnp.concatenate([stacked, one[None]]), cache, last)


class ActionExpert(nnx.Module):
    """The expert of the suffix."""

    def __init__(self, config: TransformerConfig, dtype: DTypeLike, adaptive: bool, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.dtype = jnp.dtype(dtype)
        self.layers = stack(config.depth, rngs, lambda rngs: Layer(config, adaptive, rngs=rngs))
        self.norm = RMSNorm(config.width, adaptive, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "BK S D"],
        cond: Float[Array, "BK D"] | None,
        cache: KVCache,
        layout: PrefixLayout,
        execution: Execution,
    ) -> Float[Array, "BK S D"]:
        """Suffix tokens, and Pi0.5's time condition → normed outputs, against the prefix in `cache`.

        Where the cache has fewer rows than x, each serves as many in turn; a layer's is repeated inside the scan.
        """
        places = Places.of(layout, self.head_dim)
        cond = None if cond is None else cond.astype(self.dtype)

        def step(layer: Layer, x, cached: KVCache):
            cached = jax.tree.map(lambda own: repeat(own, len(x)), cached)
            x, _ = attend_cached(layer, x, layer.modulate(cond), cached, places, execution)
            return x, None

        x, _ = execution.scan(self.layers, step, x.astype(self.dtype), cache, dtype=self.dtype)
        finish = lambda norm, x: final_norm(x, norm.modulate(cond), execution)  # noqa: E731
        return execution.apply(self.norm, finish, x, dtype=self.dtype)


def attend_cached(
    layer: Layer, x: Float[Array, "B T D"], modulations: Modulations, cache: KVCache, places: Places, execution
) -> tuple[Float[Array, "B T D"], KVCache]:
    """One layer over the suffix's first tokens: their keys and values are written to the cache's beginning, then they
    attend to all of it."""

    def into(cached):
        return lambda own: lax.dynamic_update_slice_in_dim(cached, own, 0, axis=1)

    place = into(cache.k), into(cache.v)
    return layer(x, modulations, places.rotation, places.key_start, places.key_end, place, execution)


def final_norm(x: Float[Array, "B T D"], modulation: Modulation, execution: Execution) -> Float[Array, "B T D"]:
    return ada_rms_norm(x, modulation.scale, modulation.shift, implementation=execution.norm)
