"""Inference, end to end and by stage, beside the openpi-style baseline and lerobot's policy: seconds per call, warm.

On an accelerator the released sizes in bfloat16: one, two and three cameras, and batches; elsewhere the tiny presets,
to see that the benchmarks themselves work. `-rs` lists why a peer was left out; `-k "policy and pi0_base"` selects.

    pytest bench/bench_infer.py --benchmark-only --benchmark-json=infer.json

Prompts are of some 12 tokens (Pi0) or 60 (Pi0.5, with the state); pi0fast pads them to their bucket. Every time is one
call's, from its dispatch until its result is there. Attributes in `extra_info`: the sizes; p50, p95 and p99 of the
rounds; `of_ceiling` and `of_peak`, which fraction of the median the least time is (`pi0fast.flops.inference`), by what
this device does at most and by its datasheet. The peers' least time is ours: that of what has to be computed.

Stages: *transforms* of one observation on the host, and those of `pi0fast.stages`, each compiled by itself: *vision*,
*prefix* (embedded tokens and Pi0's state to keys and values) and *steps*, all ten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from bench import ceilings, inference, timing
from bench.inference import Workload
from bench.memory import KeepLast
from pi0fast import Pi0, config, convert, flops
from pi0fast.policy import Policy, Request
from pi0fast.stages import Stages

ACCELERATOR = jax.default_backend() != "cpu"
ROUNDS, WARMUP = (100, 3) if ACCELERATOR else (5, 1)
NUM_STEPS = 10
IMAGE_SHAPE = (480, 640)


@dataclass(frozen=True)
class Case:
    preset: str
    num_cameras: int
    batch: int

    @property
    def size(self) -> config.Pi0Config:
        return config.PRESETS[self.preset]()

    def workload(self) -> Workload:
        tokens = min(60 if self.size.pi05 else 12, self.size.max_token_len)
        return Workload(self.size, self.num_cameras, tokens, IMAGE_SHAPE)


if ACCELERATOR:
    SIZES = [(1, 1), (2, 1), (3, 1), (3, 8), (3, 32)]
    CASES = [Case(preset, *size) for preset in ("pi0_base", "pi05_base") for size in SIZES]
else:
    CASES = [Case("pi0_tiny", 1, 1), Case("pi05_tiny", 2, 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.preset}-{case.num_cameras}cameras-b{case.batch}")
def case(request) -> Case:
    """Of a module, so that pytest runs all benchmarks of a case before the next."""
    return request.param


# Made once for the tests that follow each other; one at a time, since released models fill a GPU.


@KeepLast
def params_of(preset: str) -> inference.Params:
    return inference.draw_params(config.PRESETS[preset]())


@KeepLast
def model_of(preset: str) -> Pi0:
    return convert.from_openpi(params_of(preset), config.PRESETS[preset]())


@KeepLast
def lerobot_of(preset: str) -> Any:
    from tests import lerobot_model

    return lerobot_model.build(config.PRESETS[preset]())


@KeepLast
def policy_of(case: Case) -> Policy:
    stages_of.clear()
    return inference.make_policy(model_of(case.preset), case.workload(), case.batch, NUM_STEPS)


def requests_of(case: Case) -> list[Request]:
    policy, observation = policy_of(case), case.workload().observation()
    return [policy.prepare(observation)] * case.batch


def prompt_len(case: Case) -> int:
    """Prompt tokens that the policy computes."""
    (request, *_) = requests_of(case)
    return policy_of(case).batch([request]).tokenized_prompt.shape[1]


def measure(
    benchmark,
    case: Case,
    run: Callable[[], Any],
    stage: str = "call",
    *,
    contender: str = "pi0fast",
) -> None:
    """Time `run`. stage: `policy`, with the host's transforms; `call`, without; `transforms`; or one of `Stages`."""
    describe(benchmark, case, stage, contender)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARMUP)
    report(benchmark, case, stage)


