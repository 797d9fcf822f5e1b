"""What the processes of a run tell each other besides arrays: where all stop, and why one of them has ended.

A TCP connection from each process to process 0, which passes messages on. A process that is killed closes its
connection; JAX's heartbeats end the run where a machine is gone without closing it (`pi0fast.distributed`).
"""

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import threading
import traceback
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

LINGER_S = 10  # at most: how long a process that ends stays, so that the others learn why
ADDRESS_BYTES = 1024
DIED = "died without a word: it was killed, or its machine is gone"
RESUME = "Complete checkpoints are kept: start all processes again with --resume"


class LastWord:
    """A shell that prints `message` when this process ends without `unsaid`: killed from outside, or by JAX."""

    def __init__(self, message: str):
        script = 'trap "" HUP INT TERM; read -r line || echo "$0" >&2'
        self._shell = subprocess.Popen(["/bin/sh", "-c", script, f"pi0fast: {message}"], stdin=subprocess.PIPE)

    def unsaid(self) -> None:
        self._shell.communicate(b"\n")


class Hub:
    """In process 0: passes on what `count` processes say."""

    def __init__(self, count: int):
        self.token = secrets.token_hex(16)
        self._listener = Listener(("", 0), backlog=count, authkey=self.token.encode())
        self.port = self._listener.address[1]
        self._count, self._connections = count, {}
        self._leaving, self._steps, self._stopping = set(), {}, False
        self._lock = threading.RLock()
        self.alone = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while len(self._connections) < self._count:
            with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):  # it is not one of us
                connection = self._listener.accept()
                self._connections[connection.recv()] = connection
        self._listener.close()
        for index, connection in list(self._connections.items()):
            threading.Thread(target=self._serve, args=(index, connection), daemon=True).start()

    def _serve(self, index: int, connection: Connection) -> None:
        try:
            while True:
                self._handle(index, *connection.recv())
        except (OSError, EOFError):
            with self._lock:
                del self._connections[index]
                if len(self._leaving) < self._count:
                    self._send("ended", (index, DIED))
                if self._connections.keys() <= {0}:
                    self.alone.set()

    def _handle(self, index: int, kind: str, value: Any) -> None:
        with self._lock:
            if kind == "leaving":
                self._leaving.add(index)
                if len(self._leaving) == self._count:
                    self._send("left", None)
            elif kind == "failed":
                self._send("ended", (index, value))
            elif kind == "stop" and not self._stopping:
                self._stopping = True
                self._send("pause", None)
            elif kind == "paused":
                self._steps[index] = value
                if len(self._steps) == self._count:
                    # Nobody has begun more than one step after the last that was reported.
                    self._send("stop", max(self._steps.values()) + 1)

    def _send(self, kind: str, value: Any) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send((kind, value))


class Link:
    """A process's end of its connection to the hub. When another process ends too early, so does this one.

    resumable: whether the message of an end says how to go on.
    """

    def __init__(self, coordinator: str | None):
        """coordinator: the host of process 0, where it is known. Raises: ConnectionError: it cannot be reached."""
        self.index, self.count = jax.process_index(), jax.process_count()
        self.resumable = False
        self._hub = Hub(self.count) if self.index == 0 else None
        hosts, port, self.token = _broadcast(
            [_hosts(coordinator), self._hub.port, self._hub.token] if self._hub else []
        )
        self._connection = _connect(hosts, port, self.token)
        self._saying, self._ending = threading.Lock(), threading.Lock()
        self._told, self._left = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self._step, self._paused, self._stop_at = -1, False, None
        self._last_word = LastWord(
            f"process {self.index} of {self.count} was killed, or JAX ended it because another one died: then "
            f"the lines above, or what the other printed, say more. {RESUME}"
        )
        self._connection.send(self.index)
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self, step: int) -> bool:
        """Whether all stop after `step` steps; to be called before each step."""
        with self._changed:
            self._step = step
            self._changed.wait_for(lambda: not self._paused)
            return self._stop_at is not None and step >= self._stop_at

    def ask_to_stop(self) -> None:
        self._say("stop", None)

    def fail(self, error: BaseException, details: bool) -> NoReturn:
        """Ends this process, and with it all. details: print the traceback."""
        self._ending.acquire()  # for good; if another process's end is being told, that is what ends this one
        what = f"failed: {type(error).__name__}: {error}"
        if details:
            traceback.print_exception(error)
        self._print(what)
        self._say("failed", what)
        self._told.wait(LINGER_S)
        self._exit()

    def leave(self) -> None:
        """Waits until all have finished; from then on the others' ends no longer matter."""
        self._say("leaving", None)
        self._left.wait()

    def close(self) -> None:
        self._last_word.unsaid()

    def _listen(self) -> None:
        try:
            while True:
                kind, value = self._connection.recv()
                if kind == "ended":
                    self._end(*value)
                elif kind == "left":
                    self._left.set()
                with self._changed:
                    self._paused = kind == "pause"
                    if kind == "pause":
                        self._say("paused", self._step)
                    elif kind == "stop":
                        self._stop_at = value
                    self._changed.notify_all()
        except (OSError, EOFError):
            self._end(0, DIED)

    def _end(self, other: int, what: str) -> None:
        """Ends this process because of another, unless it ends already."""
        self._told.set()
        if not self._left.is_set() and self._ending.acquire(blocking=False):
            self._print(f"ends because process {other} {what}")
            self._exit()

    def _print(self, what: str) -> None:
        after = f"\n{RESUME}" if self.resumable else ""
        print(f"pi0fast: process {self.index} of {self.count} {what}{after}", file=sys.stderr, flush=True)

    def _exit(self) -> NoReturn:
        if self._hub:
            self._hub.alone.wait(LINGER_S)  # JAX ends the others as soon as process 0 is gone
        self._last_word.unsaid()
        for worker in multiprocessing.active_children():
            worker.terminate()
        os._exit(1)  # an orderly exit would wait for the other processes

    def _say(self, kind: str, value: Any) -> None:
        with self._saying, contextlib.suppress(OSError):
            self._connection.send((kind, value))


def _hosts(coordinator: str | None) -> list[str]:
    """Where the other processes may find this machine: names and addresses, the likeliest first."""
    hosts = [coordinator] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent; it chooses the interface that leads outside (RFC 5737)
        hosts.append(probe.getsockname()[0])
    return [*hosts, socket.gethostname()]


def _broadcast(value: list[Any]) -> list[Any]:
    """Process 0's value, in all."""
    padded = json.dumps(value).encode().ljust(ADDRESS_BYTES)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))))


def _connect(hosts: list[str], port: int, token: str) -> Connection:
    errors = []
    for host in hosts:
        try:
            return Client((host, port), authkey=token.encode())
        except OSError as error:
            errors.append(f"{host}: {error}")
    raise ConnectionError(
        f"process {jax.process_index()} cannot reach process 0 on port {port} ({'; '.join(errors)}); let the processes "
        "of a run connect to each other on any TCP port"
    )
