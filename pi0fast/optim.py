"""The optimizer: AdamW with warm-up and cosine decay, global-norm clipping, and what is frozen."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax
from flax import nnx

from pi0fast.params import flatten


@dataclass(frozen=True)
class OptimConfig:
    """openpi's defaults.

    The learning rate warms up linearly from peak/(warmup_steps+1) to `peak_lr`, then follows a cosine to `end_lr` at
    `decay_steps` and stays there. ema_decay: average of the weights that inference uses; None to do without.
    """

    peak_lr: float = 2.5e-5
    end_lr: float = 2.5e-6
    warmup_steps: int = 1000
    decay_steps: int = 30_000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    ema_decay: float | None = 0.99

    def schedule(self) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=self.peak_lr / (self.warmup_steps + 1),
            peak_value=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.end_lr,
        )

    def optimizer(self) -> optax.GradientTransformation:
        adamw = optax.adamw(self.schedule(), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def frozen_filter(model: nnx.Module, freeze: str) -> Callable[[Any, Any], bool]:
    """An nnx filter for the weights that `freeze` names.

    freeze: comma-separated weight paths; a folder (`vlm`) stands for everything in it, `*` for any characters
        (`*/modulation`).

    Raises:
        ValueError: a pattern that matches no weight, or nothing left to train.
    """
    paths = list(flatten(model))
    patterns = [pattern.strip() for pattern in freeze.split(",") if pattern.strip()]

    def matches(path: str, pattern: str) -> bool:
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")

    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            tops = sorted({path.split("/")[0] for path in paths})
            raise ValueError(f"--freeze: {pattern!r} matches no weight; the top-level parts are {', '.join(tops)}")
    if all(any(matches(path, pattern) for pattern in patterns) for path in paths):
        raise ValueError(f"--freeze={freeze!r} leaves nothing to train; name fewer parts")
    return lambda path, _: any(matches("/".join(map(str, path)), pattern) for pattern in patterns)


def update_average(average: Any, weights: Any, decay: float) -> Any:
    """The exponential moving average after one more step."""
    return jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, weights)
