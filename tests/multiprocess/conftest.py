"""Real processes that train together over the loopback."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import COMPILED

ROOT = Path(__file__).parents[2]
LIMIT_S = 300  # a process that has not ended by then is stuck


class Group:
    """The processes of one run."""

    def __init__(self, commands: list[list[str]], environment: dict[str, str]):
        self.processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for command in commands
        ]
        self._lines = [[] for _ in commands]
        self._readers = [threading.Thread(target=self._read, args=(index,)) for index in range(len(commands))]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int) -> None:
        """Until the process has ended, and what it has left behind to speak for it."""
        stream = self.processes[index].stdout
        assert stream
        with stream:
            for line in stream:
                self._lines[index].append(line.decode(errors="replace").rstrip())

    def output(self, index: int) -> str:
        """What a process has printed, without gloo's lines."""
        return "\n".join(line for line in self._lines[index] if "[Gloo]" not in line and "peer ranks" not in line)

    def outputs(self) -> str:
        return "\n".join(f"── process {index}\n{self.output(index)}" for index in range(len(self.processes)))

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes. Fails if a process takes longer."""
        deadline = time.monotonic() + limit_s
        for process, reader in zip(self.processes, self._readers, strict=True):
            reader.join(max(0.1, deadline - time.monotonic()))
            assert not reader.is_alive(), f"not ended after {limit_s} s:\n{self.outputs()}"
            process.wait()
        return [process.returncode for process in self.processes]

    def finish(self) -> str:
        """Process 0's output, when all have ended well."""
        assert self.wait() == [0] * len(self.processes), self.outputs()
        return self.output(0)

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            assert all(process.poll() is None for process in self.processes), self.outputs()
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.02)

    def end(self) -> None:
        for process, reader in zip(self.processes, self._readers, strict=True):
            process.kill()
            process.wait()
            reader.join()


@pytest.fixture
def start(demo_dataset):
    """`start(count, arguments)` runs a Python command line in `count` processes; `{index}` in it is each one's number.

    The flags that let them find each other are added.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(demo_dataset.parent / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    groups = []

    def run(count: int, *arguments: str) -> Group:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        commands = []
        for index in range(count):
            own = [argument.replace("{index}", str(index)) for argument in arguments]
            flags = (f"coordinator=127.0.0.1:{port}", f"processes={count}", f"process={index}")
            commands.append([sys.executable, *own, *(f"--distributed.{flag}" for flag in flags if count > 1)])
        groups.append(Group(commands, environment))
        return groups[-1]

    yield run
    for group in groups:
        group.end()


@pytest.fixture
def trainer(start, demo_dataset, tmp_path):
    """`trainer(count, out, flags)` trains the small model in `count` processes."""

    def run(count: int, out: str, *flags: str) -> Group:
        flags = (f"--data={demo_dataset}", f"--out={tmp_path / out}", "--output.log-every=1", *flags)
        return start(count, "-m", "tests.mini", *flags)

    return run
