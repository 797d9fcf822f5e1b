"""Late chunks in the simulator: the right step of the right chunk in each tick, and the statistics by hand."""

import json
from typing import Any

import numpy as np
import pytest
from flax import nnx

from pi0fast import Pi0, config
from pi0fast import evaluate_latency as late
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.data.demo import MAX_STEPS
from pi0fast.normalize import NormStats
from pi0fast.params import flatten
from pi0fast.robots import DEMO


class Straight:
    """A policy of straight lines at constant speed: executed in step, whatever the latency, they stay straight."""

    metadata = {"action_horizon": 8}  # noqa: RUF012

    def __init__(self, astray=0.0):
        self.requests, self.astray = [], astray

    def infer_batch(self, observations):
        self.requests.append(observations)
        if len(self.requests) == 1:
            self.speed = 0.005 * np.sign([0.5 - seen["observation.state"] for seen in observations])
        steps = np.arange(1, 9)[:, None] + self.astray
        return np.stack(
            [seen["observation.state"] + speed * steps for seen, speed in zip(observations, self.speed, strict=True)]
        )


@pytest.mark.parametrize(("latency", "execute"), [(1, 1), (2, 4), (4, 4), (1, 7)])
def test_each_tick_executes_its_step(latency, execute):
    policy: Any = Straight()
    episodes = late.play(policy, 3, latency=latency, execute=execute, rtc=True, seed=0)
    assert all(episode.steps > 10 for episode in episodes)
    assert max(max(episode.action_jerk, episode.position_jerk) for episode in episodes) < 1e-12
    first, *others = policy.requests
    assert not any("rtc/delay" in seen for seen in first)
    for request in others:
        for seen, speed in zip(request, policy.speed, strict=True):
            left = seen["rtc/previous_actions"]
            assert len(left) == 8 - execute and seen["rtc/delay"] == latency
            np.testing.assert_allclose(left[0] - seen["observation.state"], speed, atol=1e-6)
    # chunks are asked for when `execute` steps of the last one are done, which was there `latency` steps after its own
    # observation
    assert len(others) == len(range(execute, MAX_STEPS, execute))


def test_a_chunk_out_of_step_is_seen_in_the_jerk():
    policy: Any = Straight(astray=0.5)
    episodes = late.play(policy, 3, latency=2, execute=4, rtc=False, seed=0)
    assert min(episode.action_jerk for episode in episodes) > 1e-8


def test_without_real_time_chunking_nothing_is_sent():
    policy: Any = Straight()
    late.play(policy, 2, latency=2, execute=4, rtc=False, seed=0)
    assert not any("rtc/previous_actions" in seen for request in policy.requests for seen in request)


@pytest.mark.parametrize(("latency", "execute"), [(0, 4), (5, 4), (4, 5)])
def test_latencies_that_chunks_are_too_short_for(latency, execute):
    policy: Any = Straight()
    with pytest.raises(ValueError, match=f"latency={latency}, execute={execute}: .* horizon 8"):
        late.play(policy, 2, latency=latency, execute=execute, rtc=True, seed=0)


def test_jerk_by_hand():
    steps = np.arange(10.0)
    assert late.jerk(np.stack([steps, 2 * steps**2], axis=1)) == 0
    assert late.jerk(np.stack([steps**3, -(steps**3)], axis=1)) == 72
    assert late.jerk(np.array([[0.0, 0], [0, 0], [0, 0], [0, 0.5], [0, 0.5]])) == (0.25 + 1.0) / 2


def test_paired_statistics():
    rng = np.random.default_rng(3)
    episodes, effect = rng.standard_normal(400) * 10, 0.5 + rng.standard_normal(400)
    mean, low, high = late.paired_difference(episodes, episodes + effect)
    assert mean == pytest.approx(effect.mean())
    half = 1.96 * effect.std() / 20  # the normal approximation; unpaired it would be 28 times as wide
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.1 * half)
    before, after = np.zeros(98, bool), np.zeros(98, bool)
    before[:50], after[8:56] = True, True  # 8 lost, 6 gained
    expected = -0.02 - 1.96 * np.sqrt((0.15 - 0.02**2) / 100), -0.02 + 1.96 * np.sqrt((0.15 - 0.02**2) / 100)
    np.testing.assert_allclose(late.paired_rates(before, after), (-2 / 98, *expected))
    np.testing.assert_allclose(late.paired_rates(before, before), (0, -0.0196, 0.0196))


@pytest.mark.long
def test_the_program_plays_both_ways_and_keeps_every_episode(tmp_path):
    """An untrained policy; the same again gives the same."""
    size = config.pi0_tiny()
    RunConfig(size, DEMO, tokenizer="demo").save(tmp_path)
    unit = NormStats(*np.array([[0.0, 0.0], [0.1, 0.1], [-1.0, -1.0], [1.0, 1.0]]))
    with Checkpoints(tmp_path) as checkpoints:
        params = {path: variable[...] for path, variable in flatten(Pi0(size, rngs=nnx.Rngs(0))).items()}
        checkpoints.save(1, params=params, norm_stats={"state": unit, "actions": unit})
    results = []
    for name in ("a", "b"):
        late.main(tmp_path, (2,), episodes=3, out=tmp_path / name)
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0] == results[1]
    assert results[0]["settings"]["rtc"]["max_guidance"] == 5.0
    result = results[0]["latency"]["2"]
    assert len(result["episodes"]["hard"]) == len(result["episodes"]["rtc"]) == 3
    jerks = {way: [episode["action_jerk"] for episode in result["episodes"][way]] for way in ("hard", "rtc")}
    assert result["mean"]["rtc"]["action_jerk"] == pytest.approx(np.mean(jerks["rtc"]))
    mean, low, high = result["rtc_minus_hard"]["action_jerk"]
    assert low <= mean <= high and mean == pytest.approx(np.mean(jerks["rtc"]) - np.mean(jerks["hard"]))
