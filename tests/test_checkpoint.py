"""Checkpoints: damage is found and named, a kill or a full disk costs one save, any mesh restores them."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pi0fast import checkpoint, integrity, storage
from pi0fast import mesh as meshes
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.integrity import CorruptCheckpointError
from pi0fast.train_state import HOST
from tests.checkpoint_process import STATS

PARAMS = {
    "layer/w": np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32),
    "layer/half": np.random.default_rng(1).standard_normal((16, 8)).astype(jnp.bfloat16),
}
STATE = (np.int32(3), {"m": np.arange(4096, dtype=np.float32)})


def child(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """A process of `tests.checkpoint_process`."""
    command = [*prefix, sys.executable, "-m", "tests.checkpoint_process", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


# ── Checksums ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"])
def test_a_checksum_sees_every_bit_and_place_on_any_mesh(dtype):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        array = rng.integers(0, 2, (16, 24)).astype(bool)
    else:
        array = rng.integers(0, 256, (16, 24 * jnp.dtype(dtype).itemsize), np.uint8).view(dtype)
    expected = integrity.checksums({"x": jnp.asarray(array)})["x"]
    for spec in [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec()]:
        for mesh in ("fsdp:8", "data:2,fsdp:4"):
            placed = jax.device_put(array, NamedSharding(meshes.make(mesh), spec))
            assert integrity.checksums({"x": placed}) == {"x": expected}
    changed = {}
    for bit in range(1 if dtype == "bool" else 8 * array.dtype.itemsize):
        other = array.copy()
        other.view(f"u{array.dtype.itemsize}")[5, 7] ^= np.array(1 << bit, f"u{array.dtype.itemsize}")
        changed[f"bit {bit}"] = other
    changed["rows"], changed["shape"] = array[::-1], array.reshape(24, 16).T
    sums = integrity.checksums({name: jnp.asarray(other) for name, other in changed.items()})
    assert not [name for name, value in sums.items() if value == expected]


def test_what_lies_in_the_hosts_memory_is_saved_and_restored_there(tmp_path):
    sharding = NamedSharding(meshes.make("fsdp:8"), PartitionSpec("fsdp"), memory_kind=HOST)
    array = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    placed = jax.device_put(array, sharding)
    sums = integrity.checksums({"x": placed})
    assert sums == integrity.checksums({"x": jnp.asarray(array)})
    storage.save_arrays(tmp_path / "arrays", {"x": placed})
    loaded = storage.load_arrays(
        tmp_path / "arrays", shardings={"x": sharding}, dtypes={"x": np.float32}, checksums=sums
    )
    assert loaded["x"].sharding == sharding
    np.testing.assert_array_equal(loaded["x"], array)


def test_groups_are_bounded_and_keep_the_order(monkeypatch):
    monkeypatch.setattr(integrity, "GROUP_BYTES", 10)
    assert integrity.groups({"a": 4, "b": 6, "c": 1, "d": 50, "e": 2, "f": 8}) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert integrity.groups({}) == []


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def like(tree):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def save(run, step):
    with Checkpoints(run, keep_last=5) as checkpoints:
        params, state = jax.tree.map(jnp.asarray, (PARAMS, STATE))
        checkpoints.save(step, params=params, train_state=state, loader={"batch": step}, norm_stats=STATS)


def restore(run, step):
    return checkpoint.restore(run, step, like(PARAMS), like(STATE))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("damage") / "run"
    save(run, 200)
    save(run, 400)
    return run


@pytest.fixture
def run(two_checkpoints, tmp_path):
    """Checkpoints of steps 200 and 400."""
    return shutil.copytree(two_checkpoints, tmp_path / "run")


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_whole_restores(run):
    jax.tree.map(np.testing.assert_array_equal, restore(run, 400), (PARAMS, STATE, {"batch": 400}))
    assert set(checkpoint.load_stats(run / "checkpoints" / "400")) == {"state"}


@pytest.mark.parametrize("item", ["params", "train_state"])
@pytest.mark.parametrize("damage", [flip, cut, os.unlink])
def test_damaged_arrays_are_named_and_the_checkpoint_before_is_offered(run, item, damage):
    damage(largest_file(run / "checkpoints" / "400" / item))
    named = "layer/w|layer.w" if item == "params" else r"\[1\]\['m'\]"
    offer = "The checkpoint before it is that of step 200: .*--resume --resume-step=200"
    with pytest.raises(CorruptCheckpointError, match=rf"checkpoints/400.* is damaged: .*({named}).*{offer}"):
        restore(run, 400)
    shutil.rmtree(run / "checkpoints" / "200")
    with pytest.raises(CorruptCheckpointError, match="There is no checkpoint before it"):
        restore(run, 400)


@pytest.mark.long
def test_nothing_but_the_message_is_printed(tmp_path, monkeypatch, caplog):
    """The reads under way when one fails are ended; what a collector finds of them would be a page of stderr each."""
    storage.save_arrays(tmp_path / "arrays", {f"a/{i}": jnp.arange(30_000.0) + i for i in range(400)})
    path = largest_file(tmp_path / "arrays")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    uncollected = []
    monkeypatch.setattr(sys, "unraisablehook", uncollected.append)
    for _ in range(10):
        with pytest.raises(CorruptCheckpointError):
            storage.load_arrays(tmp_path / "arrays")
        gc.collect()
    assert not uncollected
    assert not [record for record in caplog.records if record.name == "asyncio" and record.levelname == "ERROR"]


@pytest.mark.parametrize("name", ["layer/w", "layer/half"])
def test_other_values_than_were_saved_are_named(run, name):
    """Values that orbax itself finds nothing wrong with."""
    folder = run / "checkpoints" / "400" / "params"
    shutil.rmtree(folder)
    other = PARAMS[name].copy()
    other.view(np.uint8)[3, 2] ^= 1
    storage.save_arrays(folder, {**jax.tree.map(jnp.asarray, PARAMS), name: jnp.asarray(other)})
    with pytest.raises(CorruptCheckpointError, match=rf"it holds other values than were saved in {name}\. "):
        checkpoint.load_item(folder.parent, "params")
    with pytest.raises(CorruptCheckpointError, match=name):
        checkpoint.load_item(folder.parent, "params", dtypes={"layer/w": "bfloat16"})


@pytest.mark.parametrize("damage", [cut, os.unlink])
@pytest.mark.parametrize("file", ["params/_METADATA", "params/manifest.ocdbt", "loader/position.json"])
def test_a_damaged_small_file_is_named(run, file, damage):
    damage(run / "checkpoints" / "400" / file)
    with pytest.raises(CorruptCheckpointError, match=r"400.* is damaged: .*--resume-step=200"):
        restore(run, 400)
    restore(run, 200)


def test_small_files_that_still_parse_are_compared(run):
    step = run / "checkpoints" / "400"
    position, stats, sums = (step / item for item in ("loader/position.json", "assets/norm_stats.json", "checksums"))
    position.write_text('{"batch": 399}')
    with pytest.raises(CorruptCheckpointError, match="loader/position.json holds other values than were saved"):
        restore(run, 400)
    stats.write_text(stats.read_text().replace("1.0", "1.5"))
    with pytest.raises(CorruptCheckpointError, match="assets/norm_stats.json holds other values than were saved"):
        checkpoint.load_stats(step)
    content = json.loads((sums / "checksums.json").read_text())
    content["loader"] ^= 1
    (sums / "checksums.json").write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpointError, match="checksums/checksums.json holds other values"):
        restore(run, 400)


def test_a_checkpoint_without_checksums_loads(run):
    shutil.rmtree(run / "checkpoints" / "400" / "checksums")
    jax.tree.map(np.testing.assert_array_equal, restore(run, 400), (PARAMS, STATE, {"batch": 400}))


def test_a_train_state_of_other_settings_is_refused(run):
    with pytest.raises(ValueError, match=r"(?s)settings.*misshaped: \[1\]\['m'\] is"):
        checkpoint.restore(run, 400, like(PARAMS), like((STATE[0], {"m": np.zeros(3, np.float32)})))


def test_newer_checkpoints_are_set_aside_not_deleted(run):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 300; it has those of \[200, 400\]"):
        checkpoint.step_to_resume(run, 300)
    assert checkpoint.step_to_resume(run, None) == 400 and checkpoint.step_to_resume(run, 200) == 200
    assert checkpoint.set_newer_aside(run, 200) == [run / "set_aside" / "400"]
    assert checkpoint.steps(run) == [200] and (run / "set_aside" / "400" / "params").is_dir()
    save(run, 400)
    assert checkpoint.set_newer_aside(run, 200) == [run / "set_aside" / "400.1"]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    """Over a restart, whatever was not evaluated, and a loss that is no number."""
    losses = {1: 0.5, 2: 0.3, 3: None, 4: math.nan, 5: 0.4, 6: 0.3, 7: 0.9, 8: None}

    def save(steps):
        with Checkpoints(tmp_path, keep_last=2, keep_best=True) as checkpoints:
            for step in steps:
                value = losses[step]
                validation = None if value is None else {"loss": value, "action_error": 1.0}
                params = {"w": jnp.full(3, float(step))}
                checkpoints.save(step, params=params, norm_stats=STATS, validation=validation)

    save([1])
    assert checkpoint.best_step(tmp_path) == 1
    save([2, 3, 4])
    assert checkpoint.steps(tmp_path) == [2, 3, 4] and checkpoint.best_step(tmp_path) == 2
    save([5, 6, 7, 8])
    assert checkpoint.steps(tmp_path) == [6, 7, 8] and checkpoint.best_step(tmp_path) == 6  # the newest of equals
    found = {step: checkpoint.find_checkpoint(tmp_path, step).name for step in (7, "best", None)}
    assert found == {7: "7", "best": "6", None: "8"}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; it has those of \[6, 7, 8\]"):
        checkpoint.find_checkpoint(tmp_path, 5)


def test_without_validation_no_checkpoint_is_the_best(run):
    assert not (run / "checkpoints" / "400" / "metrics").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint with a validation loss; train with --val\.fraction"):
        checkpoint.find_checkpoint(run, "best")


def test_a_config_that_does_not_read_is_named(tmp_path):
    from pi0fast import config

    RunConfig(config.pi0_tiny(), None, "demo").save(tmp_path)
    cut(tmp_path / "config.json")
    with pytest.raises(CorruptCheckpointError, match=r"config\.json cannot be read: JSONDecodeError"):
        RunConfig.load(tmp_path)


# ── Real processes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_killed_in_a_save_the_checkpoint_before_restores(tmp_path):
    """Ten kills at random moments of a save; what each leaves is restored and compared."""
    cut_off = int(output(child("kills", tmp_path / "run", 10, 64)).removeprefix("cut off"))
    assert cut_off >= 3


def test_a_full_disk_is_a_clear_message_and_costs_one_save(own_mounts, tmp_path):
    mount = 'mount -t tmpfs -o size=24m tmpfs "$0" && exec "$@"'
    message = output(child("full_disk", tmp_path, prefix=(*own_mounts, "sh", "-c", mount, str(tmp_path))))
    assert message.startswith("the checkpoint of step 2 could not be written to ")
    assert "No space left on device" in message
    assert message.strip().endswith("The checkpoints of steps 1 are kept; make room there, then go on with --resume")


@pytest.mark.long
def test_openpis_weights_go_straight_to_shards(tmp_path):
    """Each byte is read once, the host holds little beside the weights, a device its eighth.

    2^27: orbax's cache of 100 MB and compiled programs. In one group, all would take some 850 MB at most.
    """
    output(child("write_openpi", tmp_path))
    numbers = output(child("load_openpi", tmp_path)).split()
    files, read, matrices, largest, peak, *on_device = map(int, numbers)
    assert read < 1.05 * files
    assert peak < matrices + 3 * largest + 2**27
    assert len(on_device) == 8
    np.testing.assert_allclose(on_device, matrices / 8, rtol=0.02)
