"""One sample of a robot ↔ what the model sees of it, on the host: delta, normalise, resize, tokenise, pad.

Letters: H action horizon, A the model's action dimension, d the robot's own dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pi0fast.config import Pi0Config
from pi0fast.normalize import NormStats, normalize, unnormalize
from pi0fast.robots import Robot
from pi0fast.tokenizer import PromptTokenizer

MAX_NORMALIZED = 100.0  # standard deviations, or half ranges: wrong units and wrong statistics go beyond


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[..., h, w, 3]` → uint8 `[..., height, width, 3]`: the whole image, centred on black, aspect ratio kept.

    Pillow's bilinear filter (openpi, openpi_client/image_tools.py). An image of the right size passes through. Raises
    ValueError for another shape or dtype.
    """
    if image.ndim < 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(
            f"an image is {image.dtype} {image.shape}, expected uint8 [height, width, 3]; put the channels last and "
            "scale [0, 1] to [0, 255]"
        )
    *batch, old_height, old_width, _ = image.shape
    if (old_height, old_width) == (height, width):
        return image
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = max(1, int(old_height / ratio)), max(1, int(old_width / ratio))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padded = np.zeros((*batch, height, width, 3), np.uint8)
    for index in np.ndindex(*batch):
        resized = Image.fromarray(image[index]).resize((new_width, new_height), Image.Resampling.BILINEAR)
        padded[index][top : top + new_height, left : left + new_width] = np.asarray(resized)
    return padded


def delta_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """`actions [..., H, d]` relative to the current `state [..., ds]` where `mask [d]` is True; () changes nothing.

    Raises ValueError when the mask does not fit.
    """
    return actions - _offset(actions, state, mask)


def absolute_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """The inverse of `delta_actions`."""
    return actions + _offset(actions, state, mask)


def pad_to_dim(x: np.ndarray, dim: int) -> np.ndarray:
    """Zeros behind the last axis: `[..., d]` → `[..., dim]`. Raises ValueError when d is larger."""
    if x.shape[-1] > dim:
        raise ValueError(f"{x.shape[-1]} dimensions do not fit the model's {dim}; raise Pi0Config.action_dim")
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, dim - x.shape[-1])])


def check_cameras(config: Pi0Config, robot: Robot) -> None:
    """Raises ValueError for cameras of the robot that the model does not have."""
    if unknown := sorted(set(robot.cameras) - set(config.cameras)):
        raise ValueError(
            f"robot {robot.name!r} has cameras {unknown}, which the model does not know; its cameras are "
            f"{list(config.cameras)}: rename or drop them in the robot, or add them to Pi0Config.cameras"
        )


