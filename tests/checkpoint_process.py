"""Processes that save and restore, for tests that kill them or fill their disk: `COMMAND ARGUMENTS`."""

import math
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pi0fast import checkpoint, config, convert, integrity, storage
from pi0fast import mesh as meshes
from pi0fast.checkpoint import Checkpoints, SaveError
from pi0fast.config import SiglipConfig, TransformerConfig
from pi0fast.convert_rules import rules
from pi0fast.normalize import NormStats
from pi0fast.params import flatten

STATS = {"state": NormStats(np.zeros(2), np.ones(2), np.zeros(2), np.ones(2))}


def saved(step: int, megabytes: int) -> tuple[dict, tuple, dict]:
    """params, train state and loader position of a step, as numpy and hardly compressible."""
    rng = np.random.default_rng(step)
    params = {"a/w": rng.standard_normal((megabytes, 2**17), dtype=np.float32), "a/b": rng.standard_normal(7)}
    params = {path: array.astype(np.float32) for path, array in params.items()}
    return params, (np.int32(step), {"m": rng.standard_normal((megabytes, 2**17), dtype=np.float32)}), {"batch": step}


def save(run: Path, step: int, megabytes: int) -> None:
    params, state, loader = saved(step, megabytes)
    with Checkpoints(run) as checkpoints:
        place = jax.tree.map(jnp.asarray, (params, state))
        checkpoints.save(step, params=place[0], train_state=place[1], loader=loader, norm_stats=STATS)


def check(run: Path, step: int, megabytes: int) -> None:
    """The checkpoint restores to what was saved."""
    params, state, loader = saved(step, megabytes)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (params, state))
    found = checkpoint.restore(run, step, *like)
    jax.tree.map(np.testing.assert_array_equal, found, (params, state, loader))


def kills(folder: str, count: str, megabytes: str) -> None:
    """Child after child is killed in its second save; each checks what the one before left. Prints what was cut off."""
    run = Path(folder)
    rng, cut_off, newest = np.random.default_rng(), 0, None
    for _ in range(int(count)):
        reader, writer = os.pipe()
        child = os.fork()  # before any backend runs
        if not child:
            os.close(reader)
            newest = checkpoint.newest_step(run)
            if newest:
                check(run, newest, int(megabytes))
            integrity.checksums(
                jax.tree.map(jnp.asarray, saved(0, int(megabytes))[0])
            )  # compiled before a save is timed
            start = time.monotonic()
            save(run, (newest or 0) + 1, int(megabytes))
            os.write(writer, f"{time.monotonic() - start} {(newest or 0) + 2}\n".encode())
            save(run, (newest or 0) + 2, int(megabytes))
            signal.pause()
        os.close(writer)
        with os.fdopen(reader) as lines:
            seconds, step = lines.readline().split()
            while not list((run / "checkpoints").glob(f"{step}*")):  # it has begun
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5) * float(seconds))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        names = [path.name for path in (run / "checkpoints").iterdir()]
        cut_off += any(name.startswith(f"{step}.") for name in names)
        newest = checkpoint.newest_step(run)
        assert newest in (int(step) - 1, int(step)), (newest, step, names)
    assert newest is not None
    check(run, newest, int(megabytes))
    print(f"cut off {cut_off}")


def full_disk(folder: str) -> None:
    """Saves until there is no room, makes room, and goes on."""
    run, filler = Path(folder) / "run", Path(folder) / "filler"
    save(run, 1, 4)
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - 2**20))
    try:
        save(run, 2, 4)
    except SaveError as error:
        print(error)
    else:
        raise AssertionError("a full disk went unnoticed")
    assert checkpoint.newest_step(run) == 1
    check(run, 1, 4)
    filler.unlink()
    save(run, 3, 4)
    check(run, 3, 4)
    assert checkpoint.steps(run) == [1, 3]


WIDE = TransformerConfig(width=512, depth=10, mlp_dim=2048, num_heads=4, num_kv_heads=1, head_dim=128)
LARGE = config.Pi0Config(
    vlm=WIDE, action_expert=WIDE, siglip=SiglipConfig(64, 2, 128, 2, 14), vocab_size=512, image_size=28
)


def openpi_array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape, dtype=np.float32)


def write_openpi(folder: str) -> None:
    """A checkpoint of some 270 MB, each array in one chunk, as a trainer without sharding writes it."""
    arrays = {f"params/{path}": openpi_array(path, shape) for path, shape in convert.openpi_shapes(LARGE).items()}
    storage.save_arrays(Path(folder) / "params", {path: jnp.asarray(array) for path, array in arrays.items()})


def load_openpi(folder: str) -> None:
    """Prints bytes: files, read, the model, its largest rule, memory before and at most, on each device."""
    integrity.GROUP_BYTES = 2**24
    mesh = meshes.make("fsdp:8")
    jnp.zeros(()).block_until_ready()
    files = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    read, before = counter("/proc/self/io", "rchar"), 1024 * counter("/proc/self/status", "VmRSS")
    model, dead = convert.load_openpi_model_and_dead(folder, LARGE, mesh)
    weights = {path: variable[...] for path, variable in flatten(model).items()}
    jax.block_until_ready((weights, dead))
    peak = 1024 * counter("/proc/self/status", "VmHWM") - before
    read = counter("/proc/self/io", "rchar") - read
    on_device = dict.fromkeys(jax.devices(), 0)
    for array in weights.values():
        for shard in array.addressable_shards:
            on_device[shard.device] += shard.data.nbytes if array.ndim > 1 else 0
    matrices = sum(array.nbytes for array in weights.values() if array.ndim > 1)
    sizes = [4 * sum(map(math.prod, rule.theirs.values())) * (rule.depth or 1) for rule in rules(LARGE)]
    print(files, read, matrices, max(sizes), peak, *on_device.values())
    for rule in rules(LARGE):
        lead = (rule.depth,) if rule.depth else ()
        made = rule.read([jnp.asarray(openpi_array(path, lead + shape)) for path, shape in rule.theirs.items()])
        for path, expected in made.items():
            np.testing.assert_array_equal(weights[path], expected, err_msg=path)


def counter(path: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


if __name__ == "__main__":
    commands = {
        "kills": kills,
        "full_disk": full_disk,
        "write_openpi": write_openpi,
        "load_openpi": load_openpi,
    }
    commands[sys.argv[1]](*sys.argv[2:])
