"""Shapes that the models run, and what each costs at least: for benchmarks, tuning and tests.

Pi0 and Pi0.5 with three cameras of 256 tokens, and a prompt padded to 48 or 200 tokens. Pi0.5's action expert is
adaptive: scale, shift and gate come from the time of each example, in the dtype of the activations.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


@dataclass(frozen=True)
class Case:
    """One norm of one layer.

    residual: x is added to a residual first.
    adaptive: scale and shift are `[B, D]`, and with a residual so is a gate. Otherwise there is a float32 scale `[D]`.
    """

    name: str
    batch: int
    tokens: int
    width: int
    residual: bool = False
    adaptive: bool = False

    def inputs(self, seed: int = 0, dtype: DTypeLike = jnp.bfloat16) -> dict[str, Float[Array, "..."]]:
        """Keyword arguments of the op, standard normal."""
        data, modulation = (self.batch, self.tokens, self.width), (self.batch, self.width)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {"x": (data, dtype)}
        if self.residual:
            shapes["residual"] = data, dtype
        if self.adaptive:
            shapes |= {"scale": (modulation, dtype), "shift": (modulation, dtype)}
        else:
            shapes["scale"] = (self.width,), jnp.float32
        if self.adaptive and self.residual:
            shapes["gate"] = modulation, dtype
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {name: jax.random.normal(key, *shapes[name]) for name, key in zip(shapes, keys, strict=True)}

    def flops(self, backward: bool = False) -> int:
        """Operations on `[B, T, D]`, every one counted once; backward without the forward pass.

        Forward: square, sum, two products. Backward: the unit vector, its cotangent, their product, its sum; that times
        the unit vector, a difference, a product; scale's gradient, a product and a sum.
        """
        gated = self.adaptive and self.residual
        if backward:
            return (9 + self.adaptive + self.residual + 3 * gated) * self._elements()
        return (4 + self.adaptive + self.residual + gated) * self._elements()

    def bytes(self, backward: bool = False) -> int:
        """Least memory traffic with 16-bit data: each array is read or written once.

        Forward: x, residual, modulations → normed, new residual, float32 `rsqrt` of each token. Backward: what was
        normed, `rsqrt`, both cotangents, modulations (without shift), and with a gate x → the gradients of all inputs;
        without a gate, x and the residual share theirs.
        """
        gated = self.adaptive and self.residual
        passes = 3 + self.residual + 2 * gated if backward else 2 + 2 * self.residual
        modulation = 2 * self.batch * self.width if self.adaptive else 4 * self.width
        modulations = 1 + self.adaptive + gated
        touched = 2 * modulations - self.adaptive if backward else modulations
        return 2 * passes * self._elements() + 4 * self.batch * self.tokens + touched * modulation

    def shrunk(self) -> "Case":
        """The same structure, small enough for a CPU and for kernels in an interpreter."""
        return replace(self, batch=min(self.batch, 2), tokens=min(self.tokens // 8, 7), width=self.width // 32)

    def _elements(self) -> int:
        return self.batch * self.tokens * self.width


CASES = (
    Case("pi0_prefix", 32, 816, 2048, residual=True),
    Case("pi0_suffix", 32, 51, 1024),
    Case("pi0_inference", 1, 51, 1024, residual=True),
    Case("pi05_prefix", 32, 968, 2048, residual=True),
    Case("pi05_suffix", 32, 50, 1024, residual=True, adaptive=True),
    Case("pi05_inference", 1, 50, 1024, residual=True, adaptive=True),
)
