"""Key ranges of the usual attention masks, for `prefix_lm_attention`: one interval of keys for each query.

    q, k, v = ...  # [B, T, N, C] and [B, S, K, C]
    out = prefix_lm_attention(q, k, v, *ranges.causal(batch, length), scale=head_dim**-0.5)

Every function returns int32 arrays `[B, T]`: query t of example b sees the keys `start[b, t] <= s < end[b, t]`. A query
that sees nothing has the range `[0, 0)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class KeyRanges(NamedTuple):
    """`key_start` and `key_end` of `prefix_lm_attention`."""

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]


def causal(batch: int, num_queries: int, num_keys: int | None = None) -> KeyRanges:
    """A query sees the keys up to its own token.

    The queries are the last `num_queries` of the `num_keys` tokens, as when decoding with a cache; None: all of them.

    Raises:
        ValueError: fewer keys than queries.
    """
    end = _positions(num_queries, num_keys) + 1
    return _rows(batch, jnp.zeros_like(end), end)


def sliding_window(batch: int, num_queries: int, num_keys: int | None = None, *, window: int) -> KeyRanges:
    """A query sees the last `window` keys up to its own token, itself included; else as `causal`.

    Raises:
        ValueError: fewer keys than queries, or a window without keys.
    """
    if window < 1:
        raise ValueError(f"window={window}: it counts the query's own token, so it is at least 1")
    end = _positions(num_queries, num_keys) + 1
    return _rows(batch, jnp.maximum(end - window, 0), end)


def packed(segment_ids: Int[Array, "B T"], *, causal: bool = True) -> KeyRanges:
    """Documents packed one after another: a query sees its own document, with `causal` up to its own token.

    segment_ids: neighbours with the same id are one document, 0 is padding and sees nothing. An id that comes back
        after another one is a new document.

    Raises:
        ValueError: segment_ids is not [B, T].
        TypeError: segment_ids are not integers.
    """
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, expected [B, T]; add the missing axes")
    _check_integers("segment_ids", segment_ids)
    num_tokens = segment_ids.shape[1]
    position = jnp.arange(num_tokens, dtype=jnp.int32)
    differs = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(segment_ids[:, :1], bool)
    start = lax.cummax(jnp.where(jnp.concatenate([edge, differs], axis=1), position, 0), axis=1)
    if causal:
        end = jnp.broadcast_to(position + 1, start.shape)
    else:
        last = jnp.concatenate([differs, edge], axis=1)
        end = lax.cummin(jnp.where(last, position + 1, num_tokens), axis=1, reverse=True)
    return _seen_where(segment_ids != 0, start, end)


def padded(lengths: Int[Array, " B"], num_tokens: int) -> KeyRanges:
    """An encoder with padding at the end: the first `lengths[b]` tokens see each other, padding sees nothing.

    Raises:
        ValueError: lengths is not [B].
        TypeError: lengths are not integers.
    """
    _check_lengths(lengths=lengths)
    end = jnp.broadcast_to(lengths[:, None], (*lengths.shape, num_tokens))
    return _seen_where(jnp.arange(num_tokens) < lengths[:, None], jnp.zeros_like(end), end)


def prefix_lm(prefix_lengths: Int[Array, " B"], num_tokens: int, lengths: Int[Array, " B"] | None = None) -> KeyRanges:
    """The prefix sees all of itself, later tokens see everything up to themselves.

    As PaliGemma's (https://arxiv.org/abs/2407.07726) images and prompt, and its answer.

    lengths: how many tokens are not padding, prefix included; None: all `num_tokens`. Padding sees nothing.

    Raises:
        ValueError: the lengths are not [B].
        TypeError: the lengths are not integers.
    """
    if lengths is None:
        lengths = jnp.full_like(prefix_lengths, num_tokens)
    _check_lengths(prefix_lengths=prefix_lengths, lengths=lengths)
    position = jnp.arange(num_tokens, dtype=jnp.int32)
    end = jnp.maximum(prefix_lengths[:, None], position + 1)
    return _seen_where(position < lengths[:, None], jnp.zeros_like(end), end)


def _positions(num_queries: int, num_keys: int | None) -> Int[Array, " T"]:
    """Where the queries stand among the keys."""
    num_keys = num_queries if num_keys is None else num_keys
    if num_keys < num_queries:
        raise ValueError(
            f"{num_queries} queries and {num_keys} keys: the queries are the last of the tokens that have keys; "
            "give at least as many keys"
        )
    return jnp.arange(num_keys - num_queries, num_keys, dtype=jnp.int32)


def _rows(batch: int, start: Int[Array, " T"], end: Int[Array, " T"]) -> KeyRanges:
    """The same ranges for every example."""
    return KeyRanges(*(jnp.broadcast_to(bound, (batch, *bound.shape)) for bound in (start, end)))


def _seen_where(sees: Bool[Array, "B T"], start: Int[Array, "B T"], end: Int[Array, "B T"]) -> KeyRanges:
    return KeyRanges(*(jnp.where(sees, bound, 0).astype(jnp.int32) for bound in (start, end)))


def _check_lengths(**lengths: Array) -> None:
    shape = next(iter(lengths.values())).shape
    for name, given in lengths.items():
        if given.ndim != 1 or given.shape != shape:
            raise ValueError(f"{name} has shape {given.shape}, expected [B], one length for each example")
        _check_integers(name, given)


def _check_integers(name: str, array: Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} is {array.dtype}; cast it to int32")
