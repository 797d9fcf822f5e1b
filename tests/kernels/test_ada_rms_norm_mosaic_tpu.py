"""The TPU norm in Pallas's interpreter against the reference: values, every gradient, races; compiled for TPUs if slow.

What is compared, and how, is the Triton norm's: `test_ada_rms_norm_triton.py`.
"""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, SingleDeviceSharding

from pi0fast import targets
from pi0fast_kernels import _dispatch, _mosaic_tpu, ada_rms_norm
from pi0fast_kernels.ada_rms_norm import mosaic_tpu
from pi0fast_kernels.ada_rms_norm.cases import CASES, Case
from tests.kernels.test_ada_rms_norm_triton import (
    ALL,
    EPS,
    TOLERANCE,
    VARIANTS,
    Variant,
    arrays,
    compare,
    error,
    expected,
    inputs,
    kernels,
    loss,
    problems,
)
from tests.kernels.tpu_interpreter import race_free

pytestmark = pytest.mark.skipif(not _mosaic_tpu.INTERPRET, reason="runs in Pallas's TPU interpreter only")

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


def without_races(module: ModuleType) -> Any:
    """The module, failing where one of its kernels has a race."""

    def checked(function):
        def run(*arrays, **options):
            with race_free():
                return jax.block_until_ready(function(*arrays, **options))

        return run

    return SimpleNamespace(forward=checked(module.forward), backward=checked(module.backward))


def check(module: ModuleType, variant: Variant, shape: tuple[int, int, int], seed=0, **config) -> None:
    """Values and gradients agree to float32 rounding, and no kernel has a race."""
    given = arrays(variant, *shape, seed=seed)
    compare(kernels(without_races(module), given, **config), expected(**given))


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant):
    """Neither tokens nor channels fill their blocks."""
    check(mosaic_tpu, VARIANTS[variant], (2, 21, 33))


@pytest.mark.parametrize("shape", [(3, 1, 19), (1, 16, 32), (1, 2, 8), (16, 3, 24), (1, 37, 24)], ids=str)
def test_shapes(shape):
    """One token, one block, several examples a block, blocks shared by two cores of which one has fewer."""
    check(mosaic_tpu, ALL, shape)


@pytest.mark.parametrize("modulation_dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_half_precision(variant, modulation_dtype):
    halves = arrays(VARIANTS[variant], 2, 21, 40, dtype=jnp.bfloat16, modulation_dtype=modulation_dtype)
    exact = expected(**{name: x.astype(jnp.float32) for name, x in halves.items()})
    ours, theirs = kernels(without_races(mosaic_tpu), halves), expected(**halves)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name != "rstd":
            assert ours[name].dtype == theirs[name].dtype, name
        assert error(ours[name], exact[name]) <= 1.5 * error(theirs[name], exact[name]) + TOLERANCE, name


def test_the_residual_is_rounded_before_it_is_normed():
    halves = arrays(ALL, 2, 5, 24, dtype=jnp.bfloat16)
    forward = partial(mosaic_tpu.forward, eps=EPS, device=_dispatch.device())
    normed, _, total = forward(*(halves[name] for name in ("x", "scale", "shift", "residual", "gate")))
    assert total is not None
    alone, _, _ = forward(total, halves["scale"], halves["shift"])
    np.testing.assert_array_equal(alone, normed)
    np.testing.assert_array_equal(total, expected(**halves)["total"])


def test_rows_of_zeros_are_finite():
    zeros = jax.tree.map(jnp.zeros_like, arrays(ALL, 1, 3, 24))
    results = kernels(mosaic_tpu, zeros | {"dnormed": zeros["dnormed"] + 1})
    assert all(np.isfinite(result).all() for result in results.values())
    assert not results["normed"].any()


def test_results_are_the_same_from_run_to_run():
    given = arrays(ALL, 2, 21, 24)
    first, second = kernels(mosaic_tpu, given), kernels(mosaic_tpu, given)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.long
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(largest=40))
def test_random_problems(problem):
    variant, shape, seed = problem
    check(mosaic_tpu, VARIANTS[variant], shape, seed)


