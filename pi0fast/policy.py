"""A trained model behind one call: observations of a robot in, its actions out."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pi0fast import checkpoint, normalize
from pi0fast.checkpoint import RunConfig
from pi0fast.execution import Execution, Kernels
from pi0fast.observation import Observation
from pi0fast.params import replace
from pi0fast.pi0 import Pi0, check_kernels
from pi0fast.robots import Robot
from pi0fast.tokenizer import PromptTokenizer, resolve_tokenizer
from pi0fast.transforms import SampleTransform


class Policy:
    """Host transforms, one compiled call, and their inverse.

    num_steps: Euler steps from noise to actions. seed: of the noise; the same calls in the same order give the same
    actions. kernels: of attention and norms; `auto` takes the first that can run.

    Raises:
        ValueError: the named kernels cannot run here.
    """

    def __init__(
        self,
        model: Pi0,
        transform: SampleTransform,
        *,
        num_steps: int = 10,
        seed: int = 0,
        kernels: Kernels = "auto",
    ):
        execution = Execution(kernels=kernels)
        check_kernels(model.config, execution)
        self._transform = transform
        self._key = jax.random.key(seed)
        self._calls = 0
        graphdef, self._weights = nnx.split(model)
        shape = (model.config.action_horizon, model.config.action_dim)

        def sample(weights, observation: Observation, key):
            noise = jax.random.normal(key, (observation.state.shape[0], *shape))
            return nnx.merge(graphdef, weights).sample_actions(observation, noise, num_steps, execution=execution)

        self._sample = jax.jit(sample)

    @staticmethod
    def load(run: str | Path, *, num_steps: int = 10, seed: int = 0, kernels: Kernels = "auto") -> "Policy":
        """The newest checkpoint of a run.

        Raises:
            FileNotFoundError: `run` is not a run, or has no checkpoint yet.
            ValueError: the run does not say which robot it is for, or the named kernels cannot run here.
        """
        run = Path(run)
        config = RunConfig.load(run)
        if config.robot is None:
            raise ValueError(f"{run} does not say which robot it is for; convert it again with --robot")
        check_kernels(config.model, Execution(kernels=kernels))
        step = checkpoint.newest_checkpoint(run)
        abstract = nnx.eval_shape(lambda: Pi0(config.model, rngs=nnx.Rngs(0)))
        model = replace(abstract, checkpoint.load_arrays(step / "params"))
        stats = normalize.load(checkpoint.stats_path(step))
        return Policy(model, make_transform(config, stats), num_steps=num_steps, seed=seed, kernels=kernels)

    @property
    def robot(self) -> Robot:
        return self._transform.robot

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One observation → `actions` float32 [H, d] in the robot's units, and `infer_ms`, the time that it took.

        observation: the robot's data-set keys (images uint8 [height, width, 3]; state and its parts float), and
            `prompt`. A missing camera counts as masked.

        Raises:
            ValueError: naming the key that is missing or does not fit.
        """
        start = time.perf_counter()
        actions = self.infer_batch([observation])[0]
        return {"actions": actions, "infer_ms": (time.perf_counter() - start) * 1e3}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """As `infer`, for several observations at once: float32 [B, H, d]. Compiles once for each B."""
        samples = [_repack(observation, self.robot) for observation in observations]
        inputs = jax.tree.map(lambda *leaves: np.stack(leaves), *(self._transform(sample) for sample in samples))
        self._calls += 1
        actions = self._sample(self._weights, Observation(**inputs), jax.random.fold_in(self._key, self._calls))
        states = np.stack([sample["state"] for sample in samples])
        return self._transform.invert_actions(np.asarray(actions), states)


def make_transform(config: RunConfig, stats: Mapping[str, normalize.NormStats]) -> SampleTransform:
    """The host transforms of a run."""
    assert config.robot is not None
    tokenizer = PromptTokenizer(resolve_tokenizer(config.tokenizer), config.model.max_token_len)
    return SampleTransform(config.model, config.robot, stats, tokenizer)


def _repack(observation: Mapping[str, Any], robot: Robot) -> dict[str, Any]:
    """The robot's keys → the transform's."""
    if missing := [key for key in (*robot.state, "prompt") if key not in observation]:
        raise ValueError(f"the observation has no {missing}; it has {sorted(observation)}")
    images = {f"image.{camera}": observation[key] for camera, key in robot.cameras.items() if key in observation}
    state = np.concatenate([np.atleast_1d(observation[key]) for key in robot.state])
    return {**images, "state": state, "prompt": observation["prompt"]}
