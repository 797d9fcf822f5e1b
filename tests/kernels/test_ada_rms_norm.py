"""The reference against its formula in float64; its gradients; and the op's checks of its input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pi0fast_kernels import ada_rms_norm
from tests.kernels.test_prefix_lm_attention import unchecked

B, T, D = 2, 5, 24


def arrays(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def formula(x, scale, shift: Any = 0.0, residual: Any = None, gate: Any = 1.0):
    x, scale, shift, gate = (np.asarray(a, np.float64) for a in (x, scale, shift, gate))
    scale, shift, gate = (a[:, None] if a.ndim == 2 else a for a in (scale, shift, gate))
    total = x if residual is None else np.asarray(residual, np.float64) + gate * x
    return total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale) + shift, total


@pytest.mark.parametrize("per_example", [False, True])
def test_values(per_example):
    modulation = (B, D) if per_example else (D,)
    x, residual, scale, shift, gate = arrays((B, T, D), (B, T, D), modulation, modulation, modulation)
    np.testing.assert_allclose(ada_rms_norm(x, scale), formula(x, scale)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ada_rms_norm(x, scale, shift), formula(x, scale, shift)[0], rtol=1e-5, atol=1e-5)
    for gate_or_none in (gate, None):
        expected = formula(x, scale, shift, residual, 1.0 if gate_or_none is None else gate)
        actual = ada_rms_norm(x, scale, shift, residual=residual, gate=gate_or_none)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_differences():
    x, residual, scale, shift, gate = arrays((B, T, D), (B, T, D), (B, D), (B, D), (B, D))

    def total(*arguments):
        x, residual, scale, shift, gate = map(jnp.asarray, arguments)
        normed, kept = ada_rms_norm(x, scale, shift, residual=residual, gate=gate)
        return jnp.sum(jnp.sin(normed)) + jnp.sum(jnp.cos(kept))

    check_grads(total, (x, residual, scale, shift, gate), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_a_row_of_zeros_is_finite():
    normed = ada_rms_norm(jnp.zeros((1, 1, D)), jnp.ones(D))
    gradient = jax.grad(lambda x: jnp.sum(ada_rms_norm(x, jnp.ones(D))))(jnp.zeros((1, 1, D)))
    assert not normed.any() and np.isfinite(gradient).all()


def test_half_precision_rounds_the_residual_before_the_norm():
    x, residual, scale = arrays((B, T, D), (B, T, D), (D,), dtype=jnp.bfloat16)
    normed, total = ada_rms_norm(x, scale, residual=residual)
    assert normed.dtype == total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, ada_rms_norm(total, scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((T, D))}, r"expected \[B, T, D\]"),
        ({"scale": jnp.zeros(D + 1)}, "scale has shape"),
        ({"residual": jnp.zeros((B, T, D), jnp.bfloat16)}, "give both alike"),
        ({"gate": jnp.zeros(D)}, "pass residual too"),
        ({"implementation": "cuda"}, "no implementation 'cuda'; it has reference"),
    ],
)
def test_malformed_input(change, message):
    arguments = {"x": jnp.zeros((B, T, D)), "scale": jnp.zeros(D), **change}
    with pytest.raises(ValueError, match=message):
        unchecked(ada_rms_norm)(**arguments)
