"""Shapes that the models run, and what each costs at least: for benchmarks, tuning and tests.

Pi0 and Pi0.5 with three cameras of 256 tokens, and a prompt padded to 48 or 200 tokens; SigLIP So400m/14 over 32
examples; and causal attention as other models have it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Case:
    """One attention of one layer.

    mask: what queries see.
        `all`: every key, without ranges.
        `causal`: the keys up to the query's own.
        `prefix`: the first tokens are valid and see each other, padding sees nothing.
        `suffix`: keys are `[actions | states | valid prefix | padding]`; actions see from the first key on, states from
            the first state on, both to the end of the valid prefix. The queries are the actions and states.
    valid: how many prefix tokens are valid, at least and at most; the examples are spread evenly over that.
    states: how many of a suffix's tokens are states.
    """

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Literal["all", "causal", "prefix", "suffix"]
    valid: tuple[int, int] = (0, 0)
    states: int = 0

    @property
    def scale(self) -> float:
        """What logits are multiplied with."""
        return self.head_dim**-0.5

    def inputs(
        self, seed: int = 0, dtype: Any = jnp.bfloat16
    ) -> tuple[
        Float[Array, "B T N C"],
        Float[Array, "B S K C"],
        Float[Array, "B S K C"],
        Int[Array, "B T"] | None,
        Int[Array, "B T"] | None,
    ]:
        """q, k, v (standard normal), key_start, key_end; the ranges are the same for every seed."""
        heads = (self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)
        q, k, v = (
            jax.random.normal(key, (self.batch, *shape, self.head_dim), dtype)
            for key, shape in zip(jax.random.split(jax.random.key(seed), 3), heads, strict=True)
        )
        if self.mask == "all":
            return q, k, v, None, None
        start, end = jnp.moveaxis(jnp.array(self.intervals(), jnp.int32), -1, 0)
        return q, k, v, start, end

    def flops(self, backward: bool = False) -> int:
        """Of the matrix products of visible query-key pairs: two forward, five backward (without the forward pass)."""
        pairs = sum(end - start for example in self.intervals() for start, end in example)
        return (10 if backward else 4) * self.head_dim * self.heads * pairs

    def bytes(self, backward: bool = False) -> int:
        """Least memory traffic with 16-bit arrays: each is read or written once.

        Forward: q, k, v → out. Backward: those, out's gradient and the float32 logsumexp → the gradients of q, k, v.
        """
        rows, tokens = self.batch * self.queries, self.batch * self.keys
        queries, keys = rows * self.heads * self.head_dim, tokens * self.kv_heads * self.head_dim
        ranges = 0 if self.mask == "all" else 2 * 4 * rows
        if backward:
            return 2 * (4 * queries + 4 * keys) + 4 * rows * self.heads + ranges
        return 2 * (2 * queries + 2 * keys) + ranges

    def shrunk(self) -> "Case":
        """The same structure, small enough for a CPU and for kernels in an interpreter."""

        def few(tokens: int) -> int:
            return min(tokens // 16, 64)

        queries = few(self.queries - self.states) + self.states
        kv_heads = min(self.kv_heads, 2)
        return replace(
            self,
            batch=min(self.batch, 2),
            queries=queries,
            keys=queries + few(self.keys - self.queries),
            heads=kv_heads * min(self.heads // self.kv_heads, 4),
            kv_heads=kv_heads,
            head_dim=self.head_dim // 4,
            valid=(few(self.valid[0]), few(self.valid[1])),
        )

    def intervals(self) -> list[list[tuple[int, int]]]:
        """The keys that each query of each example sees."""
        least, most = self.valid
        steps = max(self.batch - 1, 1)
        return [self._example(least + (most - least) * b // steps) for b in range(self.batch)]

    def _example(self, valid: int) -> list[tuple[int, int]]:
        match self.mask:
            case "all":
                return self.queries * [(0, self.keys)]
            case "causal":
                return [(0, self.keys - self.queries + t + 1) for t in range(self.queries)]
            case "prefix":
                return valid * [(0, valid)] + (self.queries - valid) * [(0, 0)]
            case "suffix":
                actions, end = self.queries - self.states, self.queries + valid
                return actions * [(0, end)] + self.states * [(actions, end)]


# Pi0: 20 to 48 prompt tokens are valid; Pi0.5, whose prompt has the state as text: 80 to 200.
PI0, PI05 = (768 + 20, 768 + 48), (768 + 80, 768 + 200)

CASES = (
    Case("pi0_prefix", 32, 816, 816, 8, 1, 256, "prefix", PI0),
    Case("pi0_suffix", 32, 51, 867, 8, 1, 256, "suffix", PI0, states=1),
    Case("pi0_inference", 1, 51, 867, 8, 1, 256, "suffix", PI0, states=1),
    Case("pi05_prefix", 32, 968, 968, 8, 1, 256, "prefix", PI05),
    Case("pi05_suffix", 32, 50, 1018, 8, 1, 256, "suffix", PI05),
    Case("pi05_inference", 1, 50, 1018, 8, 1, 256, "suffix", PI05),
    Case("siglip", 96, 256, 256, 16, 16, 72, "all"),
    Case("causal", 4, 4096, 4096, 8, 1, 256, "causal"),
    Case("causal_gqa", 2, 4096, 4096, 32, 8, 128, "causal"),
)
