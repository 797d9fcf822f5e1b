"""What a result was measured on, and with which versions."""

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda13-plugin",
    "flax",
    "jax-triton",
    "triton",
    "torch",
    "tokamax",
    "lerobot",
    "pi0fast",
)


COMMIT_VARIABLE = "PI0FAST_COMMIT"  # says it where the files are no git checkout


def provenance() -> dict[str, Any]:
    """Device and its clocks now, processors that this process may use, versions, and the commit, marked where files
    differ from it."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": commit(),
        "clocks": _clocks(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """That the files are of, with `-dirty` where they differ from it."""
    return os.environ.get(COMMIT_VARIABLE) or _git("describe", "--always", "--dirty", "--abbrev=12")


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
    return _output("git", *arguments)


def _clocks(device: Any) -> dict[str, str] | None:
    """Of an NVIDIA GPU, as nvidia-smi names and gives them."""
    if device.platform != "gpu" or shutil.which("nvidia-smi") is None:
        return None
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    index = str(device.local_hardware_id)
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        index = shown.split(",")[int(index)]
    found = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return dict(zip(names, found.split(", "), strict=True)) if found else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