def describe(benchmark, case: Case, stage: str, contender: str) -> None:
    benchmark.group = f"inference {case.preset} cameras={case.num_cameras} batch={case.batch} {stage}"
    benchmark.extra_info.update(
        preset=case.preset, num_cameras=case.num_cameras, batch=case.batch, stage=stage, contender=contender
    )
    ours = contender == "pi0fast"
    benchmark.extra_info.update(prompt_len=prompt_len(case), num_steps=NUM_STEPS, dtype=case.size.dtype, ours=ours)


def report(benchmark, case: Case, stage: str) -> None:
    """Percentiles, and the median's distance from the least times."""
    if not benchmark.enabled:
        return
    percentiles = {f"p{p}": float(np.percentile(benchmark.stats.stats.data, p)) for p in (50, 95, 99)}
    benchmark.extra_info.update(percentiles)
    if stage == "transforms":
        return
    cost = flops.inference(case.size, case.num_cameras, prompt_len(case), batch_size=case.batch, evaluations=NUM_STEPS)
    once = {"vision": [cost.vision], "prefix": [cost.prefix], "steps": [cost.state, *NUM_STEPS * [cost.step]]}
    every = [*once["vision"], *once["prefix"], *once["steps"]]
    benchmark.extra_info.update(ceilings.rates(once.get(stage, every), percentiles["p50"]))


# ── End to end ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_policy(benchmark, case):
    """Observations in, the robot's actions out, host transforms included."""
    policy, observation = policy_of(case), case.workload().observation()
    if case.batch == 1:
        measure(benchmark, case, lambda: policy.infer(observation), "policy")
    else:
        measure(benchmark, case, lambda: policy.infer_batch([observation] * case.batch), "policy")


@KeepLast
def in_turn(case: Case) -> tuple[dict[str, list[float]], float]:
    """Seconds of ours and of the openpi-style baseline, by round, and the relative error between their results."""
    noise = case.workload().noise(case.batch)
    ours = inference.ours(policy_of(case), requests_of(case), noise)
    theirs = inference.baseline(params_of(case.preset), case.size, requests_of(case), noise, NUM_STEPS)
    error = inference.relative_error(theirs(), ours())
    assert case.size.dtype != "float32" or error < inference.TOLERANCE
    calls = {"pi0fast": timing.timed(ours), "openpi_style": timing.timed(theirs)}
    return timing.interleaved(calls, ROUNDS), error


@pytest.mark.benchmark(timer=timing.CLOCK)
@pytest.mark.parametrize("contender", ["pi0fast", "openpi_style"])
def test_run(benchmark, case, contender):
    """After the host transforms. Float32 results must agree; in bfloat16 the difference is noted."""
    seconds, error = in_turn(case)
    describe(benchmark, case, "call", contender)
    benchmark.extra_info["relative_error"] = error
    timing.CLOCK.replay(benchmark, seconds[contender])
    report(benchmark, case, "call")


@pytest.mark.filterwarnings("ignore")  # what torch and lerobot deprecate is not ours to mend
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lerobot(benchmark, case, compiled):
    if reason := inference.lerobot_refusal(case.size, compiled):
        pytest.skip(reason)
    requests, noise = requests_of(case), case.workload().noise(case.batch)
    run = inference.lerobot(lerobot_of(case.preset), case.size, requests, noise, NUM_STEPS, compiled)
    measure(benchmark, case, run, contender=f"lerobot_{'compiled' if compiled else 'eager'}")


# ── Stages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@KeepLast
def stages_of(case: Case) -> Stages:
    policy = policy_of(case)
    noise = case.workload().noise(case.batch)
    return Stages.of(policy.sampler, policy.batch(requests_of(case)), noise, execution=policy.execution)


def test_transforms(benchmark, case):
    policy, observation = policy_of(case), case.workload().observation()
    measure(benchmark, case, lambda: policy.prepare(observation), "transforms")


@pytest.mark.parametrize("stage", ["vision", "prefix", "steps"])
def test_stage(benchmark, case, stage):
    measure(benchmark, case, getattr(stages_of(case), stage), stage)
