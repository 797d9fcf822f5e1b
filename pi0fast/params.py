"""Declare a weight once: its value, its logical axis names, its initialiser.

Sharding, freezing and checkpoint names derive from this declaration. The axis names are `nnx` metadata
(`out_sharding`); `pi0fast.fsdp.AXES` maps them to mesh axes.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Initializer = Callable[..., Array]
zeros = nnx.initializers.zeros_init()
ones = nnx.initializers.ones_init()
lecun = nnx.initializers.lecun_normal()


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer = lecun
) -> nnx.Param[Array]:
    """A float32 weight with one logical axis name per dimension (None: never sharded)."""
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} needs {len(shape)} axis names, got {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


def normal(std: float) -> Initializer:
    return nnx.initializers.normal(std)


def stack(depth: int, rngs: nnx.Rngs, make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """`depth` layers as one module, their weights stacked along a first axis named `layers`."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


class Linear(nnx.Module):
    """`x @ kernel + bias`, the bias in x's dtype."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        init: Initializer = lecun,
    ):
        self.kernel = param(rngs, (d_in, d_out), axes, init)
        self.bias = param(rngs, (d_out,), (None,), zeros)

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...] + self.bias[...].astype(x.dtype)


def flatten(tree: nnx.Module | nnx.State) -> dict[str, nnx.Variable[Array]]:
    """Every weight by its path, e.g. `vlm/layers/q`, in sorted order."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def replace[M: nnx.Module](model: M, weights: Mapping[str, Array]) -> M:
    """A copy of the model with these weights, by path, in place of its own."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, replace_state(state, weights))


def replace_state(state: nnx.State, weights: Mapping[str, Array]) -> nnx.State:
    """A copy of the state with these weights, by path, in place of its own."""
    return nnx.from_flat_state(
        (path, variable.replace(weights["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)
    )
