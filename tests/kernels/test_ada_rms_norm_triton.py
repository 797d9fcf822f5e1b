"""The Triton norm in Triton's interpreter against the reference: values and every gradient."""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pi0fast_kernels import _dispatch, _triton, ada_rms_norm
from pi0fast_kernels._triton import Launch
from pi0fast_kernels.ada_rms_norm import reference, triton
from pi0fast_kernels.ada_rms_norm.api import _one_form
from pi0fast_kernels.ada_rms_norm.cases import CASES

pytestmark = pytest.mark.skipif(not triton.INTERPRET, reason="runs in Triton's interpreter only")

EPS = 1e-6
# Float32 roundings of 6e-8, in sums of up to about a hundred terms in another order.
TOLERANCE = 2e-6
H100 = _dispatch.Device("cuda", "NVIDIA H100 80GB HBM3", 90, 132)


class Variant(NamedTuple):
    """What is there beside x and scale."""

    shift: bool = False
    residual: bool = False
    gate: bool = False


VARIANTS = {
    "plain": Variant(),
    "shift": Variant(shift=True),
    "residual": Variant(residual=True),
    "shift and residual": Variant(shift=True, residual=True),
    "gate": Variant(residual=True, gate=True),
    "all": Variant(True, True, True),
}
ALL = VARIANTS["all"]

# Tokens and channels that the interpreter's blocks do and do not divide.
SHAPES = [(2, 5, 24), (3, 1, 19), (1, 16, 32), (2, 21, 33), (1, 2, 8)]


def arrays(variant: Variant, b: int, t: int, d: int, seed=0, dtype=jnp.float32, modulation_dtype=None):
    """x, scale and what else the variant has, and cotangents of the results, by name; modulations `[B, D]`."""
    data, modulation = ((b, t, d), dtype), ((b, d), modulation_dtype or dtype)
    kinds = {"x": data, "scale": modulation, "dnormed": data}
    kinds |= {"shift": modulation} if variant.shift else {}
    kinds |= {"residual": data, "dtotal": data} if variant.residual else {}
    kinds |= {"gate": modulation} if variant.gate else {}
    keys = jax.random.split(jax.random.key(seed), len(kinds))
    return {name: jax.random.normal(key, *kinds[name]) for name, key in zip(kinds, keys, strict=True)}


def present(**values) -> dict[str, jax.Array]:
    return {name: value for name, value in values.items() if value is not None}


def through(module: ModuleType, dnormed, dtotal=None, *, options, **inputs) -> dict[str, jax.Array]:
    """All results of `forward` and `backward` of a module, by name."""
    normed, rstd, total = module.forward(**inputs, eps=EPS, **options)
    needed = present(shift=inputs.get("shift"), dtotal=dtotal)
    if "gate" in inputs:
        needed |= {"x": inputs["x"], "gate": inputs["gate"]}
    kept = inputs["x"] if total is None else total
    dkept, dscale, dshift, dx, dgate = module.backward(kept, rstd, dnormed, inputs["scale"], **needed, **options)
    return present(
        normed=normed,
        rstd=rstd,
        total=total,
        dx=dkept if dx is None else dx,
        dscale=dscale,
        dshift=dshift,
        dresidual=None if total is None else dkept,
        dgate=dgate,
    )


def kernels(module: ModuleType, given: dict[str, jax.Array], **config) -> dict[str, jax.Array]:
    return through(module, **given, options={"device": _dispatch.device(), **config})


def expected(dnormed, dtotal=None, **inputs) -> dict[str, jax.Array]:
    """The same by autodiff of the reference."""

    def norm(inputs):
        optional = (inputs.get(name) for name in ("shift", "residual", "gate"))
        return reference.norm(inputs["x"], inputs["scale"], *optional, eps=EPS)

    (normed, total), vjp = jax.vjp(norm, inputs)
    (gradients,) = vjp((dnormed, jnp.zeros_like(total) if dtotal is None else dtotal))
    mean = np.mean(np.asarray(total, np.float64) ** 2, axis=-1)
    return present(
        normed=normed,
        rstd=1 / np.sqrt(mean + EPS),
        total=None if dtotal is None else total,
        **{f"d{name}": gradient for name, gradient in gradients.items()},
    )


