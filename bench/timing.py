"""How seconds are taken: calls in flight, contenders in turn, and pytest-benchmark told afterwards.

A round of one contender is several calls, dispatched without waiting; the host waits after the last, and the round's
time is divided. So the cost of dispatching is hidden behind the device unless a call takes less than the host needs to
dispatch it (`dispatch_us`): then that is what is measured. Repeating a call inside one program would hide it too, but
XLA may move, merge or drop such calls. Where a call's arguments rotate over more memory than the cache holds, it cannot
find them there.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

FEW = 8  # calls that tell how long one takes


class Calls:
    """Calls a function over arguments in turn, and waits for the device after every `in_flight` calls."""

    def __init__(
        self,
        run: Callable[..., Any],
        arguments: Sequence[Any] = ((),),
        wait: Callable[[Any], Any] = jax.block_until_ready,
    ):
        self.run, self.arguments, self.wait = run, arguments, wait
        self.in_flight = 1
        self.count = 0

    def __call__(self) -> None:
        result = self.run(*self.arguments[self.count % len(self.arguments)])
        self.count += 1
        if self.count % self.in_flight == 0:
            self.wait(result)

    def once(self) -> Any:
        """What a call returns, of the first arguments."""
        return self.run(*self.arguments[0])

    def calibrate(self, round_seconds: float) -> dict[str, float]:
        """Warms up, and chooses how many calls fill a round: on a CPU one, since several would run side by side."""
        self.in_flight, self.count = 1, 0
        for _ in range(FEW):
            self()
        self.in_flight, self.count = FEW, 0
        start = time.perf_counter()
        for _ in range(FEW - 1):
            self()
        dispatched = time.perf_counter()
        self()
        seconds = (time.perf_counter() - start) / FEW
        self.in_flight, self.count = max(1, min(math.ceil(round_seconds / seconds), 1000)), 0
        return {"calls_per_round": self.in_flight, "dispatch_us": (dispatched - start) / (FEW - 1) * 1e6}

    def round(self) -> float:
        """Seconds of one call, over one round."""
        start = time.perf_counter()
        for _ in range(self.in_flight):
            self()
        return (time.perf_counter() - start) / self.in_flight


def interleaved(rounds_of: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one after the other in every round, so that what else runs slows all alike.

    rounds_of: run a round and say what one call of it took. The first round of each warms up and does not count.
    """
    seconds = {name: [] for name in rounds_of}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(1 + rounds):
            for name, run in rounds_of.items():
                taken = run()
                if number:
                    seconds[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return seconds


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """A call that waits for its result, as a round."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


class Clock:
    """A timer for pytest-benchmark that goes by times already taken: it measures one test at a time, and contenders of
    one comparison, each a test of its own, are to run in turn."""

    def __init__(self):
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """Gives the benchmark these rounds. The test needs `pytest.mark.benchmark(timer=CLOCK)`."""
        remaining = iter(seconds)

        def advance() -> None:
            self._now += next(remaining, 0.0)

        benchmark.pedantic(advance, rounds=len(seconds))


CLOCK = Clock()
