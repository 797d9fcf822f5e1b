"""Real-time chunking: the next chunk is sampled while the last one is executed, and guided to agree with it.

Black, Galliker & Levine 2025 (https://arxiv.org/abs/2506.07339). The client (`broker.ActionBroker`) sends what is left
of the chunk in execution with its observation; here it becomes what `flow.guided` pulls the samples to, and how firmly.

Letters: H action horizon, A the model's action dimension, d the robot's own, m steps that are left, at most H.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from pi0fast.repack import as_array
from pi0fast.transforms import SampleTransform

Schedule = Literal["exponential", "linear", "ones", "zeros"]

PREVIOUS_ACTIONS, DELAY = "rtc/previous_actions", "rtc/delay"


@dataclass(frozen=True)
class RtcConfig:
    """How firmly a chunk is held to the one before it.

    Args:
        delay: steps that are executed before the chunk arrives, for observations that do not say; they are held in
            full.
        execute: steps at the end of the chunk that stay free, even if actions for them are left. By default the
            paper's: a client that has executed s actions has H - s left.
        schedule: of the steps between, see `prefix_weights`.
        max_guidance: the paper's β, the bound of the guidance's factor. More follows the last chunk more closely, and
            may diverge with few sampling steps.

    Raises:
        ValueError: a value out of its range.
    """

    delay: int = 0
    execute: int = 0
    schedule: Schedule = "exponential"
    max_guidance: float = 5.0

    def __post_init__(self):
        if min(self.delay, self.execute) < 0:
            raise ValueError(f"delay={self.delay} and execute={self.execute} are counts of steps; give 0 or more")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r} is not one of {', '.join(get_args(Schedule))}")
        if not 0 <= self.max_guidance < float("inf"):
            raise ValueError(f"max_guidance={self.max_guidance} must be finite and not negative; the paper takes 5")

    def check(self, horizon: int) -> None:
        """Raises: ValueError: the chunk has no room for `delay` steps to hold and `execute` free ones."""
        prefix_weights(horizon, self.delay, self.execute, self.schedule)


def prefix_weights(horizon: int, delay: int, execute: int, schedule: Schedule = "exponential") -> np.ndarray:
    """How firmly each step of a chunk is held to the last one, float32 `[horizon]` in [0, 1].

    1 for the first `delay` steps, which are executed while the chunk is computed; 0 for the last `execute` ones, for
    which the last chunk has no actions. Between them, with c falling evenly towards 0: c (e^c - 1) / (e - 1) for
    `exponential`, c for `linear`, all held for `ones`, all free for `zeros`.

    Raises:
        ValueError: the two parts overlap or are negative, or an unknown schedule.
    """
    if not 0 <= delay <= horizon - execute <= horizon:
        raise ValueError(
            f"delay={delay}, execute={execute}: real-time chunking needs 0 <= delay <= horizon - execute with the "
            f"model's horizon {horizon}; ask for the next chunk earlier (a smaller execute), or make inference faster"
        )
    step, end = np.arange(horizon), horizon - execute
    falling = np.clip((end - step) / (end - delay + 1), 0, 1)
    match schedule:
        case "exponential":
            between = falling * np.expm1(falling) / np.expm1(1.0)
        case "linear":
            between = falling
        case "ones":
            between = np.ones(horizon)
        case "zeros":
            between = np.zeros(horizon)
        case _:
            raise ValueError(f"schedule={schedule!r} is not one of {', '.join(get_args(Schedule))}")
    return np.where(step < delay, 1.0, np.where(step < end, between, 0.0)).astype(np.float32)


def guidance(
    transform: SampleTransform, previous_actions: Any, delay: Any, state: np.ndarray, config: RtcConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the last chunk → target float32 `[H, A]` and weight float32 `[H]` of the next one.

    Dimensions that pad the robot's are held at 0, as they are in training.

    previous_actions: `[m, d]` in the robot's units, absolute; row 0 is executed at the time of the observation.
    delay: steps until the next chunk takes over; None takes the config's. More than are left counts as all of them.
    state: the observation's own, raw `[ds]`: relative actions are relative to it.

    Raises:
        ValueError: naming the key that does not fit.
    """
    horizon, dim = transform.config.action_horizon, transform.action_stats.dim
    previous = as_array(PREVIOUS_ACTIONS, previous_actions)
    if previous.ndim != 2 or not 0 < len(previous) <= horizon or previous.shape[1] != dim:
        raise ValueError(
            f"{PREVIOUS_ACTIONS} has shape {list(previous.shape)}, expected [m, {dim}] with m from 1 to {horizon}: the "
            "actions that are not executed yet; leave the key out when none is left"
        )
    if delay is None:
        delay = config.delay
    elif np.ndim(delay) or not np.issubdtype(np.asarray(delay).dtype, np.integer) or not 0 <= delay <= horizon:
        raise ValueError(f"{DELAY} is {delay!r}, expected a whole number of steps from 0 to {horizon}")
    state = np.asarray(state, np.float64)
    target = transform.model_actions(previous, state, steps=len(previous), key=PREVIOUS_ACTIONS)
    end = min(len(previous), horizon - config.execute)
    weight = prefix_weights(horizon, min(int(delay), end), horizon - end, config.schedule)
    return np.pad(target, [(0, horizon - len(previous)), (0, 0)]), weight
