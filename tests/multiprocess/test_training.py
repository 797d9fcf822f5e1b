"""Training on several real processes: the same numbers, stopping together, faults, and resuming on other processes."""

import dataclasses
import json
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Pi0, checkpoint, config, convert, storage, train
from pi0fast.optim import OptimConfig
from pi0fast.settings import TINY, ValidationSettings
from tests.mini import MINI
from tests.multiprocess.restored import bits

SCHEDULE = ("--optim.peak-lr=1e-3", "--optim.warmup-steps=2", "--optim.decay-steps=20")
ENDS_S = 60  # within so long of a fault in one process, all have ended


@pytest.fixture
def alone(demo_dataset, tmp_path, monkeypatch):
    """`alone(out, changes)` trains as `trainer` does, in this process."""
    monkeypatch.setitem(config.PRESETS, "pi0_tiny", lambda: MINI)
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo_dataset.parent / "cache"))
    optim = OptimConfig(peak_lr=1e-3, end_lr=TINY.optim.end_lr, warmup_steps=2, decay_steps=20)
    output = dataclasses.replace(TINY.output, log_every=1)

    def run(out, **changes):
        settings = dataclasses.replace(TINY, data=str(demo_dataset), batch_size=8, optim=optim, output=output)
        return train.train("pi0_tiny", dataclasses.replace(settings, out=tmp_path / out, **changes))

    return run


def lines(run, *names):
    """Of every step, the named metrics."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in names] for line in found])


def saved(run, step):
    """What a checkpoint holds, by item and path."""
    folder = checkpoint.step_folder(run, step)
    return {
        f"{item}/{path}": np.asarray(array)
        for item in ("params", "train_state")
        for path, array in checkpoint.load_arrays(folder / item).items()
    }


def assert_agree(run, single, step):
    """Losses, gradient norms and, after `step` steps, weights and moments, to float32 rounding.

    Rounding grows with the steps, so after more than 20 the bound is wider. SigLIP's key biases are left out: their
    gradient is zero but for rounding, which Adam scales up to a whole step.
    """
    rtol = 5e-6 if step <= 20 else 1e-4
    np.testing.assert_allclose(lines(run, "loss", "grad_norm"), lines(single, "loss", "grad_norm"), rtol=rtol)
    arrays = saved(run, step)
    for path, expected in saved(single, step).items():
        if not ("qkv" in path and "bias" in path):
            np.testing.assert_allclose(arrays[path], expected, rtol=1e-3, atol=2e-5, err_msg=path)


def assert_silent(group, index):
    """The process says nothing of the run; what libraries warn of is theirs."""
    assert not any(word in group.output(index) for word in ("pi0fast", "step", "loss", "Loss curve"))


@pytest.mark.long
def test_two_processes_train_as_one(trainer, alone, tmp_path):
    group = trainer(2, "two", "--mesh=fsdp:2", "--steps=3", "--batch-size=8", *SCHEDULE)
    single = alone("one", mesh="fsdp:2", steps=3)
    assert "Loss curve" in group.finish()
    assert_silent(group, 1)
    assert_agree(tmp_path / "two", single, 3)
    assert (tmp_path / "two" / "loss.png").exists() and not list(tmp_path.glob(".two*"))


@pytest.mark.long
def test_two_processes_validate_as_one(trainer, alone, tmp_path):
    """On the same held-out samples, though each process loads its part of them."""
    flags = ("--val.fraction=0.31", "--val.batches=3", "--steps=2", "--batch-size=8", *SCHEDULE)
    group = trainer(2, "two", "--mesh=fsdp:2", *flags)
    single = alone("one", mesh="fsdp:2", steps=2, val=ValidationSettings(fraction=0.31, batches=3))
    assert "--step=best" in group.finish()
    found, expected = (
        [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        for run in (tmp_path / "two", single)
    )
    assert [line["step"] for line in found] == [0, 2]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    assert checkpoint.best_step(tmp_path / "two") == 2


@pytest.fixture(scope="module")
def trajectories():
    """The runs of one process that all others are compared with, made by the first test that needs them."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [pytest.param(2, "fsdp:8", marks=pytest.mark.long), (4, "data:2,fsdp:4")])
