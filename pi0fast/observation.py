"""What the model sees of one moment: shapes, units and ranges, and the image conversion on the device."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """A batch of observations.

    images: per camera `[B, height, width, 3]`, uint8 in [0, 255] (four times less traffic to the device) or float in
        [-1, 1]. A camera left out of the dict is not computed at all; the order of tokens is `Pi0Config.cameras`.
    image_masks: per camera, False where the image is missing (its tokens are then padding).
    state: normalised and zero-padded to the action dimension.
    tokenized_prompt: padded on the right with id 0, where `tokenized_prompt_mask` is False.
    """

    images: dict[str, UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"]]
    image_masks: dict[str, Bool[Array, " B"]]
    state: Float[Array, "B A"]
    tokenized_prompt: Int[Array, "B L"]
    tokenized_prompt_mask: Bool[Array, "B L"]

    @staticmethod
    def of(batch: Mapping[str, Any]) -> "Observation":
        """What a batch of samples has of it, by the names of the fields."""
        return Observation(**{field.name: batch[field.name] for field in fields(Observation)})


def image_to_float(image: UInt8[Array, "*shape"] | Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 in [0, 255] → float32 in [-1, 1]; a float image is taken to be in [-1, 1] already."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return image.astype(jnp.float32)
