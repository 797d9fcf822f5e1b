"""Pi0 and Pi0.5: SigLIP and a prompt as prefix, state and noisy actions as suffix, a velocity field as output.

Black et al. 2024 (https://arxiv.org/abs/2410.24164) and https://arxiv.org/abs/2504.16054.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pi0fast import flow
from pi0fast.config import Pi0Config
from pi0fast.execution import Execution
from pi0fast.gemma import ActionExpert, KVCache, Vlm
from pi0fast.layout import PrefixLayout, repeat
from pi0fast.observation import Observation, image_to_float
from pi0fast.params import Linear, normal, param
from pi0fast.siglip import Siglip
from pi0fast_kernels import ada_rms_norm, prefix_lm_attention


class ActionHead(nnx.Module):
    """The projections between actions, state, time and the action expert's tokens, all in float32."""

    def __init__(self, config: Pi0Config, *, rngs: nnx.Rngs):
        self.pi05 = config.pi05
        self.width = width = config.action_expert.width
        self.action_in = Linear(config.action_dim, width, (None, "embed"), rngs=rngs)
        self.time_in = Linear(width if config.pi05 else 2 * width, width, ("embed", "embed_out"), rngs=rngs)
        self.time_out = Linear(width, width, ("embed", "embed_out"), rngs=rngs)
        self.action_out = Linear(width, config.action_dim, ("embed", None), rngs=rngs)
        if not config.pi05:
            self.state_in = Linear(config.action_dim, width, (None, "embed"), rngs=rngs)

    def condition(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        """What time contributes: Pi0.5's condition of the norms, or Pi0's part of the action tokens' first product."""
        time = flow.time_embedding(t, self.width)
        if self.pi05:
            return jax.nn.silu(self.time_out(jax.nn.silu(self.time_in(time))))
        return time @ self.time_in.kernel[self.width :] + self.time_in.bias[...]

    def actions(self, x_t: Float[Array, "B H A"], condition: Float[Array, "#B D"]) -> Float[Array, "B H D"]:
        """The action tokens. Pi0 mixes each with time: the first of its two layers sees both side by side."""
        tokens = self.action_in(x_t)
        if self.pi05:
            return tokens
        hidden = tokens @ self.time_in.kernel[: self.width] + condition[:, None]
        return self.time_out(jax.nn.silu(hidden))

    def embed(
        self, state: Float[Array, "B A"], x_t: Float[Array, "B H A"], t: Float[Array, " B"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B D"] | None]:
        """The suffix tokens (actions, then Pi0's state), and Pi0.5's time condition."""
        condition = self.condition(t)
        actions = self.actions(x_t, condition)
        if self.pi05:
            return actions, condition
        return jnp.concatenate([actions, self.state_in(state)[:, None]], axis=1), None


class Pi0(nnx.Module):
    """The model; every weight is a float32 `nnx.Param` with logical axis names."""

    def __init__(self, config: Pi0Config, *, rngs: nnx.Rngs):
        self.config = config
        self.siglip = Siglip(config, rngs=rngs)
        width = config.vlm.width
        self.embedding = param(rngs, (config.vocab_size, width), ("vocab", "embed"), normal(width**-0.5))
        self.vlm = Vlm(config.vlm, config.dtype, rngs=rngs)
        self.action_expert = ActionExpert(config.action_expert, config.dtype, config.pi05, rngs=rngs)
        self.head = ActionHead(config, rngs=rngs)

    @classmethod
    def abstract(cls, config: Pi0Config) -> "Pi0":
        """The model with shapes and dtypes (`jax.ShapeDtypeStruct`) where its weights would be."""
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))

    def velocity(
        self,
        observation: Observation,
        x_t: Float[Array, "BK H A"],
        t: Float[Array, " BK"],
        *,
        execution: Execution = Execution(),
    ) -> Float[Array, "BK H A"]:
        """The velocity (noise minus actions) at `x_t`, float32. t: 1 is noise.

        x_t, t: K in turn for each example of the observation, whose prefix is computed once for them.

        Raises:
            ValueError: an input whose shape does not fit the config.
        """
        validate(self.config, observation, x_t, samples=max(1, len(x_t) // len(observation.state)))
        cache, layout = self.prefix(observation, execution)
        assert isinstance(cache, KVCache), "layers in a list are a Sampler's"
        return self.suffix(observation.state, x_t, t, cache, layout, execution)

    def loss(
        self,
        observation: Observation,
        actions: Float[Array, "B H A"],
        noise: Float[Array, "BK H A"],
        t: Float[Array, " BK"],
        *,
        weights: Float[Array, " A"] | None = None,
        execution: Execution = Execution(),
    ) -> Float[Array, "BK H"]:
        """The flow-matching loss of each draw and step; its mean is the training loss.

        noise, t: K draws in turn for each example, whose prefix is computed once for them.
        weights: of the action dimensions, see `flow.loss`.
        """
        with jax.named_scope("draw"):
            actions = repeat(actions, len(noise))
            x_t = flow.interpolate(actions, noise, t)
        velocity = self.velocity(observation, x_t, t, execution=execution)
        with jax.named_scope("loss"):
            return flow.loss(velocity, actions, noise, weights)

    def prefix(self, observation: Observation, execution: Execution) -> tuple[KVCache | list[KVCache], PrefixLayout]:
        """Images and prompt → their keys and values in every layer, and the layout of the batch."""
        return self.attend_prefix(*self.embed_prefix(observation, execution), execution)

    def attend_prefix(
        self, tokens: Float[Array, "B P D"], valid: Bool[Array, "B P"], execution: Execution
    ) -> tuple[KVCache | list[KVCache], PrefixLayout]:
        """The part of `prefix` that follows `embed_prefix`."""
        with jax.named_scope("prefix"):
            layout = PrefixLayout.build(
                valid,
                action_horizon=self.config.action_horizon,
                has_state=not self.config.pi05,
                compact=execution.compact,
            )
            return self.vlm(layout.order_tokens(tokens), layout, execution), layout

    def embed_prefix(
        self, observation: Observation, execution: Execution
    ) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
        """Image tokens in camera order, then prompt tokens; and which of them are valid."""
        cameras = [camera for camera in self.config.cameras if camera in observation.images]
        tokens, valid = [], []
        if cameras:
            with jax.named_scope("siglip"):  # one pass over the images of all cameras
                images = jnp.concatenate([image_to_float(observation.images[camera]) for camera in cameras])
                tokens += jnp.split(self.siglip(images, execution), len(cameras))
            shape = tokens[0].shape[:2]
            valid += [jnp.broadcast_to(observation.image_masks[camera][:, None], shape) for camera in cameras]
        with jax.named_scope("embed_prompt"):
            prompt = execution.lookup(self.embedding, observation.tokenized_prompt)
            scale = jnp.asarray(self.config.vlm.width**0.5, prompt.dtype)
            tokens.append((prompt * scale).astype(self.config.dtype))
            valid.append(observation.tokenized_prompt_mask)
            return jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)

    def suffix(
        self,
        state: Float[Array, "B A"],
        x_t: Float[Array, "BK H A"],
        t: Float[Array, " BK"],
        cache: KVCache,
        layout: PrefixLayout,
        execution: Execution,
    ) -> Float[Array, "BK H A"]:
        """The velocity at `x_t`, given the prefix."""
        with jax.named_scope("suffix"):
            state, layout = jax.tree.map(lambda x: repeat(x, len(x_t)), (state, layout))
            tokens, cond = execution.apply(self.head, lambda head: head.embed(state, x_t, t))
            out = self.action_expert(tokens, cond, cache, layout, execution)[:, : self.config.action_horizon]
            return execution.apply(self.head, lambda head: head.action_out(out.astype(jnp.float32)))


def validate(config: Pi0Config, observation: Observation, actions: Float[Array, "BK H A"], samples: int = 1) -> None:
    """Raises: ValueError: an input whose shape does not fit the config, or not `samples` rows of actions an example."""
    batch = len(observation.state)
    expected = {
        "actions": (actions, (batch * samples, config.action_horizon, config.action_dim)),
        "state": (observation.state, (batch, config.action_dim)),
        "tokenized_prompt": (observation.tokenized_prompt, (batch, observation.tokenized_prompt.shape[-1])),
        "tokenized_prompt_mask": (observation.tokenized_prompt_mask, observation.tokenized_prompt.shape),
    }
    if unknown := set(observation.images) - set(config.cameras):
        raise ValueError(
            f"cameras {sorted(unknown)} are not in Pi0Config.cameras={config.cameras}; rename or drop them"
        )
    if set(observation.images) != set(observation.image_masks):
        raise ValueError(
            f"images has cameras {sorted(observation.images)} and image_masks {sorted(observation.image_masks)}; "
            "give one mask per image"
        )
    for camera, image in observation.images.items():
        expected[f"images[{camera!r}]"] = (image, (batch, config.image_size, config.image_size, 3))
        expected[f"image_masks[{camera!r}]"] = (observation.image_masks[camera], (batch,))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def check_kernels(config: Pi0Config, execution: Execution) -> None:
    """Traces every kernel on the smallest input with this model's dtypes and widths.

    Raises:
        ValueError: the named kernels cannot run for the mesh in context, or here.
    """
    transformers, siglip = (config.vlm, config.action_expert), config.siglip
    heads = {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in transformers}
    heads.add((siglip.num_heads, siglip.num_heads, siglip.width // siglip.num_heads))
    array = partial(jax.ShapeDtypeStruct, dtype=config.dtype)
    for n, k, c in heads:
        attend = partial(prefix_lm_attention, scale=1.0, implementation=execution.attention)
        keys = array((1, 1, k, c))
        jax.eval_shape(lambda q, kv, attend=attend: attend(q, kv, kv, None, None), array((1, 1, n, c)), keys)
    for layer in transformers:
        norm = partial(ada_rms_norm, implementation=execution.norm)
        jax.eval_shape(norm, array((1, 1, layer.width)), array((layer.width,)))
