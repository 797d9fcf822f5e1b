"""Benchmarks run on whatever device JAX finds."""

from importlib import metadata

import jax
import pytest

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "tokamax", "pi0fast")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture(autouse=True)
def provenance(benchmark):
    """Every result says what it was measured on, and with which versions."""
    device = jax.devices()[0]
    benchmark.extra_info.update(
        device=device.device_kind,
        platform=device.platform,
        runtime=device.client.platform_version,
        versions={package: _version(package) for package in PACKAGES},
    )
