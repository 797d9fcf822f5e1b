"""What a result was measured on, and with which versions."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "jax-triton", "triton", "torch", "tokamax", "lerobot", "pi0fast")


def provenance() -> dict[str, Any]:
    """Device, processors that this process may use, versions, and the commit, marked where files differ from it."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
    }


def _processor() -> str:
    """The model's name on Linux, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Its output, or None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
