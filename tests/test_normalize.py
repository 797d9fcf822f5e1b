import json

import numpy as np
import pytest

from pi0fast import normalize
from pi0fast.normalize import NormStats

RNG = np.random.default_rng(0)
# The form of the file in an openpi checkpoint's assets.
OPENPI_FILE = {
    "norm_stats": {
        "state": {"mean": [0.1, 2.0], "std": [0.5, 1.0], "q01": [-1.0, 0.0], "q99": [1.2, 4.0]},
        "actions": {"mean": [0.0], "std": [0.3], "q01": [-0.9], "q99": [0.8]},
    }
}


def test_formulas_by_hand():
    stats = NormStats(*np.array([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0], [5.0, 0.0]]))  # mean, std, q01, q99
    x = np.array([5.0, 0.0])
    np.testing.assert_allclose(normalize.normalize(x, stats, quantiles=False), [4 / 2.000001, 0.0], rtol=1e-12)
    np.testing.assert_allclose(normalize.normalize(x, stats, quantiles=True), [8 / 8.000001 * 2 - 1, -1.0], rtol=1e-12)
    # No clipping.
    assert normalize.normalize(np.array([13.0, 0.0]), stats, quantiles=True)[0] == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("quantiles", [False, True])
def test_inverse(quantiles):
    stats = normalize.compute([RNG.standard_normal((100, 5)) * 3 + 7])
    x = RNG.standard_normal((4, 6, 5)) * 10
    there = normalize.normalize(x, stats, quantiles=quantiles)
    np.testing.assert_allclose(normalize.unnormalize(there, stats, quantiles=quantiles), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streaming_is_exact_below_the_limit(dtype):
    x = (RNG.gamma(2.0, size=(50_003, 3)) * [1, 100, 1e-3]).astype(dtype)
    stats = normalize.compute(np.split(x, [1, 7, 7, 20_000]))
    np.testing.assert_allclose(stats.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(stats.std, x.astype(np.float64).std(axis=0), rtol=1e-12)
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    np.testing.assert_array_equal(stats.q01, q01)
    np.testing.assert_array_equal(stats.q99, q99)


def test_variance_survives_a_large_offset():
    x = RNG.standard_normal((40_000, 1))
    stats = normalize.compute(np.split(x + 1e8, 10))
    assert stats.std[0] == pytest.approx((x + 1e8).std(), rel=1e-9)
    assert stats.std[0] == pytest.approx(x.std(), rel=1e-6)


def test_quantiles_beyond_the_limit_are_of_a_uniform_sample():
    """A rising stream, so that a sample that favours early or late rows is far off; 5 standard errors of the rank."""
    rows, kept = 400_000, 20_000
    x = np.arange(rows, dtype=np.float64)[:, None] / rows
    stats = normalize.compute(np.split(x, 40), exact_rows=kept)
    tolerance = 5 * np.sqrt(0.01 * 0.99 / kept)
    assert stats.q01[0] == pytest.approx(0.01, abs=tolerance)
    assert stats.q99[0] == pytest.approx(0.99, abs=tolerance)
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, x.std(axis=0), rtol=1e-12)
    again = normalize.compute([x], exact_rows=kept)
    assert (again.q01, again.q99) == (stats.q01, stats.q99)


def test_compute_refuses():
    with pytest.raises(ValueError, match="no rows"):
        normalize.compute([])
    with pytest.raises(ValueError, match="no rows"):
        normalize.compute([np.zeros((0, 3))])
    with pytest.raises(ValueError, match=r"shape \(4, 2\) where \[n, 3\]"):
        normalize.compute([np.zeros((4, 3)), np.zeros((4, 2))])
    with pytest.raises(ValueError, match=r"shape \(4,\) where \[n, d\]"):
        normalize.compute([np.zeros(4)])
    for value in (np.nan, -np.inf):
        x = np.zeros((40_000, 3))
        x[30_000, 1] = value
        with pytest.raises(ValueError, match=f"row 30005, dimension 1 is {value}"):
            normalize.compute([np.zeros((5, 3)), x])


def test_narrow_dimensions():
    std, q99 = np.array([[1.0, 0.0, 1.0, 2e-4], [2.0, 0.0, 0.01, 3e-4]])
    stats = NormStats(mean=np.zeros(4), std=std, q01=np.zeros(4), q99=q99)
    assert normalize.narrow_dimensions(stats) == [(1, "std", 0.0), (1, "q99 - q01", 0.0), (2, "q99 - q01", 0.01)]


def test_reads_and_writes_openpis_file(tmp_path):
    path = tmp_path / "assets" / "norm_stats.json"
    path.parent.mkdir()
    path.write_text(json.dumps(OPENPI_FILE))
    stats = normalize.load(path)
    assert stats["state"].q99.tolist() == [1.2, 4.0] and stats["actions"].dim == 1
    other = tmp_path / "new" / "folder" / "norm_stats.json"
    normalize.save(other, stats)
    assert json.loads(other.read_text()) == OPENPI_FILE
    assert list(other.parent.iterdir()) == [other]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a norm_stats.json"),
        ("[1]", "is not a norm_stats.json"),
        ('{"stats": {}}', "is not a norm_stats.json"),
        ('{"norm_stats": {"state": {"mean": [1], "std": [1], "q01": [0]}}}', "'state' needs .*KeyError\\('q99'\\)"),
        ('{"norm_stats": {"state": {"mean": [1], "std": [1, 2], "q01": [0], "q99": [1]}}}', "'state' needs .*std must"),
        ('{"norm_stats": {"state": {"mean": [NaN], "std": [1], "q01": [0], "q99": [1]}}}', "mean must be finite"),
        ('{"norm_stats": {"state": {"mean": [1], "std": [-1], "q01": [0], "q99": [1]}}}', "must not be negative"),
        ('{"norm_stats": {"state": {"mean": ["a"], "std": [1], "q01": [0], "q99": [1]}}}', "'state' needs"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    path = tmp_path / "norm_stats.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        normalize.load(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m pi0fast.norm_stats"):
        normalize.load(tmp_path / "norm_stats.json")
