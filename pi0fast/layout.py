"""Where tokens stand and what each may see: order, positions and key ranges.

After RoPE the order of keys is free. Keys are ordered `[actions | state | valid prefix | padding]`, so that whatever a
query sees is one interval: an action sees from 0, the state from H, both to the end of the valid prefix. Prefix queries
attend to the prefix keys alone: `[0, number of valid prefix tokens)`.

The rule behind it (`c = cumsum(autoregressive flag)`, query i sees valid key j iff `c[j] <= c[i]`) makes three blocks:
prefix, state, actions. Padding and masked cameras consume no position.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefixLayout:
    """The layout of one batch.

    token_order: which prefix token comes at each place, valid ones first; None leaves the tokens where they are.
    key_order: the same for the keys of a layer, when the tokens stay where they are.
    num_valid: valid prefix tokens of each example.
    prefix_start, prefix_end: the keys that each prefix query sees, among the prefix keys; a padding query sees none.
    suffix_start, suffix_end: the keys that each suffix query sees, among suffix and prefix keys.
    """

    token_order: Int[Array, "B P"] | None
    key_order: Int[Array, "B P"] | None
    num_valid: Int[Array, " B"]
    prefix_positions: Int[Array, "B P"]
    prefix_start: Int[Array, "B P"]
    prefix_end: Int[Array, "B P"]
    suffix_positions: Int[Array, "B S"]
    suffix_start: Int[Array, "B S"]
    suffix_end: Int[Array, "B S"]

    @staticmethod
    def build(
        valid: Bool[Array, "B P"], *, action_horizon: int, has_state: bool, compact: bool = True
    ) -> "PrefixLayout":
        """The layout of a prefix whose valid tokens are marked, followed by a suffix.

        The suffix tokens are the actions, then Pi0's state; in position the state comes before the actions.
        """
        batch = valid.shape[0]
        num_valid = jnp.sum(valid, axis=1, dtype=jnp.int32)
        positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        order = jnp.argsort(jnp.logical_not(valid), axis=1, stable=True).astype(jnp.int32)
        if compact:
            positions, valid = (jnp.take_along_axis(x, order, axis=1) for x in (positions, valid))

        num_state = int(has_state)
        offsets = np.concatenate([num_state + np.arange(action_horizon), np.arange(num_state)]).astype(np.int32)
        starts = np.repeat(np.array([0, action_horizon], np.int32), [action_horizon, num_state])
        suffix_shape = (batch, action_horizon + num_state)
        return PrefixLayout(
            token_order=order if compact else None,
            key_order=None if compact else order,
            num_valid=num_valid,
            prefix_positions=positions,
            prefix_start=jnp.zeros_like(positions),
            prefix_end=jnp.where(valid, num_valid[:, None], 0),
            suffix_positions=num_valid[:, None] + offsets,
            suffix_start=jnp.broadcast_to(starts, suffix_shape),
            suffix_end=jnp.broadcast_to(num_valid[:, None] + action_horizon + num_state, suffix_shape),
        )

    def order_tokens(self, tokens: Array) -> Array:
        """Prefix tokens `[B, P, ...]` in this layout's order."""
        return _take(tokens, self.token_order)

    def order_keys(self, keys: Array) -> Array:
        """Keys or values `[B, P, ...]` of prefix tokens, with the valid ones first."""
        return _take(keys, self.key_order)


def _take(x: Array, order: Int[Array, "B P"] | None) -> Array:
    if order is None:
        return x
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def repeat(x: Array, rows: int) -> Array:
    """Each row of x as often in turn as makes `rows` of them; x itself where it has as many."""
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0, total_repeat_length=rows)
