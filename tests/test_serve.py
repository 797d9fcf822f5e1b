"""The server around a policy under control: the protocol, batches, the queue, and clients that misbehave."""

import contextlib
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from pi0fast import batching, serve, wire
from pi0fast.serve import Limits
from tests.serving import Doubler, client, raw_client, reply, robot_client, served

NUMBER = wire.encode({"x": 21})


def ask(connection, x):
    connection.send(wire.encode({"x": x}))


def closed(connection) -> int:
    """The code that a connection closes with."""
    with pytest.raises(ConnectionClosed) as error:
        connection.recv(timeout=60)
    assert error.value.rcvd is not None
    return error.value.rcvd.code


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
def shut(doubler):
    """A policy whose first batch waits for the test to open its gate."""
    doubler.gate.clear()
    yield doubler
    doubler.gate.set()


def test_openpis_client_gets_metadata_and_replies(doubler):
    with served(doubler) as server, robot_client(server.port) as robot:
        assert robot.get_server_metadata() == {"robot": "doubler"}
        first, second = (robot.infer({"x": np.arange(3, dtype=np.float32)}) for _ in range(2))
        assert first.keys() == {"actions", "server_timing"}
        np.testing.assert_array_equal(first["actions"], np.array([0, 2, 4], np.float32))
        assert first["server_timing"].keys() == {"infer_ms"}
        assert second["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"] > 0


def test_requests_that_wait_run_together(shut):
    with served(shut) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(server.port)) for _ in range(7)]
        ask(clients[0], 0)
        shut.wait_until_started()
        for x in range(1, 7):
            ask(clients[x], x)
            server.wait_for_metric(x, "pi0fast_queue_depth")
        shut.gate.set()
        assert [reply(each)["actions"] for each in clients] == [0, 2, 4, 6, 8, 10, 12]
        assert shut.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert server.metric("pi0fast_batch_size_sum") == 7
        assert server.metric("pi0fast_batch_size_count") == 3


def test_a_gathering_batch_starts_as_soon_as_it_is_full(doubler):
    doubler.batch_sizes = (1, 2)
    with served(doubler, Limits(gather_ms=1e6)) as server, client(server.port) as one, client(server.port) as other:
        ask(one, 1)
        server.wait_for_metric(1, "pi0fast_queue_depth")
        ask(other, 2)
        assert (reply(one)["actions"], reply(other)["actions"]) == (2, 4)
    assert doubler.batches == [[1, 2]]


def test_a_bad_request_in_a_batch_fails_alone(shut):
    with served(shut) as server, contextlib.ExitStack() as stack:
        first, good, bad, garbage = (stack.enter_context(client(server.port)) for _ in range(4))
        ask(first, 0)
        shut.wait_until_started()
        bad.send(wire.encode({"y": 1}))
        garbage.send(b"\xc1")
        ask(good, 1)
        server.wait_for_metric(3, "pi0fast_queue_depth")
        shut.gate.set()
        assert reply(good)["actions"] == 2
        assert reply(bad) == "ValueError: the observation has no 'x'; it has ['y']"
        assert reply(garbage) == "ValueError: the message is not msgpack"
        assert closed(bad) == closed(garbage) == 1011
        ask(good, 2)
        assert reply(good)["actions"] == 4
        assert server.metric("pi0fast_requests_total", outcome="ok") == 3
        assert server.metric("pi0fast_requests_total", outcome="bad_request") == 2


def test_a_request_that_breaks_its_batch_fails_alone_and_tells_no_secrets(shut, caplog):
    with served(shut) as server, contextlib.ExitStack() as stack:
        first, poison, good = (stack.enter_context(client(server.port)) for _ in range(3))
        ask(first, 0)
        shut.wait_until_started()
        ask(poison, "poison")
        ask(good, 3)
        server.wait_for_metric(2, "pi0fast_queue_depth")
        with caplog.at_level(logging.ERROR):
            shut.gate.set()
            message = reply(poison)
            assert reply(good)["actions"] == 6
        assert closed(poison) == 1011
        assert server.metric("pi0fast_requests_total", outcome="internal_error") == 1
    assert isinstance(message, str) and message.startswith("RuntimeError") and "hunter2" not in message
    (record,) = caplog.records
    assert message.split()[-1] in record.message and "hunter2" in caplog.text


