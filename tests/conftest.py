"""Test-wide settings: eight virtual CPU devices, shapes checked as the code runs, one small demo data set.

Triton's kernels run in its interpreter; with JAX_PLATFORMS=cuda, tests/kernels/test_on_gpu.py runs them on a GPU.
"""

import os
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    os.environ["TRITON_INTERPRET"] = "1"

# Most tests of the trainer compile the same few programs.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
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


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory):
    """A LeRobot v3 data set of `DEMO_EPISODES` demonstrations; copy it before spoiling it."""
    from pi0fast.data.demo_dataset import write_demo_dataset

    return write_demo_dataset(tmp_path_factory.mktemp("data") / "demo", episodes=DEMO_EPISODES)
