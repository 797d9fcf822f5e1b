"""Test-wide settings: eight virtual CPU devices, and shapes checked as the code runs."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

install_import_hook(
    ["pi0fast_kernels", "pi0fast.flow", "pi0fast.gemma", "pi0fast.pi0", "pi0fast.siglip"], "beartype.beartype"
)
