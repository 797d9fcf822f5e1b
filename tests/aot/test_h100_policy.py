"""The full-size inference call, compiled for an H100 that is not there: what stands in the loop over time."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pi0fast import config

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs `uv sync --group aot`"),
]

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict]:
    """What a call holds, by preset and kind; compiled side by side."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.aot.compile_h100_policy"]
    running = {
        (preset, kind): subprocess.Popen(
            [*command, preset, "auto", kind], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for preset, kind in (("pi0_base", "plain"), ("pi05_base", "plain"), ("pi05_base", "guided"))
    }
    written = {case: process.communicate()[0] for case, process in running.items()}
    assert not any(process.returncode for process in running.values())
    return {case: json.loads(text) for case, text in written.items()}


@pytest.fixture(params=["pi0_base", "pi05_base"])
def figures(request, compiled) -> dict:
    return compiled[request.param, "plain"]


def test_the_loop_never_copies_the_cache(figures):
    depth = config.PRESETS[figures["preset"]]().vlm.depth
    assert figures["cache_sized_in_the_loop"] == {"update in place": 2 * depth}


def test_the_loop_multiplies_the_action_tokens_alone(figures):
    """Four products a layer, and the action head's: no image, no prompt, no time and, in Pi0, no state."""
    size = config.PRESETS[figures["preset"]]()
    head = 2 if size.pi05 else 4  # Pi0 mixes the tokens with time in two more
    assert figures["dots_in_the_loop"] == {"eval_jaxpr/suffix/dot_general": 4 * size.vlm.depth + head}


def test_every_attention_and_norm_is_our_kernel_and_nothing_calls_the_host(figures):
    """Siglip's layers, the prefix's and the suffix's; Pi0's first step, which has the state too, is not in the loop."""
    size = config.PRESETS[figures["preset"]]()
    depth, steps = size.vlm.depth, 1 if size.pi05 else 2
    assert figures["triton_kernels"] == {
        "prefix_lm_attention_forward": size.siglip.depth + (depth - 1) + steps * depth,
        "prefix_lm_attention_combine": steps * depth,
        "ada_rms_norm_forward": (2 * depth - 1) + steps * (2 * depth + 1),
    }
    assert figures["host_callbacks"] == 0


def test_a_guided_step_runs_our_kernels_backwards_and_never_copies_the_cache(compiled):
    figures = compiled["pi05_base", "guided"]
    depth = config.pi05_base().vlm.depth
    assert figures["cache_sized_in_the_loop"] == {"update in place": 2 * depth}
    assert figures["host_callbacks"] == 0
    backward = {name: count for name, count in figures["triton_kernels"].items() if "forward" not in name}
    backward.pop("prefix_lm_attention_combine")
    assert backward == {
        "prefix_lm_attention_dq": depth,
        "prefix_lm_attention_dkv": depth,
        "ada_rms_norm_backward": 2 * depth + 1,
    }


def test_a_step_is_few_launches(figures):
    """Fourteen a layer: a norm and a product in pieces for each of attention and MLP, and what joins them."""
    depth = config.PRESETS[figures["preset"]]().vlm.depth
    assert sum(figures["step_launches"].values()) < 15 * depth
    assert sum("dynamic_slice" in result["scope"] for result in figures["largest_in_the_loop"]) == 0
