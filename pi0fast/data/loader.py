"""Batches in a fixed order: a function of the seed and the data set, not of the number of workers or processes."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import grain

ENDLESS = 1 << 62  # samples; grain's workers add to the length, which must stay below 2^63
PREFETCH_BATCHES = 2  # made ahead in the background; per worker, with workers


class Source(Protocol):
    """Random access to samples. Picklable, for worker processes.

    fingerprint: changes when the data do. frames: each sample's number in the data set.
    """

    fingerprint: str
    frames: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Loader:
    """An endless iterator over this process's part of the batches.

    Every epoch is a new permutation of the samples; epochs follow each other without a gap, so a batch may span two. Of
    each global batch, process p of n gets the samples at positions p, p + n, p + 2n, ….

    transform: sample → a nested dict of arrays and scalars of fixed shapes.
    batch_size: of the global batch, all processes together.
    workers: processes that make batches; 0 makes them in a thread of this one. With workers, source and transform are
        pickled, and a script must guard its entry with `if __name__ == "__main__"`.

    A batch is `transform`'s dict, its leaves stacked along a new first axis b = batch_size / process_count, with
    "example" int64 [b], the samples' positions in the global stream (step * batch_size + position in the global batch),
    and "index" int64 [b], their numbers in the data set.

    num_samples: of the source. last_wait_s: seconds that the last `next` took, which is what training waited for data.

    Raises ValueError for an empty source, and sizes that are not positive or do not divide.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(source) == 0:
            raise ValueError("the source has no samples; pass one with data")
        if batch_size < 1 or workers < 0 or not 0 <= process_index < process_count:
            raise ValueError(
                f"batch_size={batch_size} must be positive, workers={workers} at least 0, process_index="
                f"{process_index} in [0, process_count={process_count})"
            )
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of process_count={process_count}; it is the global batch, "
                f"try {batch_size + -batch_size % process_count}"
            )
        self._load = _Load(source, transform)
        self.num_samples, self._fingerprint = len(source), source.fingerprint
        self.batch_size, self._seed, self._workers = batch_size, seed, workers
        self._process_index, self._process_count = process_index, process_count
        self._next_batch = 0
        self._iterator: grain.DatasetIterator | None = None
        self.last_wait_s = 0.0

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, Any]:
        start = time.perf_counter()
        iterator = self._iterator = self._iterator or self._start(self._next_batch)
        batch = next(iterator)
        self._next_batch += 1
        self.last_wait_s = time.perf_counter() - start
        return batch

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the batch after the last one returned; JSON can hold it.

        It is the same in every process, and fits any number of workers and processes.
        """
        return {"next_batch": self._next_batch, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; takes no longer for a later batch.

        Raises ValueError when the data set, the seed or the batch size is another, for then the order is, too.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(
                    f"the loader's saved state has {key}={state[key]!r}, this run {mine!r}, so the order of the data "
                    f"cannot be continued; {_REMEDIES[key]}, or begin another --out with this run as --init-from"
                )
        self.close()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        """Stop the workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "seed": self._seed, "batch_size": self.batch_size}

    def _start(self, next_batch: int) -> "grain.DatasetIterator":
        import grain

        # Everything is indexed, so starting at a later batch is a slice. Batching before the workers split the stream
        # makes whole batches their unit, which keeps the order.
        dataset = (
            grain.MapDataset.range(self.num_samples)
            .seed(self._seed)
            .shuffle()
            .repeat(None)
            .map_with_index(_pair)[next_batch * self.batch_size + self._process_index : ENDLESS : self._process_count]
            .map(self._load)
            .batch(self.batch_size // self._process_count)
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES))
        )
        if self._workers:
            # grain reads absl's flags in its workers' set-up, which fails in programs that are not absl's
            from absl import flags

            flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=PREFETCH_BATCHES),
                _leave_group,
            )
        return iter(dataset)


class _Load:
    """(position in the stream, index) → the transformed sample; a class, so that workers can unpickle it."""

    def __init__(self, source: Source, transform: Callable[[dict[str, Any]], Mapping[str, Any]]):
        self._source, self._transform = source, transform

    def __call__(self, position_and_index: tuple[int, int]) -> dict[str, Any]:
        position, index = position_and_index
        sample = self._transform(self._source[index])
        return {**sample, "example": np.int64(position), "index": np.int64(self._source.frames[index])}


def _leave_group(*_) -> None:
    """A worker lives as long as the process that started it, whatever is sent to that one's process group: at Ctrl-C
    that one may need batches until all processes of a run are at the same step."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    os.setpgid(0, 0)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _pair(position: int, index: int) -> tuple[int, int]:
    return position, index


_REMEDIES = {
    "fingerprint": "restore the data set that the run was started with",
    "seed": "give the same --seed",
    "batch_size": "give the same --batch-size",
}
