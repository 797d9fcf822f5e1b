"""Actions from an observation, in the form that one compiled call runs fastest.

A `Sampler` holds a model's weights as sampling wants them, made once:

- layers one by one, matrices in the matmul dtype: nothing copies a layer's weights out of a stack;
- query, key and value projections as one matrix;
- LoRA's updates merged into the projections;
- everything that depends on time only, for every evaluation: Pi0's part of the action tokens, or the modulations of
  all of Pi0.5's norms, whose weights are then not needed any more.

A call runs the prefix and writes its keys and values into a cache with free places in front. The loop over time
computes the action tokens alone: each layer writes their keys and values into those places, in the loop's own buffers,
and attends to the whole. Pi0's state token sees neither time nor noise: it is one more row of the first step, so that
nothing reads the action expert's weights for it alone, and its keys and values stay in their place for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import batched
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from pi0fast import flow
from pi0fast.execution import Execution, cast
from pi0fast.flow import Solver
from pi0fast.gemma import ActionExpert, KVCache, Layer, Modulation, Modulations, Places, attend_cached, final_norm
from pi0fast.layout import PrefixLayout
from pi0fast.lora import merge
from pi0fast.observation import Observation
from pi0fast.params import flatten
from pi0fast.pi0 import Pi0, validate


class FusedLayer(Layer):
    """A layer with one matrix for queries, keys and values, and without the weights of adaptive norms."""

    def __init__(self, layer: Layer):
        self.heads, self.query_heads = layer.heads, layer.query_heads
        self.qkv = nnx.Param(jnp.concatenate([layer.q[...], layer.kv[...]], axis=1))
        self.out, self.gate_up, self.down = layer.out, layer.gate_up, layer.down
        if not layer.attention_norm.adaptive:
            self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm

    def project(self, h, rotation):
        (n, c), (k, _) = self.query_heads, self.heads
        parts = jnp.split(h @ self.qkv[...], [n * c, (n + k) * c], axis=-1)
        q, k, v = (part.reshape(*h.shape[:2], -1, c) for part in parts)
        return rotation(q), rotation(k), v


class Conditions(NamedTuple):
    """What depends on time only, of one evaluation or, along leading axes, of many.

    modulations: of all of Pi0.5's norms, layer by layer, the final one last: scale, shift and gate. One array, so that
        a step of the loop takes its own out with one copy.
    """

    tokens: Float[Array, "*evaluations D"]
    modulations: Float[Array, "*evaluations norms 3 D"] | None

    def by_layer(self) -> tuple[list[Modulations] | None, Modulation | None]:
        """Of one evaluation: each layer's, and the final norm's."""
        if self.modulations is None:
            return None, None
        *norms, final = (Modulation(*of_norm) for of_norm in self.modulations)
        return [Modulations(*pair) for pair in batched(norms, 2)], final


class Guidance(NamedTuple):
    """What the samples are pulled to (`flow.guided`): normalised actions, and how firmly each step, in [0, 1]."""

    target: Float[Array, "B H A"]
    weight: Float[Array, "B H"]
    max_guidance: float | Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """`Sampler.of(model)(observation, noise)`: normalised actions.

    A pytree: give it to a jitted function as an argument, and its weights are no constants of the program.
    """

    weights: nnx.State
    conditions: Conditions
    graphdef: nnx.GraphDef[Pi0] = field(metadata={"static": True})
    num_steps: int = field(metadata={"static": True})
    solver: Solver = field(metadata={"static": True})

    @staticmethod
    def of(model: Pi0, num_steps: int = 10, solver: Solver = "euler") -> "Sampler":
        """The sampler of a model; the model stays as it is.

        Raises:
            ValueError: no step, or an unknown solver.
        """
        model = nnx.merge(*nnx.split(merge(model)))  # the modules below are replaced
        conditions = _conditions(model, num_steps, solver)
        siglip, vlm, expert = model.siglip, model.vlm, model.action_expert
        dtype = vlm.dtype
        siglip.layers = nnx.List(_unstack(siglip.layers, dtype))
        siglip.head = _cast(siglip.head, dtype)
        vlm.layers = nnx.List(FusedLayer(layer) for layer in _unstack(vlm.layers, dtype))
        vlm.last = _cast(vlm.last, dtype)
        expert.layers = nnx.List(FusedLayer(layer) for layer in _unstack(expert.layers, dtype))
        head = model.head  # of the products with time, what is still needed
        if model.config.pi05:
            del expert.norm, head.time_in, head.time_out
        else:
            head.time_in.kernel = nnx.Param(head.time_in.kernel[: head.width])
            del head.time_in.bias
        graphdef, weights = nnx.split(model)
        return Sampler(weights, conditions, graphdef, num_steps, solver)

    def __call__(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        guidance: Guidance | None = None,
        *,
        execution: Execution = Execution(),
    ) -> Float[Array, "B H A"]:
        """Integrates from noise at t = 1 to actions at t = 0. Guided, each step runs the suffix backwards too.

        Raises:
            ValueError: an input whose shape does not fit the config.
        """
        model = self.model
        validate(model.config, observation, noise)
        tokens, valid = model.embed_prefix(observation, execution)
        cache, layout = self.prefix(tokens, valid, execution)
        return self.steps(observation.state, noise, cache, layout, execution, guidance)

    @property
    def model(self) -> Pi0:
        """The modules: layers in lists, without what `conditions` stands for."""
        return nnx.merge(self.graphdef, self.weights)

    def prefix(
        self, tokens: Float[Array, "B P D"], valid: Bool[Array, "B P"], execution: Execution
    ) -> tuple[list[KVCache], PrefixLayout]:
        """Embedded prefix tokens → their keys and values, with free places for the suffix's."""
        cache, layout = self.model.attend_prefix(tokens, valid, execution)
        assert isinstance(cache, list)
        return cache, layout

    def steps(
        self,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        cache: list[KVCache],
        layout: PrefixLayout,
        execution: Execution,
        guidance: Guidance | None = None,
    ) -> Float[Array, "B H A"]:
        """All steps; the state is Pi0's own."""
        model = self.model
        expert, head, horizon = model.action_expert, model.head, model.config.action_horizon

        def velocity(x_t, at: Conditions, cache, *, with_state: bool):
            with jax.named_scope("suffix"):
                tokens = head.actions(x_t, at.tokens[None])
                if with_state:
                    tokens = jnp.concatenate([tokens, head.state_in(state)[:, None]], axis=1)
                places = Places.of(layout, expert.head_dim, tokens.shape[1])
                modulations, final = at.by_layer()
                x, cache = _attend(expert, tokens, modulations, cache, places, execution)
                x = final_norm(x[:, :horizon], final or expert.norm.modulate(None), execution)
                return head.action_out(x.astype(jnp.float32)), cache

        def guided(guidance: Guidance, x_t, at, cache, *, with_state: bool):
            conditions, t = at
            return flow.guided(lambda x: velocity(x, conditions, cache, with_state=with_state), x_t, t, *guidance)

        run, conditions = velocity, self.conditions
        if guidance is not None:
            times = jnp.asarray(flow.evaluation_times(self.num_steps, self.solver), jnp.float32)
            run, conditions = partial(guided, guidance), (conditions, times)
        return flow.integrate(
            partial(run, with_state=False),
            noise,
            conditions,
            cache,
            num_steps=self.num_steps,
            solver=self.solver,
            first=None if model.config.pi05 else partial(run, with_state=True),
        )


