"""What a robot sends, by its data set's keys or by openpi's → what the host transforms take."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pi0fast.robots import Robot

MAX_SIDE = 4096  # pixels of an image


class Repack:
    """`repack(observation)` → a sample of `SampleTransform`: state, prompt and the images that are there.

    A key and openpi's key of the same thing (`observation.images.top`, `observation/images/top`, `images/top`) both do;
    other keys are ignored. state_dim: of the state's parts together. default_prompt: for observations without one.
    """

    def __init__(self, robot: Robot, state_dim: int, default_prompt: str | None = None):
        self.robot, self.state_dim, self.default_prompt = robot, state_dim, default_prompt
        self._keys = {_canonical(key): key for key in (*robot.state, *robot.cameras.values())}

    def __call__(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """An observation that is not nested → a sample.

        Raises:
            ValueError: naming the key that is missing or does not fit, what came, and what was expected.
        """
        values = {self._keys.get(_canonical(key), key): (key, value) for key, value in observation.items()}
        robot, prompt = self.robot, observation.get("prompt", self.default_prompt)
        missing = [key for key in robot.state if key not in values] + ["prompt"] * (prompt is None)
        if missing:
            raise ValueError(f"the observation has no {missing}; it has {sorted(observation)}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {type(prompt).__name__}, expected a string")
        parts = [_numbers(*values[key]) for key in robot.state]
        if (found := sum(map(len, parts))) != self.state_dim:
            keys = " and ".join(values[key][0] for key in robot.state)
            raise ValueError(f"{keys}: {found} state dimensions, expected {self.state_dim}")
        images = {f"image.{camera}": _image(*values[key]) for camera, key in robot.cameras.items() if key in values}
        if robot.cameras and not images:
            expected = list(robot.cameras.values())
            raise ValueError(f"the observation has none of the images {expected}; it has {sorted(observation)}")
        return {**images, "state": np.concatenate(parts), "prompt": prompt}


def flatten_keys(observation: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts → one, keys joined by "/"."""
    flat = {}
    for key, value in observation.items():
        flat |= flatten_keys(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_array(key: str, value: Any) -> np.ndarray:
    """Raises: ValueError, naming the key, for lists whose rows differ in length."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{key} is a list of rows of different lengths, expected an array") from error


def _canonical(key: str) -> str:
    """`observation/images/top` → `images.top`: what data-set keys and openpi's keys have in common."""
    return key.replace("/", ".").removeprefix("observation.")


def _numbers(key: str, value: Any) -> np.ndarray:
    """A number or a list of them, all finite."""
    array = np.atleast_1d(as_array(key, value))
    if array.dtype.kind not in "fiub" or array.ndim != 1:
        raise ValueError(f"{key} is {array.dtype} {array.shape}, expected numbers [d]")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{key} is not finite: {array[index]} at {index}")
    return array


def _image(key: str, value: Any) -> np.ndarray:
    """uint8 `[height, width, 3]`; channels may come first."""
    image = as_array(key, value)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = np.moveaxis(image, 0, 2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"{key} is {image.dtype} {image.shape}, expected uint8 [height, width, 3]; scale [0, 1] to 255"
        )
    if max(image.shape) > MAX_SIDE:
        raise ValueError(f"{key} is {image.shape[0]} x {image.shape[1]} pixels; send at most {MAX_SIDE} a side")
    return image
