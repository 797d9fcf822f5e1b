"""`python -m pi0fast.serve` as users run it, with a real policy, real clients, load, kills and malformed frames."""

import contextlib
import json
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from pi0fast import wire
from pi0fast.policy import Policy
from tests.conftest import COMPILED
from tests.load_clients import observation
from tests.serving import Program, client, get, metric, raw_client, reply, robot_client, save_untrained_run, until

ENV = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    save_untrained_run(folder)
    return str(folder)


@pytest.fixture(scope="module")
def program(run):
    with Program("--checkpoint", run, env=ENV) as program:
        yield program


def test_openpis_client_drives_a_real_policy(run, program):
    assert program.first_line == f"Serving {run} at ws://127.0.0.1:{program.port}\n"
    policy = Policy.load(run, batch_sizes=(1, 4))
    asked = observation(seed=0)
    with robot_client(program.port) as robot:
        assert robot.get_server_metadata() == policy.metadata
        for _ in range(20):
            answer, expected = robot.infer(asked), policy.infer(asked)
            np.testing.assert_allclose(answer["actions"], expected["actions"], rtol=1e-5, atol=1e-5)
            assert answer["policy_timing"].keys() == expected["policy_timing"].keys()
            assert answer["server_timing"]["infer_ms"] >= answer["policy_timing"]["device_ms"] > 0
    with robot_client(program.port) as robot:
        with pytest.raises(RuntimeError, match=r"ValueError: the observation has no \['prompt'\]"):
            robot.infer({key: value for key, value in asked.items() if key != "prompt"})
        with pytest.raises(ConnectionClosed):
            robot.infer(asked)
    with robot_client(program.port) as robot:
        assert np.isfinite(robot.infer(asked)["actions"]).all()


def test_a_key_from_the_environment_and_a_drain_by_sigterm(run):
    with Program("--checkpoint", run, env={**ENV, "PI0FAST_API_KEY": "s3cret"}) as program:
        with robot_client(program.port, api_key="s3cret") as robot:
            assert np.isfinite(robot.infer(observation(0))["actions"]).all()
            program.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as error:
                robot._ws.recv(timeout=60)
            assert error.value.rcvd is not None and error.value.rcvd.code == 1001
        assert program.process.wait(60) == 0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(run, number):
    with Program("--checkpoint", run, env=ENV) as program, raw_client(program.port):  # it answers no farewell
        program.process.send_signal(signal.SIGTERM)
        assert program.lines.readline().startswith("Answering what is queued")
        program.process.send_signal(number)
        assert program.process.wait(60) == -number


