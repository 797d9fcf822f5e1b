import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pi0fast.data.loader import Loader

NUM_SAMPLES = 10


class Source:
    fingerprint = "abc"

    def __init__(self, num_samples=NUM_SAMPLES, bad=None):
        self.num_samples, self.bad = num_samples, bad
        self.frames = np.arange(num_samples)

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError(f"sample {index} is broken")
        return {"state": np.full(3, index, np.float32), "prompt": f"do {index}"}


def transform(sample):
    return {
        "images": {"base_0_rgb": np.full((2, 2, 3), sample["state"][0], np.uint8)},
        "image_masks": {"base_0_rgb": True},
        "state": sample["state"] * 2,
    }


def slow_transform(sample):
    time.sleep(0.05)
    return transform(sample)


def make_loader(**options):
    return Loader(**{"source": Source(), "transform": transform, "batch_size": 4, "seed": 3, **options})


def take(loader, count):
    """(example, index) of `count` batches, each [b, 2]"""
    batches = [np.stack([batch["example"], batch["index"]], axis=1) for batch in itertools.islice(loader, count)]
    loader.close()
    return np.stack(batches)


def test_batches_are_stacked_samples():
    loader = make_loader()
    batch = next(loader)
    loader.close()
    index = batch["index"]
    assert index.dtype == batch["example"].dtype == np.int64
    np.testing.assert_array_equal(batch["example"], np.arange(4))
    np.testing.assert_array_equal(batch["state"], np.repeat(index[:, None] * 2, 3, axis=1))
    assert batch["state"].dtype == np.float32
    images = batch["images"]["base_0_rgb"]
    assert images.dtype == np.uint8 and images.shape == (4, 2, 2, 3)
    np.testing.assert_array_equal(images[:, 0, 0, 0], index)
    mask = batch["image_masks"]["base_0_rgb"]
    assert mask.dtype == bool and mask.shape == (4,) and mask.all()


def test_every_epoch_is_another_permutation():
    stream = take(make_loader(), 15).reshape(-1, 2)
    np.testing.assert_array_equal(stream[:, 0], np.arange(60))
    epochs = stream[:, 1].reshape(6, NUM_SAMPLES)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(NUM_SAMPLES), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_the_order_depends_on_the_seed_only():
    np.testing.assert_array_equal(take(make_loader(), 5), take(make_loader(), 5))
    assert (take(make_loader(), 5) != take(make_loader(seed=4), 5)).any()


@pytest.mark.slow
def test_workers_make_batches_of_one():
    with_workers, without = make_loader(workers=1, batch_size=1), make_loader(batch_size=1)
    try:
        for _ in range(3):
            np.testing.assert_array_equal(next(with_workers)["index"], next(without)["index"])
    finally:
        with_workers.close()


@pytest.mark.slow
def test_the_order_is_the_same_with_workers_and_resumes():
    expected = take(make_loader(), 10)
    loader = make_loader(workers=2)
    loader.restore({**loader.state(), "next_batch": 3})
    np.testing.assert_array_equal(take(loader, 7), expected[3:])


PROGRAM = """
import itertools, multiprocessing, os, signal, sys
from tests.test_loader import make_loader, slow_transform

signal.signal(signal.SIGTERM, lambda *_: None)
loader = make_loader(workers=2, transform=slow_transform)
next(loader)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.read()
print(len(list(itertools.islice(loader, 8))))
loader.close()
"""


@pytest.fixture
def program():
    """A process that waits behind its first batch, in a process group of its own; and its two workers."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, text=True) as process:
        assert process.stdout
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        yield process, workers
        for pid in (process.pid, *workers):
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_signal_to_the_process_group_leaves_the_workers_to_their_process(program):
    process, _ = program
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.strip() == "8" and process.returncode == 0, err


@pytest.mark.slow
def test_workers_end_with_their_process(program):
    process, workers = program
    process.kill()
    deadline = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "workers of a process that was killed go on"
        time.sleep(0.1)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_batches(count):
    expected = take(make_loader(), 7)
    parts = [take(make_loader(process_index=index, process_count=count), 7) for index in range(count)]
    np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(7, 4, 2), expected)


@pytest.mark.parametrize("next_batch", [1, 2, 3, 5, 8])  # within epochs, across them, and at the end of the second
def test_resume_continues_the_stream(next_batch):
    expected = take(make_loader(), 11)
    loader = make_loader()
    take(loader, next_batch)
    state = json.loads(json.dumps(loader.state()))
    assert state["next_batch"] == next_batch

    resumed = make_loader()
    resumed.restore(state)
    assert resumed.state() == state
    np.testing.assert_array_equal(take(resumed, 11 - next_batch), expected[next_batch:])
    parts = []
    for index in range(2):
        resumed = make_loader(process_index=index, process_count=2)
        resumed.restore(state)
        parts.append(take(resumed, 11 - next_batch))
    np.testing.assert_array_equal(np.stack(parts, axis=2).reshape(-1, 4, 2), expected[next_batch:])


def test_restore_into_a_running_loader():
    loader = make_loader()
    first = next(loader)
    state = loader.state()
    second = next(loader)
    next(loader)
    loader.restore(state)
    np.testing.assert_array_equal(next(loader)["index"], second["index"])
    loader.restore({**state, "next_batch": 0})
    np.testing.assert_array_equal(next(loader)["index"], first["index"])
    loader.close()


def test_resume_late_takes_no_longer():
    def first_batch_seconds(next_batch):
        loader = make_loader(source=Source(1000))
        loader.restore({**loader.state(), "next_batch": next_batch})
        start = time.perf_counter()
        batch = next(loader)
        seconds = time.perf_counter() - start
        loader.close()
        assert batch["example"][0] == 4 * next_batch
        return seconds

    early = min(first_batch_seconds(0) for _ in range(3))
    assert min(first_batch_seconds(10**9) for _ in range(3)) < early + 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed=3, this run 4.*same --seed"),
        ({"batch_size": 8}, "batch_size=4, this run 8.*same --batch-size"),
        ({"fingerprint": "xyz"}, "fingerprint='abc', this run 'xyz'.*restore the data set"),
    ],
)
def test_restore_into_another_run_is_an_error(change, message):
    source = Source()
    source.fingerprint = change.pop("fingerprint", source.fingerprint)
    with pytest.raises(ValueError, match=message):
        make_loader(source=source, **change).restore(make_loader().state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "not a multiple of process_count=4.*try 8"),
        ({"batch_size": 0}, "must be positive"),
        ({"workers": -1}, "at least 0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"source": Source(0)}, "no samples"),
    ],
)
def test_malformed_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


def test_an_error_of_the_source_reaches_the_consumer():
    loader = make_loader(source=Source(bad=5))
    with pytest.raises(ValueError, match="sample 5 is broken"):
        take(loader, 5)
    loader.close()


def test_wait_is_the_time_without_data():
    loader = make_loader(transform=slow_transform)
    next(loader)
    assert loader.last_wait_s > 0.19  # 4 samples of 0.05 s
    time.sleep(0.7)  # both batches ahead are made meanwhile
    next(loader)
    assert loader.last_wait_s < 0.1
    loader.close()
