"""The learning-rate schedule and the moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from pi0fast import config, optim, train_state
from pi0fast import mesh as meshes
from pi0fast.optim import OptimConfig
from pi0fast.params import flatten
from pi0fast.settings import TINY, Settings


def test_schedule():
    rate = OptimConfig().schedule()
    np.testing.assert_allclose(rate(0), 2.5e-5 / 1001, rtol=1e-5, atol=1e-11)  # float32, of the peak
    np.testing.assert_allclose(rate(1000), 2.5e-5, rtol=1e-5)
    np.testing.assert_allclose(rate(15_500), (2.5e-5 + 2.5e-6) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(40_000), 2.5e-6, rtol=1e-5)


def test_a_run_goes_on_with_the_state_that_it_has():
    begun = dataclasses.asdict(OptimConfig())
    OptimConfig(peak_lr=1.0, ema_decay=0.5).check_resumes(begun)
    OptimConfig().check_resumes({name: value for name, value in begun.items() if name != "mu_dtype"})  # an older run
    with pytest.raises(ValueError, match=r"began with --optim.mu-dtype=float32 and cannot go on with bfloat16"):
        OptimConfig(mu_dtype="bfloat16").check_resumes(begun)
    with pytest.raises(
        ValueError, match=r"began with --optim.ema-decay=0.99 and cannot go on with None: .*--init-from"
    ):
        OptimConfig(ema_decay=None).check_resumes(begun)
    with pytest.raises(ValueError, match=r"began with --optim.ema-decay=None and cannot go on with 0.99"):
        OptimConfig().check_resumes({**begun, "ema_decay": None})
    with pytest.raises(ValueError, match=r"began with --optim.second-moment=float32 and cannot go on with factored"):
        OptimConfig(second_moment="factored").check_resumes({**begun, "second_moment": "float32"})
    OptimConfig(ema_on_host=True).check_resumes(begun)  # the same numbers, elsewhere


def test_the_command_line():
    flags = ["--optim.ema-decay=None", "--optim.mu-dtype=bfloat16", "--reduce-dtype=bfloat16", "--accum=4"]
    settings = tyro.cli(Settings, default=Settings(), args=flags)
    assert settings.optim == OptimConfig(ema_decay=None, mu_dtype="bfloat16")
    assert (settings.reduce_dtype, settings.accum) == ("bfloat16", 4)
    _, state, _ = train_state.abstract_state(config.pi0_tiny(), settings, meshes.make("fsdp:8"))
    assert state.average is None


def test_average():
    averaged = optim.update_average({"w": np.array(1.0)}, {"w": np.array(2.0)}, 0.9)
    np.testing.assert_allclose(averaged["w"], 1.1)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_moments_lie_where_their_weights_do(mu_dtype):
    settings = dataclasses.replace(TINY, optim=OptimConfig(mu_dtype=mu_dtype))
    _, state, _ = train_state.abstract_state(config.pi0_tiny(), settings, meshes.make("data:2,fsdp:4"))
    for name, dtype in (("mu", mu_dtype), ("nu", "float32")):
        moments = flatten(optax.tree.get(state.opt_state, name))
        assert {moment.dtype for moment in moments.values()} == {np.dtype(dtype)}
        for path, weight in flatten(state.weights).items():
            assert moments[path].get_value().sharding == weight.get_value().sharding, path


def test_a_first_moment_in_bfloat16_is_rounded_and_nothing_else():
    """Updates are computed in float32: after one step from zero they are those of a moment in float32."""
    weights, gradient = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    updates, moments = {}, {}
    for mu_dtype in ("float32", "bfloat16"):
        optimizer = OptimConfig(mu_dtype=mu_dtype).optimizer()
        updates[mu_dtype], state = optimizer.update(gradient, optimizer.init(weights), weights)
        moments[mu_dtype] = optax.tree.get(state, "mu")
    np.testing.assert_array_equal(updates["bfloat16"], updates["float32"])
    np.testing.assert_array_equal(moments["bfloat16"], moments["float32"].astype(jnp.bfloat16))


FACTORED = OptimConfig(second_moment="factored", peak_lr=1e-3, warmup_steps=0, eps=0.0, weight_decay=0.0)
SIDE = 128  # from which on matrices are factored


def updates(optim, gradients):
    """Those of one matrix, step by step, and the state that is left."""
    optimizer, weights, found = optim.optimizer(), jnp.ones_like(gradients[0]), []
    state = optimizer.init(weights)
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, weights)
        found.append(update)
    return found, state


def test_a_factored_moment_is_adams_where_squares_have_rank_one():
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(1, 9, (2, SIDE))
    gradient = jnp.asarray(np.outer(rows, columns) * rng.choice([-1, 1], (SIDE, SIDE)), jnp.float32)
    adam = dataclasses.replace(FACTORED, second_moment="float32")
    for ours, theirs in zip(updates(FACTORED, [gradient] * 3)[0], updates(adam, [gradient] * 3)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_small_matrices_keep_adams_second_moment():
    gradients = list(jnp.asarray(np.random.default_rng(0).normal(size=(4, SIDE, SIDE - 1)), jnp.float32))
    _, ours = updates(FACTORED, gradients)
    _, theirs = updates(dataclasses.replace(FACTORED, second_moment="float32"), gradients)
    unbiased = optax.tree.get(theirs, "nu") / (1 - FACTORED.b2 ** len(gradients))
    np.testing.assert_allclose(optax.tree.get(ours, "v")[""], unbiased, rtol=1e-5)


def test_factored_moments_are_means_that_lie_whole_everywhere():
    settings = dataclasses.replace(TINY, optim=FACTORED)
    _, state, _ = train_state.abstract_state(config.pi0_tiny(), settings, meshes.make("fsdp:8"))
    row, column, whole = (optax.tree.get(state.opt_state, name) for name in ("v_row", "v_col", "v"))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves((row, column, whole)))
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(state.weights)}
    large = "['vlm']['layers']['gate_up'].value"
    layers, width, columns = shapes[large]
    assert (row[large].shape, column[large].shape, whole[large].shape) == ((layers, width), (layers, columns), (1,))
    small = "['action_expert']['layers']['mlp_norm']['scale'].value"
    assert whole[small].shape == shapes[small]