def test_a_reply_that_cannot_be_sent_is_an_internal_error(doubler):
    doubler.run = lambda requests: [{"actions": object()} for _ in requests]
    with served(doubler) as server, client(server.port) as robot:
        ask(robot, 1)
        assert reply(robot).startswith("TypeError: the server failed")
        assert closed(robot) == 1011


def test_a_policy_that_loses_replies_is_an_internal_error(doubler):
    doubler.run = lambda requests: []
    with served(doubler) as server:
        for _ in range(2):
            with client(server.port) as robot:
                ask(robot, 1)
                assert str(reply(robot)).startswith("RuntimeError: the server failed")


def test_a_full_queue_says_so_and_keeps_the_connection(shut):
    with served(shut, Limits(max_queue=1)) as server, contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(client(server.port)) for _ in range(3))
        ask(first, 0)
        shut.wait_until_started()
        ask(second, 1)
        server.wait_for_metric(1, "pi0fast_queue_depth")
        ask(third, 2)
        assert reply(third).startswith("Overloaded: 1 requests wait already; send this one again later")
        shut.gate.set()
        assert (reply(first)["actions"], reply(second)["actions"]) == (0, 2)
        ask(third, 2)
        assert reply(third)["actions"] == 4
        assert server.metric("pi0fast_requests_total", outcome="overloaded") == 1


def test_a_request_past_its_deadline_does_not_run(shut):
    with served(shut, Limits(deadline_ms=50)) as server, client(server.port) as first, client(server.port) as late:
        ask(first, 0)
        shut.wait_until_started()
        ask(late, 1)
        assert reply(late).startswith("DeadlineExceeded: the request waited 50 ms and was not run")
        shut.gate.set()
        assert reply(first)["actions"] == 0
        ask(late, 2)
        assert reply(late)["actions"] == 4
        assert server.metric("pi0fast_requests_total", outcome="deadline") == 1
    assert shut.batches == [[0], [2]]


def test_a_client_that_leaves_gives_up_its_place(shut):
    with served(shut) as server, client(server.port) as first, client(server.port) as polite:
        ask(first, 0)
        shut.wait_until_started()
        leaver = raw_client(server.port)
        ask(polite, 1)
        frame = b"\x82" + bytes([0x80 | len(NUMBER)]) + bytes(4) + NUMBER
        leaver.sendall(frame)
        server.wait_for_metric(2, "pi0fast_queue_depth")
        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as a crash sends it
        leaver.close()
        polite.close()
        server.wait_for_metric(0, "pi0fast_queue_depth")
        shut.gate.set()
        assert reply(first)["actions"] == 0
        assert server.metric("pi0fast_requests_total", outcome="client_left") == 2
        server.wait_for_metric(1, "pi0fast_connected_clients")
    assert shut.batches == [[0]]


def test_http_answers_while_the_model_runs(shut):
    with served(shut) as server, client(server.port) as robot:
        ask(robot, 0)
        shut.wait_until_started()
        assert server.get("/healthz") == (200, "OK\n")
        assert server.get("/healthz?probe=1") == (200, "OK\n")
        assert server.get("/")[0] == server.get("/actions")[0] == 404
        assert server.metric("pi0fast_connected_clients") == 1
        assert server.metric("pi0fast_uptime_seconds") > 0
        shut.gate.set()
        reply(robot)
        server.wait_for_metric(1, "pi0fast_request_seconds_count")
        for name in ("queue_seconds", "inference_seconds", "batch_size"):
            assert server.metric(f"pi0fast_{name}_count") == 1
        for outcome in batching.OUTCOMES:
            assert server.metric("pi0fast_requests_total", outcome=outcome) == (outcome == "ok")


