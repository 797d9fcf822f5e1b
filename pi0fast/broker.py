"""The client's side of action chunks: the next one is inferred in the background while one is executed.

    broker = ActionBroker(policy, execute=10)
    while running:
        robot.apply(broker.step(robot.observe()))
        wait_for_the_next_tick()

`policy` is anything with `infer(observation) -> {"actions": [H, d], ...}`: a `Policy` in this process, or the
`WebsocketClientPolicy` of openpi-client. With real-time chunking (https://arxiv.org/abs/2506.07339, algorithm 1) a
request carries what is left of the chunk in execution, so that the next one can agree with it; the policy must have
been loaded with `rtc`.
Needs numpy only.
"""

import queue
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np


class Infers(Protocol):
    def infer(self, obs: dict[str, Any], /) -> Mapping[str, Any]: ...


class ActionBroker:
    """One action per control tick, from chunks that arrive late.

    Step i of a chunk belongs to the tick i after its observation. So a chunk that arrives K ticks after that is
    executed from its step K on; at that moment it replaces the last one.

    policy: only this broker's thread calls it, one call at a time.
    execute: steps of a chunk to execute before the next is asked for, at least (the paper's s_min).
    rtc: send `rtc/previous_actions` float32 [m, d] (not executed yet, row 0 in this tick) and `rtc/delay`. Without it
        the chunks switch hard.
    delay: ticks that inference is assumed to take before any was measured.
    window: latencies remembered, the assumed one first; the largest is the next one's estimate.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, policy: Infers, *, execute: int, rtc: bool = True, delay: int = 1, window: int = 10):
        if execute < 1 or delay < 0 or window < 1:
            raise ValueError(f"execute={execute} and window={window} must be at least 1, delay={delay} at least 0")
        self.held = 0
        self._policy, self._execute, self._rtc = policy, execute, rtc
        self._delays = deque([delay], maxlen=window)
        self._requests: queue.SimpleQueue[tuple[Future, dict[str, Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self.reset()
        # A daemon: a policy that never answers does not keep the process from ending.
        self._thread = threading.Thread(target=self._answer, name="ActionBroker", daemon=True)
        self._thread.start()

    @property
    def delay(self) -> int:
        """The estimate of the next chunk's latency in ticks: the largest of the last ones."""
        return max(self._delays)

    def step(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action [d] of this tick. Call it once per tick, from one thread.

        The first call of an episode waits for its chunk; no other waits. Past the end of a chunk, when the next one is
        late, its last action is held, and `held` counts the ticks.

        observation: as `policy.infer` takes it. It may be read until a later tick, so its arrays must not be reused.

        Raises:
            Exception: what `policy.infer` raised. The tick has no action then; the next call goes on with the chunk and
                asks again.
            ValueError: the policy's actions are not [H, d] with H > execute.
            RuntimeError: the broker is closed.
        """
        if self._closed:
            raise RuntimeError("the broker is closed; make a new one")
        if self._chunk is None:
            self._request(observation)
            self._receive()
        elif self._pending is not None and self._pending.done():
            delay = self._next - self._asked
            try:
                self._receive()
            except BaseException:
                self._next += 1  # the tick passes all the same
                raise
            self._delays.append(delay)
        assert self._chunk is not None
        if self._pending is None and self._next >= self._execute:
            self._request(observation)
        self.held += self._next >= len(self._chunk)
        step = min(self._next, len(self._chunk) - 1)
        self._next += 1
        return self._chunk[step].copy()

    def reset(self) -> None:
        """Forget the chunk in execution and the one under way: a new episode begins. Measured latencies stay."""
        self._chunk: np.ndarray | None = None
        self._pending: Future | None = None
        self._next = self._asked = 0  # steps of the chunk: the next to execute; the first when the next chunk was asked

    def close(self, timeout: float | None = 10.0) -> None:
        """End the thread, waiting at most `timeout` seconds for the inference under way; no reply is used any more."""
        self._closed = True
        self._requests.put(None)
        self._thread.join(timeout)

    def __enter__(self) -> "ActionBroker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _request(self, observation: Mapping[str, Any]) -> None:
        request = dict(observation)
        left = None if self._chunk is None else self._chunk[self._next :]
        if self._rtc and left is not None and len(left):
            request["rtc/previous_actions"] = left
            request["rtc/delay"] = min(self.delay, len(left))
        self._pending, self._asked = Future(), self._next
        self._requests.put((self._pending, request))

    def _receive(self) -> None:
        """The chunk asked for takes over, where its own steps have got to."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        actions = np.array(pending.result()["actions"], np.float32)
        if actions.ndim != 2 or len(actions) <= self._execute:
            raise ValueError(
                f"the policy's actions have shape {list(actions.shape)}; execute={self._execute} needs [H, d] with a "
                "larger H: execute fewer steps of each chunk"
            )
        self._chunk, self._next = actions, self._next - self._asked

    def _answer(self) -> None:
        while (request := self._requests.get()) is not None:
            future, observation = request
            try:
                future.set_result(self._policy.infer(observation))
            except BaseException as error:  # step raises it, in the control loop's thread
                future.set_exception(error)
