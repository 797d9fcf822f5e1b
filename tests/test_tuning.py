"""What each choice trains, that its gradients are right, and what an update of low rank costs and becomes."""

import dataclasses
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.config import LoraConfig
from pi0fast.lora import is_lora, merge
from pi0fast.params import flatten, replace
from pi0fast.settings import TINY, LoraSettings, LossSettings, Settings
from pi0fast.tuning import adapted, check_resumes, frozen_filter
from tests.mini import MINI, batches

LORA = LoraSettings(LoraConfig(2), LoraConfig(3, alpha=6.0))


def asked(tune, **changes) -> Settings:
    lora = {"lora": LORA, "lora+expert": LoraSettings(LORA.vlm)}.get(tune, LoraSettings())
    return dataclasses.replace(TINY, **{"tune": tune, "lora": lora, **changes})


def trained(settings: Settings) -> set[str]:
    model = Pi0.abstract(adapted(MINI, settings))
    _, _, weights = nnx.split(model, frozen_filter(model, settings), ...)
    return set(flatten(weights))


def below(paths: set[str], *folders: str) -> set[str]:
    return {path for path in paths if path.split("/")[0] in folders}


def test_each_choice_trains_what_it_says():
    everything = trained(asked("full"))
    assert below(everything, "siglip", "embedding", "vlm", "action_expert", "head") == everything
    assert trained(asked("expert")) == below(everything, "action_expert", "head")
    lora = trained(asked("lora"))
    assert {path for path in lora if not is_lora(path)} == below(everything, "head")
    parts = ("q", "kv", "out", "gate_up", "down")
    assert {path for path in lora if is_lora(path)} == {
        *(f"{expert}/layers/{part}_lora/{x}" for expert in ("vlm", "action_expert") for part in parts for x in "ab"),
        "vlm/last/kv_lora/a",
        "vlm/last/kv_lora/b",
    }
    both = trained(asked("lora+expert"))
    assert both == {path for path in lora if path.startswith("vlm")} | below(everything, "action_expert", "head")
    siglip = dataclasses.replace(LORA, siglip=True)
    assert trained(asked("lora", lora=siglip)) == lora | below(everything, "siglip")
    attention = LoraSettings(LoraConfig(rank=0), LoraConfig(2, mlp=False))
    assert {path.split("/")[2] for path in trained(asked("lora", lora=attention)) if is_lora(path)} == {
        "q_lora",
        "kv_lora",
        "out_lora",
    }


def test_freeze_takes_folders_and_patterns():
    everything = trained(asked("full"))
    assert trained(asked("full", freeze="vlm, embedding")) == everything - below(everything, "vlm", "embedding")
    assert trained(asked("full", freeze="*/bias")) == {path for path in everything if not path.endswith("/bias")}
    assert below(trained(asked("lora", freeze="vlm")), "vlm") == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (asked("full", freeze="vlm,llm"), "'llm' matches no weight"),
        (asked("full", freeze="*"), "leaves nothing to train"),
        (asked("expert", freeze="action_expert,head"), "--tune=expert .* leaves nothing to train"),
        (asked("lora", lora=LoraSettings(LoraConfig(0), LoraConfig(0))), "no update to train; raise a rank"),
        (asked("lora+expert", lora=LoraSettings(LoraConfig(0))), "no update to train; raise a rank"),
        (asked("expert", lora=LORA), "--tune=expert has none of the updates that --lora asks for"),
        (asked("lora+expert", lora=LORA), r"--tune=lora\+expert has none of the updates"),
    ],
)
def test_choices_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        trained(settings)


@pytest.mark.parametrize(
    ("fields", "message"), [({"rank": -1}, "rank=-1"), ({"rank": 2, "attention": False, "mlp": False}, "neither")]
)
def test_updates_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_a_run_goes_on_training_what_it_trained():
    check_resumes({}, asked("full"))  # an older run
    check_resumes({"freeze": "siglip,embedding,vlm"}, asked("expert"))
    for begun in ({}, {"tune": "lora"}, {"tune": "expert", "freeze": "head"}):
        with pytest.raises(ValueError, match="trains other weights than --tune=expert"):
            check_resumes(begun, asked("expert"))
    with pytest.raises(ValueError, match="lora.siglip=True and trains other weights than .*lora.siglip=False"):
        check_resumes({"tune": "lora", "lora": {"siglip": True}}, asked("lora"))


