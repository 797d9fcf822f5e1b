"""Training-time image augmentation on the device, by augmax. Nothing else imports augmax, and training without
augmentation does without."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pi0fast.observation import Observation, image_to_float

CROP = 0.95
ROTATION_DEGREES = 5.0


def augment(observation: Observation, keys: Key[Array, " B"]) -> Observation:
    """The observation with randomly changed images, float32 in [-1, 1]; one key per example, shared by its cameras.

    All cameras: brightness, contrast and saturation. Those without "wrist" in their name also: a random crop to 95 %,
    resized back, and a rotation by up to 5 degrees.
    """
    images = {}
    for camera, image in observation.images.items():
        unit = (image_to_float(image) + 1.0) / 2.0
        changed = jax.vmap(partial(_augment_one, camera))(keys, unit)
        images[camera] = jnp.clip(changed, 0.0, 1.0) * 2.0 - 1.0
    return dataclasses.replace(observation, images=images)


def _augment_one(camera: str, key: Key[Array, ""], image: Float[Array, "height width 3"]) -> Any:
    import augmax

    height, width, _ = image.shape
    transforms = []
    if "wrist" not in camera:
        transforms = [
            augmax.RandomCrop(int(width * CROP), int(height * CROP)),
            augmax.Resize(width, height),
            augmax.Rotate((-ROTATION_DEGREES, ROTATION_DEGREES)),
        ]
    transforms.append(augmax.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.5))
    return augmax.Chain(*transforms)(key, image)
