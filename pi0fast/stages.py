"""Where the time of the compiled call goes: its stages, each compiled by itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pi0fast.execution import Execution
from pi0fast.observation import Observation
from pi0fast.sampling import Sampler


@dataclass(frozen=True)
class Stages:
    """Calls that run one stage of a `Sampler` on given inputs and wait for its result.

    vision: images and prompt → embedded tokens. prefix: these → keys and values. steps: all steps from noise to
    actions; the last result is the sampler's. One after the other they do what the whole call does, but what passes
    between two goes through memory, and `steps` must copy the cache that the whole call writes in place.
    """

    vision: Callable[[], Any]
    prefix: Callable[[], Any]
    steps: Callable[[], jax.Array]

    @staticmethod
    def of(
        sampler: Sampler, observation: Observation, noise: np.ndarray, *, execution: Execution = Execution()
    ) -> "Stages":
        """Compiles the stages and runs the first two; the inputs go to the device beforehand."""
        observation, noise = jax.device_put((observation, noise))
        weights, structure = jax.tree.flatten(sampler)  # as in the policy's call, passed without Python's help

        def stage(run: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
            jitted = jax.jit(lambda weights, *inputs: run(jax.tree.unflatten(structure, weights), *inputs, execution))
            compiled = jitted.lower(weights, *inputs).compile()
            return lambda: jax.block_until_ready(compiled(weights, *inputs))

        vision = stage(lambda sampler, *inputs: sampler.model.embed_prefix(*inputs), observation)
        prefix = stage(Sampler.prefix, *vision())
        return Stages(vision, prefix, stage(Sampler.steps, observation.state, noise, *prefix()))

    def time(self) -> dict[str, float]:
        """Seconds of one run of each stage."""
        seconds = {}
        for name in ("vision", "prefix", "steps"):
            start = time.perf_counter()
            getattr(self, name)()
            seconds[name] = time.perf_counter() - start
        return seconds