FAULTS = {
    "the last tokens of a block are left out": ("if tokens % how.chunk:", "if False:"),
    "the last block is left out": ("if rest:", "if False:"),
    "sums begin anew with every block": ("(pl.program_id(1) == 0) & (pl.program_id(2) == 0)", "pl.program_id(2) >= 0"),
    "the residual's own cotangent is left out": ("dy += at", "dy += 0.0 * at"),
    "the mean of the gradient is left out": ("(dunit - unit *", "(dunit - 0.0 * unit *"),
    "every example has the first one's modulations": ("row = pl", "row = 0 * pl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    old, new = FAULTS[fault]
    text = Path(mosaic_tpu.__file__).read_text()
    assert text.count(old) == 1
    (tmp_path / "faulty.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("pi0fast_kernels.ada_rms_norm.faulty", tmp_path / "faulty.py")
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    with pytest.raises(AssertionError):
        check(faulty, ALL, (2, 11, 24))


# Through the public op, under JAX's transformations.


def agree(make, *given) -> None:
    """`make(loss)(*given)` is the same with both implementations."""
    ours, theirs = (make(partial(loss, implementation=name))(*given) for name in ("mosaic_tpu", "reference"))
    errors = jax.tree.leaves(jax.tree.map(error, ours, theirs))
    assert max(errors) <= TOLERANCE, errors


@pytest.mark.parametrize("vectors", [("scale",), ("scale", "shift", "gate")], ids=["mixed", "all"])
def test_jit_with_modulations_of_the_example_and_of_all(vectors):
    agree(lambda f: jax.jit(jax.value_and_grad(f)), inputs(*vectors))


def test_gradients_have_their_inputs_dtype():
    given = {name: x.astype(jnp.bfloat16) if x.ndim == 3 else x for name, x in inputs("scale").items()}
    gradients = jax.eval_shape(jax.grad(partial(loss, implementation="mosaic_tpu")), given)
    assert {name: x.dtype for name, x in gradients.items()} == {name: x.dtype for name, x in given.items()}


@pytest.mark.parametrize("vectors", [(), ("scale", "shift", "gate")], ids=["each", "all"])
def test_vmap(vectors):
    given = inputs(*vectors)
    several = {name: jnp.stack([x, 2 - x]) if name in ("x", "gate") else x for name, x in given.items()}
    axes = ({name: 0 if name in ("x", "gate") else None for name in given},)
    agree(lambda f: jax.value_and_grad(lambda x: jnp.sum(jax.vmap(f, axes)(x))), several)


def scanned(f, *, remat: bool):
    def step(total, x):
        return total + f(x | {"x": x["x"] + 1e-3 * total}), None

    step = jax.checkpoint(step) if remat else step
    return jax.value_and_grad(lambda given: jax.lax.scan(step, jnp.ones(()), given)[0])


def twice(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jnp.stack([x, x + 1]), given)


def test_scan():
    agree(partial(scanned, remat=False), twice(inputs("scale")))


def test_shard_map():
    """Examples sharded over two devices, scale `[D]` replicated: its gradient is the sum over the mesh."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    given = inputs("scale")
    specs = {name: PartitionSpec() if x.ndim == 1 else PartitionSpec("data") for name, x in given.items()}

    def sharded(f):
        run = jax.shard_map(
            lambda x: jax.lax.psum(f(x), "data"), mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec()
        )
        return jax.jit(jax.value_and_grad(run))

    agree(lambda f: sharded(f) if f.keywords["implementation"] == "mosaic_tpu" else jax.value_and_grad(f), given)


@pytest.mark.parametrize("case", CASES[-1:], ids=lambda case: case.name)
def test_cases(case):
    agree(jax.value_and_grad, case.shrunk().inputs(seed=1, dtype=jnp.float32))


# For TPUs that are not there.


def on(kind: str):
    """As if the program were traced for that TPU."""
    described = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


@pytest.mark.parametrize("remat", [False, True])
def test_none_takes_the_kernel_on_a_tpu_and_still_runs_on_a_cpu(remat):
    """With rematerialisation, too, which the interpreter's callbacks do not go through."""
    given = twice(inputs("scale"))
    with on("TPU v5 lite"):
        traced = jax.jit(scanned(partial(loss, implementation=None), remat=remat)).trace(given)
    assert "ada_rms_norm_backward" in str(traced.jaxpr) and "platform_index" in str(traced.jaxpr)
    exact = scanned(partial(loss, implementation="reference"), remat=False)(given)
    assert max(jax.tree.leaves(jax.tree.map(error, traced.lower().compile()(given), exact))) <= TOLERANCE


def test_what_a_tpu_kernel_cannot_run():
    x, scale = jnp.zeros((1, 1, 4097)), jnp.zeros(4097)
    with pytest.raises(ValueError, match="mosaic_tpu: it takes widths up to 4096, not 4097"):
        ada_rms_norm(x, scale, implementation="mosaic_tpu")


def test_a_second_derivative_names_the_remedy():
    given = inputs("scale")
    once = jax.grad(lambda x: loss({**given, "x": x}, implementation="mosaic_tpu"))
    with pytest.raises(NotImplementedError, match="no second derivatives .* pass implementation='reference'"):
        jax.grad(lambda x: jnp.sum(once(x)))(given["x"])


@pytest.mark.parametrize("name", ["scale", "shift", "gate"])
def test_it_refuses_float16_modulations(name):
    """Mosaic cannot load them."""
    x = jnp.zeros((1, 2, 8))
    given: dict[str, Any] = {"scale": jnp.zeros(8), name: jnp.zeros(8, jnp.float16)}
    with pytest.raises(ValueError, match="mosaic_tpu: it takes bfloat16 and float32, not float16"):
        ada_rms_norm(x, residual=x, **given, implementation="mosaic_tpu")


WIDEST = Case("widest", 32, 816, 4096, residual=True, adaptive=True)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.bfloat16, marks=pytest.mark.slow, id="bf16"),
        pytest.param(jnp.float32, marks=pytest.mark.long, id="f32"),
    ],
)
@pytest.mark.parametrize("case", [*CASES, WIDEST], ids=lambda case: case.name)
@pytest.mark.parametrize("generation", CHIPS)
def test_compiles_for_a_tpu(generation, case, dtype):
    """Both kernels, and they fit into VMEM."""
    pytest.importorskip("libtpu", reason="compiles for TPUs: uv sync --group aot")
    (chip,) = targets.devices(CHIPS[generation])[:1]
    sharding = SingleDeviceSharding(chip)
    shapes = jax.eval_shape(lambda: case.inputs(dtype=dtype))
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in shapes.items()}
    with on(chip.device_kind):
        traced = jax.jit(jax.grad(partial(loss, implementation="mosaic_tpu"))).trace(given)
    text = str(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
    assert "ada_rms_norm_forward" in text and "ada_rms_norm_backward" in text
