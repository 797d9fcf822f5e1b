"""Pi0's whole training step, compiled for an H100 that is not there: what runs, how often, and what is never made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def compiled(kernels: str) -> dict:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.aot.compile_h100", kernels]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def logits(step: dict) -> list[list[int]]:
    """Shapes with a query axis and a key axis: the prefix's 816 tokens, the suffix's 51 against 867, an image's 256."""
    pairs = (816, 816), (51, 867), (256, 256)
    return [s for s in step["shapes"] if any(s.count(t) >= 1 + (t == keys) and keys in s for t, keys in pairs)]


@pytest.mark.timeout(900)
def test_every_call_site_is_one_kernel_and_no_logits_are_made():
    step = compiled("auto")
    # Call sites: SigLIP's layers, the VLM's, its last, the action expert's, its final norm. Attention stands in three
    # of them, and its forward pass is not repeated in the backward pass; norms in layers are (remat `mlp`).
    assert step["kernels"] == {
        "prefix_lm_attention_forward": 3,
        "prefix_lm_attention_dq": 3,
        "prefix_lm_attention_dkv": 3,
        "ada_rms_norm_forward": 2 + 1 + 2 + 1 + (2 + 2),
        "ada_rms_norm_backward": 2 + 1 + 2 + 1,
    }
    assert not logits(step)


@pytest.mark.timeout(900)
def test_the_reference_makes_logits():
    """So that the test above is known to see them."""
    step = compiled("reference")
    assert not step["kernels"]
    assert [32, 8, 816, 816] in logits(step) and [96, 16, 256, 256] in logits(step)
