"""Which implementation runs: by name, by device, by what each refuses."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pi0fast_kernels import _dispatch, _triton, prefix_lm_attention, ranges
from pi0fast_kernels._dispatch import Device
from pi0fast_kernels.prefix_lm_attention import jax_nn

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 90, 132)
CPU = Device("cpu", "cpu", None, None)


def on_h100():
    """As if the program were traced for an H100."""
    described = AbstractDevice(device_kind=H100.kind, num_cores=H100.num_cores, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def inputs(dtype=jnp.float32):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 16), dtype)
    return q, k, v


def test_device():
    assert _dispatch.device() == CPU
    with on_h100():
        assert _dispatch.device() == H100


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA L40S", 89),
        ("NVIDIA GeForce RTX 4090", 89),
        ("NVIDIA H200", 90),
        ("NVIDIA GeForce RTX 5090", 120),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_capability_of_devices_that_are_not_there(kind, capability):
    described = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        assert _dispatch.device() == Device("cuda", kind, capability, 1)


def test_choose():
    reasons = {"reference": None, "fast": "no such device", "odd": None}
    assert _dispatch.choose("op", None, reasons, ("fast", "odd", "reference")) == "odd"
    assert _dispatch.choose("op", "reference", reasons, ("fast",)) == "reference"
    with pytest.raises(ValueError, match="op cannot run: fast: no such device"):
        _dispatch.choose("op", "fast", reasons, ("odd",))
    with pytest.raises(ValueError, match="no implementation 'faster'; it has reference, fast, odd"):
        _dispatch.choose("op", "faster", reasons, ("odd",))


def test_large_fallbacks_are_not_silent():
    reasons = {"reference": None, "fast": "no such device"}
    order, much = ("fast", "reference"), _dispatch.LOUD_BYTES + 1
    with pytest.warns(UserWarning, match=r"logits take 2\.0 GiB \(fast: no such device\)"):
        assert _dispatch.choose("op", None, reasons, order, fallback_bytes=much) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("op", "reference", reasons, order, fallback_bytes=much) == "reference"
        assert _dispatch.choose("op", None, reasons, order, fallback_bytes=much - 1) == "reference"
    long = jax.ShapeDtypeStruct((1, 2**15, 1, 16), jnp.float32)
    with pytest.warns(UserWarning, match="prefix_lm_attention falls back to its reference"):
        jax.eval_shape(lambda x: prefix_lm_attention(x, x, x, None, None, scale=1.0), long)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (CPU, jnp.bfloat16, "needs an NVIDIA GPU and the program is for cpu"),
        (Device("tpu", "TPU v5e", None, 1), jnp.bfloat16, "the program is for TPU v5e"),
        (Device("cuda", "NVIDIA V100", None, 80), jnp.bfloat16, "compute capability None"),
        (H100, jnp.float32, "takes bfloat16 and float16, not float32; cast, or take the reference"),
        (H100, jnp.bfloat16, None),
    ],
)
def test_what_triton_refuses(device, dtype, message, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRET", False)
    reason = _triton.reason(device, dtype)
    assert reason is None if message is None else message in reason


def test_what_triton_refuses_in_its_interpreter():
    assert _triton.reason(CPU, jnp.float32) is None
    assert "bfloat16" in str(_triton.reason(CPU, jnp.bfloat16))


def test_triton_refuses_head_dimensions_that_do_not_fit():
    x = jnp.zeros((1, 1, 1, 8))
    with pytest.raises(ValueError, match="triton: it takes head dimensions from 16 to 256, not 8"):
        prefix_lm_attention(x, x, x, None, None, scale=1.0, implementation="triton")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "message"),
    [
        (CPU, jnp.bfloat16, 64, "needs an NVIDIA GPU"),
        (H100, jnp.float32, 64, "bfloat16 and float16, not float32"),
        (H100, jnp.bfloat16, 70, "multiples of 8 up to 256"),
        (Device("cuda", "NVIDIA A100", 80, 108), jnp.bfloat16, 256, "multiples of 8 up to 128"),
        (H100, jnp.bfloat16, 256, None),
    ],
)
def test_what_cudnn_refuses(device, dtype, head_dim, message):
    reason = jax_nn.cudnn_reason(device, jnp.zeros((1, 1, 1, head_dim), dtype))
    assert reason is None if message is None else message in reason


def test_a_program_traced_for_a_gpu_still_runs_on_a_cpu():
    """The kernel is chosen while tracing; where the program is lowered for something else, the reference runs."""
    q, k, v = inputs()
    bounds = ranges.causal(2, 5)

    def gradients(implementation):
        def total(q, k, v):
            return jnp.sum(jnp.sin(prefix_lm_attention(q, k, v, *bounds, scale=0.3, implementation=implementation)))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

    expected = gradients("reference")(q, k, v)
    with on_h100():
        traced = gradients(None).trace(q, k, v)
    assert "pure_callback" in str(traced.jaxpr) and "platform_index" in str(traced.jaxpr)
    compiled = traced.lower().compile()
    assert "callback" not in str(compiled.as_text())
    for actual, exact in zip(jax.tree.leaves(compiled(q, k, v)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bounds", [(None, None), ranges.causal(2, 5), (jnp.full((2, 5), 3), jnp.full((2, 5), 3))])
def test_xla_is_the_same_function(bounds):
    """JAX's own attention behind this op, queries without keys included."""

    def gradients(implementation):
        def total(q, k, v):
            return jnp.sum(jnp.sin(prefix_lm_attention(q, k, v, *bounds, scale=0.3, implementation=implementation)))

        return jax.value_and_grad(total, (0, 1, 2))(*inputs())

    for actual, exact in zip(*map(jax.tree.leaves, (gradients("xla"), gradients("reference"))), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-6)
