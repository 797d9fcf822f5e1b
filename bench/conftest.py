"""Benchmarks run on whatever device JAX finds."""

import jax
import pytest


@pytest.fixture(autouse=True)
def provenance(benchmark):
    """Every result says what it was measured on."""
    device = jax.devices()[0]
    benchmark.extra_info.update(device=device.device_kind, platform=device.platform, jax=jax.__version__)
