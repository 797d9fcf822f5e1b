"""Test-wide settings: eight virtual CPU devices, shapes checked as the code runs, one small demo data set.

Kernels run in interpreters, Triton's and Pallas's for TPUs and GPUs; with JAX_PLATFORMS=cuda,
tests/kernels/test_on_gpu.py runs Triton's on a GPU.
"""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["PI0FAST_TPU_INTERPRET"] = "1"
os.environ["PI0FAST_MOSAIC_GPU_INTERPRET"] = "1"

os.environ.setdefault("PI0FAST_COMMIT", "tests")  # results need one, also where the files are no git checkout

# Most tests of the trainer compile the same few programs. Each worker of pytest-xdist has its own cache, since JAX does
# not write a file in one piece; what a worker starts is no worker, and may run pytest itself.
WORKER = os.environ.pop("PYTEST_XDIST_WORKER", "alone")
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled" / WORKER
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # starts the backend, so that nothing changes that number

OPS = [f"pi0fast_kernels.{op}" for op in ("prefix_lm_attention", "ada_rms_norm")]
KERNELS = [
    f"{op}.{module}" for op in OPS for module in ("api", "reference", "cases", "jax_nn")
]  # Triton has types of its own
CHECKED = (*KERNELS, "pi0fast_kernels.ranges", "pi0fast.flow", "pi0fast.gemma", "pi0fast.pi0", "pi0fast.siglip")
install_import_hook(CHECKED, "beartype.beartype")

DEMO_EPISODES = 6


@pytest.fixture
def own_mounts():
    """What to put before a command that mounts file systems of its own, which need no rights and end with it."""
    prefix = ("unshare", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("a small file system needs `unshare --map-root-user --mount`, which this machine does not allow")
    return prefix


@pytest.fixture
def mini_settings(demo_dataset, tmp_path, monkeypatch):
    """Six steps on the demo's data in a folder that is not there yet; `pi0_tiny` stands for a smaller model."""
    from pi0fast import config
    from pi0fast.optim import OptimConfig
    from pi0fast.settings import TINY
    from tests.mini import MINI

    monkeypatch.setitem(config.PRESETS, "pi0_tiny", lambda: MINI)
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo_dataset.parent / "cache"))
    return dataclasses.replace(
        TINY,
        mesh="fsdp:1",
        data=str(demo_dataset),
        steps=6,
        batch_size=8,
        out=tmp_path / "run",
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=2, decay_steps=20),
        output=dataclasses.replace(TINY.output, save_every=3, log_every=1),
    )


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory):
    """A LeRobot v3 data set of `DEMO_EPISODES` demonstrations; copy it before spoiling it."""
    from pi0fast.data.demo_dataset import write_demo_dataset

    return write_demo_dataset(tmp_path_factory.mktemp("data") / "demo", episodes=DEMO_EPISODES)
