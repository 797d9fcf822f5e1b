"""How the model runs, not what it computes: sharding hooks, rematerialisation, kernels, prefix compaction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from pi0fast_kernels import ATTENTION_RESIDUALS

Remat = Literal["none", "mlp", "full"]
Kernels = Literal["auto", "reference", "triton", "mosaic_gpu", "mosaic_tpu"]

# What a layer computes that the policy `mlp` keeps for the backward pass.
SAVED_BY_MLP = ("query", "key", "value", *ATTENTION_RESIDUALS, "residual")


def cast(state: nnx.State, dtype: DTypeLike | None) -> nnx.State:
    """The matrices of one layer in `dtype`; vectors (norm scales, biases) keep their precision."""
    return jax.tree.map(lambda x: x.astype(dtype) if dtype is not None and x.ndim >= 2 else x, state)


def take(table: nnx.Param[Float[Array, "V D"]], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """The embeddings of the tokens, from a table that is whole on this device."""
    return jnp.take(table[...], tokens, axis=0)


@dataclass(frozen=True)
class Execution:
    """Choices that leave the numbers unchanged, to rounding.

    gather: (weights of one layer as stored, matmul dtype or None) → the whole weights, cast. Called inside the layer
        scan, so that a sharded model holds one layer's whole weights at a time.
    lookup: (embedding table as stored, tokens) → embeddings.
    sharded: `gather` moves data. Its results are then recomputed in the backward pass under every remat policy.
    remat: `none` saves all activations; `mlp` saves q, k, v, the attention output and the residuals, and recomputes
        norms and MLP; `full` saves the inputs of each layer only.
    compact: order the prefix tokens with the valid ones first, once. Otherwise each layer orders its keys.
    kernels: the implementation of every op of `pi0fast_kernels`; `auto` takes the first that can run, and so does the
        norm beside the attention of `mosaic_gpu`.
    """

    gather: Callable[[nnx.State, DTypeLike | None], nnx.State] = cast
    lookup: Callable[[nnx.Param[Array], Array], Array] = take
    sharded: bool = False
    remat: Remat = "none"
    compact: bool = True
    kernels: Kernels = "auto"

    @property
    def attention(self) -> Literal["reference", "triton", "mosaic_gpu", "mosaic_tpu"] | None:
        """`kernels`, as the attention takes it."""
        return None if self.kernels == "auto" else self.kernels

    @property
    def norm(self) -> Literal["reference", "triton", "mosaic_tpu"] | None:
        """`kernels`, as the norm takes it."""
        return None if self.kernels in ("auto", "mosaic_gpu") else self.kernels

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with the residuals that the remat policy allows. Wrap everything that calls `gather` with it."""
        match self.remat:
            case "full":
                return jax.checkpoint(function, prevent_cse=False)
            case "mlp":
                policy = jax.checkpoint_policies.save_only_these_names(*SAVED_BY_MLP)
                return jax.checkpoint(function, policy=policy, prevent_cse=False)
            case "none" if self.sharded:
                return jax.checkpoint(function, policy=_save_all_but_gathered, prevent_cse=False)
            case "none":
                return function
        raise ValueError(f"remat={self.remat!r} is not one of none, mlp, full")

    def apply(self, module: nnx.Module, function: Callable[..., Any], *args, dtype: DTypeLike | None = None) -> Any:
        """`function(module with its weights gathered, *args)`, its weights freed for the backward pass."""
        graphdef, state = nnx.split(module)

        def run(state, *args):
            return function(nnx.merge(graphdef, self.gather(state, dtype)), *args)

        return self.checkpoint(run)(state, *args)

    def scan(
        self, layers: nnx.Module, function: Callable[..., Any], carry: Any, xs: Any = None, *, dtype: DTypeLike | None
    ) -> tuple[Any, Any]:
        """`carry, y = function(layer, carry, x)` over layers stacked along their first axis, or over a list of layers.

        A list runs unrolled, so that no layer's weights are copied out of a stack; xs and ys are then lists too.
        """
        if isinstance(layers, nnx.List):
            ys = []
            for layer, x in zip(layers, xs or [None] * len(layers), strict=True):
                carry, y = self.apply(layer, function, carry, x, dtype=dtype)
                ys.append(y)
            return carry, ys
        graphdef, state = nnx.split(layers)

        def body(carry, inputs):
            state, x = inputs
            return function(nnx.merge(graphdef, self.gather(state, dtype)), carry, x)

        return jax.lax.scan(self.checkpoint(body), carry, (state, xs))


def _save_all_but_gathered(primitive, *_, **params) -> bool:
    """A remat policy. A gather with a backward pass of its own is one equation to it, the all-gather inside."""
    if primitive.name == "custom_vjp_call":
        return not any(equation.primitive.name.startswith("all_gather") for equation in params["call_jaxpr"].eqns)
    return not primitive.name.startswith("all_gather")
