"""Serve a policy to robots, by the protocol of openpi-client.

python -m pi0fast.serve --checkpoint RUN
"""

import asyncio
import gc
import hmac
import http
import ipaddress
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from prometheus_client import Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from pi0fast import wire
from pi0fast.batching import Batcher, BatchPolicy, Metrics, RequestError
from pi0fast.cli import one_line_errors
from pi0fast.config import StateMode
from pi0fast.execution import Kernels
from pi0fast.flow import Solver
from pi0fast.policy import Policy, Step, keep_compiled_programs
from pi0fast.rtc import RtcConfig

logger = logging.getLogger(__name__)

SEND_SECONDS = 10.0  # a client that does not read what waits for it is dropped after so long


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Args:
        max_message_mb: the largest message taken, in MiB.
        max_connections: more clients are refused with HTTP 503.
        max_queue: requests that may wait; more are answered with an error, and may try again.
        deadline_ms: a request that has not started after so long is answered with an error, and may try again.
        gather_ms: how long a request waits for others to share its batch; 0 takes those that wait already.
        keepalive_s: clients are pinged this often, and dropped after as long without an answer.
    """

    max_message_mb: float = 64.0
    max_connections: int = 64
    max_queue: int = 64
    deadline_ms: float | None = None
    gather_ms: float = 0.0
    keepalive_s: float = 20.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 or (field.name == "gather_ms" and value == 0)):
                raise ValueError(f"{field.name}={value} must be positive")
        if self.deadline_ms is not None and self.deadline_ms <= self.gather_ms:
            raise ValueError(
                f"deadline_ms={self.deadline_ms:g} would pass while a request waits gather_ms={self.gather_ms:g} for "
                "others; make it longer"
            )


class _Connection(ServerConnection):
    """A client that does not read is not read either, so that nothing piles up for it, and dropped if it stays so."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()
        self._drop = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drop.cancel()
        if not self.recv_messages.paused:
            self.transport.resume_reading()


