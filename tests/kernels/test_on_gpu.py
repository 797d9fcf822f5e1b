"""Every kernel on a GPU, in bfloat16, at the shapes that the models run.

JAX_PLATFORMS=cuda,cpu pytest tests/kernels/test_on_gpu.py
JAX_PLATFORMS=cuda,cpu compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_on_gpu.py -k shrunk
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0fast_kernels import _dispatch, ada_rms_norm, prefix_lm_attention
from pi0fast_kernels._triton import INTERPRET
from pi0fast_kernels.ada_rms_norm.cases import CASES as NORMS
from pi0fast_kernels.prefix_lm_attention.cases import CASES as ATTENTIONS

pytestmark = pytest.mark.skipif(INTERPRET, reason="needs a GPU: JAX_PLATFORMS=cuda,cpu")

SIZES = ("real", "shrunk")


def values_and_gradients(op, arrays: dict, implementation: str) -> list[jax.Array]:
    """The results of the op, and the gradients of all its floating arrays under a random cotangent."""
    differentiable = {name: x for name, x in arrays.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}

    @jax.jit
    def run(differentiable, fixed):
        out, vjp = jax.vjp(lambda given: op(**given, **fixed, implementation=implementation), differentiable)
        leaves, structure = jax.tree.flatten(out)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        cotangents = [jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves, strict=True)]
        return [*leaves, *jax.tree.leaves(vjp(structure.unflatten(cotangents)))]

    return run(differentiable, {name: x for name, x in arrays.items() if name not in differentiable})


def wide(arrays: dict) -> dict:
    return {
        name: x.astype(jnp.float32) if x is not None and x.dtype == jnp.bfloat16 else x for name, x in arrays.items()
    }


def error(actual: jax.Array, exact: jax.Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(actual, np.float64) - np.asarray(exact, np.float64)))))


def check(op, arrays: dict, implementation: str) -> None:
    """The error against float32 is at most 1.5 times the reference's own in bfloat16; two runs give the same bits."""
    ours, again = (values_and_gradients(op, arrays, implementation) for _ in range(2))
    theirs = values_and_gradients(op, arrays, "reference")
    with jax.default_matmul_precision("float32"):
        exact = values_and_gradients(op, wide(arrays), "reference")
    for n, (actual, same, other, target) in enumerate(zip(ours, again, theirs, exact, strict=True)):
        assert np.isfinite(np.asarray(actual, np.float32)).all(), n
        if implementation in ("mosaic_gpu", "triton"):
            np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(same, np.float32))
        assert error(actual, target) <= 1.5 * error(other, target), n


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda case: case.name)
def test_prefix_lm_attention(case, size, implementation):
    case = case if size == "real" else case.shrunk()
    arrays = dict(zip(("q", "k", "v", "key_start", "key_end"), case.inputs(), strict=True))
    if implementation == "mosaic_gpu" and _dispatch.device().capability != 90:
        pytest.skip(f"{_dispatch.device().kind} is no Hopper GPU")
    check(partial(prefix_lm_attention, scale=case.scale), arrays, implementation)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_ada_rms_norm(case, size):
    case = case if size == "real" else case.shrunk()
    check(ada_rms_norm, case.inputs(), "triton")
