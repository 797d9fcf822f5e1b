"""Benchmarks run on whatever device JAX finds."""

import pytest

from bench.provenance import provenance


@pytest.fixture(scope="session")
def here():
    return provenance()


@pytest.fixture(autouse=True)
def say_where(benchmark, here):
    """Every result says what it was measured on."""
    benchmark.extra_info.update(here)
