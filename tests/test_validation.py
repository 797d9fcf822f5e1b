"""Validation: which episodes are held out, what an evaluation gives, and what the trainer does with it."""

import dataclasses
import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, checkpoint, flow, train, train_state, training_data, validation
from pi0fast import mesh as meshes
from pi0fast.data.demo import Simulator
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.params import replace
from pi0fast.policy import Policy
from pi0fast.robots import find_robot
from pi0fast.sampling import sample_actions
from pi0fast.settings import LossSettings, ValidationSettings
from pi0fast.validation import Validation
from tests.conftest import DEMO_EPISODES
from tests.mini import MINI

FRACTION = 0.31  # of the demo's six episodes, 3 and 4
HELD_OUT = {3, 4}
WIDE = dataclasses.replace(MINI, action_dim=4)  # more than the robot's 2
WIDE_05 = dataclasses.replace(WIDE, pi05=True, state_mode=None, max_token_len=32)


@pytest.fixture
def settings(mini_settings):
    return dataclasses.replace(mini_settings, val=ValidationSettings(fraction=FRACTION, batches=3))


@pytest.fixture
def source(demo_dataset, mini_settings):
    return LeRobotSource(demo_dataset, find_robot("demo"), MINI.action_horizon, MINI.image_size)


def lines(run, name="validation"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


# ── The split ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_episode_is_held_out_by_a_hash_of_its_number():
    """Growing the data set or the fraction leaves out nothing that was held out before."""
    assert validation.held_out(DEMO_EPISODES, FRACTION) == HELD_OUT
    thousand = validation.held_out(1000, 0.1)
    assert len(thousand) == 106
    first = int.from_bytes(hashlib.sha256(str(min(thousand)).encode()).digest()) / 2**256
    assert first < 0.1
    assert thousand == {episode for episode in validation.held_out(5000, 0.1) if episode < 1000}
    assert thousand < validation.held_out(1000, 0.2)


@pytest.mark.parametrize(("fraction", "message"), [(0.01, "holds out none; give more"), (0.99, "none to train on")])
def test_a_split_with_an_empty_part_is_refused_before_anything_is_decoded(settings, fraction, message, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(settings.out.parent / "cache"))
    chosen = dataclasses.replace(settings, val=ValidationSettings(fraction=fraction))
    with pytest.raises(ValueError, match=rf"--val\.fraction={fraction} of 6 episodes .*{message}"):
        train.train("pi0_tiny", chosen)
    assert not settings.out.exists() and not (settings.out.parent / "cache").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 1.0}, "less than 1"),
        ({"fraction": -0.1}, "at least 0"),
        ({"batches": 0}, r"--val\.batches=0"),
        ({"every": 0}, r"--val\.every=0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, fields, message):
    chosen = dataclasses.replace(settings, val=ValidationSettings(**fields), data="/nowhere")
    with pytest.raises(ValueError, match=message):
        train.train("pi0_tiny", chosen)


def test_parts_share_the_frames_and_have_fingerprints_of_their_own(source):
    kept, held = source.part({0, 1, 2, 5}), source.part(HELD_OUT)
    assert sorted([*kept.frames, *held.frames]) == source.frames.tolist()
    assert len({source.fingerprint, kept.fingerprint, held.fingerprint}) == 3
    assert held.frames[0] == source.index(3, 0) and held.frames[-1] == source.index(5, 0) - 1
    for i in (0, 7, len(held) - 1):
        jax.tree.map(np.testing.assert_array_equal, held[i], source[held.frames[i]])
    with pytest.raises(IndexError):
        held[len(held)]


def test_a_bad_sample_is_replaced_from_its_own_part(source, demo_dataset):
    source = LeRobotSource(demo_dataset, find_robot("demo"), MINI.action_horizon, MINI.image_size, "replace")
    held = source.part(HELD_OUT)
    held._bad[held.frames[::2]] = True
    assert held.num_bad == len(held.frames[::2])
    good = [held[i]["state"].tolist() for i in range(1, len(held), 2)]
    assert all(held[i]["state"].tolist() in good for i in range(0, len(held), 2))


def test_training_and_validation_see_their_own_episodes(settings, source):
    data = training_data.open_data(settings, MINI)
    loader, held_out = data.loader, data.held_out
    episodes = np.searchsorted([source.index(episode, 0) for episode in range(6)], np.arange(len(source)), "right") - 1
    assert held_out is not None
    for part, expected in ((loader, {0, 1, 2, 5}), (held_out, HELD_OUT)):
        index = np.concatenate([next(part)["index"] for _ in range(-(-part.num_samples // part.batch_size))])
        part.close()
        assert set(episodes[index]) == expected and len(set(index)) == part.num_samples


def test_without_validation_the_order_is_that_of_the_whole_data_set(mini_settings, source):
    data = training_data.open_data(mini_settings, MINI)
    loader, held_out = data.loader, data.held_out
    assert held_out is None
    assert loader.state()["fingerprint"] == source.fingerprint
    found = np.concatenate([next(loader)["index"] for _ in range(3)])
    loader.close()
    import grain

    order = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat(None)
    np.testing.assert_array_equal(found, [order[i] for i in range(24)])


# ── An evaluation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(settings, spec, model):
    """What an evaluation of a new model gives."""
    settings = dataclasses.replace(settings, mesh=spec)
    mesh = meshes.make(spec)
    graphdef, _, _ = train_state.abstract_state(model, settings, mesh)
    state, frozen, _ = train_state.initialize(model, settings, mesh)
    data = training_data.open_data(settings, model)
    held_out, transform = data.held_out, data.transform
    assert held_out is not None
    dim = transform.action_stats.dim
    weights = settings.loss.action_weights(dim, model.action_dim)
    step = validation.make_step(graphdef, settings, mesh, state.averaged, frozen, dim, weights)
    validate = Validation(held_out, settings.val.batches, step, partial(training_data.to_device, mesh=mesh))
    found = validate(state.averaged, frozen)
    assert validate(state.averaged, frozen) == found  # the same samples, noise and times again
    return found, nnx.merge(graphdef, state.averaged, frozen)


def written_out(settings, model):
    """The same with `Pi0.loss` and a `Sampler`, on all samples that count in one batch."""
    data = training_data.open_data(settings, model.config)
    held_out, transform = data.held_out, data.transform
    assert held_out is not None
    batches = [next(held_out) for _ in range(settings.val.batches)]
    held_out.close()
    count = min(held_out.num_samples, settings.val.batches * settings.batch_size)
    batch = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)[:count]), *batches)
    observation, actions = Observation.of(batch), batch["actions"]
    keys, shape = jax.random.split(jax.random.key(settings.val.seed)), (model.config.action_horizon, actions.shape[2])
    (noise, t), (start, _) = (flow.draw(key, batch["index"].astype(jnp.uint32), shape) for key in keys)
    real, dims = ~batch["action_is_pad"], transform.action_stats.dim
    assert not real.all()
    weights = settings.loss.action_weights(dims, model.config.action_dim)
    weights = None if weights is None else jnp.array(weights)
    losses, sampled = jax.jit(
        lambda model: (
            model.loss(observation, actions, noise, t, weights=weights),
            sample_actions(model, observation, start),
        )
    )(model)
    return {
        "loss": np.mean(losses[real]) if settings.loss.mask_padding else np.mean(losses),
        "action_error": np.mean(np.abs(sampled - actions)[real][:, :dims]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_evaluation_is_the_loss_and_the_error_of_samples(settings):
    found, model = evaluate(settings, "fsdp:1", WIDE)
    assert_same(found, written_out(settings, model))


@pytest.mark.slow
def test_each_sample_counts_once_and_what_is_masked_never(settings):
    """More batches than the held-out episodes fill."""
    settings = dataclasses.replace(
        settings,
        val=dataclasses.replace(settings.val, batches=50),
        loss=LossSettings(mask_padding=True, mask_dims=True),
    )
    found, model = evaluate(settings, "fsdp:1", WIDE_05)
    assert_same(found, written_out(settings, model))


@pytest.mark.long
def test_meshes_agree(settings):
    assert_same(evaluate(settings, "data:2,fsdp:4", WIDE)[0], evaluate(settings, "fsdp:1", WIDE)[0])


# ── In the trainer ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_resumed_run_evaluates_the_weights_that_inference_uses(settings, capsys):
    begun = train.train("pi0_tiny", dataclasses.replace(settings, steps=3))
    first = lines(begun)
    assert [line["step"] for line in first] == [0, 3]
    with (begun / "validation.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0, "action_error": 1.0}\n{"step": 5, "lo')  # what a crash may leave
    other = dataclasses.replace(settings, resume=True, val=ValidationSettings())
    with pytest.raises(ValueError, match=rf"began with --val\.fraction={FRACTION} and cannot go on with 0\.0"):
        train.train("pi0_tiny", other)
    run = train.train("pi0_tiny", dataclasses.replace(settings, resume=True))
    assert lines(run)[:2] == first and [line["step"] for line in lines(run)] == [0, 3, 6]
    weights = checkpoint.load_item(run / "checkpoints" / "6", "params")
    model = replace(Pi0.abstract(MINI), weights)
    found = {name: lines(run)[-1][name] for name in ("loss", "action_error")}
    assert_same(found, written_out(settings, model))
    said = capsys.readouterr().out
    assert f"step 6  validation: loss {found['loss']:.4f}  action error {found['action_error']:.4f}" in said
    assert f"python -m pi0fast.evaluate {run} --step=best" in said


@pytest.mark.slow
def test_evaluations_come_when_asked_and_leave_training_as_it_is(settings):
    rare = train.train("pi0_tiny", settings)
    often = ValidationSettings(fraction=FRACTION, batches=1, every=2)
    often = train.train("pi0_tiny", dataclasses.replace(settings, val=often, out=settings.out.with_name("often")))
    assert [line["step"] for line in lines(rare)] == [0, 3, 6]
    assert [line["step"] for line in lines(often)] == [0, 2, 3, 4, 6]
    losses = [[line["loss"] for line in lines(run, "metrics")] for run in (rare, often)]
    assert losses[0] == losses[1]


@pytest.mark.long
def test_the_best_checkpoint_is_kept_and_can_be_chosen(settings):
    """A learning rate that spoils the model after its third step, over a resume."""
    wild = dataclasses.replace(
        settings,
        optim=dataclasses.replace(settings.optim, peak_lr=1.0, ema_decay=None, warmup_steps=1),
        output=dataclasses.replace(settings.output, save_every=1, keep_last=1),
    )
    run = train.train("pi0_tiny", dataclasses.replace(wild, steps=3))
    train.train("pi0_tiny", dataclasses.replace(wild, resume=True))
    losses = {line["step"]: line["loss"] for line in lines(run) if line["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 6 and checkpoint.steps(run) == [best, 6]
    assert checkpoint.best_step(run) == best
    observation = Simulator(seed=5).reset()
    actions = {step: Policy.load(run, step=step).infer(observation)["actions"] for step in (best, "best", 6, None)}
    np.testing.assert_array_equal(actions["best"], actions[best])
    np.testing.assert_array_equal(actions[None], actions[6])
    assert (actions["best"] != actions[6]).any()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4; it has those of \["):
        Policy.load(run, step=4)
