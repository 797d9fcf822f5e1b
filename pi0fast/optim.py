"""The optimizer: AdamW with warm-up and cosine decay, and global-norm clipping."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with openpi's defaults.

    The learning rate warms up linearly from peak/(warmup_steps+1), then follows a cosine and stays at its end.

    Args:
        peak_lr: the learning rate after `warmup_steps`.
        end_lr: the learning rate from `decay_steps` on.
        warmup_steps: until the peak.
        decay_steps: until the end, counted from the first step on.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of every trained weight, times the learning rate.
        clip_norm: gradients with a larger global norm are scaled down to it.
        mu_dtype: of the first moment; bfloat16 halves its memory.
        second_moment: `factored` keeps a row and a column of means for each matrix in place of one value for each
            weight.
        ema_decay: of the average of the weights that inference uses; None to do without.
        ema_on_host: the average lies in the host's memory, and passes through the device once a step.
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
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    second_moment: Literal["float32", "factored"] = "float32"
    ema_decay: float | None = 0.99
    ema_on_host: bool = False

    def check(self) -> None:
        """Raises: ValueError: a number out of range."""
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise ValueError(
                f"--optim.warmup-steps={self.warmup_steps} must be at least 0 and less than --optim.decay-steps="
                f"{self.decay_steps}, which counts from the first step on"
            )
        if not self.peak_lr > 0 or not self.clip_norm > 0:
            raise ValueError(f"--optim.peak-lr={self.peak_lr} and --optim.clip-norm={self.clip_norm} must be positive")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"--optim.ema-decay={self.ema_decay} must be at least 0 and less than 1, or None")

    def schedule(self) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=self.peak_lr / (self.warmup_steps + 1),
            peak_value=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.end_lr,
        )

    def optimizer(self) -> optax.GradientTransformation:
        clip = optax.clip_by_global_norm(self.clip_norm)
        if self.second_moment == "factored":
            return optax.chain(clip, self._factored())
        adamw = optax.adamw(
            self.schedule(),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mu_dtype=self.mu_dtype,
        )
        return optax.chain(clip, adamw)

    def _factored(self) -> optax.GradientTransformation:
        """AdamW with Adafactor's second moment (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235).

        As there, the first moment is of gradients that the second has scaled already. The decay of the second moment is
        Adam's, its correction of the start included: b2 (1 - b2^(t-1)) / (1 - b2^t). Matrices with a side under 128,
        and vectors, keep a value for each weight. All of it lies whole on every device.
        """

        def decay(count, b2):
            t = count.astype(jnp.float32) + 1
            return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)

        return optax.chain(
            on_arrays(optax.scale_by_factored_rms(decay_rate=self.b2, epsilon=self.eps**2, decay_rate_fn=decay)),
            optax.ema(self.b1, debias=True, accumulator_dtype=self.mu_dtype),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.schedule()),
        )

    def check_resumes(self, begun: Mapping[str, Any]) -> None:
        """Raises: ValueError: a run that began with these fields keeps another state than this one would."""
        for name, was, now in (
            ("mu_dtype", begun.get("mu_dtype", "float32"), self.mu_dtype),
            ("second_moment", begun.get("second_moment", "float32"), self.second_moment),
            ("ema_decay", begun.get("ema_decay", self.ema_decay), self.ema_decay),
        ):
            if was != now and (name != "ema_decay" or None in (was, now)):
                flag = f"--optim.{name.replace('_', '-')}"
                raise ValueError(
                    f"the run began with {flag}={was} and cannot go on with {now}: give {flag}={was}, or another --out "
                    "and this run as --init-from, which starts with its weights and new moments"
                )


def on_arrays(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose state has other shapes than the weights and cannot carry their metadata: plain arrays by path."""

    def by_path(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def update(updates, state, params=None):
        made, state = inner.update(by_path(updates), state, by_path(params))
        found: Any = made
        return jax.tree_util.tree_map_with_path(lambda path, _: found[jax.tree_util.keystr(path)], updates), state

    return optax.GradientTransformation(lambda params: inner.init(by_path(params)), update)


def update_average(average: Any, weights: Any, decay: float) -> Any:
    """The exponential moving average after one more step, on the device."""
    average = jax.device_put(average, jax.memory.Space.Device)  # which leaves what is there as it is
    return jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, weights)
