"""Test-wide settings: eight virtual CPU devices, shapes checked as the code runs, one small demo data set."""

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Most tests of the trainer compile the same few programs.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # starts the backend, so that nothing changes that number

CHECKED = ("pi0fast_kernels", "pi0fast.flow", "pi0fast.gemma", "pi0fast.pi0", "pi0fast.siglip")
install_import_hook(CHECKED, "beartype.beartype")

DEMO_EPISODES = 6


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory):
    """A LeRobot v3 data set of `DEMO_EPISODES` demonstrations; copy it before spoiling it."""
    from pi0fast.data.demo_dataset import write_demo_dataset

    return write_demo_dataset(tmp_path_factory.mktemp("data") / "demo", episodes=DEMO_EPISODES)
