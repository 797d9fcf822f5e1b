"""The training step of `pi0_base` on eight TPUs, with our kernels and without: peak memory, and what it takes at least.

    python -m bench.tpu_steps --out=profiles/<folder> [--target=v5e …]

Each step from a process of its own, a few minutes each, what is there already left out. `pi0fast.plan` compiles and
estimates; but for it, an attention kernel runs at the peak. So the record also says what of its estimate these kernels
are, and how often each runs on which shape, for a table that puts the cycles of their code (`bench.tpu.figures`) there.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from bench import provenance
from pi0fast import flops, hlo, targets
from pi0fast.estimate import estimate
from pi0fast.hlo import Instruction, Program
from pi0fast.plan import PlanSettings, plan
from pi0fast.settings import DEFAULTS

TARGETS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
KERNELS = ("mosaic_tpu", "reference")
BATCH = 32
STEPS = "steps.json"


def step(target: str, kernels: str) -> dict[str, Any]:
    """The plan, and what it holds of our kernels: {name, shape of its first large operand: how often it runs}."""
    settings = dataclasses.replace(DEFAULTS["pi0_base"], batch_size=BATCH, kernels=kernels)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "step.txt"
        made = plan("pi0_base", PlanSettings(target=TARGETS[target], train=settings, hlo=text))
        program = Program(text.read_text())
    spec = flops.device(targets.devices(TARGETS[target])[0].device_kind)
    assert spec is not None
    runs: dict[str, int] = {}
    for times, call, types in kernel_calls(program, program.entry):
        name = f"{re.sub(r'[.]\d+$', '', call.name)} {_shape(call, types)}"
        runs[name] = runs.get(name, 0) + times
    whole = estimate(program, spec, lambda collective: 0.0).compute_s
    for name, instructions in program.computations.items():
        program.computations[name] = [x for x in instructions if not _is_attention(x)]
    attention = whole - estimate(program, spec, lambda collective: 0.0).compute_s
    return {
        "target": target,
        "kernels": kernels,
        "provenance": provenance.provenance(),
        "runs": runs,
        "attention_ms": attention * 1e3,
        "plan": dataclasses.asdict(made),
    }


def kernel_calls(
    program: Program, computation: str, times: int = 1
) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Every Pallas kernel of a computation and its loops, how often it runs, and the types of what stands beside it."""
    instructions = program.computations[computation]
    types = {x.name: x.type for x in instructions}
    for x in instructions:
        if x.opcode == "while":
            body = re.search(r"body=%?([\w.-]+)", x.line)
            assert body is not None
            yield from kernel_calls(program, body[1], times * program.trip_count(x))
        elif x.opcode == "call":
            for called in x.called:
                yield from kernel_calls(program, called, times)
        elif 'custom_call_target="tpu_custom_call"' in x.line:
            yield times, x, types


def _is_attention(x: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in x.line and x.name.startswith("prefix_lm_attention")


def _shape(call: Instruction, types: dict[str, str]) -> str:
    """Of its largest operand."""
    arrays = [array for operand in call.operands for array in hlo.arrays(types[operand])]
    return "×".join(map(str, max(arrays, key=lambda array: array.bytes).shape))


def main() -> None:
    parser = argparse.ArgumentParser(description="The training step of pi0_base on eight TPUs.")
    parser.add_argument("--out", type=Path, help="the folder of the record")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; may be repeated")
    parser.add_argument("--kernels", action="append", choices=KERNELS, help="only these; may be repeated")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        jax.config.update("jax_platforms", "cpu")
        print(json.dumps(step(*arguments.one)))
        return
    path = arguments.out / STEPS
    there = json.loads(path.read_text()) if path.exists() else {}
    for target in arguments.target or TARGETS:
        for kernels in arguments.kernels or KERNELS:
            name = f"{target} {kernels}"
            if name in there and not arguments.again:
                continue
            command = [sys.executable, "-m", "bench.tpu_steps", "--one", target, kernels]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            there[name] = json.loads(done.stdout)
            path.write_text(json.dumps(there, indent=1) + "\n")
            print(name, f"{there[name]['plan']['time']['step_ms']:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
