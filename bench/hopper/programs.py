"""What is compiled for an H100 to be looked at: our attention kernels as they ship and cut up otherwise, and peers'."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from bench import peers
from bench.hopper.model import Work
from pi0fast_kernels import _dispatch
from pi0fast_kernels.prefix_lm_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_dq,
)
from pi0fast_kernels.prefix_lm_attention.cases import CASES, Case

KIND, SMS = "NVIDIA H100 80GB HBM3", 132
DEVICE = _dispatch.Device("cuda", KIND, 90, SMS)
MESH = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=KIND, num_cores=SMS, platform="cuda"))
NAMED = {case.name: case for case in CASES}


Tile = dict[str, int]  # how a kernel cuts up its work: the fields of its own dataclass


@dataclass(frozen=True)
class Program:
    """One thing to compile.

    kernels: what of it is of interest: name, tile and work. in_order: they are told apart by the order in which they
        are compiled, and None stands for one that is of no interest; otherwise by their names.
    """

    contender: str
    case: Case
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[tuple[str, Tile, Work] | None, ...]
    shipped: bool = True
    in_order: bool = False

    def found(self, reports: Sequence[Path]) -> Iterator[tuple[Path, str, Tile, Work]]:
        """Each kernel of interest with its report, of those that compiling it has added."""
        if self.in_order:
            of_kernel = zip(reports, self.kernels, strict=True)
        else:
            names = [kernel[0].replace("few_rows", "forward") for kernel in self.kernels if kernel]
            ours = [[x for x in reports if x.name.startswith(f"prefix_lm_attention_{name}_")] for name in names]
            assert all(len(each) == 1 for each in ours), (names, reports)
            of_kernel = zip((each[0] for each in ours), self.kernels, strict=True)
        yield from ((report, *kernel) for report, kernel in of_kernel if kernel is not None)


def gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of the sum of its squares."""
    return jax.grad(lambda *arrays: jnp.sum(jnp.square(function(*arrays).astype(jnp.float32))), (0, 1, 2))


# ── Ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def shipped() -> Iterator[Program]:
    """Every case, and the head dimensions that no case has, with the tiles that it is given."""
    gqa, inference = NAMED["causal_gqa"], NAMED["pi0_inference"]
    others = [dataclasses.replace(gqa, name="causal_gqa_64", head_dim=64)]
    others += [dataclasses.replace(inference, name=f"pi0_inference_{c}", head_dim=c) for c in (64, 128)]
    for case in (*CASES, *others):
        yield forward(case, mosaic_gpu.tuning(case.head_dim))
        if "inference" not in case.name:
            yield backward(case, mosaic_gpu_backward.tuning(case.head_dim))


def grid() -> Iterator[Program]:
    """Tiles that might do better: for one case of each head dimension, and for one with few rows.

    Where many fit, those are left out that leave most of a processor idle or differ only in how much is copied ahead.
    """
    for name in ("pi0_prefix", "pi0_inference", "siglip", "causal_gqa"):
        case = NAMED[name]
        many = case.head_dim <= 128
        first = mosaic_gpu.tuning(case.head_dim)
        which = "few_rows" if name == "pi0_inference" else "forward"
        ships = getattr(first, which)
        for tile in mosaic_gpu.candidates(case.head_dim):
            unlikely = many and (tile.warpgroups == 1 or tile.stages > 3 or tile.queries != ships.queries)
            if tile != ships and not unlikely:
                yield forward(case, dataclasses.replace(first, **{which: tile}), shipped=False)
        if name == "pi0_inference":
            continue
        second = mosaic_gpu_backward.tuning(case.head_dim)
        dq, dkv = mosaic_gpu_backward.candidates(case.head_dim)
        for tile in dq:
            if tile != second.dq:
                yield backward(case, dataclasses.replace(second, dq=tile), "dq", shipped=False)
        for tile in dkv:
            if tile != second.dkv and not (many and (tile.cluster != 2 or tile.stages == 3)):
                yield backward(case, dataclasses.replace(second, dkv=tile), "dkv", shipped=False)


def forward(case: Case, config: mosaic_gpu.TuningConfig, *, shipped: bool = True) -> Program:
    arguments = jax.eval_shape(lambda: _inputs(case))
    run = partial(mosaic_gpu.forward, scale=case.scale, device=DEVICE, config=config)
    q, k, *_ = arguments
    plan = mosaic_gpu.forward_plan(q, k, config, SMS)
    work = Work(
        2,
        plan.tile.rows,
        plan.tile.keys,
        plan.width,
        heads_apart=case.kv_heads > 1,
        consumers=plan.tile.warpgroups,
        splits=plan.splits,
        persistent=True,
    )
    name = "few_rows" if plan.splits > 1 else "forward"
    return Program("pi0fast", case, run, arguments, ((name, dataclasses.asdict(plan.tile), work),), shipped)


