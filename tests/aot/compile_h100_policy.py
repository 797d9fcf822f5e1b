"""Compiles the inference call of a full-size model for one H100 that is not there, and prints what it holds, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100_policy PRESET auto|reference|triton [plain|guided] [HLO]

One observation with three cameras and the longest prompt, ten Euler steps, weights as `Policy.load` reads them. PRESET:
pi0_base or pi05_base. guided: by what is left of the last chunk (real-time chunking). HLO: a file for the compiled
program. A process of its own, as `compile_h100`.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pi0fast import config, hlo, policy, precompile
from pi0fast.execution import Execution
from pi0fast.pi0 import check_kernels
from pi0fast.rtc import RtcConfig
from tests.aot import h100

STAGES = ("siglip", "prefix", "suffix")


def main(preset: str, kernels: str, kind: str = "plain", written: str | None = None) -> None:
    size, guided = config.PRESETS[preset](), kind == "guided"
    mesh, execution = h100.mesh(), Execution(kernels=kernels)  # pyright: ignore[reportArgumentType]
    weights, structure = jax.tree.flatten(precompile.abstract_sampler(size))
    inputs = policy.abstract_inputs(size, size.cameras, 1, size.max_token_len, guided)
    weights, inputs = h100.place((weights, inputs), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        check_kernels(size, execution)
        lowered = policy.make_call(structure, execution, RtcConfig() if guided else None).lower(weights, *inputs)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    if written:
        Path(written).write_text(text)
    program = hlo.Program(text)
    (body,) = program.bodies
    step, once = (hlo.launches(program.computations[name]) for name in (body, program.entry))
    stages = Counter(next((stage for stage in STAGES if f"/{stage}/" in x.scope), "other") for x in once)
    cache_size = (size.suffix_len + prefix_len(size)) * size.vlm.num_kv_heads * size.vlm.head_dim
    figures = {
        "preset": preset,
        "kernels": kernels,
        "call": kind,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "triton_kernels": h100.triton_kernels(text),
        "step_launches": Counter(x.kind for x in step),
        "launches_before_the_loop": stages,
        "cache_sized_in_the_loop": Counter(
            "update in place" if "dynamic_update_slice" in line else line
            for line in hlo.loop_instructions(text, cache_size)
        ),
        "dots_in_the_loop": Counter(x.scope.split("/body/")[-1] for x in program.inside(body) if x.opcode == "dot"),
        "host_callbacks": text.count("callback"),
        "largest_in_the_loop": hlo.largest_results(step, 25),
        "largest_before_the_loop": hlo.largest_results(once, 40),
    }
    print(json.dumps(figures, indent=1))


def prefix_len(size: config.Pi0Config) -> int:
    return len(size.cameras) * size.tokens_per_image + size.max_token_len


if __name__ == "__main__":
    main(*sys.argv[1:])
