"""How processes find each other, and what they say when they do not; where they stop."""

from typing import Any

import numpy as np
import pytest

from pi0fast.data.loader import Loader
from pi0fast.distributed import DistributedSettings, join, launched

TOGETHER = """
import os, random, signal, time
import tyro
from pi0fast.distributed import DistributedSettings, join

def main(asks: int, begin: int, distributed: DistributedSettings):
    with join(distributed, "fsdp:4") as processes:
        step, rng = begin, random.Random(distributed.process)
        with processes.stop_signals() as stop, processes.errors_end_all():
            while not stop(step):
                if step - begin == 20 and processes.index == asks:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(rng.uniform(0, 0.02))  # no collective keeps them in step
                step += 1
        print("stopped after", step)

tyro.cli(main)
"""

BATCH = """
import numpy as np, tyro
from jax.experimental import multihost_utils
from pi0fast import mesh as meshes
from pi0fast import training_data
from pi0fast.data.loader import Loader
from pi0fast.distributed import DistributedSettings, join
from tests.multiprocess.test_join import Numbers

def main(distributed: DistributedSettings):
    with join(distributed, "data:2,fsdp:2") as processes:
        mesh = meshes.make("data:2,fsdp:2")
        print("mesh", [[device.process_index for device in row] for row in mesh.devices])
        part = dict(process_index=processes.index, process_count=processes.count)
        loader = Loader(Numbers(), dict, batch_size=8, seed=0, **part)
        batch = next(loader)
        index = batch.pop("index")
        batch = training_data.to_device(batch, mesh)
        mine = {int(row) for shard in batch["example"].addressable_shards for row in np.asarray(shard.data)}
        assert mine == set(range(processes.index, 8, 2)), mine
        example, sample = multihost_utils.process_allgather((batch["example"], batch["sample"]), tiled=True)
        index = multihost_utils.process_allgather(index, tiled=True)
        assert (sample == index + 100).all()
        print("batch", sorted(zip(example.tolist(), sample.tolist())))
        loader.close()

tyro.cli(main)
"""

EARLY = """
import tyro
from pi0fast import distributed
from pi0fast.distributed import DistributedSettings, join

distributed.START_S = 3

def main(distributed: DistributedSettings):
    join(distributed, "fsdp:2")

tyro.cli(main)
"""

SHARED = """
from pathlib import Path
import tyro
from pi0fast.distributed import DistributedSettings, join

def main(out: Path, distributed: DistributedSettings):
    with join(distributed, "fsdp:2", (FileNotFoundError,)) as processes:
        processes.check_shared(out)

tyro.cli(main)
"""


class Numbers:
    """A source of samples that are numbers."""

    fingerprint = "numbers"
    frames = np.arange(20)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample": np.int32(100 + index)}


def test_processes_at_different_steps_stop_after_the_same(start):
    group = start(4, "-c", TOGETHER, "--asks=2", "--begin=1000")
    group.finish()
    stops = {group.output(index) for index in range(4)}
    assert len(stops) == 1 and int(stops.pop().removeprefix("stopped after ")) > 1020


def test_a_global_batch_is_that_of_one_process(start):
    """`data` runs over processes, `fsdp` inside; each process has loaded what lies on its devices."""
    single = Loader(Numbers(), dict, batch_size=8, seed=0)
    expected = next(single)["sample"].tolist()
    single.close()
    group = start(2, "-c", BATCH)
    group.finish()
    for index in range(2):
        assert group.output(index).splitlines() == [
            "mesh [[0, 0], [1, 1]]",
            f"batch {list(enumerate(expected))}",
        ]


@pytest.mark.long
def test_a_process_that_never_comes_is_named_as_the_cause(start):
    group = start(2, "-c", EARLY)
    group.processes[0].kill()
    assert group.wait()[1] != 0
    assert "JAX ended this process because the processes of the run did not find each other in 3 s" in group.output(1)


def test_a_folder_that_is_not_shared_is_an_error(start, tmp_path):
    group = start(2, "-c", SHARED, f"--out={tmp_path}/{{index}}/run")
    assert group.wait() == [1, 1]
    assert f"process 1 does not see what process 0 writes in {tmp_path}/1; give an --out" in group.output(1)
    assert "process 0 of 2 ends because process 1 failed: FileNotFoundError" in group.output(0)


@pytest.mark.parametrize(
    ("settings", "mesh", "message"),
    [
        (DistributedSettings("host:1", 2), "fsdp:2", "go together"),
        (DistributedSettings(process=0), "fsdp:2", "go together"),
        (DistributedSettings("host", 2, 0), "fsdp:2", "must be host:port"),
        (DistributedSettings("host:99999", 2, 0), "fsdp:2", "must be host:port"),
        (DistributedSettings("host:1", 2, 2), "fsdp:2", "--distributed.process=2 must be"),
        (DistributedSettings("host:1", 0, 0), "fsdp:2", "--distributed.processes=0"),
        (DistributedSettings("host:1", 2, 0), "fsdp:3", "does not divide over 2 processes"),
        (DistributedSettings("host:1", 2, 0), "fsdp:0", "positive integer"),
    ],
)
def test_flags_that_make_no_sense(settings, mesh, message):
    with pytest.raises(ValueError, match=message):
        join(settings, mesh)


def test_alone_nothing_starts():
    with join(DistributedSettings(), "fsdp:1") as processes, processes.stop_signals() as stop:
        assert processes.count == 1 and processes.is_first and not stop(0)
    assert join(DistributedSettings("host:1", 1, 0), "fsdp:1").count == 1


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "8"}, 1),  # inside an allocation, not started by srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, 8),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
    ],
)
def test_launchers(environment, count, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == count
