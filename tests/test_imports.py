"""The import rules of the house: who may import what, and that importing starts nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "pi0fast_kernels"
PACKAGE = ROOT / "pi0fast"

MODEL = (
    "config",
    "layout",
    "observation",
    "augment",
    "execution",
    "params",
    "siglip",
    "lora",
    "gemma",
    "pi0",
    "flow",
    "sampling",
)
MODEL_MAY = {"numpy", "jax", "jaxtyping", "flax", "pi0fast_kernels", *(f"pi0fast.{name}" for name in MODEL)}

BARE = ("pi0fast.train", "pi0fast.precompile", "pi0fast.policy", "bench.campaign", "bench.inference", "bench.results")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, as written: `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def outside(path: Path, allowed: set[str]) -> set[str]:
    """Imports that are neither in the standard library nor below an allowed module."""

    def fits(name: str) -> bool:
        parts = name.split(".")
        below = any(".".join(parts[:length]) in allowed for length in range(1, len(parts) + 1))
        return below or parts[0] in sys.stdlib_module_names

    return {name for name in imports(path) if not fits(name) and name != "pi0fast"}


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: str(path.relative_to(KERNELS)))
def test_kernels_import_jax_and_no_other_op(path):
    op = path.relative_to(KERNELS).parts[0]
    shared = {f"pi0fast_kernels.{name}" for name in ("_dispatch", "_triton", "_mosaic_gpu", "_mosaic_tpu")}
    allowed = {"jax", "jaxtyping", "numpy", *shared, f"pi0fast_kernels.{op}"}  # numpy comes with jax
    if path.parent == KERNELS:
        allowed.add("pi0fast_kernels")
    backend = path.stem.lstrip("_").startswith(("mosaic_gpu", "mosaic_tpu", "triton"))
    if backend:
        allowed |= {"triton", "jax_triton"}
    found = {name for name in outside(path, allowed) if name != "pi0fast_kernels"}
    assert not found
    assert backend or not any(name.startswith("jax.experimental.pallas") for name in imports(path))


@pytest.mark.parametrize("name", MODEL)
def test_model_imports(name):
    allowed = MODEL_MAY | ({"augmax"} if name == "augment" else set())
    assert not outside(PACKAGE / f"{name}.py", allowed)


@pytest.mark.parametrize("name", ["policy", "rtc", "serve", "batching", "wire"])
def test_policy_never_imports_training(name):
    path = PACKAGE / f"{name}.py"
    forbidden = ("pi0fast.train", "pi0fast.optim", "pi0fast.data")
    assert not {found for found in imports(path) if found.startswith(forbidden)}


def test_the_clients_broker_needs_numpy_only():
    assert not outside(PACKAGE / "broker.py", {"numpy"})
    code = "import sys, pi0fast.broker; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_private_jax_and_lerobot_in_its_source_only():
    for path in [*files(PACKAGE), *files(KERNELS)]:
        found = imports(path)
        assert not {name for name in found if name.startswith("jax._src")}, path
        if path.parent != PACKAGE / "data":
            assert not {name for name in found if name.split(".")[0] in ("lerobot", "torch")}, path


def test_foreign_parameter_names_stay_in_convert():
    for path in files(PACKAGE):
        if not path.stem.startswith("convert"):
            assert "PaliGemma/" not in path.read_text(), path


def test_a_step_is_timed_without_what_reads_data_and_command_lines():
    """As on a machine that has JAX, flax, optax and orbax, and no network to fetch more from."""
    missing = ("lerobot", "grain", "augmax", "tyro", "av", "torchcodec", "websockets", "beartype")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import {', '.join(BARE)}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_imports_start_no_backend():
    """An unknown platform makes any backend fail to start."""
    modules = ", ".join(f"pi0fast.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    code = f"import pi0fast, pi0fast_kernels, {modules}"
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
