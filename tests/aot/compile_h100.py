"""Compiles pi0_base's training step for one H100 that is not there, and prints what the program holds, as JSON.

    JAX_PLATFORMS=cpu python -m tests.aot.compile_h100 auto|reference|triton|mosaic_gpu

A process of its own: the tests' has Triton's interpreter, and JAX may not look for a GPU.
"""

import dataclasses
import json
import re
import sys
from typing import Any

from pi0fast import config, precompile
from pi0fast.optim import OptimConfig
from pi0fast.settings import DEFAULTS
from tests.aot import h100


def main(kernels: Any) -> None:
    settings = dataclasses.replace(DEFAULTS["pi0_base"], kernels=kernels, optim=OptimConfig(ema_decay=None))
    size, mesh = config.pi0_base(), h100.mesh()
    compiled = precompile.compile_step(size, settings, mesh, cameras=3)
    assert compiled.text is not None
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.text)}
    found = {"kernels": h100.triton_kernels(compiled.text), "shapes": sorted(shapes)}
    print(json.dumps({**found, **dataclasses.asdict(compiled.memory)}))


if __name__ == "__main__":
    main(sys.argv[1])