def sample_actions(
    model: Pi0,
    observation: Observation,
    noise: Float[Array, "B H A"],
    num_steps: int = 10,
    *,
    solver: Solver = "euler",
    execution: Execution = Execution(),
) -> Float[Array, "B H A"]:
    """Normalised actions from noise. To sample again and again, keep the `Sampler` that this makes each time."""
    return Sampler.of(model, num_steps, solver)(observation, noise, execution=execution)


def matmul_weights(model: Pi0) -> set[str]:
    """Paths of the weights that sampling uses in the matmul dtype only, so that they can be read in it."""
    exact = ("head/", "siglip/patches/")
    return {
        path
        for path, variable in flatten(model).items()
        if not path.startswith(exact) and variable.ndim - (variable.get_metadata()["out_sharding"][0] == "layers") >= 2
    }


def _conditions(model: Pi0, num_steps: int, solver: Solver) -> Conditions:
    """One product for all evaluations, and one for all layers' norms of a kind."""
    times = flow.evaluation_times(num_steps, solver)
    tokens = model.head.condition(jnp.asarray(times.reshape(-1), jnp.float32))
    if not model.config.pi05:
        return Conditions(tokens.reshape(*times.shape, -1), None)
    expert = model.action_expert
    cond = tokens.astype(expert.dtype)
    graphdef, stacked = nnx.split(expert.layers)

    def modulate(state: nnx.State) -> Modulations:
        layer: Any = nnx.merge(graphdef, cast(state, expert.dtype))
        return layer.modulate(cond)

    of_layers = jnp.stack(jax.tree.leaves(jax.vmap(modulate)(stacked)), axis=2)  # depth, evaluation, norm and part, D
    of_layers = jnp.moveaxis(of_layers, 0, 1).reshape(times.size, -1, 3, of_layers.shape[-1])
    final = jnp.stack(jax.tree.leaves(_cast(expert.norm, expert.dtype).modulate(cond)), axis=1)
    modulations = jnp.concatenate([of_layers, final[:, None]], axis=1)
    return Conditions(*(x.reshape(*times.shape, *x.shape[1:]) for x in (tokens, modulations)))


def _attend(
    expert: ActionExpert,
    x: Float[Array, "B T D"],
    modulations: Sequence[Modulations] | None,
    cache: list[KVCache],
    places: Places,
    execution: Execution,
) -> tuple[Float[Array, "B T D"], list[KVCache]]:
    """Some of the suffix through every layer; each writes its keys and values into the cache."""

    def step(layer: Layer, x, inputs):
        given, cached = inputs
        return attend_cached(layer, x, given or layer.modulate(None), cached, places, execution)

    inputs = list(zip(modulations or [None] * len(cache), cache, strict=True))
    return execution.scan(expert.layers, step, x.astype(expert.dtype), inputs, dtype=expert.dtype)


def _cast[M: nnx.Module](module: M, dtype: DTypeLike) -> M:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, cast(state, dtype))


def _unstack(layers: nnx.Module, dtype: DTypeLike) -> list:
    graphdef, stacked = nnx.split(layers)
    depth = len(jax.tree.leaves(stacked)[0])
    each = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth))
    return [nnx.merge(graphdef, cast(state, dtype)) for state in each]
