"""The attention kernels for Hopper, cut up in the ways that promise most: those that ship, and the best of the others.

    pytest bench/bench_mosaic_gpu.py --benchmark-only --results=tiles.jsonl

What promises most is derived (`bench.hopper.model`) and stands in the newest record of
`python -m bench.mosaic_gpu_resources`. Timed as in `bench_kernels.py`: results are checked first, and the ways of one
kernel run in turn. dq and dkv are timed within the whole backward pass, the other kernel as it ships.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import bench_kernels, timing
from bench.hopper import report
from bench.hopper.figures import Figures, in_words
from bench.hopper.programs import NAMED
from bench.peers import Contender
from pi0fast_kernels import _dispatch, _mosaic_gpu
from pi0fast_kernels.prefix_lm_attention import mosaic_gpu, mosaic_gpu_backward, mosaic_gpu_dkv, mosaic_gpu_dq

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)

PROFILES = Path(__file__).parent.parent / "profiles"
RECORD = "*_mosaic_gpu_compiler_figures/resources.json"
OP = dataclasses.replace(bench_kernels.ATTENTION, name="tiles of mosaic_gpu", implementations=(), peers=())
BACKWARD = {"dq": mosaic_gpu_dq.Tile, "dkv": mosaic_gpu_dkv.Tile}
MOST = 2  # beside the one that ships, of each kernel


def promising(record: Path | None = None) -> dict[tuple[str, str], list[dict[str, int]]]:
    """Kernel and case → tiles, the one that ships first. Without what has something wrong with it, and without kernels
    of which only one way is known."""
    records = [record] if record else sorted(PROFILES.glob(RECORD))[-1:]
    entries = [entry for path in records for entry in json.loads(path.read_text())["kernels"]]
    found: dict[tuple[str, str], list[Figures]] = {}
    for each in report.ranked([Figures(**entry) for entry in entries]):
        if not each.complaints:
            found.setdefault((each.kernel, each.case), []).append(each)
    tiles = {}
    for key, ways in found.items():
        shipped = [each.tile for each in ways if each.shipped]
        others = [each.tile for each in ways if each.tile not in shipped]
        if others:
            tiles[key] = [*shipped, *others[:MOST]]
    return tiles


def passes(case: Any, kernel: str, tile: dict[str, int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward pass, as `mosaic_gpu` has them, with this tile of this kernel."""
    if kernel not in BACKWARD:
        config = dataclasses.replace(mosaic_gpu.tuning(case.head_dim), **{kernel: mosaic_gpu.Tile(**tile)})
        return partial(mosaic_gpu.forward, config=config), mosaic_gpu.backward
    config = mosaic_gpu_backward.tuning(case.head_dim)
    config = dataclasses.replace(config, **{kernel: BACKWARD[kernel](**tile)})
    return mosaic_gpu.forward, partial(mosaic_gpu_backward.backward, config=config)


def attention(case: Any, kernel: str, tile: dict[str, int]) -> Callable[..., jax.Array]:
    """The op of these passes, on its arrays by name."""
    forward, backward = passes(case, kernel, tile)
    how = {"scale": case.scale, "device": _dispatch.device()}

    @jax.custom_vjp
    def attend(q, k, v, key_start, key_end):
        return forward(q, k, v, key_start, key_end, **how)[0]

    def attend_forward(*arrays):
        out, lse = forward(*arrays, **how)
        return out, (*arrays, out, lse)

    def attend_backward(residuals, dout):
        return *backward(*residuals, dout, **how), None, None

    attend.defvjp(attend_forward, attend_backward)

    def op(q, k, v, key_start, key_end):
        start = jnp.zeros(q.shape[:2], jnp.int32) if key_start is None else key_start
        end = jnp.full(q.shape[:2], k.shape[1], jnp.int32) if key_end is None else key_end
        return attend(q, k, v, start, end)

    return op


def contender(kernel: str, tile: dict[str, int]) -> Contender:
    def refusal(case, backward):
        device = _dispatch.device()
        if device.platform != "cuda":
            return "it needs an NVIDIA GPU"
        return _mosaic_gpu.reason(device, jnp.bfloat16)

    return Contender(
        f"{kernel}: {in_words(tile)}",
        refusal,
        partial(attention, kernel=kernel, tile=tile),
        ours=True,
    )


def _parameters() -> list[Any]:
    return [
        pytest.param(NAMED[case], kernel in BACKWARD, contender(kernel, tile), id=f"{case}-{kernel}-{at}")
        for (kernel, case), tiles in promising().items()
        for at, tile in enumerate(tiles)
    ]


@pytest.mark.parametrize(("case", "backward", "contender"), _parameters())
def test_tiles(benchmark, request, case, backward, contender):
    bench_kernels.report(benchmark, request, OP, case, backward, contender)