def test_twenty_steps_agree(trainer, alone, tmp_path, trajectories, count, mesh):
    """One seed, one global batch: 2 × 4 and 4 × 2 devices, against 1 and 8 devices in one process."""
    group = trainer(count, "several", f"--mesh={mesh}", "--steps=20", "--batch-size=8", *SCHEDULE)
    for single in ("fsdp:1", "fsdp:8"):
        if single not in trajectories:
            trajectories[single] = alone(f"single-{single}", mesh=single, steps=20)
    group.finish()
    for single in trajectories.values():
        assert_agree(tmp_path / "several", single, 20)


@pytest.mark.long
def test_a_signal_to_one_saves_the_same_step_in_all(trainer, alone, tmp_path):
    group = trainer(2, "run", "--mesh=fsdp:2", "--steps=100000", "--batch-size=8", *SCHEDULE)
    group.wait_for_step(tmp_path / "run", 3)
    group.processes[1].send_signal(signal.SIGTERM)
    assert "and saved. Go on with the same command and --resume" in group.finish()
    assert_silent(group, 1)
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert step >= 3 and len(lines(tmp_path / "run", "step")) == step
    alone("run", mesh="fsdp:2", steps=step + 2, resume=True)
    whole = alone("whole", mesh="fsdp:2", steps=step + 2)
    assert_agree(tmp_path / "run", whole, step + 2)


@pytest.mark.long
@pytest.mark.parametrize(("victim", "count"), [(0, 1), (1, 4)])
def test_a_killed_process_ends_the_others_and_the_run_resumes_on_another_number(
    trainer, alone, tmp_path, victim, count
):
    group = trainer(2, "run", "--mesh=fsdp:2", "--steps=100000", "--batch-size=8", "--output.save-every=3", *SCHEDULE)
    group.wait_for_step(tmp_path / "run", 7)
    group.processes[victim].send_signal(signal.SIGKILL)
    codes = group.wait(ENDS_S)
    other = 1 - victim
    assert codes[victim] == -signal.SIGKILL and codes[other] not in (0, -signal.SIGKILL)
    message = group.output(other)
    assert f"process {victim} died without a word" in message or "JAX ended it" in message, message
    assert "--resume" in message
    # The next save, of all processes that were there, may or may not have been complete.
    step = int(checkpoint.newest_checkpoint(tmp_path / "run").name) + 3
    flags = ("--mesh=fsdp:4", f"--steps={step}", "--batch-size=8", "--resume")
    resumed = trainer(count, "run", *flags, *SCHEDULE)
    assert "Loss curve" in resumed.finish()
    assert_agree(tmp_path / "run", alone("whole", mesh="fsdp:1", steps=step), step)


@pytest.mark.long
def test_data_that_vanish_from_one_process_end_all(trainer, alone, demo_dataset, tmp_path):
    """Each process has a copy of its own; only process 1's goes away."""
    for index in range(2):
        shutil.copytree(demo_dataset, tmp_path / f"data{index}")
    flags = (f"--data={tmp_path}/data{{index}}", "--input.cache-gib=0", "--batch-size=8")
    group = trainer(2, "run", "--mesh=fsdp:2", "--steps=100000", "--output.save-every=2", *flags)
    group.wait_for_step(tmp_path / "run", 4)
    (tmp_path / "data1").rename(tmp_path / "gone")
    assert group.wait(ENDS_S) == [1, 1]
    reason = f"failed: FileNotFoundError: the data set {tmp_path / 'data1'} vanished while it was being read"
    assert f"pi0fast: process 1 of 2 {reason}" in group.output(1)
    assert f"pi0fast: process 0 of 2 ends because process 1 {reason}" in group.output(0)
    assert "--resume" in group.output(0)
    step = int(checkpoint.newest_checkpoint(tmp_path / "run").name)
    alone("run", mesh="fsdp:2", steps=step + 1, resume=True)


