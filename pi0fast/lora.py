"""Low-rank updates of the transformer's projections, as openpi has them (https://arxiv.org/abs/2106.09685).

openpi gives every head, and each half of a gated MLP, factors of its own. The projection stays as it is, so that it can
be frozen: its gradient is then never computed, only that of the two thin factors.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pi0fast.config import LoraConfig
from pi0fast.params import normal, param

INIT_STD = 0.01  # of both factors: a new update is small, not zero


class Lora(nnx.Module):
    """What is added to `x @ w`, w `[D, outputs * C]`: `scale * x @ a[o] @ b[o]` in each of `outputs` blocks of columns.

    summed: so many factors b are added up first. openpi has one for each head in the update of the output projection,
        behind the sum of all heads' intermediates.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        config: LoraConfig,
        *,
        rngs: nnx.Rngs,
        outputs: int = 1,
        summed: int = 1,
        scale: float = 1.0,
    ):
        self.rank, self.outputs, self.summed, self.scale = config.rank, outputs, summed, scale
        width, columns = shape[0], shape[1] // outputs
        self.a = param(rngs, (width, outputs * self.rank), (axes[0], None), normal(INIT_STD))
        self.b = param(rngs, (outputs * summed * self.rank, columns), (None, axes[1]), normal(INIT_STD))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B columns"]:
        hidden = (x @ self.a[...]).reshape(*x.shape[:-1], self.outputs, self.rank)
        update = jnp.einsum("...or,orc->...oc", hidden, self._outward())
        return self.scale * update.reshape(*x.shape[:-1], -1)

    def matrix(self) -> Float[Array, "*layers D columns"]:
        """What merging adds to w, float32."""
        a = self.a[...].astype(jnp.float32)
        inward = a.reshape(*a.shape[:-1], self.outputs, self.rank)
        update = jnp.einsum("...dor,...orc->...doc", inward, self._outward().astype(jnp.float32))
        return self.scale * update.reshape(*a.shape[:-1], -1)

    def _outward(self) -> Float[Array, "*layers outputs rank C"]:
        b = self.b[...]
        return b.reshape(*b.shape[:-2], self.outputs, self.summed, self.rank, b.shape[-1]).sum(-3)


def product(module: nnx.Module, name: str, x: Float[Array, "*B D"]) -> Float[Array, "*B columns"]:
    """x times the module's projection of that name, its update added where there is one."""
    y = x @ getattr(module, name)[...]
    update = getattr(module, f"{name}_lora", None)
    return y if update is None else y + update(x)


def merge(model: Any, experts: Sequence[str] = ("vlm", "action_expert")) -> Any:
    """A copy of the model with the updates of these experts added to their projections, in float32.

    A model without such updates is given back.
    """
    kept = {name: None if name in experts else getattr(model.config, name).lora for name in ("vlm", "action_expert")}
    config = model.config.with_lora(**kept)
    if config == model.config:
        return model
    model = nnx.merge(*nnx.split(model))
    for expert in experts:
        for _, module in list(nnx.iter_modules(getattr(model, expert))):
            for name, update in list(vars(module).items()):
                if isinstance(update, Lora):
                    weight = getattr(module, name.removesuffix("_lora"))
                    merged = weight.replace(weight[...].astype(jnp.float32) + update.matrix())
                    setattr(module, name.removesuffix("_lora"), merged)
                    delattr(module, name)
    model.config = config
    return model


def is_lora(path: str) -> bool:
    """Whether the weight of this path, e.g. `vlm/layers/q_lora/a`, belongs to an update."""
    return any(folder.endswith("_lora") for folder in path.split("/"))