def test_a_port_in_use_is_an_error_before_anything_is_loaded(program):
    command = [sys.executable, "-m", "pi0fast.serve", "--checkpoint=nowhere", f"--port={program.port}"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Address already in use; choose another --host or --port" in refused.stderr


@contextlib.contextmanager
def load(port: int, clients: int, seconds: float) -> Iterator[list]:
    """Clients in a nice process of their own; their results are there at the end."""
    script = str(Path(__file__).parent / "load_clients.py")
    command = [sys.executable, script, str(port), str(clients), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    results = []
    try:
        yield results
        output, _ = process.communicate(timeout=seconds + 120)
        results += json.loads(output)
    finally:
        process.kill()
        process.communicate()


def probe(program: Program, seconds: float) -> tuple[list[float], list[float]]:
    """/healthz for so long: milliseconds of each answer, and the server's MiB at each."""
    times, memory = [], []
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        start = time.perf_counter()
        assert get(program.port, "/healthz") == (200, "OK\n")
        times.append((time.perf_counter() - start) * 1e3)
        memory.append(program.rss_mb())
        pause.wait(0.1)
    return times, memory


def test_eight_clients_at_once(program):
    with load(program.port, clients=8, seconds=3) as results:
        times, _ = probe(program, 3)
    assert len(times) > 5
    assert [result["lost"] for result in results] == [[]] * 8
    assert all(result["replies"] > 0 and result["connections"] == 1 for result in results)
    assert metric(program.port, "pi0fast_batch_size_bucket", le="1.0") < metric(
        program.port, "pi0fast_batch_size_count"
    )


@pytest.mark.slow
def test_thirty_two_clients_for_a_minute(run):
    with Program("--checkpoint", run, env=ENV) as program:
        with load(program.port, clients=32, seconds=70) as results:
            early, _ = probe(program, 10)  # clients connect, caches fill
            times, memory = probe(program, 58)
            times += early
        assert [result["lost"] for result in results] == [[]] * 32
        assert all(result["connections"] == 1 for result in results)
        replies = sum(result["replies"] for result in results)
        half = len(memory) // 2
        first, second = (statistics.median(part) for part in (memory[:half], memory[half:]))
        print(
            f"{replies} replies; /healthz: median {statistics.median(times):.1f}, max {max(times):.1f} ms of "
            f"{len(times)}; RSS {first:.1f}, then {second:.1f} MiB"
        )
        assert second < first + 8
        # On two cores, which clients and compute share, one answer of some hundred waits longer for its turn. With
        # inference on the event loop the median is 121 ms (measured there).
        assert statistics.median(times) < 10
        assert statistics.quantiles(times, n=100)[98] < 50


@pytest.mark.long
def test_a_kill_loses_only_requests_in_flight(run):
    def wait_for_replies(program: Program):
        until(lambda: metric(program.port, "pi0fast_requests_total", outcome="ok") >= 200)

    with Program("--checkpoint", run, env=ENV) as first, load(first.port, clients=8, seconds=60) as results:
        wait_for_replies(first)
        first.process.kill()
        first.process.wait()
        with Program("--checkpoint", run, port=first.port, env=ENV) as second:
            wait_for_replies(second)
            until(lambda: metric(second.port, "pi0fast_connected_clients") == 0)  # the load has ended
    assert [len(result["lost"]) for result in results] == [1] * 8
    assert [result["connections"] for result in results] == [2] * 8


VALID = wire.encode(observation(seed=0))


def malformed(random: random.Random) -> bytes:
    """A message that is no observation, or is by a lucky chance."""

    def flipped() -> bytes:
        data = bytearray(VALID)
        for _ in range(random.randint(1, 4)):  # mostly in the first bytes: the rest are pixels
            data[random.randrange(random.choice((40, 120, len(data))))] = random.randrange(256)
        return bytes(data)

    def lying() -> bytes:
        shape = [random.choice((-1, 0, 1, 3, 56, 57, 2**31, 2**62)) for _ in range(random.randint(0, 9))]
        dtype = random.choice(("|u1", "<f4", "<f8", "|O", "<U9", "|V8", ">f4", "<c16", "<M8[ns]", "", "x" * 99))
        array = {b"__ndarray__": True, b"data": random.randbytes(9408), b"dtype": dtype, b"shape": shape}
        return packed({**observation(0), "observation": {"images": {"top": array}, "state": array}})

    def nested() -> bytes:
        return (
            random.choice((b"\x91", b"\x81\xa1a", b"\x81\xa6prompt")) * random.choice((9, 100, 1024, 50_000)) + b"\xc0"
        )

    def announced() -> bytes:
        kind = random.choice(b"\xc6\xc9\xdb\xdd\xdf")
        return b"\x81\xa1a" + bytes([kind]) + struct.pack(">I", random.choice((2**32 - 1, 2**31, 2**20))) + VALID[:50]

    def mistyped() -> bytes:
        key = random.choice(("observation", "observation/state", "observation/images/top", "prompt", b"prompt"))
        wrong = random.choice((None, True, 2**63, 1.5, float("nan"), "x" * 70_000, b"x", [], {}, [[1], [2, 3]], [None]))
        flat = {"observation/state": [0.5, 0.5], "prompt": "touch the red block"}
        return packed({**flat, key: wrong})

    kinds = (
        lambda: random.randbytes(random.randint(0, 300)),
        flipped,
        lambda: VALID[: random.randrange(len(VALID))],
        lambda: VALID + random.randbytes(random.randint(1, 9)),
        lying,
        nested,
        announced,
        mistyped,
    )
    return random.choice(kinds)()


def packed(message) -> bytes:
    data = msgpack.packb(message)
    assert data is not None
    return data


def broken_websocket(random: random.Random, port: int) -> None:
    """Bytes below the level of messages; the connection breaks off amid them."""
    header = bytes([random.choice((0x82, 0x02, 0x00, 0x83, 0xF2, 0x88, 0x89)), random.choice((0xFE, 0xFF, 0x85, 0x05))])
    with raw_client(port) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(random.choice((b"", header)) + random.randbytes(random.randint(0, 200)))
        if random.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def fuzz(program: Program, frames: int) -> None:
    chance = random.Random(0)
    port, asked = program.port, wire.encode(observation(seed=1))
    with client(port) as well_behaved:
        for number in range(frames):
            if number % 5 == 0:
                broken_websocket(chance, port)
            else:
                with client(port) as stranger:
                    stranger.send(malformed(chance))
                    answer = reply(stranger)
                    if isinstance(answer, str):
                        assert answer.startswith("ValueError: ")
                        with pytest.raises(ConnectionClosed):
                            stranger.recv(timeout=60)
                    else:
                        assert np.isfinite(answer["actions"]).all()
            if number % 50 == 0:
                well_behaved.send(asked)
                assert reply(well_behaved)["actions"].shape == (8, 2)
    assert metric(port, "pi0fast_requests_total", outcome="internal_error") == 0
    assert metric(port, "pi0fast_requests_total", outcome="bad_request") > frames / 2
    assert program.process.poll() is None


def test_malformed_frames(program):
    fuzz(program, 300)


@pytest.mark.slow
def test_six_thousand_malformed_frames(run):
    with Program("--checkpoint", run, env=ENV) as program:
        fuzz(program, 6000)
