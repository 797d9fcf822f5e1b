"""What the tests of the server share: servers in this process and in one of their own, and a policy under control."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import ClientConnection, connect

from pi0fast import Pi0, config, wire
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.robots import DEMO
from pi0fast.serve import Limits, PolicyServer, bind

ROOT = Path(__file__).parent.parent
SECONDS = 60.0  # none of the waits takes so long; a busy machine may


class Doubler:
    """A policy that doubles x. While `gate` is closed, a batch that has started waits; `started` counts batches."""

    def __init__(self, batch_sizes=(1, 4)):
        self.metadata = {"robot": "doubler"}
        self.batch_sizes = batch_sizes
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def prepare(self, observation):
        if "x" not in observation:
            raise ValueError(f"the observation has no 'x'; it has {sorted(observation)}")
        return observation["x"]

    def run(self, requests):
        self.started.release()
        assert self.gate.wait(SECONDS)
        self.batches.append(list(requests))
        if any(isinstance(x, str) for x in requests):
            raise RuntimeError("the password is hunter2")
        return [{"actions": 2 * np.asarray(x)} for x in requests]

    def wait_until_started(self):
        assert self.started.acquire(timeout=SECONDS)


class Served:
    """A server in a thread of this process."""

    def __init__(self, policy, limits: Limits, **options):
        self._sock = bind("127.0.0.1", 0)
        self.port: int = self._sock.getsockname()[1]
        self._server = lambda: PolicyServer(policy, limits, **options)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(SECONDS)

    async def _run(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        with self._sock:
            await self._server().run(self._sock, self._stop, self._ready.set)

    def begin_to_stop(self):
        self._loop.call_soon_threadsafe(self._stop.set)

    def join(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        return get(self.port, path, **headers)

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.port, name, **labels)

    def wait_for_metric(self, value: float, name: str, **labels: str):
        until(lambda: self.metric(name, **labels) == value)


@contextlib.contextmanager
def served(policy, limits: Limits = Limits(), **options) -> Iterator[Served]:
    server = Served(policy, limits, **options)
    try:
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the test has stopped it
            server.begin_to_stop()
        server.join()


class Program:
    """`python -m pi0fast.serve`, as a process."""

    def __init__(self, *arguments: str, port: int = 0, env: dict[str, str] | None = None):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
        command = [sys.executable, "-m", "pi0fast.serve", f"--port={port}", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = self.process.stdout
        self.first_line = self.lines.readline()
        self.port = int(self.first_line.rsplit(":", 1)[1])

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.lines.close()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    """HTTP status and text."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric(port: int, name: str, **labels: str) -> float:
    """One sample of /metrics."""
    status, text = get(port, "/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (value,) = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
    return value


def until(true: Callable[[], bool]):
    """Waits for what no event tells."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def client(port: int, **options) -> Iterator[ClientConnection]:
    """A websocket without openpi-client's manners; the metadata is read."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options) as connection:
        assert isinstance(connection.recv(timeout=SECONDS), bytes)
        yield connection


@contextlib.contextmanager
def robot_client(port: int, **options) -> Iterator[WebsocketClientPolicy]:
    """openpi-client, whose way to connect newer versions of websockets deprecate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"connect\(\) must be used as a context manager", DeprecationWarning)
        policy = WebsocketClientPolicy("127.0.0.1", port, **options)
    try:
        yield policy
    finally:
        policy._ws.close()


def reply(connection: ClientConnection) -> Any:
    """The next frame: a reply, or the text of an error."""
    frame = connection.recv(timeout=SECONDS)
    return frame if isinstance(frame, str) else wire.decode(frame)


def raw_client(port: int) -> socket.socket:
    """A socket after the opening handshake; it answers no pings."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert sock.recv(12) == b"HTTP/1.1 101"
    return sock


def save_untrained_run(folder: Path):
    """An untrained `pi0_tiny` as a run."""
    size = config.pi0_tiny()
    RunConfig(size, DEMO, tokenizer="demo").save(folder)
    params = {path: variable[...] for path, variable in flatten(Pi0(size, rngs=nnx.Rngs(0))).items()}
    stats = NormStats(*np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, params=params, norm_stats={"state": stats, "actions": stats})
