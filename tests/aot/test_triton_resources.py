"""Every Triton kernel that ships, compiled for GPUs that are not there: it fits, spills nothing, uses tensor cores."""

import pytest

from bench import triton_resources
from pi0fast_kernels._triton import SHARED_MEMORY

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", triton_resources.TARGETS, ids=lambda target: f"sm_{target.capability}")
def test_every_kernel_fits_without_spills(target):
    resources = triton_resources.collect(target)
    assert {entry.kernel for entry in resources} == {"forward", "combine", "dq", "dkv", "backward"}
    for entry in resources:
        assert entry.spilled == 0 and not entry.instructions["LDL"] and not entry.instructions["STL"], entry
        assert entry.shared <= SHARED_MEMORY[target.capability], entry
        if entry.op == "prefix_lm_attention" and entry.kernel != "combine":
            assert entry.instructions["HGMMA" if target.capability == 90 else "HMMA"] > 0, entry
