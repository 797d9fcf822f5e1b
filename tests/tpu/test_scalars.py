"""The scalars that reach a Pallas kernel, from the arguments that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench.tpu.scalars import scalars, words


def scaled(x, bounds, name="kernel"):
    """A kernel with two prefetched scalars computed from `bounds`, under a derivative rule, vmap and jit."""

    def kernel(first, last, x, out):
        out[...] = x[...] * first[0] + last[0]

    @jax.custom_vjp
    def run(x, bounds):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=(1,)),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            name=name,
        )(jnp.min(bounds)[None], jax.jit(jnp.max)(bounds)[None], x)

    run.defvjp(lambda x, bounds: (run(x, bounds), bounds), lambda bounds, dout: (run(dout, bounds + 1), None))
    return jax.jit(run)(x, bounds)


X, BOUNDS = jnp.ones((8, 128)), jnp.array([3, 5, 4])


def test_forward():
    program = jax.make_jaxpr(scaled)(X, BOUNDS)
    returned, found = scalars(program, [None, BOUNDS])
    assert returned == [None]
    assert {name: [x.tolist() for x in arrays] for name, arrays in found.items()} == {"kernel": [[3], [5]]}


def test_backward_from_what_the_forward_pass_saves():
    def forward(x, bounds):
        return jax.vjp(lambda x: scaled(x, bounds), x)

    saved, _ = scalars(jax.make_jaxpr(forward)(X, BOUNDS), [None, BOUNDS])
    out, pullback = jax.eval_shape(forward, X, BOUNDS)
    program = jax.make_jaxpr(lambda out, pullback: pullback(out))(out, pullback)
    _, found = scalars(program, saved)
    assert [x.tolist() for x in found["kernel"]] == [[4], [6]]


def test_scalars_of_unknown_arrays_are_an_error():
    with pytest.raises(ValueError, match="the scalars of kernel depend on"):
        scalars(jax.make_jaxpr(scaled)(X, BOUNDS), [np.asarray(X), None])


def test_two_kernels_of_one_name_are_an_error():
    twice = jax.make_jaxpr(lambda x, bounds: scaled(scaled(x, bounds), bounds))(X, BOUNDS)
    with pytest.raises(ValueError, match="two kernels are called kernel"):
        scalars(twice, [None, BOUNDS])


@pytest.mark.parametrize(
    ("array", "layout", "expected"),
    [
        # Row 1, column 129 of two tiles of 4 × 128.
        (np.arange(4 * 256).reshape(4, 256), "{1,0:T(4,128)}", {512 + 128 + 1: 256 + 129}),
        (np.arange(3), "{0:T(128)}", {0: 0, 2: 2, 127: 0}),
        # Bytes: four rows in a word.
        (np.arange(24, dtype=np.int8).reshape(1, 8, 3), "{2,1,0:T(8,128)(4,1)S(1)}", {1: 0x0A070401, 128: 0x15120F0C}),
    ],
)  # fmt: skip
def test_scalars_lie_in_tiles(array, layout, expected):
    stored = words(array, layout)
    assert {place: int(stored[place]) for place in expected} == expected


def test_other_layouts_are_an_error():
    with pytest.raises(ValueError, match="row-major"):
        words(np.zeros((2, 3), np.int32), "{0,1:T(4,128)}")
