"""The learning-rate schedule, and what --freeze names."""

import numpy as np
import pytest
from flax import nnx

from pi0fast import Pi0, config, optim
from pi0fast.optim import OptimConfig
from pi0fast.params import flatten


def test_schedule():
    rate = OptimConfig().schedule()
    np.testing.assert_allclose(rate(0), 2.5e-5 / 1001, rtol=1e-5, atol=1e-11)  # float32, of the peak
    np.testing.assert_allclose(rate(1000), 2.5e-5, rtol=1e-5)
    np.testing.assert_allclose(rate(15_500), (2.5e-5 + 2.5e-6) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(40_000), 2.5e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: Pi0(config.pi0_tiny(), rngs=nnx.Rngs(0)))


def frozen(model, freeze):
    _, state, _ = nnx.split(model, optim.frozen_filter(model, freeze), ...)
    return set(flatten(state))


def test_freeze_folders_and_patterns(model):
    paths = set(flatten(model))
    assert frozen(model, "") == set()
    assert frozen(model, "vlm, embedding") == {p for p in paths if p.startswith("vlm/") or p == "embedding"}
    assert frozen(model, "*/bias") == {p for p in paths if p.endswith("/bias")}


@pytest.mark.parametrize(
    ("freeze", "message"), [("vlm,llm", "'llm' matches no weight"), ("*", "leaves nothing to train")]
)
def test_freeze_that_makes_no_sense(model, freeze, message):
    with pytest.raises(ValueError, match=message):
        optim.frozen_filter(model, freeze)


def test_average():
    averaged = optim.update_average({"w": np.array(1.0)}, {"w": np.array(2.0)}, 0.9)
    np.testing.assert_allclose(averaged["w"], 1.1)