@pytest.mark.long
def test_data_that_vanish_end_a_single_process(trainer, alone, demo_dataset, tmp_path):
    data = shutil.copytree(demo_dataset, tmp_path / "data")
    flags = (f"--data={data}", "--input.cache-gib=0", "--batch-size=8", "--mesh=fsdp:2")
    group = trainer(1, "run", "--steps=100000", "--output.save-every=2", *flags)
    group.wait_for_step(tmp_path / "run", 4)
    data.rename(tmp_path / "gone")
    assert group.wait(ENDS_S) == [1]
    assert f"FileNotFoundError: the data set {data} vanished while it was being read" in group.output(0)
    (tmp_path / "gone").rename(data)
    step = int(checkpoint.newest_checkpoint(tmp_path / "run").name)
    alone("run", mesh="fsdp:2", steps=step + 1, resume=True, data=str(data))


@pytest.mark.long
def test_a_loss_that_is_not_finite_is_told_alike_by_all(trainer, tmp_path):
    wild = ("--optim.peak-lr=1e30", "--optim.clip-norm=1e30", "--optim.warmup-steps=1")
    group = trainer(2, "run", "--mesh=fsdp:2", "--steps=100", "--batch-size=8", *wild)
    assert group.wait() == [1, 1]
    said = [line.split("NonFiniteLossError: ")[1] for line in group.outputs().splitlines() if "NonFinite" in line]
    assert len(said) == 2 and said[0] == said[1] and "batch indices [" in said[0]


@pytest.mark.long
def test_openpis_weights_start_several_processes(trainer, alone, tmp_path):
    """Each reads its shards; the dead parameters are kept beside the run, whole, and handed on from there."""
    model = Pi0(MINI, rngs=nnx.Rngs(7))
    rng = np.random.default_rng(0)
    shapes = convert.openpi_shapes(MINI)
    theirs = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    dead = convert.dead_params(theirs, MINI)
    storage.save_arrays(tmp_path / "1" / "params", convert.to_openpi(model, dead))
    flags = (f"--init-from={tmp_path / '1'}", "--steps=2", "--batch-size=8", *SCHEDULE)
    trainer(2, "two", "--mesh=fsdp:2", *flags).finish()
    single = alone("one", mesh="fsdp:2", steps=2, init_from=str(tmp_path / "1"))
    assert_agree(tmp_path / "two", single, 2)
    again = (f"--init-from={tmp_path / 'two'}", "--steps=1", "--batch-size=8", *SCHEDULE)
    trainer(2, "again", "--mesh=fsdp:2", *again).finish()
    for run in ("two", "again"):
        kept = storage.load_arrays(tmp_path / run / "dead")
        assert kept.keys() == dead.keys()
        for path, array in dead.items():
            np.testing.assert_array_equal(kept[path], array, err_msg=path)


@pytest.mark.long
def test_two_by_four_restores_bit_equal_elsewhere(trainer, start, demo_dataset, tmp_path):
    """What the trainer has after restoring on 1 × 8, 4 × 2 and 1 × 1 devices is what 2 × 4 wrote."""
    flags = ("--mesh=fsdp:8", "--steps=2", "--batch-size=8", "--optim.mu-dtype=bfloat16", *SCHEDULE)
    trainer(2, "run", *flags).finish()
    expected = saved(tmp_path / "run", 2)
    for count, mesh in ((4, "data:2,fsdp:4"), (1, "fsdp:8"), (1, "fsdp:1")):
        target = tmp_path / f"{count}-{mesh}.npz"
        flags = (f"--data={demo_dataset}", f"--out={tmp_path / 'run'}", f"--mesh={mesh}", str(target))
        start(count, "-m", "tests.multiprocess.restored", *flags).finish()
        with np.load(target) as arrays:
            assert arrays.keys() == expected.keys()
            for path, array in expected.items():
                np.testing.assert_array_equal(arrays[path], bits(array), err_msg=f"{mesh} {path}")