class PolicyServer:
    """openpi's protocol: metadata, then a reply for each request, in msgpack (`pi0fast.wire`).

    A reply is the policy's, and `server_timing`: `infer_ms` of its batch, and from the second on `prev_total_ms`, from
    the previous request's arrival to its reply's departure. An error is a text frame. After a request that is malformed
    or fails, the connection closes with 1011; after overload or a missed deadline, for which the request is not to
    blame, it stays. `/healthz` and `/metrics` answer over HTTP; with an API key, all but `/healthz` needs it.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        limits: Limits = Limits(),
        *,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ):
        self._metadata = wire.encode(policy.metadata)
        self._limits = limits
        self._credentials = None if api_key is None else f"Api-Key {api_key}".encode()
        self._tls = tls
        self._metrics = Metrics(policy.batch_sizes)
        self._batcher = Batcher(
            policy,
            self._metrics,
            queue_size=limits.max_queue,
            deadline=None if limits.deadline_ms is None else limits.deadline_ms / 1e3,
            gather=limits.gather_ms / 1e3,
        )
        self._clients: set[ServerConnection] = set()
        self._idle: set[ServerConnection] = set()
        self._stopping = False
        start = time.monotonic()
        for name, text, value in (
            ("queue_depth", "Requests that wait", lambda: self._batcher.depth),
            ("connected_clients", "Open connections", lambda: len(self._clients)),
            ("uptime_seconds", "Since the server was made", lambda: time.monotonic() - start),
        ):
            Gauge(f"pi0fast_{name}", text, registry=self._metrics.registry).set_function(value)

    async def run(self, sock: socket.socket, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Serve on a bound socket until `stop`; then answer what is queued, and close with 1001."""
        async with asyncio.TaskGroup() as group:
            batches = group.create_task(self._batcher.run())
            server = await serve(
                self._talk,
                sock=sock,
                ssl=self._tls,
                create_connection=_Connection,
                process_request=self._respond,
                origins=[None],  # no web page
                compression=None,
                max_size=round(self._limits.max_message_mb * 2**20),
                max_queue=1,
                ping_interval=self._limits.keepalive_s,
                ping_timeout=self._limits.keepalive_s,
                open_timeout=SEND_SECONDS,
                close_timeout=SEND_SECONDS / 2,
            )
            ready()
            await stop.wait()
            self._stopping = True
            server.close(close_connections=False)
            await asyncio.gather(*(_leave(client) for client in self._idle))
            await server.wait_closed()
            batches.cancel()

    def _respond(self, client: ServerConnection, request: Request) -> Response | None:
        """Plain HTTP; None goes on to the websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return client.respond(http.HTTPStatus.OK, "OK\n")
        if self._credentials is not None:
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(), self._credentials):
                text = "Give the server's API key: `Authorization: Api-Key …`, or api_key=… of openpi-client.\n"
                response = client.respond(http.HTTPStatus.UNAUTHORIZED, text)
                response.headers["WWW-Authenticate"] = "Api-Key"
                return response
        if path == "/metrics":
            response = client.respond(http.HTTPStatus.OK, generate_latest(self._metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        if not request.headers.get_all("Upgrade"):
            return client.respond(http.HTTPStatus.NOT_FOUND, "There are /healthz, /metrics, and websockets.\n")
        if len(self._clients) >= self._limits.max_connections:
            text = f"{len(self._clients)} clients are connected; start the server with a larger --max-connections.\n"
            return client.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    async def _talk(self, client: ServerConnection) -> None:
        self._clients.add(client)
        try:
            await client.send(self._metadata)
            timing: dict[str, float] = {}
            while not self._stopping:
                self._idle.add(client)
                message = await client.recv()
                self._idle.discard(client)
                arrival = time.perf_counter()
                outcome = await self._answer(client, message, timing)
                self._metrics.requests.labels(outcome).inc()
                seconds = time.perf_counter() - arrival
                self._metrics.request_seconds.observe(seconds)
                timing = {"prev_total_ms": seconds * 1e3} if outcome == "ok" else timing
            await _leave(client)
        except ConnectionClosed:
            pass
        finally:
            self._idle.discard(client)
            self._clients.discard(client)

    async def _answer(self, client: ServerConnection, message: bytes | str, timing: dict[str, float]) -> str:
        """Sends the reply or an error; returns the outcome."""
        left = asyncio.ensure_future(client.wait_closed())
        try:
            reply = asyncio.ensure_future(self._batcher.submit(message, timing))
            await asyncio.wait((reply, left), return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                reply.cancel()
                return "client_left"
            try:
                await client.send(reply.result())
                return "ok"
            except RequestError as error:
                await client.send(str(error))
                if error.closes:
                    await client.close(CloseCode.INTERNAL_ERROR, "The frame before this one has the error.")
                return error.outcome
        except ConnectionClosed:
            return "client_left"
        finally:
            left.cancel()


async def _leave(client: ServerConnection) -> None:
    await client.close(CloseCode.GOING_AWAY, "The server is shutting down.")


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet; port 0 takes a free one.

    Raises:
        ValueError: there is no such address, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port={port} is not between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host={host} is no address of this machine: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        sock.close()
        raise ValueError(f"cannot serve at {host}:{port}: {error.strerror}; choose another --host or --port") from error


def read_api_key(file: Path | None) -> str | None:
    """The key of a file, else of PI0FAST_API_KEY, else None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the key is empty, or not printable ASCII without spaces.
    """
    key = os.environ.get("PI0FAST_API_KEY") if file is None else file.read_text().strip()
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        source = "PI0FAST_API_KEY" if file is None else file
        raise ValueError(f"{source} holds no API key; a key is printable ASCII without spaces")
    return key


def load_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS by a PEM certificate and its key, or None without both.

    Raises:
        ValueError: one is missing, or they are no such pair.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        tls.load_cert_chain(cert, key)
    except OSError as error:  # ssl's errors are too
        raise ValueError(f"{cert} and {key} are no PEM certificate and its key: {error}") from error
    return tls


def main(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    step: Step | None = None,
    robot: str | None = None,
    asset_id: str | None = None,
    action_horizon: int | None = None,
    state_mode: StateMode | None = None,
    num_steps: int = 10,
    solver: Solver = "euler",
    seed: int = 0,
    batch_sizes: tuple[int, ...] = (1, 4),
    default_prompt: str | None = None,
    kernels: Kernels = "auto",
    rtc: bool = False,
    guidance: RtcConfig = RtcConfig(),
    api_key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits(),
) -> None:
    """Serve a policy to robots, by the protocol of openpi-client.

    Args:
        checkpoint: the folder of a run, or an openpi checkpoint `<step>`, local or gs://.
        host: the address to serve at; 0.0.0.0 serves the network, and should have an API key.
        port: 0 takes a free one.
        step: of a run's checkpoint, or `best`, that with the lowest validation loss; by default the newest.
        robot: a ready robot's name or a YAML file, in place of the run's; an openpi checkpoint needs it.
        asset_id: whose statistics to take, of an openpi checkpoint that has several.
        action_horizon: of an openpi checkpoint, which does not tell; 50 of pi0_base, 10 of pi0_droid.
        state_mode: of an openpi checkpoint of Pi0.5: prompt, or unused as its LIBERO configs are.
        num_steps: of the solver, from noise to actions.
        solver: euler, midpoint or heun.
        seed: of the noise.
        batch_sizes: to compile for; requests that wait together run together, up to the last.
        default_prompt: for requests without one.
        kernels: of attention and norms: auto, reference, triton, mosaic_gpu or mosaic_tpu.
        rtc: also compile for requests that carry what is left of the last chunk (real-time chunking).
        guidance: of real-time chunking.
        api_key_file: holds the key that clients must give; without it, PI0FAST_API_KEY does.
        tls_cert: a PEM file, for wss:// in place of ws://.
        tls_key: the PEM file of its key.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    keep_compiled_programs()
    api_key, tls = read_api_key(api_key_file), load_tls(tls_cert, tls_key)
    with bind(host, port) as sock:
        address, port = sock.getsockname()[:2]
        if api_key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            logger.warning("anyone who reaches %s can use this server; give it an --api-key-file", address)
        policy = Policy.load(
            checkpoint,
            step=step,
            robot=robot,
            asset_id=asset_id,
            action_horizon=action_horizon,
            state_mode=state_mode,
            num_steps=num_steps,
            solver=solver,
            seed=seed,
            batch_sizes=batch_sizes,
            default_prompt=default_prompt,
            kernels=kernels,
            rtc=guidance if rtc else None,
        )
        policy.warmup()
        gc.collect()
        gc.freeze()  # nothing is answered while garbage is looked for, in JAX's modules alone for 80 ms (two CPU cores)
        url = f"{'ws' if tls is None else 'wss'}://{f'[{address}]' if ':' in address else address}:{port}"
        server = PolicyServer(policy, limits, api_key=api_key, tls=tls)
        asyncio.run(_until_signalled(server, sock, lambda: print(f"Serving {checkpoint} at {url}", flush=True)))


async def _until_signalled(server: PolicyServer, sock: socket.socket, ready: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT drains; a second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def drain() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        print("Answering what is queued; a second signal stops at once", flush=True)
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, drain)
    await server.run(sock, stop, ready)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, prog="python -m pi0fast.serve")
