"""Chunks in a real thread, let through one by one: which action each tick gets, and what each request carries."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest

from pi0fast.broker import ActionBroker

HORIZON = 8


class Gated:
    """A policy that answers when it is let: step i of its n-th chunk is [tick of the observation + i, n]."""

    def __init__(self):
        self.requests, self.errors = [], {}
        self.asked, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def infer(self, obs):
        self.requests.append(obs)
        self.asked.release()
        number = len(self.requests) - 1
        assert self.gate.acquire(timeout=30)
        if number in self.errors:
            raise self.errors[number]
        steps = obs["tick"] + np.arange(HORIZON)
        return {"actions": np.stack([steps, np.full(HORIZON, number)], axis=1).astype(np.float32)}


@pytest.fixture
def policy():
    return Gated()


@pytest.fixture
def make(policy):
    """A broker of the policy, which answers everything at the end."""
    brokers = []

    def make(**options):
        brokers.append(ActionBroker(policy, **options))
        return brokers[-1]

    yield make
    policy.gate.release(100)
    for broker in brokers:
        broker.close()


def play(broker, ticks, latencies):
    """The first chunk arrives at once, the next ones `latencies` ticks after their observation; the last is repeated.

    Returns the actions [ticks, 2], and the broker's estimate of the latency after each tick.
    """
    policy, actions, delays, arrivals = broker._policy, [], [], []
    policy.gate.release()
    for tick in range(ticks):
        before = broker._pending
        if arrivals and tick == arrivals[-1]:
            policy.gate.release()
            assert before is not None and not wait([before], timeout=30).not_done
        actions.append(broker.step({"tick": tick}))
        if tick == 0:
            assert policy.asked.acquire(timeout=30)
        delays.append(broker.delay)
        if broker._pending is not None and broker._pending is not before:
            assert policy.asked.acquire(timeout=30)
            arrivals.append(tick + latencies[min(len(arrivals), len(latencies) - 1)])
    return np.array(actions), delays


def test_each_tick_gets_its_action_and_each_request_what_is_left(policy, make):
    broker = make(execute=3)
    actions, _ = play(broker, ticks=12, latencies=[2])
    np.testing.assert_array_equal(actions[:, 0], np.arange(12))
    # asked at ticks 3, 6, 9; in execution two ticks later
    np.testing.assert_array_equal(actions[:, 1], [0] * 5 + [1] * 3 + [2] * 3 + [3])
    assert broker.held == 0 and broker.delay == 2
    assert [request["tick"] for request in policy.requests] == [0, 3, 6, 9]
    assert set(policy.requests[0]) == {"tick"}
    for number, request in enumerate(policy.requests[1:]):
        left = request["rtc/previous_actions"]
        np.testing.assert_array_equal(left[:, 0], request["tick"] + np.arange(5))
        np.testing.assert_array_equal(left[:, 1], number)
    assert [request["rtc/delay"] for request in policy.requests[1:]] == [1, 2, 2]


def test_without_real_time_chunking_nothing_is_sent(policy, make):
    broker = make(execute=3, rtc=False)
    actions, _ = play(broker, ticks=12, latencies=[2])
    np.testing.assert_array_equal(actions[:, 0], np.arange(12))
    np.testing.assert_array_equal(actions[:, 1], [0] * 5 + [1] * 3 + [2] * 3 + [3])
    assert all(set(request) == {"tick"} for request in policy.requests)


def test_a_late_chunk_holds_the_last_action(policy, make):
    broker = make(execute=4)
    actions, _ = play(broker, ticks=12, latencies=[6])
    np.testing.assert_array_equal(actions[:, 0], [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 10, 11])
    assert broker.held == 2 and broker.delay == 6
    # the next is asked for at once: the one that arrived has two steps left, fewer than the expected delay
    assert policy.requests[2]["tick"] == 10
    assert len(policy.requests[2]["rtc/previous_actions"]) == policy.requests[2]["rtc/delay"] == 2


def test_a_chunk_later_than_its_whole_length(policy, make):
    broker = make(execute=7)
    actions, _ = play(broker, ticks=18, latencies=[9])
    np.testing.assert_array_equal(actions[:, 0], [*range(8), *[7] * 8, 14, 14])
    assert broker.held == 10
    assert "rtc/previous_actions" not in policy.requests[2]  # nothing was left


def test_the_estimate_is_the_largest_of_the_window(make):
    broker = make(execute=3, delay=4, window=2)
    _, delays = play(broker, ticks=14, latencies=[1, 3, 1, 1])
    # asked at ticks 3, 6, 9, 12; measured one, three and one tick later
    assert delays == [4] * 9 + [3] * 4 + [1]


def test_an_error_is_raised_in_step_and_the_next_asks_again(policy, make):
    policy.errors = {0: ValueError("no such key"), 2: ConnectionError("gone")}
    broker = make(execute=1)
    policy.gate.release(4)
    with pytest.raises(ValueError, match="no such key"):
        broker.step({"tick": 0})
    np.testing.assert_array_equal(broker.step({"tick": 1}), [1, 1])
    broker.step({"tick": 2})
    wait([broker._pending], timeout=30)
    with pytest.raises(ConnectionError, match="gone"):
        broker.step({"tick": 3})
    assert broker.delay == 1 and len(broker._delays) == 1  # how long a failure took says nothing about inference
    np.testing.assert_array_equal(broker.step({"tick": 4}), [4, 1])
    wait([broker._pending], timeout=30)
    np.testing.assert_array_equal(broker.step({"tick": 5}), [5, 3])


def test_reset_forgets_the_chunk_under_way(policy, make):
    broker = make(execute=3)
    play(broker, ticks=5, latencies=[9])
    broker.reset()
    policy.gate.release(2)  # the forgotten one, and the new episode's first
    np.testing.assert_array_equal(broker.step({"tick": 100}), [100, 2])
    assert "rtc/previous_actions" not in policy.requests[2]


def test_an_action_may_be_changed_by_its_receiver(policy, make):
    broker = make(execute=1)
    policy.gate.release()
    broker.step({"tick": 0})[:] = np.nan
    broker.step({"tick": 1})[:] = np.nan
    assert policy.asked.acquire(timeout=30) and policy.asked.acquire(timeout=30)
    assert np.isfinite(policy.requests[1]["rtc/previous_actions"]).all()


def test_close_ends_the_thread(policy, make):
    broker = make(execute=3)
    play(broker, ticks=4, latencies=[9])
    broker.close(timeout=0.01)  # the policy does not answer; close comes back all the same
    assert broker._thread.is_alive() and broker._thread.daemon
    policy.gate.release()
    broker.close()
    assert not broker._thread.is_alive()
    with pytest.raises(RuntimeError, match="the broker is closed"):
        broker.step({"tick": 4})


@pytest.mark.parametrize("options", [{"execute": 0}, {"execute": 1, "delay": -1}, {"execute": 1, "window": 0}])
def test_options_out_of_range(policy, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        ActionBroker(policy, **options)


def test_chunks_too_short_to_execute(policy, make):
    broker = make(execute=HORIZON)
    policy.gate.release()
    with pytest.raises(ValueError, match=r"shape \[8, 2\]; execute=8"):
        broker.step({"tick": 0})
