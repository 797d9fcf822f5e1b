"""What is compiled for an H100 to be looked at: our attention kernels as they ship and cut up otherwise, and peers'."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from bench import peers
from bench.hopper_model import Work
from pi0fast_kernels.prefix_lm_attention.cases import CASES, Case

DEVICE = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
)
NAMED = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Program:
    """One thing to compile.

    kernels: what it has of ours or a peer's, in the order in which they are compiled, each with its work; None for one
        that is of no interest. case: which shapes. config: how it cuts them up, in words.
    """

    contender: str
    case: Case
    config: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[tuple[str, Work] | None, ...]
    shipped: bool = True


def gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Of the sum of its squares."""
    return jax.grad(lambda *arrays: jnp.sum(jnp.square(function(*arrays).astype(jnp.float32))), (0, 1, 2))


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
        at = f"896 tokens, forward 128 × {keys}, backward 64 × 64"
        yield Program("jax", case, at, attention, arguments, (("forward", forward),))
        yield Program("jax", case, at, gradients(attention), arguments, (None, ("dq", dq), ("dkv", dkv)))


class H100(NamedTuple):
    """The device that tokamax asks for."""

    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"
    core_count: int = 132


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
        at = f"untuned: forward 128 × {keys}, backward 64 × 64"
        yield Program("tokamax", case, at, attention, arguments, (("forward", forward),))
        yield Program("tokamax", case, at, gradients(attention), arguments, (None, ("dq", dq), ("dkv", dkv)))


@contextmanager
def pretended() -> Iterator[None]:
    """Peers look for a GPU, and tokamax for a library with which it measures: neither is needed to compile."""
    absent = {"xprof", "xprof.cli", "xprof.cli.tools"} if importlib.util.find_spec("xprof") is None else set()
    with (
        mock.patch("jax.extend.backend.get_default_device", return_value=H100()),
        mock.patch.dict(sys.modules, dict.fromkeys(absent, mock.MagicMock())),
    ):
        yield


GROUPS: dict[str, Callable[[], Iterator[Program]]] = {
    "peers": lambda: (*jax_own(), *tokamax()),
}