class SampleTransform:
    """Samples of `robot` → inputs of the model, and the model's actions → the robot's.

    norm_stats: "state" and "actions", taken after the delta step; z-scores for Pi0, quantiles for Pi0.5.
    max_normalized: a normalised state or action beyond ± this raises (wrong units, wrong statistics, a dimension that
        hardly moved when they were taken); None allows any.
    prompt_len: prompt tokens that are given out, all that the model takes by default.

    Raises ValueError when robot, statistics, tokenizer and model do not fit each other.
    """

    def __init__(
        self,
        config: Pi0Config,
        robot: Robot,
        norm_stats: Mapping[str, NormStats],
        tokenizer: PromptTokenizer,
        max_normalized: float | None = MAX_NORMALIZED,
        prompt_len: int | None = None,
    ):
        check_cameras(config, robot)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer's ids go up to {tokenizer.vocab_size - 1}, the model embeds {config.vocab_size}; use "
                "the tokenizer that the model was trained with, or raise Pi0Config.vocab_size"
            )
        if tokenizer.max_len != config.max_token_len:
            raise ValueError(
                f"the tokenizer pads to {tokenizer.max_len} tokens, the model takes {config.max_token_len}; make it "
                "with max_len=config.max_token_len"
            )
        self.prompt_len = config.max_token_len if prompt_len is None else prompt_len
        if not 1 <= self.prompt_len <= config.max_token_len:
            raise ValueError(f"prompt_len={prompt_len} is not between 1 and the model's {config.max_token_len} tokens")
        self.config = config
        self.robot = robot
        self.tokenizer = tokenizer
        self.max_normalized = max_normalized
        self.cameras = tuple(camera for camera in config.cameras if camera in robot.cameras)
        self.state_stats = _stats_of(norm_stats, "state", robot.state_dim, robot)
        self.action_stats = _stats_of(norm_stats, "actions", robot.action_dim, robot)
        for key, stats in (("state", self.state_stats), ("actions", self.action_stats)):
            if stats.dim > config.action_dim:
                raise ValueError(
                    f"robot {robot.name!r} has {stats.dim} dimensions in its {key}, the model {config.action_dim}; "
                    "raise Pi0Config.action_dim"
                )
        delta_actions(np.zeros((1, self.action_stats.dim)), np.zeros(self.state_stats.dim), robot.delta_mask)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample, without a batch axis.

        Takes "image.{camera}" uint8 `[h, w, 3]` (a camera may be missing: then it is black, its mask False), "state"
        float `[d]`, "prompt" str, and in training "actions" float `[H, d]` and "action_is_pad" bool `[H]`.

        Returns "images" {camera: uint8 `[s, s, 3]`}, "image_masks" {camera: bool}, "state" float32 `[A]`,
        "tokenized_prompt" int32 `[prompt_len]`, "tokenized_prompt_mask" bool `[prompt_len]`, and "actions" float32
        `[H, A]`, "action_is_pad" bool `[H]` where they were given. Only the robot's cameras are there.

        Raises ValueError, naming the key, for a key that is missing or unknown, another shape, and for values that are
        not finite or beyond `max_normalized`.
        """
        if missing := [key for key in ("state", "prompt") if key not in sample]:
            raise ValueError(f"the sample has no {missing}; it has {sorted(sample)}")
        known = {f"image.{camera}" for camera in self.cameras}
        if unknown := [key for key in sample if key.startswith("image.") and key not in known]:
            raise ValueError(f"robot {self.robot.name!r} has no {unknown}; its images are {sorted(known)}")

        raw_state = _checked(sample["state"], "state", (self.state_stats.dim,))
        state = self._normalized(raw_state, "state", self.state_stats)
        images, masks = {}, {}
        for camera in self.cameras:
            image = sample.get(f"image.{camera}")
            images[camera] = self._image(image, camera)
            masks[camera] = image is not None
        tokens, token_mask = self._prompt(sample["prompt"], state)
        output = {
            "images": images,
            "image_masks": masks,
            "state": pad_to_dim(state, self.config.action_dim).astype(np.float32),
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": token_mask,
        }
        if "actions" in sample:
            output["actions"] = self.model_actions(sample["actions"], raw_state, steps=self.config.action_horizon)
        if "action_is_pad" in sample:
            output["action_is_pad"] = np.asarray(sample["action_is_pad"], bool)
        return output

    def model_actions(self, actions: Any, state: np.ndarray, *, steps: int, key: str = "actions") -> np.ndarray:
        """The robot's absolute `actions [steps, d]`, with the raw `state [ds]`, → the model's float32 `[steps, A]`.

        Raises ValueError, naming `key`, for another shape, and for values not finite or beyond `max_normalized`.
        """
        actions = _checked(actions, key, (steps, self.action_stats.dim))
        actions = delta_actions(actions, state, self.robot.delta_mask)
        actions = self._normalized(actions, key, self.action_stats)
        return pad_to_dim(actions, self.config.action_dim).astype(np.float32)

    def invert_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The model's `actions [..., H, A]` and the raw `state [..., d]` → the robot's actions float32 `[..., H, d]`.

        Raises ValueError when a value is not finite, or for other dimensions.
        """
        actions = _checked(actions, "the model's actions", (*np.shape(actions)[:-1], self.config.action_dim))
        state = _checked(state, "state", (*np.shape(actions)[:-2], self.state_stats.dim))
        actions = actions[..., : self.action_stats.dim]
        actions = unnormalize(actions, self.action_stats, quantiles=self.config.pi05)
        return absolute_actions(actions, state, self.robot.delta_mask).astype(np.float32)

    def _prompt(self, prompt: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = self.tokenizer.encode(prompt, state if self.config.state_mode == "prompt" else None)
        if mask[self.prompt_len :].any():
            raise ValueError(
                f"the prompt {prompt!r} takes {mask.sum()} tokens, more than prompt_len={self.prompt_len}; raise it"
            )
        return tokens[: self.prompt_len], mask[: self.prompt_len]

    def _image(self, image: np.ndarray | None, camera: str) -> np.ndarray:
        size = self.config.image_size
        if image is None:
            return np.zeros((size, size, 3), np.uint8)
        try:
            return resize_with_pad(np.asarray(image), size, size)
        except ValueError as error:
            raise ValueError(f"image.{camera}: {error}") from error

    def _normalized(self, x: np.ndarray, key: str, stats: NormStats) -> np.ndarray:
        normalized = normalize(x, stats, quantiles=self.config.pi05)
        bound = self.max_normalized
        if bound is not None and np.abs(normalized).max() > bound:
            worst = np.unravel_index(np.abs(normalized).argmax(), normalized.shape)
            dim = worst[-1]
            used = ("q01", "q99") if self.config.pi05 else ("mean", "std")
            of_dim = ", ".join(f"{name}={getattr(stats, name)[dim]:.6g}" for name in used)
            raise ValueError(
                f"{key}, dimension {dim}: {x[worst]:.6g} normalises to {normalized[worst]:.6g} with {of_dim}, beyond "
                f"±{bound:g}; check the units and that the statistics are this robot's, widen them by hand if the "
                "dimension hardly moved in their data, or pass max_normalized=None (--input.max-normalized)"
            )
        return normalized


def _offset(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray | float:
    """What the delta step subtracts, `[..., 1, d]`."""
    if not len(mask):
        return 0.0
    relative = np.flatnonzero(np.asarray(mask))
    if len(mask) != actions.shape[-1] or relative.max(initial=-1) >= state.shape[-1]:
        raise ValueError(
            f"delta_mask has {len(mask)} entries, the last True at {relative.max(initial=-1)}, for "
            f"{actions.shape[-1]} action and {state.shape[-1]} state dimensions; give one entry per action dimension, "
            "True only where the state has the same dimension"
        )
    offset = np.zeros((*state.shape[:-1], 1, len(mask)), state.dtype)
    offset[..., 0, relative] = state[..., relative]
    return offset


def _stats_of(norm_stats: Mapping[str, NormStats], key: str, dim: int | None, robot: Robot) -> NormStats:
    if key not in norm_stats:
        raise ValueError(
            f"the statistics have no {key!r}, only {sorted(norm_stats)}; run `python -m pi0fast.norm_stats`"
        )
    stats = norm_stats[key]
    if dim is not None and stats.dim < dim:
        raise ValueError(
            f"the statistics of {key!r} have {stats.dim} dimensions, robot {robot.name!r} has {dim}; compute its own "
            "with `python -m pi0fast.norm_stats`"
        )
    return stats.take(dim or stats.dim)


def _checked(x: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """`x` as float64 of that shape, all finite."""
    x = np.asarray(x, np.float64)
    if x.shape != shape:
        raise ValueError(f"{key} has shape {list(x.shape)}, expected {list(shape)}")
    if not np.isfinite(x).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{key} is not finite: {x[index]} at {list(index)}; remove or repair the sample")
    return x
