"""Normalisation statistics: computing them from a stream, applying and inverting them, openpi's norm_stats.json."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

EPSILON = 1e-6  # openpi's, in both formulas
MIN_SPREAD = 1e-4
BLOCK_ROWS = 1 << 14  # rows at a time, so that the float64 copies stay in cache


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics per dimension, each float64 `[d]`: mean, population standard deviation, 1 % and 99 % quantiles.

    Raises ValueError for arrays that differ in length, are not finite, or have std < 0 or q99 < q01.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    def __post_init__(self):
        for field in fields(self):
            value = np.asarray(getattr(self, field.name), dtype=np.float64)
            if value.ndim != 1 or value.shape != np.shape(self.mean) or not np.isfinite(value).all():
                raise ValueError(
                    f"{field.name} must be finite numbers of shape [d] like the mean's {np.shape(self.mean)}, got "
                    f"shape {value.shape}: {value}"
                )
            object.__setattr__(self, field.name, value)
        if (self.std < 0).any() or (self.q99 < self.q01).any():
            raise ValueError(f"std must not be negative, nor q99 below q01; got {self}")

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    def take(self, dim: int) -> "NormStats":
        """The first `dim` dimensions."""
        return NormStats(**{field.name: getattr(self, field.name)[:dim] for field in fields(self)})


def normalize(x: np.ndarray, stats: NormStats, *, quantiles: bool) -> np.ndarray:
    """`x [..., d]` → z-score, or with `quantiles` q01 → -1 and q99 → 1, without clipping (openpi, transforms.py)."""
    if quantiles:
        return (x - stats.q01) / (stats.q99 - stats.q01 + EPSILON) * 2.0 - 1.0
    return (x - stats.mean) / (stats.std + EPSILON)


def unnormalize(x: np.ndarray, stats: NormStats, *, quantiles: bool) -> np.ndarray:
    """The inverse of `normalize`."""
    if quantiles:
        return (x + 1.0) / 2.0 * (stats.q99 - stats.q01 + EPSILON) + stats.q01
    return x * (stats.std + EPSILON) + stats.mean


def compute(batches: Iterable[np.ndarray], *, exact_rows: int = 4_000_000, seed: int = 0) -> NormStats:
    """Statistics of all rows of `batches`, each `[n, d]`, in one pass and bounded memory (`exact_rows` rows).

    Mean and standard deviation are of every row, in float64: a two-pass variance per block, merged by Chan et al. 1979.
    Quantiles (numpy's linear ones) are of every row up to `exact_rows` rows; beyond, of a uniform sample of that many
    (reservoir sampling, Vitter 1985, seeded). The standard error of such a quantile's rank is
    sqrt(0.01 * 0.99 / exact_rows): with the default the "1 %" quantile is the (1 ± 0.005) % one.

    Raises ValueError when there is no row, when d changes, and for a value that is not finite.
    """
    rng = np.random.default_rng(seed)
    count, mean, deviations, sample = 0, np.zeros(0), np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        if batch.ndim != 2 or (count and batch.shape[1] != mean.shape[0]):
            expected = f"[n, {mean.shape[0]}]" if count else "[n, d]"
            raise ValueError(f"got a batch of shape {batch.shape} where {expected} was expected")
        for start in range(0, len(batch), BLOCK_ROWS):
            block = batch[start : start + BLOCK_ROWS]
            if not count:
                mean, deviations = np.zeros(batch.shape[1]), np.zeros(batch.shape[1])
                sample = np.empty((exact_rows, batch.shape[1]), batch.dtype)
            _check_finite(block, first_row=count)
            _fill_reservoir(sample, block, count, rng)
            count, mean, deviations = _merge_moments(block, count, mean, deviations)
    if not count:
        raise ValueError("no rows to compute statistics of; the data set is empty")
    kept = sample[: min(count, exact_rows)]
    q01, q99 = np.transpose([np.quantile(kept[:, dim], (0.01, 0.99)) for dim in range(kept.shape[1])])
    return NormStats(mean=mean, std=np.sqrt(deviations / count), q01=q01, q99=q99)


def narrow_dimensions(stats: NormStats) -> list[tuple[int, str, float]]:
    """`(dimension, "std" or "q99 - q01", value)` where dividing by the value makes small changes huge.

    That is below 1e-4, or for the quantile range below a fiftieth of the standard deviation: one standard deviation
    would then normalise to more than 100.
    """
    spread = stats.q99 - stats.q01
    narrow = [(dim, "std", value) for dim, value in enumerate(stats.std) if value < MIN_SPREAD]
    narrow += [
        (dim, "q99 - q01", value) for dim, value in enumerate(spread) if value < max(MIN_SPREAD, stats.std[dim] / 50)
    ]
    return [(dim, name, float(value)) for dim, name, value in narrow]


def to_dict(stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """The content of openpi's norm_stats.json."""
    return {
        "norm_stats": {
            key: {field.name: getattr(value, field.name).tolist() for field in fields(value)}
            for key, value in stats.items()
        }
    }


def save(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Write `{"state": ..., "actions": ...}` as openpi's norm_stats.json, atomically; makes the parent folders."""
    content = to_dict(stats)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def load(path: epath.PathLike) -> dict[str, NormStats]:
    """Read openpi's norm_stats.json, local or gs://: `{"norm_stats": {key: {mean, std, q01, q99}}}`.

    Raises FileNotFoundError, and ValueError naming the file and key when the content does not have that form.
    """
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"no statistics at {path}; compute them with `python -m pi0fast.norm_stats`")
    try:
        content = json.loads(epath.Path(path).read_text())["norm_stats"]
        entries = dict(content.items())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a norm_stats.json ({{"norm_stats": {{key: ...}}}}): {error!r}') from error
    stats = {}
    for key, entry in entries.items():
        try:
            stats[key] = NormStats(**{field.name: entry[field.name] for field in fields(NormStats)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {key!r} needs mean, std, q01 and q99 of one length: {error!r}") from error
    return stats


def _check_finite(block: np.ndarray, first_row: int) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        row, dim = np.argwhere(~finite)[0]
        raise ValueError(
            f"row {first_row + row}, dimension {dim} is {block[row, dim]}; remove or repair it, statistics need finite "
            "values"
        )


def _fill_reservoir(sample: np.ndarray, block: np.ndarray, count: int, rng: np.random.Generator) -> None:
    """Offer the rows `count`, `count + 1`, ...: a reservoir of k takes row i, somewhere, with chance k/(i+1)."""
    room = max(0, len(sample) - count)
    sample[count : count + len(block[:room])] = block[:room]
    rest = block[room:]
    slots = (rng.random(len(rest)) * (np.arange(len(rest)) + count + room + 1)).astype(np.int64)
    chosen = slots < len(sample)
    sample[slots[chosen]] = rest[chosen]  # of equal slots the last row stays, as it would one by one


def _merge_moments(block: np.ndarray, count: int, mean: np.ndarray, deviations: np.ndarray):
    """Count, mean and sum of squared deviations of the rows so far and the block's."""
    block = block.astype(np.float64)
    block_mean = block.mean(axis=0)
    block_deviations = np.square(block - block_mean).sum(axis=0)
    total, gap = count + len(block), block_mean - mean
    return (
        total,
        mean + gap * (len(block) / total),
        deviations + block_deviations + np.square(gap) * (count * len(block) / total),
    )
