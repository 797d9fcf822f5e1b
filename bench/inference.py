"""What is timed when inference is compared: the same weights, the same observation, one call of each contender.

A robot with some of the model's cameras and a text prompt. pi0fast runs its policy's own compiled call: the robot's
cameras alone, the prompt in its bucket. openpi and lerobot compute every camera of the model, the missing ones masked,
and the prompt padded to its full length; so that is what their contenders here get.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from bench import openpi_style, peers
from pi0fast import Observation, Pi0, convert, convert_lerobot_rules
from pi0fast.config import Pi0Config
from pi0fast.normalize import NormStats
from pi0fast.policy import Policy, Request, default_buckets
from pi0fast.robots import Robot
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer
from pi0fast.transforms import SampleTransform

TOLERANCE = 1e-5  # float32: of the relative norm of a difference

Params = Mapping[str, ArrayLike]

STATE_DIM = 8  # as DROID's and LIBERO's
WORDS = ("put", "the", "red", "block", "into", "the", "blue", "bowl", "and")


@dataclass(frozen=True)
class Workload:
    """num_cameras: of the model's, the first so many. prompt_tokens: as many words as fit into so many tokens."""

    config: Pi0Config
    num_cameras: int
    prompt_tokens: int
    image_shape: tuple[int, int] = (224, 224)

    def robot(self) -> Robot:
        config = self.config
        cameras = {camera: f"images.{camera}" for camera in config.cameras[: self.num_cameras]}
        dim = min(STATE_DIM, config.action_dim)
        return Robot("bench", ("state",), ("actions",), cameras, state_dim=dim, action_dim=config.action_dim)

    def transform(self) -> SampleTransform:
        """With statistics that leave state and actions as they are."""
        dim = self.config.action_dim
        ones, epsilon = np.ones(dim), 1e-6
        stats = NormStats(mean=0 * ones, std=ones - epsilon, q01=-ones, q99=ones - epsilon)
        tokenizer = PromptTokenizer(DEMO_TOKENIZER, self.config.max_token_len)
        return SampleTransform(self.config, self.robot(), {"state": stats, "actions": stats}, tokenizer)

    def observation(self) -> dict[str, Any]:
        """What the robot sends: images of noise, a state, a prompt."""
        rng, robot = np.random.default_rng(0), self.robot()
        images = {key: rng.integers(0, 256, (*self.image_shape, 3), dtype=np.uint8) for key in robot.cameras.values()}
        state = rng.uniform(-1, 1, robot.state_dim)
        return {**images, "state": state, "prompt": self._prompt(state if self.config.state_mode == "prompt" else None)}

    def noise(self, batch: int) -> np.ndarray:
        shape = (batch, self.config.action_horizon, self.config.action_dim)
        return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)

    def _prompt(self, state: np.ndarray | None) -> str:
        tokenizer = PromptTokenizer(DEMO_TOKENIZER, 10 * self.config.max_token_len)
        texts = (" ".join((WORDS * count)[:count]) for count in range(1, self.prompt_tokens + 1))
        fitting = [text for text in texts if tokenizer.encode(text, state)[1].sum() <= self.prompt_tokens]
        if not fitting:
            raise ValueError(f"not one word fits into prompt_tokens={self.prompt_tokens}; give more")
        return fitting[-1]


def draw_params(config: Pi0Config) -> Params:
    """Random weights by openpi's names, on the device, in the config's dtype; none zero, activations of order one."""

    def weight(path: str, shape: tuple[int, ...]) -> jax.Array:
        std = 0.1 if len(shape) < 2 else 0.7 * shape[-2] ** -0.5
        key = jax.random.key(zlib.crc32(path.encode()))
        return (jax.random.normal(key, shape) * std).astype(config.dtype)

    return {path: weight(path, shape) for path, shape in convert.openpi_shapes(config).items()}


def weights(config: Pi0Config) -> tuple[Params, Any]:
    """By openpi's names, and lerobot's model with the same, or None without lerobot."""
    if reason := lerobot_refusal(config, compiled=False):
        print(f"lerobot's policy is left out: {reason}")
        return draw_params(config), None
    from tests import lerobot_model

    model = lerobot_model.build(config)
    return convert_lerobot_rules.to_openpi(lerobot_model.weights(model), config), model


# ── Contenders: calls that return normalised actions [B, H, A] on the host ────────────────────────────────────────────


def ours(policy: Policy, requests: Sequence[Request], noise: np.ndarray) -> Callable[[], np.ndarray]:
    """The policy's own call: from requests to the robot's actions, which `Workload.transform` leaves normalised."""
    return lambda: np.stack([reply["actions"] for reply in policy.run(requests, noise=noise)])


def baseline(
    params: Params, config: Pi0Config, requests: Sequence[Request], noise: np.ndarray, num_steps: int
) -> Callable[[], np.ndarray]:
    """The openpi-style sampler, weights and inputs on the device beforehand."""
    run = jax.jit(openpi_style.sample_actions, static_argnums=(1, 4))
    weights, observation, start = jax.device_put(
        (params, all_cameras(config, [request.inputs for request in requests]), noise)
    )
    return lambda: np.asarray(run(weights, config, observation, start, num_steps))


def lerobot_refusal(config: Pi0Config, compiled: bool) -> str | None:
    """Why lerobot's policy cannot be timed here, or None."""
    if config.vlm.num_heads != 8:
        return "lerobot's code takes 8 heads for granted"
    return peers.missing("lerobot", gpu=False) or peers.missing("torch", gpu=compiled)


def lerobot(
    model: Any, config: Pi0Config, requests: Sequence[Request], noise: np.ndarray, num_steps: int, compiled: bool
) -> Callable[[], np.ndarray]:
    """`sample_actions` of lerobot's model (`tests.lerobot_model.build`), its inputs on the device beforehand."""
    from tests import lerobot_model

    torch, device = peers.torch(), peers.torch_device()
    arguments = lerobot_model.arguments(config, all_cameras(config, [request.inputs for request in requests]))
    start = torch.tensor(noise)
    if compiled:
        torch.compiler.reset()
        sample = torch.compile(model.sample_actions, mode=model.config.compile_mode)
    else:
        sample = model.sample_actions
    model.to(device).eval()
    images, masks, *rest = arguments
    images, masks = ([x.to(device) for x in each] for each in (images, masks))
    rest, start = [x.to(device) for x in rest], start.to(device)
    return lambda: sample(images, masks, *rest, noise=start, num_steps=num_steps).float().cpu().numpy()


def all_cameras(config: Pi0Config, inputs: Sequence[Mapping[str, Any]]) -> Observation:
    """Samples of `SampleTransform` as openpi sees them: every camera of the model, missing ones black and masked."""
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *inputs)
    shape = (len(inputs), config.image_size, config.image_size, 3)
    images = {camera: batch["images"].get(camera, np.zeros(shape, np.uint8)) for camera in config.cameras}
    nothing = np.zeros(len(inputs), bool)
    masks = {camera: batch["image_masks"].get(camera, nothing) for camera in config.cameras}
    return Observation(**{**batch, "images": images, "image_masks": masks})


def make_policy(model: Pi0, workload: Workload, batch: int, num_steps: int) -> Policy:
    """Compiled for this batch and for the bucket of the workload's prompt."""
    buckets = default_buckets(workload.config.max_token_len)
    bucket = next(length for length in buckets if length >= workload.prompt_tokens)
    return Policy(model, workload.transform(), num_steps=num_steps, batch_sizes=(batch,), prompt_buckets=(bucket,))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative norm of the difference."""
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
