"""The completed interpreter on a small kernel: what it computes, and that it finds the races planted there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pi0fast_kernels import _dispatch
from pi0fast_kernels._mosaic_gpu import launch
from tests.kernels.mosaic_gpu_interpreter import race_free, record_races

SHAPE = 64, 64
# pyright takes these for abstract.
SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
TILED = plgpu.TilingTransform((8, 64)), SWIZZLE  # pyright: ignore[reportAbstractUsage]
WIDE = plgpu.TilingTransform((8, 32)), SWIZZLE  # pyright: ignore[reportAbstractUsage]


def kernel(a, b, out, a_tile, b_tile, out_tile, loaded, released, *, fault):
    """out = 1 + 2 Σ a[i] @ b[i]: a once from shared memory, once from registers; one slot."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        @pl.loop(0, len(a))
        def _(i):
            @pl.when(i >= 1)
            def _():
                plgpu.barrier_wait(released)

            plgpu.copy_gmem_to_smem(a.at[i], a_tile, loaded)
            plgpu.copy_gmem_to_smem(b.at[i], b_tile, loaded)

    @pl.when(warpgroup == 1)
    def _():
        def run(total):
            total[...] = jnp.ones(SHAPE, jnp.float32)

            @pl.loop(0, len(a))
            def _(i):
                if fault != "no wait for a copy":
                    plgpu.barrier_wait(loaded)
                plgpu.wgmma(total, plgpu.load(a_tile, layout=plgpu.Layout.WGMMA), b_tile)
                plgpu.wgmma(total, a_tile, b_tile)
                if fault == "accumulator read in flight":
                    out_tile[...] = plgpu.wgmma_accumulator_load(total, wait_n=1)
                if fault != "slot released in flight":
                    plgpu.wgmma_wait(0)
                if fault != "no commit of a load":
                    plgpu.commit_smem()
                plgpu.barrier_arrive(released)
                plgpu.wgmma_wait(0)

        out_tile[...] = pl.run_state(run)(plgpu.WGMMAAccumulatorRef.init(jnp.zeros(SHAPE, jnp.float32)))
        if fault != "no commit of a store":
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out)
        if fault != "no wait for a store":
            plgpu.wait_smem_to_gmem(0)


def product(a, b, fault=None):
    tile = plgpu.SMEM(SHAPE, a.dtype, transforms=TILED)
    out_tile = plgpu.SMEM(SHAPE, jnp.float32, transforms=WIDE)
    (out,) = launch(
        partial(kernel, fault=fault),
        [a, b],
        [jax.ShapeDtypeStruct(SHAPE, jnp.float32)],
        name="product",
        device=_dispatch.device(),
        grid={"program": 1},
        warpgroups=2,
        scratch=[tile, tile, out_tile, plgpu.Barrier(num_arrivals=2), plgpu.Barrier()],
    )
    return jax.block_until_ready(out)


def operands(steps: int) -> tuple[jax.Array, jax.Array]:
    a, b = jax.random.normal(jax.random.key(0), (2, steps, *SHAPE), jnp.bfloat16)
    return a, b


def test_accumulators_and_operands_in_registers():
    a, b = operands(3)
    with race_free():
        out = product(a, b)
    exact = 1 + 2 * np.einsum("imk,ikn->mn", *(np.asarray(x, np.float64) for x in (a, b)))
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", ["slot released in flight", "no commit of a load", "no commit of a store"])
def test_races_are_found(fault):
    with record_races() as records:
        product(*operands(2), fault)
    assert [kernel.races_found for kernel in records] == [True]


def test_a_copy_that_is_not_waited_for_is_found():
    """One step: with more, the interpreter already misses the wait."""
    with record_races() as records:
        product(*operands(1), "no wait for a copy")
    assert [kernel.races_found for kernel in records] == [True]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("accumulator read in flight", "uses an accumulator that a wgmma in flight adds to"),
        ("no wait for a store", "Not all copy_smem_to_gmem read-side operations completed"),
    ],
)
def test_errors(fault, message):
    with record_races(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        product(*operands(1), fault)


def test_race_free_fails_where_no_kernel_ran_and_where_one_raced():
    with pytest.raises(AssertionError, match="no kernel ran"), race_free():
        pass
    with pytest.raises(AssertionError), race_free():
        product(*operands(1), "no commit of a store")