def test_two_servers_keep_two_counts(doubler):
    with served(doubler) as one, served(Doubler()) as other, client(one.port) as robot:
        ask(robot, 1)
        reply(robot)
        one.wait_for_metric(1, "pi0fast_request_seconds_count")
        assert other.metric("pi0fast_request_seconds_count") == 0


def test_the_api_key_opens_all_but_healthz(doubler):
    with served(doubler, api_key="s3cret") as server:
        for key in (None, "s3cre", "s3cret2", "ключ"):
            headers = {"Authorization": f"Api-Key {key}".encode().decode("latin-1")} if key else {}
            with pytest.raises(InvalidStatus) as error, client(server.port, additional_headers=headers):
                pass
            assert error.value.response.status_code == 401
        assert server.get("/metrics")[0] == server.get("/nothing")[0] == 401
        assert server.get("/metrics", Authorization="Bearer s3cret")[0] == 401
        assert server.get("/metrics", Authorization="Api-Key s3cret")[0] == 200
        assert server.get("/healthz")[0] == 200
        with robot_client(server.port, api_key="s3cret") as robot:
            assert robot.infer({"x": 1})["actions"] == 2


def test_tls(doubler, tmp_path):
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=robot -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=str(cert))
    with served(doubler, tls=serve.load_tls(cert, key)) as server:
        with connect(f"wss://127.0.0.1:{server.port}", ssl=trusting, compression=None) as robot:
            robot.recv()
            ask(robot, 1)
            assert reply(robot)["actions"] == 2
        with pytest.raises(InvalidMessage), client(server.port):
            pass
    with pytest.raises(ValueError, match="are no PEM certificate and its key"):
        serve.load_tls(key, cert)


def test_web_pages_are_refused(doubler):
    with (
        served(doubler) as server,
        pytest.raises(InvalidStatus) as error,
        client(server.port, origin="http://example.com"),
    ):
        pass
    assert error.value.response.status_code == 403


def test_too_many_clients_are_refused(doubler):
    with served(doubler, Limits(max_connections=1)) as server:
        with client(server.port):
            with pytest.raises(InvalidStatus) as error, client(server.port):
                pass
            assert error.value.response.status_code == 503
            assert b"--max-connections" in error.value.response.body
            assert server.get("/healthz")[0] == 200
        server.wait_for_metric(0, "pi0fast_connected_clients")
        with client(server.port):
            pass


def test_a_text_frame_and_a_giant_one_cost_their_clients_the_connection(doubler):
    with served(doubler, Limits(max_message_mb=0.5)) as server, client(server.port) as well_behaved:
        with client(server.port) as robot:
            robot.send("hello")
            assert reply(robot) == "ValueError: a text frame came; send msgpack in binary"
            assert closed(robot) == 1011
        with client(server.port) as robot:
            with contextlib.suppress(ConnectionClosed):  # it may close before all is sent
                robot.send(bytes(2**20))
            assert closed(robot) == 1009
        ask(well_behaved, 1)
        assert reply(well_behaved)["actions"] == 2


def test_a_client_that_stalls_amid_a_frame_is_dropped(doubler):
    with served(doubler, Limits(keepalive_s=0.2)) as server, client(server.port) as well_behaved:
        stalled = raw_client(server.port)
        stalled.sendall(b"\x82\xfe\xff\xff" + bytes(4) + b"the first of 65,535 bytes")
        while stalled.recv(4096):
            pass  # the metadata, a ping, a farewell, the end
        stalled.close()
        ask(well_behaved, 1)
        assert reply(well_behaved)["actions"] == 2
        server.wait_for_metric(1, "pi0fast_connected_clients")


