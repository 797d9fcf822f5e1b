"""Augmented images stay images, depend on their own key alone, and move only where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0fast import Observation
from pi0fast.augment import augment

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 7, 7, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    return Observation(
        images=dict.fromkeys(CAMERAS, jnp.asarray(blocks)),
        image_masks=dict.fromkeys(CAMERAS, jnp.ones(3, bool)),
        state=jnp.zeros((3, 2)),
        tokenized_prompt=jnp.zeros((3, 4), jnp.int32),
        tokenized_prompt_mask=jnp.ones((3, 4), bool),
    )


@pytest.fixture(scope="module")
def augmented(observation):
    return jax.jit(augment)(observation, jax.random.split(jax.random.key(0), 3))


def test_range_dtype_and_the_rest_unchanged(observation, augmented):
    for camera in CAMERAS:
        image = augmented.images[camera]
        assert image.dtype == jnp.float32 and image.shape == (3, 56, 56, 3)
        assert image.min() >= -1 and image.max() <= 1
        plain = np.asarray(observation.images[camera], np.float32) / 255 * 2 - 1
        assert 0.005 < np.abs(image - plain).mean() < 0.6
    np.testing.assert_array_equal(augmented.tokenized_prompt_mask, observation.tokenized_prompt_mask)


def test_one_key_per_example(observation, augmented):
    keys = jax.random.split(jax.random.key(0), 3)
    reversed_batch = jax.tree.map(lambda x: x[::-1], observation)
    other = jax.jit(augment)(reversed_batch, keys[::-1])
    for camera in CAMERAS:
        np.testing.assert_allclose(other.images[camera][::-1], augmented.images[camera], atol=1e-6)


def test_only_cameras_off_the_wrist_are_cropped_and_rotated(augmented):
    """The wrist camera's flat blocks stay flat; the base camera's edges move."""
    flat = {
        camera: np.asarray(augmented.images[camera]).reshape(3, 7, 8, 7, 8, 3).std(axis=(2, 4)).max()
        for camera in CAMERAS
    }
    assert flat["left_wrist_0_rgb"] < 1e-5 < 0.05 < flat["base_0_rgb"]
