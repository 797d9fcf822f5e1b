"""The variance of the gradient, as `bench.flow_samples` measures it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench import flow_samples
from pi0fast import Pi0
from tests.mini import MINI, batches

PAIRS = 40


def test_half_the_squared_distance_of_a_pair_has_the_trace_as_its_mean():
    """Of two weights with variances 4 and 1 around a mean that does not count."""
    draw = lambda key: {"a": 5 + 2 * jax.random.normal(key, ()), "b": jax.random.normal(key, (1,))}  # noqa: E731
    distances = jax.vmap(lambda key: flow_samples.half_squared_distance(draw, key))(
        jax.random.split(jax.random.key(0), 4000)
    )
    mean, error = flow_samples.mean_and_error(distances.tolist())
    assert mean == pytest.approx(5, abs=3 * error) and error < 0.15


def test_mean_and_standard_error_by_hand():
    mean, error = flow_samples.mean_and_error([1.0, 3.0, 5.0, 7.0])
    assert mean == 4 and error == pytest.approx(np.sqrt(20 / 3) / 2)


@pytest.mark.long
def test_the_variance_of_a_batch_falls_with_the_number_of_draws():
    model = Pi0(MINI, rngs=nnx.Rngs(0))
    pool = jax.tree.map(jnp.asarray, next(batches(MINI, 16)))
    found = {}
    for samples in (1, 4):
        distances = flow_samples.distances(model, pool, 2, samples, fixed=True, pairs=PAIRS, seed=samples)
        found[samples] = flow_samples.mean_and_error(distances)
    (one, one_error), (four, four_error) = found[1], found[4]
    assert 2 < one / four == pytest.approx(4, abs=3 * 4 * np.hypot(one_error / one, four_error / four))
