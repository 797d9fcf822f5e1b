"""Benchmarks run on whatever device JAX finds; what it does at most is measured first."""

from pathlib import Path

import pytest

from bench import ceilings, results


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="append each result to this file as it ends, as JSON lines")


@pytest.fixture(scope="session")
def here():
    return ceilings.here()


@pytest.fixture(autouse=True)
def say_where(benchmark, here, request):
    """Every result says what it was measured on, and is kept at once."""
    benchmark.extra_info.update(here)
    yield
    path = request.config.getoption("--results")
    if path and benchmark.stats:
        seconds = benchmark.stats.stats.data
        results.append(path, benchmark.fullname, benchmark.group or "", seconds, benchmark.extra_info)
