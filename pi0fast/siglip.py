"""SigLIP vision encoder: images → tokens of the VLM's width (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

A pre-LayerNorm ViT without pooling. Patch and position embedding in float32, then matmuls in the config's dtype,
LayerNorm in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pi0fast.config import Pi0Config, SiglipConfig
from pi0fast.execution import Execution
from pi0fast.params import Linear, normal, ones, param, stack, zeros
from pi0fast_kernels import prefix_lm_attention


class LayerNorm(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (None,), ones)
        self.bias = param(rngs, (width,), (None,), zeros)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(variance + 1e-6) * self.scale[...] + self.bias[...]
        return normed.astype(x.dtype)


class PatchEmbedding(nnx.Module):
    """Non-overlapping patches as one matmul, plus learned positions."""

    def __init__(self, config: Pi0Config, *, rngs: nnx.Rngs):
        patch, width = config.siglip.patch_size, config.siglip.width
        self.patch_size = patch
        self.proj = Linear(patch * patch * 3, width, (None, "embed"), rngs=rngs)
        self.position = param(rngs, (config.tokens_per_image, width), ("positions", "embed"), normal(width**-0.5))

    def __call__(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B T D"]:
        b, height, width, channels = images.shape
        p = self.patch_size
        patches = images.reshape(b, height // p, p, width // p, p, channels).swapaxes(2, 3)
        return self.proj(patches.reshape(b, -1, p * p * channels)) + self.position[...]


class EncoderLayer(nnx.Module):
    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.attention_norm = LayerNorm(config.width, rngs=rngs)
        self.qkv = Linear(config.width, 3 * config.width, ("embed", "heads"), rngs=rngs)
        self.out = Linear(config.width, config.width, ("heads", "embed"), rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, rngs=rngs)
        self.up = Linear(config.width, config.mlp_dim, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(config.mlp_dim, config.width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], execution: Execution) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        heads = (b, t, self.num_heads, d // self.num_heads)
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = (
            checkpoint_name(part.reshape(heads), name)
            for part, name in zip(jnp.split(qkv, 3, axis=-1), ("query", "key", "value"), strict=True)
        )
        everything = None, None
        attended = prefix_lm_attention(
            q, k, v, *everything, scale=heads[-1] ** -0.5, implementation=execution.attention
        )
        x = x + self.out(attended.reshape(b, t, d))
        x = checkpoint_name(x, "residual")
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=True))


class Siglip(nnx.Module):
    def __init__(self, config: Pi0Config, *, rngs: nnx.Rngs):
        siglip = config.siglip
        self.dtype = jnp.dtype(config.dtype)
        self.patches = PatchEmbedding(config, rngs=rngs)
        self.layers = stack(siglip.depth, rngs, lambda rngs: EncoderLayer(siglip, rngs=rngs))
        self.norm = LayerNorm(siglip.width, rngs=rngs)
        self.head = Linear(siglip.width, config.vlm.width, ("embed", "embed_out"), rngs=rngs)

    def __call__(self, images: Float[Array, "B height width 3"], execution: Execution) -> Float[Array, "B T D"]:
        """images in [-1, 1] → tokens of the VLM's width in the config's dtype."""
        x = execution.apply(self.patches, lambda patches: patches(images)).astype(self.dtype)
        x, _ = execution.scan(self.layers, lambda layer, x, _: (layer(x, execution), None), x, dtype=self.dtype)
        return execution.apply(self.head, lambda head, x: head(x), self.norm(x), dtype=self.dtype)
