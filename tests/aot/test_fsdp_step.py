"""The sharded training step of `pi0_base`, compiled for eight chips that are not there: what it gathers and reduces."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pi0fast import config, fsdp, hlo, train_state
from pi0fast import mesh as meshes
from pi0fast.hlo import Collective, Program
from pi0fast.params import flatten
from pi0fast.settings import DEFAULTS

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        find_spec("jax_cuda13_plugin") is None or find_spec("libtpu") is None, reason="needs `uv sync --group aot`"
    ),
]

ROOT = Path(__file__).parent.parent.parent
TARGETS = [
    pytest.param("v6e:2x4", marks=pytest.mark.slow),
    *(pytest.param(target, marks=pytest.mark.long) for target in ("h100:8", "v5e:2x4", "v5p:2x2x2")),
]


@dataclass(frozen=True)
class Step:
    """What the planner says, and the collectives of the program: those outside loops once, a layer's by its loop."""

    plan: dict
    text: str
    outside: list[Collective]
    loops: list[tuple[int, list[Collective]]]

    def of(self, kind: str) -> list[tuple[int, Collective]]:
        """How often each of these runs."""
        found = [(1, x) for x in self.outside] + [(trips, x) for trips, body in self.loops for x in body]
        return [(times, x) for times, x in found if x.kind == kind]


@pytest.fixture(params=TARGETS, scope="module")
def step(request, tmp_path_factory) -> Step:
    """Compiled in a process of its own: the planner's."""
    program = tmp_path_factory.mktemp("step") / "program"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pi0fast.plan", "pi0_base", f"--target={request.param}", "--json"]
    made = subprocess.run([*command, f"--hlo={program}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return _read(json.loads(made.stdout), program.read_text())


def _read(plan: dict, text: str) -> Step:
    program = Program(text)
    loops = [
        (program.trip_count(x), hlo.collectives(program, body))
        for x in program.computations[program.entry]
        if x.opcode == "while"
        for body in x.called
        if body in program.bodies
    ]
    return Step(plan, text, hlo.collectives(program, program.entry), loops)


@pytest.fixture(scope="module")
def weights():
    """The model's weights by path, with the axis that eight devices share them along."""
    _, state, _ = train_state.abstract_state(config.pi0_base(), DEFAULTS["pi0_base"], meshes.make("fsdp:8"))
    return flatten(state.weights)


def layer_matrices(weights) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's part of every stacked weight that is sharded."""
    return {
        path: weight.shape[1:]
        for path, weight in weights.items()
        if "layers" in path and weight.get_metadata()[fsdp.SHARDED_AXIS] is not None
    }


def test_it_fits_and_each_device_holds_an_eighth(step, weights):
    assert step.plan["fits"]
    memory, whole = step.plan["memory"], 4 * sum(int(np.prod(x.shape)) for x in weights.values())
    assert memory["parameters"] == pytest.approx(whole / 8, rel=0.02)
    assert memory["optimizer"] == pytest.approx(2 * whole / 8, rel=0.02)
    arguments = memory["parameters"] + memory["optimizer"] + memory["average"]
    assert step.plan["memory"]["arguments"] == pytest.approx(arguments, rel=0.01)  # the compiler's own count


def test_layers_are_gathered_in_bfloat16_one_at_a_time(step, weights):
    """Forward and again backward, each layer's matrices. XLA puts up to two layers into one loop body, and
    takes the first ones out of it."""
    for trips, body in step.loops:
        assert trips >= 7 and any(x.kind == "all-gather" for x in body)
    stacked = sum(2 * int(np.prod(weights[path].shape)) for path in layer_matrices(weights))
    arrays = [(times, array) for times, x in step.of("all-gather") for array in x.whole]
    gathered = sum(times * array.bytes for times, array in arrays if array.dtype == "bf16")
    assert 1.9 * stacked <= gathered <= 2.1 * stacked
    largest = max(2 * int(np.prod(shape)) for shape in layer_matrices(weights).values())
    for _, x in step.of("all-gather"):
        assert all(array.bytes <= largest for array in x.whole), x
        assert x.axes == ("fsdp",)


def test_gradients_are_reduce_scattered_layer_by_layer_in_float32(step, weights):
    backward = [body for _, body in step.loops if any(x.kind == "reduce-scatter" for x in body)]
    assert len(backward) == 3  # of SigLIP, the VLM and the action expert
    stacked = sum(4 * int(np.prod(weights[path].shape)) for path in layer_matrices(weights))
    scattered = sum(times * x.bytes for times, x in step.of("reduce-scatter"))
    assert stacked <= scattered <= 1.15 * stacked  # padded, and what is outside the loops
    assert {array.dtype for _, x in step.of("reduce-scatter") for array in x.whole} == {"f32"}


def test_no_sharded_gradient_is_all_reduced(step, weights):
    """What is summed over all devices: the replicated vectors' gradients, and scalars."""
    vectors = sum(
        4 * int(np.prod(weight.shape))
        for weight in weights.values()
        if weight.get_metadata()[fsdp.SHARDED_AXIS] is None
    )
    assert sum(times * x.bytes for times, x in step.of("all-reduce")) <= 1.02 * vectors
    assert not any(x.kind == "all-reduce" for _, body in step.loops for x in body)


def test_the_embedding_is_never_whole(step):
    size = config.pi0_base()
    shape = f"[{size.vocab_size},{size.vlm.width}]"
    shard = f"[{size.vocab_size},{size.vlm.width // 8}]"
    assert shape not in step.text and shard in step.text


def test_large_gathers_run_beside_compute(step):
    """All of 16 MB and more, and nine tenths of all bytes."""
    gathers = step.of("all-gather")
    large = [x for _, x in gathers if x.bytes >= 16e6]
    total = sum(times * x.bytes for times, x in gathers)
    assert large and all(x.is_async for x in large)
    assert sum(times * x.bytes for times, x in gathers if x.is_async) >= 0.9 * total


def test_no_host_is_asked(step):
    assert not re.search(r"callback|outfeed|infeed", step.text)
