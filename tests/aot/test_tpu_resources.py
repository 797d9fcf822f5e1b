"""One kernel of each kind compiled for a TPU that is not there, and its control flow run."""

import pytest

from bench.tpu.figures import OURS, TARGETS, Job, find
from bench.tpu_resources import collect

pytestmark = pytest.mark.slow


def test_ours_and_a_peer_take_no_less_than_their_products():
    attention = Job("v6e", "prefix_lm_attention", "pi0_inference", True, OURS)
    norm = Job("v6e", "ada_rms_norm", "pi0_inference", False, OURS)
    peer = attention._replace(contender="splash", blocks=(512, 512))
    found = list(collect([attention, norm, peer]))
    assert [x.job for x in found] == [attention, norm, peer] and not any(x.error for x in found)
    chip = TARGETS["v6e"]
    for x in (found[0], found[2]):
        (kernel,) = x.kernels
        products = 2 * 16 * chip.lanes**2 * kernel.units["matmul"]  # padding is multiplied, too
        assert products >= find(x.job).flops(backward=True)
        assert x.seconds >= x.kernel_s >= products / chip.spec.flops
        assert kernel.units["transcendental"] > 0
    assert found[1].kernels[0].units["transcendental"] > 0 and "matmul" not in found[1].kernels[0].units
    assert found[1].bound_s == 0 < found[1].traffic_s <= found[1].seconds