def test_a_client_that_takes_no_reply_is_dropped(doubler, monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.3)
    doubler.run = lambda requests: [{"actions": np.zeros(2**22 if x else 1)} for x in requests]
    with served(doubler) as server, client(server.port) as well_behaved:
        deaf = raw_client(server.port)
        deaf.sendall(b"\x82" + bytes([0x80 | len(NUMBER)]) + bytes(4) + NUMBER)
        server.wait_for_metric(1, "pi0fast_batch_size_count")
        ask(well_behaved, 0)
        assert reply(well_behaved)["actions"] == [0]
        server.wait_for_metric(1, "pi0fast_connected_clients")
        deaf.close()


def test_a_client_that_pings_and_never_reads_is_not_read_either_and_dropped(doubler, monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 3.0)
    pings = (b"\x89\xfd" + bytes(4) + bytes(125)) * 1000
    with served(doubler) as server, client(server.port) as well_behaved:
        deaf = raw_client(server.port)
        deaf.settimeout(1.0)
        with pytest.raises(TimeoutError):
            while True:
                deaf.sendall(pings)
        ask(well_behaved, 1)
        assert reply(well_behaved)["actions"] == 2
        deaf.settimeout(60)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                deaf.sendall(pings)
        deaf.close()


def test_stopping_answers_what_is_queued(shut):
    with served(shut) as server, contextlib.ExitStack() as stack:
        running, *queued = (stack.enter_context(client(server.port)) for _ in range(7))
        idle = stack.enter_context(client(server.port))
        ask(running, 0)
        shut.wait_until_started()
        for x, each in enumerate(queued, start=1):
            ask(each, x)
        server.wait_for_metric(6, "pi0fast_queue_depth")
        server.begin_to_stop()
        assert closed(idle) == 1001
        with pytest.raises(ConnectionRefusedError), client(server.port):
            pass
        shut.gate.set()
        assert [reply(each)["actions"] for each in (running, *queued)] == [0, 2, 4, 6, 8, 10, 12]
        assert {closed(each) for each in (running, *queued)} == {1001}
        server.join()


def test_stopping_does_not_wait_for_a_client_that_never_answers(doubler, monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.4)
    with served(doubler) as server:
        deaf = raw_client(server.port)
        start = time.monotonic()
        server.begin_to_stop()
        server.join()
        assert time.monotonic() - start < 30
        deaf.close()


@pytest.mark.parametrize(
    "limits", [{"max_queue": 0}, {"deadline_ms": 0.0}, {"gather_ms": -1.0}, {"max_message_mb": float("nan")}]
)
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**limits)


def test_bad_options_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    def refused(error, message, *arguments):
        with pytest.raises(error, match=message):
            serve.main(str(tmp_path), *arguments)

    with served(Doubler()) as server:
        refused(ValueError, "Address already in use; choose another --host or --port", "127.0.0.1", server.port)
    refused(ValueError, "--port=70000 is not between", "127.0.0.1", 70000)
    refused(ValueError, "--host=no.such.host.invalid is no address", "no.such.host.invalid")
    refused(FileNotFoundError, "is not a run", "127.0.0.1", 0)
    monkeypatch.setenv("PI0FAST_API_KEY", "")
    refused(ValueError, "PI0FAST_API_KEY holds no API key")
    (tmp_path / "key").write_text("two words\n")
    with pytest.raises(ValueError, match="holds no API key; a key is printable ASCII without spaces"):
        serve.read_api_key(tmp_path / "key")
    (tmp_path / "key").write_text("s3cret\n")
    assert serve.read_api_key(tmp_path / "key") == "s3cret"
    with pytest.raises(ValueError, match="needs both --tls-cert and --tls-key"):
        serve.load_tls(tmp_path / "key", None)


def test_serving_the_network_without_a_key_warns(tmp_path, caplog):
    with pytest.raises(FileNotFoundError):
        serve.main(str(tmp_path), "0.0.0.0", 0)
    assert "anyone who reaches 0.0.0.0 can use this server" in caplog.text
