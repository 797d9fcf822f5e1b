"""The trainer on a real data set: it learns, meshes agree, runs resume exactly, faults end in a clear message."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0fast import checkpoint, config, init_from, storage, train, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.checkpoint import RunConfig
from pi0fast.data.frames import DecodeError
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.integrity import CorruptCheckpointError
from pi0fast.optim import OptimConfig
from pi0fast.params import flatten
from pi0fast.robots import DEMO
from pi0fast.settings import LossSettings, OutputSettings
from pi0fast_kernels import _triton
from tests.conftest import COMPILED
from tests.mini import MINI


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    """`pi0_tiny` stands for a smaller model in this process."""
    monkeypatch.setitem(config.PRESETS, "pi0_tiny", lambda: MINI)


@pytest.fixture
def settings(mini_settings):
    return mini_settings


def changed(settings, group: str, **changes):
    return dataclasses.replace(settings, **{group: dataclasses.replace(getattr(settings, group), **changes)})


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(run):
    step = checkpoint.newest_checkpoint(run)
    return {
        f"{item}/{path}": np.asarray(array)
        for item in ("params", "train_state")
        for path, array in storage.load_arrays(step / item).items()
    }


def test_a_run_learns_and_is_a_folder(settings):
    longer = dataclasses.replace(settings, steps=60, optim=OptimConfig(peak_lr=3e-3, warmup_steps=5, decay_steps=60))
    run = train.train("pi0_tiny", longer)
    curve = losses(run)
    assert len(curve) == 60
    assert np.mean(curve[-10:]) < 0.85 * np.mean(curve[:5])
    assert RunConfig.load(run).model == MINI
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["57", "60"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "learning_rate", "samples_per_s", "data_wait", "tflops"} <= set(lines[-1])


@pytest.mark.long
def test_named_kernels_train_the_same(settings):
    """The Triton kernels, in their interpreter, inside the trainer's `shard_map`."""
    short = dataclasses.replace(settings, steps=2, batch_size=2, remat="mlp")
    ours, theirs = (
        losses(train.train("pi0_tiny", dataclasses.replace(short, kernels=kernels, out=settings.out / kernels)))
        for kernels in ("triton", "reference")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_kernels_that_cannot_run_are_refused_before_anything_is_made(settings, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRET", False)
    with pytest.raises(ValueError, match="cannot run: triton: it needs an NVIDIA GPU and the program is for cpu"):
        train.train("pi0_tiny", dataclasses.replace(settings, kernels="triton"))
    assert not settings.out.exists()


def test_resumed_run_is_bit_equal(settings):
    """A first moment in bfloat16 included."""
    settings = changed(settings, "optim", mu_dtype="bfloat16")
    whole = train.train("pi0_tiny", settings)
    part = dataclasses.replace(settings, out=settings.out.with_name("part"))
    train.train("pi0_tiny", dataclasses.replace(part, steps=3))
    with (part.out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # what a crash after step 4 leaves
    run = train.train("pi0_tiny", dataclasses.replace(part, resume=True))
    assert losses(run) == losses(whole)
    resumed, expected = final_weights(run), final_weights(whole)
    assert resumed.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(resumed[path], array, err_msg=path)


@pytest.mark.long
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on_exactly(settings):
    run = train.train("pi0_tiny", settings)
    curve, expected = losses(run), final_weights(run)
    for item in ("params", "train_state"):
        newest = checkpoint.newest_checkpoint(run)
        assert newest.name == "6"
        path = max(
            (file for file in (newest / item).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        longer = dataclasses.replace(settings, resume=True, steps=7)
        with pytest.raises(CorruptCheckpointError, match=r"checkpoints/6.* is damaged.*--resume-step=3"):
            train.train("pi0_tiny", longer)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4; it has those of \[3, 6\]"):
            train.train("pi0_tiny", dataclasses.replace(longer, resume_step=4))
        train.train("pi0_tiny", dataclasses.replace(settings, resume=True, resume_step=3))
        assert losses(run) == curve
        resumed = final_weights(run)
        assert resumed.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    assert sorted(path.name for path in (run / "set_aside").iterdir()) == ["6", "6.1"]
    gc.collect()  # the reads that orbax left unfinished, which Python warns of


@pytest.mark.long
def test_a_checkpoint_restores_onto_another_mesh(settings):
    run = train.train("pi0_tiny", dataclasses.replace(settings, steps=3))
    resumed = train.train("pi0_tiny", dataclasses.replace(settings, mesh="fsdp:8", resume=True))
    assert run == resumed
    whole = train.train("pi0_tiny", dataclasses.replace(settings, out=settings.out.with_name("whole")))
    np.testing.assert_allclose(losses(run), losses(whole), rtol=2e-5)


@pytest.mark.long
def test_frozen_weights_do_not_change_and_cost_nothing(settings):
    frozen = dataclasses.replace(settings, freeze="siglip,vlm,embedding", steps=2)
    mesh = meshes.make("fsdp:1")
    state, rest, _ = train_state.initialize(MINI, frozen, mesh)
    kept = {path: np.array(variable[...]) for path, variable in flatten(rest).items()}
    trained = {path: np.array(variable[...]) for path, variable in flatten(state.weights).items()}
    assert {path.split("/")[0] for path in kept} == {"siglip", "vlm", "embedding"}
    assert {path.split("/")[0] for path in trained} == {"action_expert", "head"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(array.size for array in trained.values())
    run = train.train("pi0_tiny", frozen)
    weights = storage.load_arrays(checkpoint.newest_checkpoint(run) / "params")
    for path, array in kept.items():
        np.testing.assert_array_equal(weights[path], array)
    assert any((np.asarray(weights[path]) != array).any() for path, array in trained.items())


def test_frozen_weights_are_in_the_models_dtype(settings):
    half = dataclasses.replace(MINI, dtype="bfloat16")
    frozen = dataclasses.replace(settings, freeze="siglip")
    state, rest, _ = train_state.initialize(half, frozen, meshes.make("fsdp:1"))
    assert {variable.dtype for variable in flatten(rest).values()} == {jnp.dtype("bfloat16")}
    assert {variable.dtype for variable in flatten(state.weights).values()} == {jnp.dtype("float32")}


def test_prompts_are_computed_as_long_as_the_data_needs(settings):
    model = dataclasses.replace(MINI, max_token_len=48)
    for asked, expected in ((None, 16), (6, 6), (48, 48)):
        data = training_data.open_data(changed(settings, "input", prompt_len=asked), model)
        loader, transform = data.loader, data.transform
        batch = next(loader)
        loader.close()
        assert batch["tokenized_prompt"].shape == (8, expected) and transform.prompt_len == expected
    with pytest.raises(ValueError, match=r"--input\.prompt-len=4: the data's prompts take up to 6 tokens"):
        training_data.open_data(changed(settings, "input", prompt_len=4), model)


@pytest.mark.long
def test_mask_padding_leaves_repeated_actions_out(settings):
    masked = changed(dataclasses.replace(settings, steps=1), "loss", mask_padding=True)
    other = dataclasses.replace(settings, steps=1, out=settings.out.with_name("plain"))
    assert losses(train.train("pi0_tiny", masked)) != losses(train.train("pi0_tiny", other))


def test_what_the_loss_is_the_mean_over():
    assert LossSettings().action_weights(2, 4) is None
    assert LossSettings(mask_dims=True).action_weights(2, 4) == (1, 1, 0, 0)
    assert LossSettings(dim_weights=(2.0, 0.5)).action_weights(2, 4) == (2, 0.5, 1, 1)
    assert LossSettings(mask_dims=True, dim_weights=(2.0, 0.0)).action_weights(2, 4) == (2, 0, 0, 0)
    with pytest.raises(ValueError, match="has 3 entries, the robot 2 action dimensions"):
        LossSettings(dim_weights=(1.0, 1.0, 1.0)).action_weights(2, 4)
    for weights in ((-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="finite, 0 or more, and not all 0"):
            LossSettings(dim_weights=weights)


@pytest.mark.long
def test_the_loss_weighs_dimensions(settings):
    """The demo's actions and the model's both have two."""
    one = dataclasses.replace(settings, steps=1)
    weighted = changed(dataclasses.replace(one, out=settings.out.with_name("weighted")), "loss", dim_weights=(1.0, 0.0))
    plain, first = (losses(train.train("pi0_tiny", choice)) for choice in (one, weighted))
    assert abs(first[0] / plain[0] - 1) > 1e-3
    wrong = changed(dataclasses.replace(one, out=settings.out.with_name("wrong")), "loss", dim_weights=(1.0,) * 3)
    with pytest.raises(ValueError, match="has 3 entries, the robot 2 action dimensions"):
        train.train("pi0_tiny", wrong)
    assert not wrong.out.exists()


def test_weights_of_another_run_are_the_start(settings):
    first = train.train("pi0_tiny", dataclasses.replace(settings, steps=3))
    again = dataclasses.replace(settings, init_from=str(first))
    state, _, dead = train_state.initialize(MINI, again, meshes.make("fsdp:8"))
    weights = storage.load_arrays(checkpoint.newest_checkpoint(first) / "params")
    for path, variable in flatten(state.weights).items():
        np.testing.assert_array_equal(variable[...], weights[path])
    assert int(state.step) == 0 and not dead
    with pytest.raises(ValueError, match=r"does not fit this model(.|\n)*misshaped: embedding"):
        init_from.plan(str(first), dataclasses.replace(MINI, vocab_size=600))


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run(settings):
    wild = changed(settings, "optim", peak_lr=1e30, clip_norm=1e30, warmup_steps=1)
    with pytest.raises(train.NonFiniteLossError, match=r"step \d+: loss .*samples \[.*batch indices \[.*--resume"):
        train.train("pi0_tiny", changed(dataclasses.replace(wild, steps=20), "output", save_every=1))
    step = checkpoint.newest_checkpoint(settings.out)
    assert all(np.isfinite(array).all() for array in final_weights(settings.out).values()), step


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 12, "mesh": "fsdp:8"}, ValueError, "does not divide over 8 devices"),
        ({"freeze": "vision"}, ValueError, "'vision' matches no weight"),
        ({"optim": OptimConfig(ema_on_host=True, ema_decay=None)}, ValueError, "there is no average to hold"),
        ({"data": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"robot": "aloha"}, ValueError, "observation.images.cam_high"),
        ({"robot": "aloha", "data": None}, ValueError, "needs --data"),
        ({"init_from": "/nowhere"}, FileNotFoundError, "/nowhere is no run .*, no openpi checkpoint"),
        ({"optim": OptimConfig(warmup_steps=1000, decay_steps=500)}, ValueError, "less than --optim.decay-steps=500"),
        ({"optim": OptimConfig(ema_decay=1.0)}, ValueError, "--optim.ema-decay=1.0 must be"),
        ({"output": OutputSettings(save_every=0)}, ValueError, "--output.save-every=0 must be at least 1"),
        ({"output": OutputSettings(keep_every=0)}, ValueError, "--output.keep-every=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, error, message, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "pi0_tiny", lambda: dataclasses.replace(MINI, cameras=config.BASE_CAMERAS))
    with pytest.raises(error, match=message):
        train.train("pi0_tiny", dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_a_run_is_not_overwritten(settings):
    train.train("pi0_tiny", dataclasses.replace(settings, steps=1))
    with pytest.raises(FileExistsError, match="add --resume"):
        train.train("pi0_tiny", settings)
    with pytest.raises(ValueError, match="another model"):
        train.train("pi05_tiny", dataclasses.replace(settings, resume=True))
    with pytest.raises(ValueError, match="seed"):
        train.train("pi0_tiny", dataclasses.replace(settings, resume=True, seed=5))
    absolute = settings.out.with_name("absolute.yaml")
    absolute.write_text(json.dumps({**DEMO.to_dict(), "delta_mask": []}))
    with pytest.raises(ValueError, match=r"another robot than .*delta_mask=\(True, True\).*delta_mask=\(\)"):
        train.train("pi0_tiny", dataclasses.replace(settings, resume=True, robot=str(absolute)))
    with pytest.raises(ValueError, match=r"a checkpoint inside a run; give the run, .*/run"):
        inside = str(checkpoint.newest_checkpoint(settings.out))
        train.train("pi0_tiny", dataclasses.replace(settings, init_from=inside, out=settings.out.with_name("new")))


def test_what_does_not_fit_is_an_error_before_images_are_decoded(settings, monkeypatch):
    def decode(*_):
        raise AssertionError

    monkeypatch.setattr(training_data, "LeRobotSource", decode)
    robot = settings.out.with_name("arm.yaml")
    robot.write_text(json.dumps({**DEMO.to_dict(), "cameras": {"top": "observation.images.top"}}))
    no_tokenizer = settings.out.with_name("no.model")
    no_tokenizer.write_text("no model")
    for changes, message in (
        ({"robot": str(robot)}, r"cameras \['top'\], which the model does not know"),
        ({"input": dataclasses.replace(settings.input, tokenizer=str(no_tokenizer))}, "is no sentencepiece model"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train("pi0_tiny", dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_a_sample_that_cannot_be_read_loses_no_step(settings, monkeypatch):
    decoded = LeRobotSource._images

    def fail_late(source, index):
        if index == unreadable:
            raise DecodeError("the video cannot be decoded")
        return decoded(source, index)

    whole = train.train("pi0_tiny", dataclasses.replace(settings, out=settings.out.with_name("whole")))
    data = training_data.open_data(settings, MINI)
    batches = [next(data.loader)["index"] for _ in range(5)]
    unreadable = next(int(index) for index in batches[-1] if index not in np.concatenate(batches[:-1]))
    rare = changed(settings, "output", save_every=100)
    with monkeypatch.context() as patch, pytest.raises(DecodeError):
        patch.setattr(LeRobotSource, "_images", fail_late)
        train.train("pi0_tiny", rare)
    assert checkpoint.steps(settings.out) == [4]
    run = train.train("pi0_tiny", dataclasses.replace(rare, resume=True))
    assert losses(run) == losses(whole)


def test_a_folder_that_cannot_be_written_is_refused_before_data_are_read(own_mounts, settings, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "from pathlib import Path; from pi0fast import train; from pi0fast.settings import TINY; "
        f"from tests.mini import MINI; train.check_out(Path({str(disk / 'run')!r}), MINI, TINY)"
    )
    mount = f"mount -t tmpfs -o ro tmpfs {disk}"
    command = [*own_mounts, "sh", "-c", f'{mount} && "$@"', "sh", sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True)
    assert f"PermissionError: {disk} cannot be written to; give another --out" in said.stderr


def test_the_last_words_name_a_program_for_the_robot(settings, capsys):
    robot = settings.out.with_name("arm.yaml")
    robot.write_text(json.dumps({**DEMO.to_dict(), "name": "arm"}))
    for changes, words in (({}, "evaluate"), ({"robot": str(robot), "out": settings.out / "arm"}, "infer")):
        run = train.train("pi0_tiny", dataclasses.replace(settings, steps=1, **changes))
        data = f" --data={settings.data}" if words == "infer" else ""
        assert f"Next: python -m pi0fast.{words} {run}{data}\n" in capsys.readouterr().out


def test_bad_samples_are_replaced_and_left_out_of_the_statistics(settings, demo_dataset, tmp_path):
    folder = shutil.copytree(demo_dataset, tmp_path / "bad", ignore=shutil.ignore_patterns("pi0fast"))
    (path,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(path)
    actions = [[float("nan"), 0.0], *table["action"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(actions)), path)
    bad = dataclasses.replace(settings, data=str(folder))
    with pytest.raises(ValueError, match="on_bad_sample='replace'"):
        training_data.open_data(bad, MINI)
    data = training_data.open_data(changed(bad, "input", on_bad_sample="replace"), MINI)
    batches = [next(data.loader) for _ in range(-(-data.loader.num_samples // settings.batch_size))]
    data.loader.close()
    assert np.isfinite(data.stats["actions"].mean).all()
    assert all(np.isfinite(batch["actions"]).all() for batch in batches)


# ── Real processes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trainer(demo_dataset, tmp_path):
    """Starts the command line on `pi0_tiny` as users have it; compiled once for all tests."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(demo_dataset.parent / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(out, *flags, prefix=()):
        command = [*prefix, sys.executable, "-m", "pi0fast.train", f"--data={demo_dataset}", f"--out={tmp_path / out}"]
        flags = ("--batch-size=4", "--output.log-every=1", *flags)
        return subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    raise AssertionError("the trainer did not get that far")


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.long
def test_killed_and_resumed_run_is_bit_equal(trainer, tmp_path):
    flags = ("--steps=40", "--output.save-every=7")
    finish(trainer("whole", *flags))
    rng = np.random.default_rng()
    kills = 0
    while True:
        process = trainer("killed", *flags, "--resume")
        wait_for_step(tmp_path / "killed", min(39, int(rng.integers(1, 16)) + 12 * kills), process)
        time.sleep(rng.uniform(0, 0.5))
        if kills == 3 or process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()  # reaps it and closes its pipe
        kills += 1
    finish(process)
    assert kills >= 2
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    killed, whole = final_weights(tmp_path / "killed"), final_weights(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(killed[path], array, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_saves_and_exits(trainer, tmp_path, number):
    process = trainer("run", "--steps=100000")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    assert "--resume" in finish(process)
    step = int(checkpoint.newest_checkpoint(tmp_path / "run").name)
    assert step >= 3 and len(losses(tmp_path / "run")) == step
    assert "Loss curve" in finish(trainer("run", f"--steps={step + 2}", "--resume"))


@pytest.mark.long
def test_half_a_checkpoint_is_not_picked_up(trainer, tmp_path):
    finish(trainer("run", "--steps=4", "--output.save-every=2"))
    newest = tmp_path / "run" / "checkpoints" / "4"
    cut_off = newest.with_name("6.orbax-checkpoint-tmp")
    shutil.copytree(newest, cut_off)
    (cut_off / "commit_success.txt").unlink(missing_ok=True)
    output = finish(trainer("run", "--steps=5", "--resume"))
    assert "Loss curve" in output
    assert [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()] and not cut_off.exists()


@pytest.mark.long
def test_a_full_disk_ends_in_a_message_and_a_run_that_goes_on(own_mounts, trainer, tmp_path):
    """A small file system of the trainer's own: the first checkpoint fits, the second does not; then there is room."""
    finish(trainer("probe", "--steps=1"))
    size = sum(file.stat().st_size for file in (tmp_path / "probe").rglob("*") if file.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, more = f"mount -t tmpfs -o size={int(1.6 * size)} tmpfs {disk}", f"mount -o remount,size=1g {disk}"
    prefix = (*own_mounts, "sh", "-c", f'{mount} && ! "$@" && echo "ended badly" && {more} && "$@"', "sh")
    said = finish(trainer("disk/run", "--steps=4", "--output.save-every=2", "--resume", prefix=prefix))
    assert "the checkpoint of step 4 could not be written" in said.split("ended badly")[0], said
    assert "The checkpoints of steps 2 are kept; make room there, then go on with --resume" in said, said
    assert "Loss curve" in said.split("ended badly")[1], said


@pytest.mark.slow
def test_command_line_errors_are_one_line(trainer):
    process = trainer("run", "--mesh=model:8")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert output.decode().strip().startswith("ValueError: --mesh='model:8'")