def backward(case: Case, config: mosaic_gpu_backward.TuningConfig, *of_interest: str, shipped: bool = True) -> Program:
    """of_interest: which of its two kernels, both by default."""
    arguments = jax.eval_shape(lambda: _backward_inputs(case))
    run = partial(mosaic_gpu_backward.backward, scale=case.scale, device=DEVICE, config=config)
    apart = case.kv_heads > 1
    head_dim = -(-case.head_dim // 16) * 16  # as wgmma takes it
    dq = Work(3, mosaic_gpu_dq.QUERIES, config.dq.keys, head_dim, heads_apart=apart, last_first=True)
    of = config.dkv
    dkv = Work(4, of.queries, of.keys, head_dim, by_keys=True, heads_apart=apart, sharing=of.cluster)
    kernels = ("dq", dataclasses.asdict(config.dq), dq), ("dkv", dataclasses.asdict(of), dkv)
    chosen = tuple(kernel for kernel in kernels if kernel[0] in (of_interest or ("dq", "dkv")))
    return Program("pi0fast", case, run, arguments, chosen, shipped)


def _inputs(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v and ranges, as the op gives them to a kernel."""
    q, k, v, start, end = case.inputs()
    tokens = case.batch, case.queries
    return q, k, v, *(jnp.zeros(tokens, jnp.int32) if x is None else x for x in (start, end))


def _backward_inputs(case: Case) -> tuple[jax.Array, ...]:
    inputs = _inputs(case)
    return *inputs, inputs[0], jnp.zeros(inputs[0].shape[:3]), inputs[0]


# ── Peers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def jax_own() -> Iterator[Program]:
    """The kernels that come with JAX, which take no ranges, and lengths in multiples of their tiles."""
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    for name, head_dim in (("pi0_prefix", 256), ("causal_gqa", 128)):
        case = dataclasses.replace(NAMED[name], mask="all", queries=896, keys=896)
        keys = 64 if head_dim > 128 else 128
        config = module.TuningConfig(
            block_q=64,
            block_kv=keys,
            max_concurrent_steps=2,
            block_q_dkv=64,
            block_kv_dkv=64,
            block_q_dq=64,
            block_kv_dq=64,
            compute_wgs_bwd=1,
        )

        def attention(q, k, v, config=config):
            return module.attention(q, k, v, config)

        arguments = jax.eval_shape(lambda case=case: case.inputs(dtype=jnp.float16))[:3]
        forward = Work(2, 128, keys, head_dim, heads_apart=True)
        dq = Work(3, 64, 64, head_dim, heads_apart=True, consumers=1)
        dkv = dataclasses.replace(dq, products=4, by_keys=True)
        yield from _both("jax", case, attention, arguments, (forward, dq, dkv))


class H100(NamedTuple):
    """The device that tokamax asks for."""

    platform: str = "gpu"
    device_kind: str = KIND
    compute_capability: str = "9.0"
    core_count: int = SMS


def tokamax() -> Iterator[Program]:
    """With the tiles that it takes untuned."""
    if importlib.util.find_spec("tokamax") is None:
        return
    (contender,) = [each for each in peers.ATTENTION if each.name == "tokamax_mosaic"]
    for name, head_dim in (("pi0_prefix", 256), ("causal_gqa", 128)):
        case = NAMED[name]
        build = contender.build(case)

        def attention(q, k, v, build=build):
            return build(q, k, v)

        arguments = jax.eval_shape(case.inputs)[:3]
        keys = 64 if head_dim > 128 else 128
        forward = Work(2, 128, keys, head_dim, heads_apart=True)
        dq = Work(3, 64, 64, head_dim, heads_apart=True, consumers=1)
        dkv = dataclasses.replace(dq, products=4, by_keys=True)
        yield from _both("tokamax", case, attention, arguments, (forward, dq, dkv))


def _both(contender: str, case: Case, attention: Any, arguments: Any, works: tuple[Work, ...]) -> Iterator[Program]:
    """Its forward pass, and its backward pass, which is compiled after a forward pass of its own."""
    first, *backward = (
        (name, {"rows": work.rows, "keys": work.keys}, work)
        for name, work in zip(("forward", "dq", "dkv"), works, strict=True)
    )
    yield Program(contender, case, attention, arguments, (first,), in_order=True)
    yield Program(contender, case, gradients(attention), arguments, (None, *backward), in_order=True)


@contextmanager
def pretended() -> Iterator[None]:
    """Peers look for a GPU, and tokamax for a library with which it measures: neither is needed to compile."""
    absent = {"xprof", "xprof.cli", "xprof.cli.tools"} if importlib.util.find_spec("xprof") is None else set()
    with (
        mock.patch("jax.extend.backend.get_default_device", return_value=H100()),
        mock.patch.dict(sys.modules, dict.fromkeys(absent, mock.MagicMock())),
    ):
        yield


GROUPS: dict[str, Callable[[], Iterable[Program]]] = {
    "shipped": shipped,
    "grid": grid,
    "peers": lambda: (*jax_own(), *tokamax()),
}
