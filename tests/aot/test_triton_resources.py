"""Every Triton kernel that ships, compiled for GPUs that are not there: it fits, spills nothing, uses tensor cores."""

import pytest

from bench import triton_resources
from pi0fast_kernels._triton import SHARED_MEMORY

pytestmark = pytest.mark.long


@pytest.mark.timeout(1200)
def test_every_kernel_fits_without_spills_and_uses_the_tensor_cores():
    resources = triton_resources.collect_all()
    by_target = {(entry.capability, entry.op, entry.kernel) for entry in resources}
    kernels = [("prefix_lm_attention", name) for name in ("forward", "combine", "dq", "dkv")]
    kernels += [("ada_rms_norm", name) for name in ("forward", "backward")]
    assert by_target == {(target.capability, *kernel) for target in triton_resources.TARGETS for kernel in kernels}
    for entry in resources:
        assert entry.spilled == 0 and not entry.instructions["LDL"] and not entry.instructions["STL"], entry
        assert entry.shared <= SHARED_MEMORY[entry.capability], entry
        if entry.op == "prefix_lm_attention" and entry.kernel != "combine":
            assert entry.instructions["HGMMA" if entry.capability == 90 else "HMMA"] > 0, entry
        assert not entry.serialized, entry
