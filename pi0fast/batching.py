"""Requests of many clients, one worker thread: a bounded queue whose waiting requests run as one batch."""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from pi0fast import wire

logger = logging.getLogger(__name__)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
OUTCOMES = ("ok", "bad_request", "internal_error", "overloaded", "deadline", "client_left")


class BatchPolicy(Protocol):
    """What the server needs of a policy. batch_sizes: ascending; the last is the most that `run` takes."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def batch_sizes(self) -> Sequence[int]: ...
    def prepare(self, observation: Mapping[str, Any], /) -> Any: ...
    def run(self, requests: Sequence[Any], /) -> Sequence[Mapping[str, Any]]: ...


class RequestError(Exception):
    """What a client is told. outcome: one of `OUTCOMES`. closes: whether its connection ends with it."""

    def __init__(self, message: str, outcome: str, *, closes: bool):
        super().__init__(message)
        self.outcome = outcome
        self.closes = closes


class Metrics:
    """What Prometheus reads of one server: a registry of its own, not the process-wide one."""

    def __init__(self, batch_sizes: Sequence[int]):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("pi0fast_requests", "Requests, by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"pi0fast_{name}", text, buckets=buckets, registry=registry)

        self.queue_seconds = histogram("queue_seconds", "From a request's arrival to the start of its batch", SECONDS)
        self.inference_seconds = histogram("inference_seconds", "A batch, from bytes to bytes", SECONDS)
        self.request_seconds = histogram(
            "request_seconds", "From a request's arrival to its reply's departure", SECONDS
        )
        self.batch_size = histogram("batch_size", "Requests that ran together", range(1, batch_sizes[-1] + 1))


@dataclass(frozen=True, eq=False)
class _Job:
    message: bytes
    timing: Mapping[str, float]
    arrival: float
    reply: asyncio.Future[bytes]


class Batcher:
    """Runs requests that wait together as one batch, in one thread of its own.

    queue_size: requests that may wait beside those that run. deadline: seconds from arrival within which a request
    must start. gather: seconds that a request waits for company while the batch is not full; 0 takes what waits.
    Everything but `_infer` and what it calls runs on the event loop.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        metrics: Metrics,
        *,
        queue_size: int,
        deadline: float | None = None,
        gather: float = 0.0,
    ):
        self._policy = policy
        self._metrics = metrics
        self._queue_size = queue_size
        self._deadline = deadline
        self._gather = gather
        self._largest = policy.batch_sizes[-1]
        self._waiting: deque[_Job] = deque()
        self._arrived = asyncio.Event()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def submit(self, message: bytes | str, timing: Mapping[str, float]) -> bytes:
        """A request's frame → its reply's bytes. timing: what `server_timing` has beside `infer_ms`.

        Cancelled, it gives up its place in the queue.

        Raises:
            RequestError: the request is malformed, the queue is full, its deadline passed, or inference failed.
        """
        if isinstance(message, str):
            raise RequestError("ValueError: a text frame came; send msgpack in binary", "bad_request", closes=True)
        if len(self._waiting) >= self._queue_size:
            raise RequestError(
                f"Overloaded: {self._queue_size} requests wait already; send this one again later, send fewer, or "
                "start the server with a larger --max-queue or --batch-sizes",
                "overloaded",
                closes=False,
            )
        loop = asyncio.get_running_loop()
        job = _Job(message, timing, time.perf_counter(), loop.create_future())
        timer = None if self._deadline is None else loop.call_later(self._deadline, self._expire, job)
        self._waiting.append(job)
        self._arrived.set()
        try:
            return await job.reply
        finally:
            if timer is not None:
                timer.cancel()
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="inference") as worker:
            while True:
                if not (jobs := await self._next_batch()):
                    continue
                start = time.perf_counter()
                for job in jobs:
                    self._metrics.queue_seconds.observe(start - job.arrival)
                self._metrics.batch_size.observe(len(jobs))
                replies = await loop.run_in_executor(worker, self._infer, jobs)
                self._metrics.inference_seconds.observe(time.perf_counter() - start)
                for job, reply in zip(jobs, replies, strict=True):
                    if job.reply.done():  # its client left
                        continue
                    if isinstance(reply, RequestError):
                        job.reply.set_exception(reply)
                    else:
                        job.reply.set_result(reply)

    async def _next_batch(self) -> list[_Job]:
        """Waits for a job, and for company; none where all left meanwhile."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        try:
            waited = time.perf_counter() - self._waiting[0].arrival
            async with asyncio.timeout(self._gather - waited):
                while self._gather and len(self._waiting) < self._largest:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
        return [self._waiting.popleft() for _ in range(min(self._largest, len(self._waiting)))]

    def _expire(self, job: _Job) -> None:
        if job in self._waiting and not job.reply.done():
            self._waiting.remove(job)
            assert self._deadline is not None
            message = (
                f"DeadlineExceeded: the request waited {self._deadline * 1e3:g} ms and was not run; send fewer "
                "requests, or start the server with a longer --deadline-ms or larger --batch-sizes"
            )
            job.reply.set_exception(RequestError(message, "deadline", closes=False))

    def _infer(self, jobs: Sequence[_Job]) -> list[bytes | RequestError]:
        """Every job's reply or error, in order; a job's error is its own."""
        start = time.perf_counter()
        prepared = [self._prepare(job) for job in jobs]
        good = [request for request in prepared if not isinstance(request, RequestError)]
        answers = iter(self._run(good) if good else [])
        replies = [request if isinstance(request, RequestError) else next(answers) for request in prepared]
        infer_ms = (time.perf_counter() - start) * 1e3
        return [_encode(job, reply, infer_ms) for job, reply in zip(jobs, replies, strict=True)]

    def _prepare(self, job: _Job) -> Any:
        try:
            return self._policy.prepare(wire.decode(job.message))
        except ValueError as error:
            return RequestError(f"ValueError: {error}", "bad_request", closes=True)
        except Exception as error:
            return _internal_error(error)

    def _run(self, requests: Sequence[Any]) -> list[Mapping[str, Any] | RequestError]:
        """The replies. Where a batch fails, its requests run one by one, so that only those fail that must."""
        try:
            replies: list[Mapping[str, Any] | RequestError] = list(self._policy.run(requests))
            if len(replies) != len(requests):
                raise RuntimeError(f"the policy gave {len(replies)} replies to {len(requests)} requests")
            return replies
        except Exception as error:
            if len(requests) == 1:
                return [_internal_error(error)]
            logger.warning("a batch of %d failed; its requests run one by one", len(requests), exc_info=True)
            return [self._run([request])[0] for request in requests]


def _encode(job: _Job, reply: Mapping[str, Any] | RequestError, infer_ms: float) -> bytes | RequestError:
    if isinstance(reply, RequestError):
        return reply
    try:
        return wire.encode({**reply, "server_timing": {"infer_ms": infer_ms, **job.timing}})
    except Exception as error:
        return _internal_error(error)


def _internal_error(error: Exception) -> RequestError:
    """Logs the error under a name that the client is told too; its message stays here."""
    name = secrets.token_hex(4)
    logger.error("internal error %s", name, exc_info=error)
    return RequestError(
        f"{type(error).__name__}: the server failed on this request; its log has the reason under {name}",
        "internal_error",
        closes=True,
    )
