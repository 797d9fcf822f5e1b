"""Several processes, one run: they start together, stop after the same step, and end together.

JAX connects them (`jax.distributed`) and ends all of them, from C++, when one has not answered for `HEARTBEAT_S`. It
neither passes on an exception nor says what to do next, so there is a second line: a TCP connection from each process
to process 0. On it they agree where to stop, and a process that fails tells the others why. One that is killed closes
its connection.
"""

import contextlib
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pi0fast import mesh as meshes
from pi0fast.link import LINGER_S, LastWord, Link

START_S = 300  # in which all processes must have been started
HEARTBEAT_S = 30  # a process that has been silent for so long is dead
SHUTDOWN_S = 30  # how long a process that has finished waits for the others, which have finished, too
BARRIER_MS = 24 * 3600 * 1000  # no limit: whoever waits for a process that is gone is ended


@dataclass(frozen=True)
class DistributedSettings:
    """Which of several processes this is. Left out: what SLURM, Open MPI or a TPU pod says, or else the only one.

    Args:
        coordinator: host:port of process 0, as the others reach it.
        processes: how many there are.
        process: the number of this one, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def check(self) -> None:
        """Raises: ValueError: some of the three are missing, or make no sense."""
        if None in (given := (self.coordinator, self.processes, self.process)):
            if any(value is not None for value in given):
                raise ValueError(
                    "--distributed.coordinator, --distributed.processes and --distributed.process go together; give "
                    "all of them, or none"
                )
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"--distributed.coordinator={self.coordinator!r} must be host:port, of process 0")
        if not 0 <= int(self.process or 0) < int(self.processes or 0):
            raise ValueError(
                f"--distributed.process={self.process} must be at least 0 and less than --distributed.processes="
                f"{self.processes}"
            )


class Processes:
    """The processes of a run, as one of them sees them: it alone, or one of those that `join` connects.

    A context manager. Processes that finish leave together. An exception in one ends all, each with a message and exit
    code 1, and unwinds no further: what would be unwound waits for the others.

    expected: errors whose message is enough, without a traceback.
    """

    def __init__(self, link: Link | None = None, expected: tuple[type[Exception], ...] = ()):
        self.index, self.count = (link.index, link.count) if link else (0, 1)
        self._link, self._expected = link, expected
        self._stop_requested = False
        self._barriers = 0

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may: it writes the run's files and tells of it."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes have come here."""
        if self._link:
            self._barriers += 1
            barrier = ocp.multihost.get_barrier_sync_fn()
            barrier(key=f"pi0fast_{self._barriers}", timeout_ms=BARRIER_MS)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The body runs in process 0, then in the others, which find what it has made."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
        self.wait()  # on what may take hours, not in the next collective, whose patience is shorter

    def agree(self, number: int) -> int:
        """Process 0's number, in all."""
        return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if self._link else number

    def check_shared(self, folder: Path) -> None:
        """Raises: FileNotFoundError: this process does not see what process 0 writes beside `folder`."""
        if not self._link:
            return
        probe = folder.parent / f".{folder.name}-{self._link.token[:8]}"
        if self.is_first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        self.wait()
        if not probe.exists():
            raise FileNotFoundError(
                f"process {self.index} does not see what process 0 writes in {folder.parent.absolute()}; give an --out "
                "on a file system that all processes share"
            )
        self.wait()
        if self.is_first:
            probe.unlink()

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[Callable[[int], bool]]:
        """Ctrl-C or SIGTERM in any process asks all to stop after the same step; a second Ctrl-C stops at once.

        Yields `stop(step)`, to be called when `step` steps are done and before the next: whether to stop.
        """
        previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self._stop
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def errors_end_all(self) -> Iterator[None]:
        """An error in the body ends the processes at once, before anything around waits for one that is gone."""
        if self._link:
            self._link.resumable = True
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _request(self, number: int, _) -> None:
        self._stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop(self, step: int) -> bool:
        if not self._link:
            return self._stop_requested
        if self._stop_requested:
            self._link.ask_to_stop()
        return self._link.stop(step)

    def _fail(self, error: BaseException) -> None:
        """Does not return, unless this process is alone."""
        if not self._link:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(LINGER_S)  # most likely another process is gone; then the link ends this one, and says which
        self._link.fail(error, details=not isinstance(error, self._expected))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None:
            self._fail(error)
        elif self._link:
            self._link.leave()
            jax.distributed.shutdown()
            self._link.close()


ALONE = Processes()


def join(settings: DistributedSettings, mesh: str, expected: tuple[type[Exception], ...] = ()) -> Processes:
    """Connects this process to the others of its run. Where there are no others, nothing is started.

    mesh: `--mesh`; processes on CPUs share its virtual devices.

    SLURM and Open MPI: JAX gives each process the GPU of its local rank, unless JAX_LOCAL_DEVICE_IDS names more.

    Raises:
        ValueError: flags that make no sense, or a mesh that does not divide over the processes.
        ConnectionError: the processes do not find each other.
    """
    settings.check()
    given = settings.coordinator is not None
    count = settings.processes if given else launched()
    if count == 1:
        return Processes()
    sizes = meshes.parse(mesh).values()
    if count and -1 not in sizes:
        if math.prod(sizes) % count:
            raise ValueError(f"--mesh={mesh!r} does not divide over {count} processes; each has as many devices")
        meshes.make_cpu_devices(math.prod(sizes) // count)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    last_word = LastWord(
        f"JAX ended this process because the processes of the run did not find each other in {START_S} s; start all of "
        "them, and let --distributed.coordinator be an address and a free port of process 0 that the others reach"
    )
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.processes,
            settings.process,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=START_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"the processes of this run do not find each other: {error}") from error
    finally:
        last_word.unsaid()
    if jax.process_index() > 0:  # process 0 tells for all
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    return Processes(Link(str(settings.coordinator).rpartition(":")[0] if given else None), expected)


def launched() -> int | None:
    """How many processes SLURM or Open MPI has started as one job, 1 without them; None on a TPU: JAX asks its pod."""
    slurm = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in os.environ else 1
    count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", slurm))
    if count > 1 or not find_spec("libtpu"):
        return count
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    workers = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    several = "," in workers if workers is not None else "TPU_SKIP_MDS_QUERY" not in os.environ
    return None if chips and (several or int(os.environ.get("MEGASCALE_NUM_SLICES", 1)) > 1) else 1
