"""Fully sharded data parallelism: weights lie in shards; a layer's are whole only while it runs.

Everything here runs inside `jax.shard_map` over the mesh of `pi0fast.mesh`. A layer's shards are cast, then gathered;
the transpose is a reduce-scatter in float32 (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). Rematerialisation
repeats the gather in the backward pass (`pi0fast.execution`).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from pi0fast import mesh as meshes
from pi0fast.execution import Execution, Kernels, Remat
from pi0fast.params import flatten

# Logical axis of a weight → mesh axis. A weight is sharded along its first axis that is mapped and that divides.
AXES = {
    "embed": "fsdp",
    "embed_out": "fsdp",
    "heads": "fsdp",
    "mlp": "fsdp",
    "positions": "fsdp",
    "vocab": None,
    "layers": None,
}

SHARDED_AXIS = "sharded_axis"


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _axes(variable: nnx.Variable) -> list[int]:
    """Along which axes a weight may be sharded, by `AXES`; a vector along none."""
    names = variable.get_metadata()["out_sharding"]
    if len(names) - (names[0] == "layers") < 2:
        return []
    return [axis for axis, name in enumerate(names) if name is not None and AXES[name]]


def place(tree: Any, mesh: Mesh) -> Any:
    """The tree with every weight's sharded axis written down in its metadata. Vectors are replicated.

    Optimizer moments and averages carry the metadata of their weights, so any train state can be placed.
    """

    def one(leaf):
        if not _is_variable(leaf):
            return leaf
        dividing = [axis for axis in _axes(leaf) if leaf.shape[axis] % mesh.shape["fsdp"] == 0]
        found = leaf.copy()
        # Counted from the end, so that it is also right for one layer of a stack.
        found.set_metadata(SHARDED_AXIS, dividing[0] - len(leaf.shape) if dividing else None)
        return found

    return jax.tree.map(one, tree, is_leaf=_is_variable)


def undivided(weights: nnx.State, mesh: Mesh | AbstractMesh) -> str | None:
    """A line that names the matrices which lie whole on every device, for no axis divides over `fsdp`; None if all do.

    It also names the largest `fsdp` on as many devices that would shard them all.
    """

    def whole(shards: int) -> list[str]:
        axes = {path: (variable.shape, _axes(variable)) for path, variable in flatten(weights).items()}
        return [path for path, (shape, axes) in axes.items() if axes and all(shape[axis] % shards for axis in axes)]

    paths = whole(mesh.shape["fsdp"])
    if not paths:
        return None
    best = next(size for size in range(mesh.shape["fsdp"], 0, -1) if mesh.size % size == 0 and not whole(size))
    gib = 4 * sum(math.prod(flatten(weights)[path].shape) for path in paths) / 2**30
    remedy = f"data:{mesh.size // best},fsdp:{best} shards all" if best > 1 else "no fsdp on as many devices shards all"
    return (
        f"{len(paths)} weights ({gib:.2g} GiB in float32, as much again for each moment and the average) do not divide "
        f"over fsdp:{mesh.shape['fsdp']} and lie whole on every device; {remedy}. They are: {', '.join(paths)}"
    )


def specs(tree: Any) -> Any:
    """The partition spec of every weight of a placed tree; anything else is replicated."""

    def one(leaf):
        axis = leaf.get_metadata().get(SHARDED_AXIS) if _is_variable(leaf) else None
        if axis is None:
            return PartitionSpec()
        names: list[str | None] = [None] * leaf.ndim
        names[axis] = "fsdp"
        return PartitionSpec(*names)

    return jax.tree.map(one, tree, is_leaf=_is_variable)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """As `specs`, on a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(tree), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def weight_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each weight of a (possibly abstract) model lies, by its path."""
    placed = flatten(place(nnx.state(model), mesh))
    return {path: NamedSharding(mesh, specs(variable)) for path, variable in placed.items()}


def execution(
    mesh: Mesh, *, remat: Remat, kernels: Kernels = "auto", reduce_dtype: DTypeLike = jnp.float32
) -> Execution:
    """How the model runs inside `shard_map` over this mesh."""
    if mesh.size == 1:
        return Execution(remat=remat, kernels=kernels)
    return Execution(
        gather=partial(gather, reduce_dtype=reduce_dtype),
        lookup=lookup,
        sharded=True,
        remat=remat,
        kernels=kernels,
    )


def vary(state: nnx.State) -> nnx.State:
    """Weights that may differ from device to device, as their gradients do before they are summed.

    The transpose sums each gradient over the mesh axes along which its weight is replicated: once per stacked weight,
    outside the layer scan.
    """

    def one(variable):
        replicated = meshes.AXES if variable.get_metadata()[SHARDED_AXIS] is None else ("data",)
        return variable.replace(lax.pcast(variable[...], replicated, to="varying"))

    return jax.tree.map(one, state, is_leaf=_is_variable)


def gather(state: nnx.State, dtype: DTypeLike | None, *, reduce_dtype: DTypeLike) -> nnx.State:
    """One layer's shards → its whole weights; matrices are cast to `dtype` before they travel."""

    def one(variable):
        x, axis = variable[...], variable.get_metadata()[SHARDED_AXIS]
        matmul_dtype = x.dtype if dtype is None or x.ndim < 2 else jnp.dtype(dtype)
        if axis is None:
            return variable.replace(x.astype(matmul_dtype))
        return variable.replace(_all_gather(x, x.ndim + axis, matmul_dtype, jnp.dtype(reduce_dtype)))

    return jax.tree.map(one, state, is_leaf=_is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(shard: Array, axis: int, dtype: Any, reduce_dtype: Any) -> Array:
    return lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _all_gather_forward(shard, axis, dtype, reduce_dtype):
    return _all_gather(shard, axis, dtype, reduce_dtype), jnp.zeros((), shard.dtype)


def _all_gather_backward(axis, dtype, reduce_dtype, like, cotangent):
    cotangent = cotangent.astype(reduce_dtype)
    return (lax.psum_scatter(cotangent, "fsdp", scatter_dimension=axis, tiled=True).astype(like.dtype),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def lookup(table: nnx.Param[Float[Array, "V shard"]], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Embeddings from a table sharded along D: every device looks up its columns for all tokens, then they trade."""
    if table.get_metadata()[SHARDED_AXIS] is None:
        return jnp.take(table[...], tokens, axis=0)
    everyones = lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    columns = jnp.take(table[...], everyones, axis=0)
    return lax.all_to_all(columns, "fsdp", split_axis=0, concat_axis=2, tiled=True)