def error(actual, exact) -> float:
    """The largest error, as a share of the largest exact value, or of one: the terms of what cancels out."""
    actual, exact = (np.asarray(x, np.float64) for x in (actual, exact))
    return float(np.abs(actual - exact).max() / max(np.abs(exact).max(), 1.0))


def compare(actual: dict[str, jax.Array], exact: dict[str, jax.Array]) -> None:
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].shape == exact[name].shape, name
        assert error(actual[name], exact[name]) <= TOLERANCE, name


def check(module: ModuleType, variant: Variant, shape: tuple[int, int, int], seed=0, **config) -> None:
    """Values and gradients agree to float32 rounding."""
    given = arrays(variant, *shape, seed=seed)
    compare(kernels(module, given, **config), expected(**given))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant, shape):
    check(triton, VARIANTS[variant], shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_in_the_kernels_form(variant):
    given = arrays(VARIANTS[variant], 2, 5, 24)
    compare(through(reference, **given, options={}), expected(**given))


@pytest.mark.parametrize(("forward", "backward", "fill"), [(1, 1, 1), (8, 4, 1), (2, 8, 8)])
def test_blocks(forward, backward, fill):
    config = triton.TuningConfig(triton.Block(forward, Launch(1)), triton.Block(backward, Launch(1)), fill)
    check(triton, ALL, (2, 21, 24), config=config)


@pytest.mark.parametrize("modulation_dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("variant", ["plain", "shift and residual", "all"])
def test_half_precision(variant, modulation_dtype):
    """float16, as the interpreter's bfloat16 is wrong."""
    halves = arrays(VARIANTS[variant], 2, 21, 40, dtype=jnp.float16, modulation_dtype=modulation_dtype)
    exact = expected(**{name: x.astype(jnp.float32) for name, x in halves.items()})
    ours, theirs = kernels(triton, halves), expected(**halves)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name != "rstd":
            assert ours[name].dtype == theirs[name].dtype, name
        assert error(ours[name], exact[name]) <= 1.5 * error(theirs[name], exact[name]) + TOLERANCE, name


def test_the_residual_is_rounded_before_it_is_normed():
    halves = arrays(ALL, 2, 5, 24, dtype=jnp.float16)
    results = kernels(triton, halves)
    alone, _, _ = triton.forward(results["total"], halves["scale"], halves["shift"], eps=EPS, device=_dispatch.device())
    np.testing.assert_array_equal(alone, results["normed"])
    np.testing.assert_array_equal(results["total"], expected(**halves)["total"])


def test_rows_of_zeros_are_finite():
    zeros = jax.tree.map(jnp.zeros_like, arrays(ALL, 1, 3, 24))
    results = kernels(triton, zeros | {"dnormed": zeros["dnormed"] + 1})
    assert all(np.isfinite(result).all() for result in results.values())
    assert not results["normed"].any()


def test_results_are_the_same_from_run_to_run():
    given = arrays(ALL, 2, 21, 24)
    first, second = kernels(triton, given), kernels(triton, given)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def problems(largest: int):
    shapes = st.tuples(st.integers(1, 3), st.integers(1, largest), st.integers(8, 2 * largest))
    return st.tuples(st.sampled_from(sorted(VARIANTS)), shapes, st.integers(0, 99))


@pytest.mark.long
@settings(max_examples=5, deadline=None, derandomize=True)
@given(problems(largest=20))
def test_random_problems(problem):
    variant, shape, seed = problem
    check(triton, VARIANTS[variant], shape, seed)


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(largest=70))
def test_many_random_problems(problem):
    variant, shape, seed = problem
    check(triton, VARIANTS[variant], shape, seed)


FAULTS = {
    "the backward pass drops the last tokens of a chunk": ("range(0, LENGTH, ROWS)", "range(0, LENGTH - ROWS, ROWS)"),
    "scale is not counted from one, forward": ("(1.0 + scales)", "scales"),
    "scale is not counted from one, backward": ("1.0 + tl.load(", "tl.load("),
    "the mean goes over the padding": ("tl.sum(y * y, 1) / D", "tl.sum(y * y, 1) / WIDE"),
    "the mean of the gradient is left out": ("(dunit - unit *", "(dunit - 0.0 * unit *"),
    "the last token is not counted": ("exists = first + offset + row < T", "exists = first + offset + row < T - 1"),
    "the new residual's cotangent is left out": ("dy += dkept", "dy += 0.0 * dkept"),
    "the gate is left out of x's gradient": ("(dy * gates[None, :])", "(dy)"),
    "shift's gradient is stored as the gate's": ("(HAS_SHIFT + 1) * D, dgate", "(HAS_SHIFT + 1) * D, dshift"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    old, new = FAULTS[fault]
    text = Path(triton.__file__).read_text()
    assert text.count(old) == 1
    (tmp_path / "faulty.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("pi0fast_kernels.ada_rms_norm.faulty", tmp_path / "faulty.py")
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    with pytest.raises(AssertionError):
        check(faulty, ALL, (2, 21, 24))


# Through the public op, under JAX's transformations.

B, T, D = 4, 3, 24


def inputs(*vectors: str, variant=ALL) -> dict[str, jax.Array]:
    """Arguments of the op; the modulations named are `[D]`, the others `[B, D]`."""
    given = arrays(variant, B, T, D)
    return {
        name: given[name][0] if name in vectors else given[name] for name in given if name not in ("dnormed", "dtotal")
    }


def loss(given: dict[str, jax.Array], implementation: Any = "triton", used=slice(None)) -> jax.Array:
    """Sees the normed value and the new residual, or the one of them that is used."""
    results = ada_rms_norm(**given, eps=EPS, implementation=implementation)
    return jnp.sum(jnp.sin(jnp.stack(jax.tree.leaves(results)[used]) + 1))


def agree(make, *given) -> None:
    """`make(loss)(*given)` is the same with both implementations."""
    ours, theirs = (make(partial(loss, implementation=name))(*given) for name in ("triton", "reference"))
    errors = jax.tree.leaves(jax.tree.map(error, ours, theirs))
    assert max(errors) <= TOLERANCE, errors


@pytest.mark.parametrize("vectors", [(), ("scale",), ("shift", "gate"), ("scale", "shift", "gate")], ids=str)
def test_modulations_of_the_example_and_of_all(vectors):
    agree(jax.value_and_grad, inputs(*vectors))


@pytest.mark.parametrize("variant", VARIANTS)
def test_jit(variant):
    agree(lambda f: jax.jit(jax.value_and_grad(f)), inputs("scale", "shift", "gate", variant=VARIANTS[variant]))


def test_gradients_have_their_inputs_dtype():
    given = {name: x.astype(jnp.float16) if x.ndim == 3 else x for name, x in inputs("scale").items()}
    for name, gradient in jax.grad(loss)(given).items():
        assert gradient.dtype == given[name].dtype, name


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2)], ids=["normed", "residual"])
def test_only_one_result_is_used(used):
    agree(lambda f: jax.value_and_grad(partial(f, used=used)), inputs())


@pytest.mark.parametrize("mapped", [("x", "residual"), ("scale", "gate"), ("shift",)], ids=str)
@pytest.mark.parametrize("vectors", [(), ("scale", "shift", "gate")], ids=["each", "all"])
def test_vmap(mapped, vectors):
    given = inputs(*vectors)
    several = {name: jnp.stack([x, 2 - x]) if name in mapped else x for name, x in given.items()}
    axes = ({name: 0 if name in mapped else None for name in given},)
    agree(lambda f: jax.vmap(jax.value_and_grad(f), axes), several)
    agree(lambda f: jax.value_and_grad(lambda x: jnp.sum(jax.vmap(f, axes)(x))), several)


def test_remat_and_scan():
    def scanned(f):
        step = jax.checkpoint(lambda total, x: (total + f(x | {"x": x["x"] + 1e-3 * total}), None))
        return jax.value_and_grad(lambda given: jax.lax.scan(step, jnp.ones(()), given)[0])

    agree(scanned, jax.tree.map(lambda x: jnp.stack([x, x + 1]), inputs("scale")))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("vectors", [("scale",), ("scale", "shift", "gate")], ids=["mixed", "all"])
def test_shard_map(vectors, remat):
    """Examples sharded, `[D]` replicated: its gradient is the sum over the mesh."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    given = inputs(*vectors)
    specs = {name: PartitionSpec() if x.ndim == 1 else PartitionSpec("data") for name, x in given.items()}

    def sharded(f):
        def run(x):
            return jax.lax.psum(f(x), "data")

        run = jax.checkpoint(run) if remat else run
        return jax.jit(jax.value_and_grad(jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())))

    agree(lambda f: sharded(f) if f.keywords["implementation"] == "triton" else jax.value_and_grad(f), given)


def test_a_wrong_guess_of_the_device_runs_the_reference(monkeypatch):
    """Chosen for a GPU while tracing, compiled for a CPU."""
    given = inputs("scale")
    exact = jax.value_and_grad(partial(loss, implementation="reference"))(given)
    monkeypatch.setattr(_dispatch, "device", lambda: H100)
    monkeypatch.setattr(_triton, "_interpret", lambda *_: pytest.fail("the kernel runs"))
    guessed = jax.jit(jax.value_and_grad(partial(loss, implementation=None)))
    assert "platform_index" in str(guessed.trace(given).jaxpr)
    assert max(jax.tree.leaves(jax.tree.map(error, guessed(given), exact))) <= TOLERANCE


def test_new_data_is_not_traced_anew():
    traced = []
    run = jax.jit(lambda given: (traced.append(given), loss(given))[1])
    for seed in range(3):
        run(jax.tree.map(lambda x, seed=seed: x + seed, inputs()))
    assert len(traced) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case):
    small = case.shrunk()
    assert small.batch <= 2 and small.tokens <= 7
    agree(jax.value_and_grad, small.inputs(seed=1, dtype=jnp.float32))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_of_cases(case):
    """What the passes take and give, counted array by array."""

    def passes():
        given = case.inputs()
        optional = map(given.get, ("shift", "residual", "gate"))
        x, scale, shift, residual, gate = _one_form(given["x"], given["scale"], *optional)
        assert scale is not None
        normed, rstd, total = reference.forward(x, scale, shift, residual, gate, eps=EPS)
        forward = (x, scale, shift, residual, gate), (normed, rstd, total)
        dnormed, dtotal = normed, total
        saved = (x if total is None else total, rstd), (None if gate is None else x, gate)
        gradients = reference.backward(*saved[0], dnormed, scale, shift, dtotal, *saved[1])
        return forward, (saved, dnormed, dtotal, scale, gradients)

    for backward, arrays in enumerate(jax.eval_shape(passes)):
        assert case.bytes(bool(backward)) == sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(arrays))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 4097), jnp.float32, "it takes widths up to 4096, not 4097"),
        ((1, 0, 24), jnp.float32, r"x \(1, 0, 24\) is empty"),
        ((1, 1, 24), jnp.bfloat16, "the interpreter's bfloat16 is wrong"),
    ],
)
def test_what_triton_cannot_run(shape, dtype, message):
    x, scale = jnp.zeros(shape, dtype), jnp.zeros(shape[-1])
    with pytest.raises(ValueError, match=f"ada_rms_norm cannot run: triton: {message}"):
        ada_rms_norm(x, scale, implementation="triton")
    assert ada_rms_norm(x, scale).shape == shape


def test_programs_fill_the_cores():
    assert triton.num_rows(1, 32 * 816, 4, num_cores=132) == 4
    assert triton.num_rows(1, 400, 4, num_cores=132) == 2
    assert triton.num_rows(1, 50, 4, num_cores=132) == 1
    assert triton.chunk_length(1, 32 * 816, 1, programs=528) == 50
    assert triton.chunk_length(32, 50, 1, programs=528) == triton.SHORTEST_CHUNK
    assert triton.chunk_length(64, 50, 4, programs=32) == 52
    assert triton.chunk_length(1, 3, 2, programs=528) == 4


def test_every_width_has_blocks(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", False)
    for capability in _triton.SHARED_MEMORY:
        for width in (1, 512, 513, 1024, 2048, 4096):
            channels = width / (32 * triton.tuning(capability, width, 1).backward.launch.num_warps)
            assert channels <= 8
