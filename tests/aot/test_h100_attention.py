"""The Hopper attention, compiled for an H100 that is not there: that it fits, and is what was meant."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pi0fast_kernels._mosaic_gpu import SHARED_MEMORY
from pi0fast_kernels.prefix_lm_attention.cases import CASES

pytestmark = pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs `uv sync --group aot`")

ROOT = Path(__file__).parent.parent.parent
SLOW = ["pi0_prefix", "pi0_inference"]
LONG = [case.name for case in CASES if case.name not in ("siglip", *SLOW)]
LONG += [f"{name}:{c}" for name in ("causal_gqa", "pi0_inference") for c in (64, 72, 96)] + ["pi0_inference:128"]
BACKWARD = [f"{name}::backward" for name in ("pi0_suffix", "siglip", "causal_gqa")] + ["causal_gqa:64:backward"]


def compiled(*names: str) -> dict[str, Any]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment.pop("PI0FAST_MOSAIC_GPU_INTERPRET", None)
    command = [sys.executable, "-m", "tests.aot.compile_h100_attention", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["siglip"], id="siglip"),
        pytest.param(SLOW, marks=pytest.mark.slow, id="pi0"),
        pytest.param(LONG, marks=pytest.mark.long, id="others"),
        pytest.param(BACKWARD, marks=pytest.mark.slow, id="backward"),
    ],
)
def test_it_fits(names):
    """No register is spilled and no product waits for the one before; what is copied is what is multiplied."""
    found = compiled(*names)
    assert list(found) == names
    for name, kernels in found.items():
        assert len(kernels) == (2 if name.endswith("backward") else 1), name
        for kernel, figures in kernels.items():
            assert figures["stack, spilled"] == [0, 0, 0], name
            assert not figures["serialized"], name
            assert figures["shared"] <= SHARED_MEMORY, name
            assert figures["wgmma"] and figures["copies"], name
            not_copied = set(figures["tiles"]) - set(figures["rows"])
            assert figures["rows"] and set(figures["rows"]) <= set(figures["tiles"]), name
            assert len(not_copied) == ("dkv" in kernel), name  # weights, that cross between warpgroups


@pytest.mark.slow
def test_it_compiles_inside_shard_map_and_checkpoint():
    """The interpreter goes through neither: here the compiler has eight GPUs. The forward kernel runs once."""
    assert compiled("sharded") == {f"prefix_lm_attention_{name}": 1 for name in ("forward", "dq", "dkv")}
