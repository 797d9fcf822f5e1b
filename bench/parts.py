"""The model's parts, one layer at a time: functions, weights and inputs, to compile, count and time."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pi0fast import Pi0, flops
from pi0fast.config import Pi0Config
from pi0fast.execution import Execution
from pi0fast.gemma import KVCache, Places, Rotation, attend_cached
from pi0fast.layout import PrefixLayout


@dataclasses.dataclass(frozen=True)
class Case:
    """Parts of the model, as a function of a module and of inputs, of which those `outside` get no gradient.

    paths: of `flops.parts`. dtype: of the matrix products; None is the inputs'.
    """

    paths: tuple[str, ...]
    run: Callable[..., Any]
    module: nnx.Module
    inside: tuple = ()
    outside: tuple = ()
    dtype: Any = None

    @property
    def inputs(self) -> tuple[nnx.State, tuple, tuple]:
        """Weights, `inside` and `outside`, as shapes and dtypes: what the functions below take."""
        return nnx.split(self.module)[1], self.inside, self.outside

    def forward(self, weights: nnx.State, inside: tuple, outside: tuple) -> Any:
        module = nnx.merge(nnx.split(self.module)[0], weights)
        return Execution().apply(module, self.run, *inside, *outside, dtype=self.dtype)

    def linearize(self, weights: nnx.State, inside: tuple, outside: tuple) -> tuple[Any, Callable[[Any], Any]]:
        """The forward pass, and the backward pass from it: cotangents → gradients of weights and `inside`."""
        return jax.vjp(lambda weights, inside: self.forward(weights, inside, outside), weights, inside)

    def part(self, config: Pi0Config) -> flops.Part:
        """FLOPs of one example."""
        cameras = len(config.cameras)
        found = [flops.parts(config, cameras, config.max_token_len)[path] for path in self.paths]
        if self.paths[0].startswith("siglip/"):  # these take one camera's image
            found = [flops.Part(part.forward / cameras, part.backward / cameras) for part in found]
        return flops.Part(sum(part.forward for part in found), sum(part.backward for part in found))


@cache
def cases(size: Pi0Config, batch: int, execution: Execution) -> dict[str, Case]:
    """By name; weights and inputs are shapes and dtypes. All cameras, whole prompts."""
    model = Pi0.abstract(size)
    head, head_dim, width = model.head, size.vlm.head_dim, size.action_expert.width
    prefix_len = len(size.cameras) * size.tokens_per_image + size.max_token_len

    dtype = jnp.dtype(size.dtype)

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    def exact(*shape: int):
        return array(*shape, dtype=jnp.float32)

    def layout(valid):
        return PrefixLayout.build(valid, action_horizon=size.action_horizon, has_state=not size.pi05)

    def vlm_layer(layer, x, valid):
        at = layout(valid)
        place, rotation = (at.order_keys, at.order_keys), Rotation.at(at.prefix_positions, head_dim)
        return layer(x, layer.modulate(None), rotation, at.prefix_start, at.prefix_end, place, execution)

    def vlm_last(last, x, valid):
        return last.keys_values(x, Rotation.at(layout(valid).prefix_positions, head_dim))

    def expert_layer(layer, x, cond, cached, valid):
        return attend_cached(layer, x, layer.modulate(cond), cached, Places.of(layout(valid), head_dim), execution)

    def call(module, *inputs):
        return module(*inputs)

    image, patches = exact(size.image_size, size.image_size, 3), array(size.tokens_per_image, size.siglip.width)
    prefix, valid = array(prefix_len, size.vlm.width), array(prefix_len, dtype=jnp.bool_)
    keys = array(size.suffix_len + prefix_len, size.vlm.num_kv_heads, head_dim)
    suffix, cond = array(size.suffix_len, width), array(width) if size.pi05 else None
    state_actions_time = exact(size.action_dim), exact(size.action_horizon, size.action_dim), exact()
    siglip, last = model.siglip, model.vlm.last
    before = tuple(path for path in flops.parts(size, 1, 0) if path.startswith("head/") and path != "head/action_out")
    found = {
        "patches": Case(("siglip/patches",), call, siglip.patches, (), (image,)),
        "siglip layer": Case(
            ("siglip/layers",), lambda m, x: m(x, execution), one(siglip.layers), (patches,), (), dtype
        ),
        "siglip head": Case(("siglip/head",), call, siglip.head, (patches,), (), dtype),
        "vlm layer": Case(("vlm/layers",), vlm_layer, one(model.vlm.layers), (prefix,), (valid,), dtype),
        "vlm's last layer": Case(("vlm/last",), vlm_last, last, (prefix,), (valid,), dtype),
        "expert layer": Case(
            ("action_expert/layers",),
            expert_layer,
            one(model.action_expert.layers),
            (suffix, cond, KVCache(keys, keys)),
            (valid,),
            dtype,
        ),
        "suffix tokens": Case(before, lambda m, *x: m.embed(*x), head, (), state_actions_time),
        "actions out": Case(("head/action_out",), call, head.action_out, (exact(size.action_horizon, width),)),
    }
    if size.pi05:
        norm = model.action_expert.norm
        found["last modulation"] = Case(("action_expert/norm",), lambda m, x: m.modulate(x), norm, (cond,), (), dtype)
    return found


def one(layers: nnx.Module) -> nnx.Module:
    """One layer of a stack."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state))
