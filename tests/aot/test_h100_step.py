"""Pi0's whole training step, compiled for an H100 that is not there: what runs, how often, and what is never made."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pi0fast_kernels.prefix_lm_attention.reference import BLOCK

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs `uv sync --group aot`"),
]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def steps() -> dict[str, dict]:
    """What the compiled step holds, by the kernels that were asked for."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.aot.compile_h100"]
    running = {
        kernels: subprocess.Popen([*command, kernels], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for kernels in ("auto", "reference")
    }
    written = {kernels: process.communicate()[0] for kernels, process in running.items()}
    assert not any(process.returncode for process in running.values())
    return {kernels: json.loads(text) for kernels, text in written.items()}


def logits(step: dict) -> list[list[int]]:
    """Shapes of a batch with an axis of queries, and keys last: the prefix's 816, the suffix's 51 against 867, an
    image's 256; queries whole, or in the reference's blocks."""
    whole = (816, 816), (51, 867), (256, 256)
    pairs = {(min(queries, size), keys) for queries, keys in whole for size in (queries, BLOCK)}
    return [s for s in step["shapes"] if len(s) > 2 and any(s[-1] == keys and t in s[:-1] for t, keys in pairs)]


def test_every_call_site_is_one_kernel_and_no_logits_are_made(steps):
    # Call sites: SigLIP's layers, the VLM's, its last, the action expert's, its final norm. Attention stands in three
    # of them, and its forward pass is not repeated in the backward pass; norms in layers are (remat `mlp`).
    assert steps["auto"]["kernels"] == {
        "prefix_lm_attention_forward": 3,
        "prefix_lm_attention_dq": 3,
        "prefix_lm_attention_dkv": 3,
        "ada_rms_norm_forward": 2 + 1 + 2 + 1 + (2 + 2),
        "ada_rms_norm_backward": 2 + 1 + 2 + 1,
    }
    assert not logits(steps["auto"])


def test_the_reference_makes_logits(steps):
    """So that the test above is known to see them."""
    assert not steps["reference"]["kernels"]
    assert {shape[-1] for shape in logits(steps["reference"])} == {816, 867, 256}


def test_the_parts_of_the_memory_make_its_peak(steps):
    """The rows of the table, which are exact or the compiler's, and what they add up to."""
    auto = steps["auto"]
    held = sum(auto[name] for name in ("parameters", "frozen", "optimizer", "average"))
    assert held == pytest.approx(auto["arguments"], rel=0.01)  # which hold the batch too
    assert held + auto["temporaries"] == pytest.approx(auto["peak"], rel=0.05)
