"""The baseline of sharded training: openpi's placement, and the same losses as ours."""

import dataclasses
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from bench import openpi_fsdp
from pi0fast import config, convert, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.optim import OptimConfig
from pi0fast.settings import TINY, LossSettings, Settings
from tests.mini import MINI, batches

MESH = "data:2,fsdp:4"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((18, 2048, 16_384), (None, None, "fsdp")),
        ((18, 16_384, 2048), (None, "fsdp", None)),
        ((1024, 1024), (None, "fsdp")),
        ((1023, 1028), (None, "fsdp")),
        ((1025, 1027), ()),  # no axis divides
        ((1023, 1024), ()),  # under 4 MiB
        ((2**21,), ()),
    ],
)
def test_placement(shape, expected):
    array = jax.ShapeDtypeStruct(shape, np.float32)
    assert openpi_fsdp.partition(array, meshes.make(MESH)) == PartitionSpec(*expected)


@pytest.mark.long
def test_losses_are_ours(monkeypatch):
    """Three steps of one model on one mesh; every matrix is sharded, as in a large model."""
    monkeypatch.setattr(openpi_fsdp, "MIN_BYTES", 0)
    settings = dataclasses.replace(
        TINY,
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=1, decay_steps=20),
        input=dataclasses.replace(TINY.input, augment=True),
        loss=LossSettings(mask_padding=True),
    )
    mesh = meshes.make(MESH)
    given = [training_data.to_device(batch, mesh) for batch in islice(batches(MINI, 8), 3)]
    graphdef, _, _ = train_state.abstract_state(MINI, settings, mesh)
    state, frozen, _ = train_state.initialize(MINI, settings, mesh)
    params = convert.to_openpi(nnx.merge(graphdef, jax.tree.map(jnp.copy, state.weights), frozen))
    ours, theirs = [], []

    step = train.make_step(graphdef, MINI, settings, mesh, state, frozen)
    for batch in given:
        state, metrics = step(state, frozen, batch)
        ours.append([metrics["loss"], metrics["grad_norm"]])

    placed = jax.tree.map(lambda x: x.sharding, openpi_fsdp.abstract_state(MINI, settings, mesh))
    assert placed.params["PaliGemma/llm/embedder/input_embedding"].spec == PartitionSpec("fsdp", None)
    baseline = openpi_fsdp.make_step(MINI, settings, mesh)
    state = jax.jit(partial(openpi_fsdp.State.initial, settings=settings), out_shardings=placed)(params)
    for batch in given:
        state, metrics = baseline(state, batch)
        theirs.append([metrics["loss"], metrics["grad_norm"]])
    (losses, norms), (their_losses, their_norms) = np.transpose(ours), np.transpose(theirs)
    np.testing.assert_allclose(losses, their_losses, rtol=2e-6)
    np.testing.assert_allclose(norms, their_norms, rtol=4e-6)  # as tests/test_trajectories.py has it
    assert int(state.step) == 3


def test_the_base_model_is_traced_without_making_it():
    model, settings, mesh = config.pi0_base(), Settings(), meshes.make("fsdp:8")
    state = openpi_fsdp.abstract_state(model, settings, mesh)
    step: Any = openpi_fsdp.make_step(model, settings, mesh)
    program = step.lower(state, training_data.abstract_batch(model, 32, model.cameras, mesh)).as_text()
    assert "all_gather" not in program and "sharding_constraint" in program  # the compiler is to find collectives