@pytest.fixture(scope="module")
def model():
    """Updates everywhere, the weights an order of magnitude larger than new ones: none is lost in rounding."""
    made = Pi0(adapted(MINI, asked("lora")), rngs=nnx.Rngs(1))
    large = {path: (10.0 if is_lora(path) else 1.0) * variable[...] for path, variable in flatten(made).items()}
    return replace(made, large)


@pytest.fixture(scope="module")
def batch():
    """An observation, and the actions, noise and times of its loss."""
    given = next(batches(MINI, 2))
    observation = Observation.of(given)
    noise = np.random.default_rng(1).normal(size=given["actions"].shape).astype(np.float32)
    return jax.tree.map(jnp.asarray, (observation, given["actions"], noise, np.array([0.3, 0.8], np.float32)))


@pytest.fixture(scope="module")
def mean_loss(batch):
    return jax.jit(lambda model: jnp.mean(model.loss(*batch)))


@pytest.fixture(scope="module")
def gradients(model, mean_loss):
    """Of every weight."""
    return gradients_of(mean_loss, *nnx.split(model))


def gradients_of(mean_loss, graphdef, weights, *frozen):
    found = jax.jit(jax.grad(lambda weights: mean_loss(nnx.merge(graphdef, weights, *frozen))))(weights)
    return {path: np.asarray(variable[...]) for path, variable in flatten(found).items()}


@pytest.mark.parametrize("tune", ["expert", "lora"])
def test_gradients_are_the_whole_models_and_finite_differences(model, mean_loss, gradients, tune):
    graphdef, frozen, weights = nnx.split(model, frozen_filter(model, asked(tune)), ...)
    found = gradients_of(mean_loss, graphdef, weights, frozen)
    for path, gradient in found.items():
        expected = gradients[path]
        assert np.linalg.norm(gradient - expected) <= 5e-6 * np.linalg.norm(expected) + 1e-7, path
    # Along the gradient the loss changes by its norm; along that of the updates alone, where there are any, too.
    for chosen in filter(None, ([path for path in found if is_lora(path)], list(found))):
        norm = np.sqrt(sum(np.sum(np.square(found[path])) for path in chosen))
        above, below = (
            mean_loss(
                replace(
                    model, {p: w[...] + step * found[p] if p in chosen else w[...] for p, w in flatten(model).items()}
                )
            )
            for step in (0.01 / norm, -0.01 / norm)
        )
        np.testing.assert_allclose((above - below) / 0.02, norm, rtol=1e-3)


def test_a_merged_model_computes_the_same(model, batch):
    observation, actions, _, t = batch
    merged = merge(model)
    assert merged.config == MINI and not any(map(is_lora, flatten(merged)))
    assert any(map(is_lora, flatten(model)))  # its own are kept
    velocity = jax.jit(lambda model: model.velocity(observation, actions, t))
    np.testing.assert_allclose(velocity(merged), velocity(model), rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(velocity(merged) - velocity(Pi0(MINI, rngs=nnx.Rngs(1))))) > 0.1


def test_a_model_without_updates_is_its_own_merged_one():
    model = Pi0(MINI, rngs=nnx.Rngs(0))
    assert merge(model) is model


@pytest.mark.long
def test_updates_train_on_every_mesh():
    """Three steps, two draws behind each prefix."""

    def run(spec, **changes):
        settings = asked(
            "lora", mesh=spec, batch_size=16, flow_samples=2, loss=LossSettings(mask_padding=True), **changes
        )
        size, mesh = adapted(MINI, settings), meshes.make(spec)
        graphdef, abstract, _ = train_state.abstract_state(size, settings, mesh)
        state, frozen, _ = train_state.initialize(size, settings, mesh)
        step = train.make_step(graphdef, size, settings, mesh, abstract, frozen)
        begun = {path: np.array(variable[...]) for path, variable in flatten(state.weights).items()}
        losses = []
        for batch in islice(batches(MINI, 16), 3):
            state, metrics = step(state, frozen, training_data.to_device(batch, mesh))
            losses.append(float(metrics["loss"]))
        moved = {path: np.asarray(variable[...]) - begun[path] for path, variable in flatten(state.weights).items()}
        return losses, moved

    (single, moved), (sharded, also_moved) = run("fsdp:1"), run("data:2,fsdp:4", remat="mlp", accum=2)
    np.testing.assert_allclose(sharded, single, rtol=1e-6)
    for path, change in moved.items():
        assert np.any(change), path
        assert np.linalg.norm(also_moved[path] - change) <= 1e-3 * np.linalg.norm(change), path
