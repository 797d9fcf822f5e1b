"""Training: loss and gradients beside the openpi-style baseline, the whole step, and the time to the first.

On an accelerator the released sizes, all cameras, whole prompts, as many samples as fit (`BATCHES`); elsewhere the tiny
presets, to see that the benchmarks themselves work. `-rs` lists what did not fit.

    pytest bench/bench_train.py --benchmark-only --benchmark-json=train.json

*gradients*: loss and all gradients, contenders in turn, on a CPU alone (`bench.train_record` has larger sizes). *step*:
all of it, the optimizer and the average too, one contender after another, since a state fills a GPU: ours by remat
policy and kernels, and openpi's way (`bench.openpi_fsdp`). Augmentation is left out. Attributes in `extra_info`: the
sizes, `temporaries` in bytes by the compiler, `first_s`, the seconds from nothing compiled to the first step's end, and
those of `bench.ceilings`; FLOPs are the model's (`pi0fast.flops`), recomputation not counted.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from bench import ceilings, inference, timing, training
from bench.memory import KeepLast
from pi0fast import Observation, config, convert, flops, memory, train_state
from pi0fast import mesh as meshes
from pi0fast.flops import Cost
from pi0fast.settings import DEFAULTS, Settings

ACCELERATOR = jax.default_backend() != "cpu"
PRESETS = ("pi0_base", "pi05_base") if ACCELERATOR else ("pi0_tiny", "pi05_tiny")
BATCHES = (64, 48, 32, 24, 16, 8, 4) if ACCELERATOR else (8,)
ROUNDS = 7
EXAMPLE_BYTES = 0.95e9  # of the released models' activations, remat=mlp, by the compiler for an H100
TOLERANCE = 1e-5  # of loss and gradient norm, relative, in float32

# By what it tells: ours, openpi's way, then what each choice of ours is worth.
CONTENDERS = {
    "pi0fast": {},
    "openpi_style": {},
    "pi0fast_reference_kernels": {"kernels": "reference"},
    "pi0fast_remat_full": {"remat": "full"},
    "pi0fast_remat_none": {"remat": "none"},
}
TIMED = list(CONTENDERS) if ACCELERATOR else ["pi0fast", "openpi_style"]


def settings_of(preset: str, batch_size: int, contender: str) -> Settings:
    default = DEFAULTS[preset]
    changes = {"remat": "mlp", "mesh": "fsdp:-1" if ACCELERATOR else "fsdp:1", **CONTENDERS[contender]}
    plain = dataclasses.replace(default.input, augment=False)
    return dataclasses.replace(default, batch_size=batch_size, input=plain, **changes)


@KeepLast
def step_of(preset: str, batch_size: int, contender: str) -> training.Step | str:
    """The step, or why it does not fit."""
    build = training.openpi_step if contender == "openpi_style" else training.our_step
    try:
        return build(config.PRESETS[preset](), settings_of(preset, batch_size, contender))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"a batch of {batch_size} does not fit: {str(error).partition(chr(10))[0]}"


@functools.cache
def batch_of(preset: str) -> int | str:
    """The largest batch of `BATCHES` that our step runs with, or why none does. What can hardly fit is not compiled."""
    settings, device = settings_of(preset, BATCHES[-1], "pi0fast"), jax.devices()[0]
    _, *held = train_state.abstract_state(config.PRESETS[preset](), settings, meshes.make(settings.mesh))
    capacity, state = memory.capacity(device), train_state.device_bytes(held)
    for size in BATCHES:
        needed = state + size * EXAMPLE_BYTES / jax.device_count()
        if not (ACCELERATOR and 0 < capacity < needed) and not isinstance(step_of(preset, size, "pi0fast"), str):
            return size
    return f"{preset}'s state alone takes {state / 1e9:.0f} GB, and a batch of {BATCHES[-1]} more than there is"


def info_of(preset: str, batch_size: int, contender: str) -> dict[str, Any]:
    size = config.PRESETS[preset]()
    lengths = {"num_cameras": len(size.cameras), "prompt_len": size.max_token_len}
    who = {"contender": contender, "ours": contender.startswith("pi0fast")}
    return {"preset": preset, "batch": batch_size, **who, "dtype": size.dtype, **lengths}


def rates(preset: str, batch_size: int, seconds: float) -> dict[str, float]:
    """FLOPs of each device; samples of all together."""
    size = config.PRESETS[preset]()
    work = flops.train_step(size, len(size.cameras), size.max_token_len, batch_size) / jax.device_count()
    return {**ceilings.rates(Cost(work, 0.0), seconds), "samples_per_s": batch_size / seconds}


@pytest.mark.parametrize("contender", TIMED)
@pytest.mark.parametrize("preset", PRESETS)
def test_step(benchmark, preset, contender):
    size = batch_of(preset)
    step = size if isinstance(size, str) else step_of(preset, size, contender)
    if isinstance(step, str) or isinstance(size, str):
        pytest.skip(f"{contender}: {step}")
    if not np.isfinite(step.loss):
        step_of.clear()
        pytest.fail(f"the loss is {step.loss}")
    benchmark.group = f"training step {preset} batch={size}"
    benchmark.extra_info.update(info_of(preset, size, contender), first_s=step.first_s, temporaries=step.temporaries)
    benchmark.pedantic(step.run, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.enabled:
        benchmark.extra_info.update(rates(preset, size, benchmark.stats.stats.median))


@pytest.mark.parametrize("preset", PRESETS)
def test_time_to_first_step(benchmark, preset):
    """Initialised, compiled, run once. A cache of compiled programs on disk counts where JAX is told of one."""
    size = batch_of(preset)
    if isinstance(size, str):
        pytest.skip(size)
    benchmark.group = f"time to first step {preset}"
    benchmark.extra_info.update(info_of(preset, size, "pi0fast"))

    def first() -> None:
        step_of.clear()
        jax.clear_caches()
        assert not isinstance(step_of(preset, size, "pi0fast"), str)

    benchmark.pedantic(first, rounds=1)


@KeepLast
def gradients_of(preset: str) -> dict[str, list[float]]:
    """Seconds of each contender, by round."""
    size, count = config.PRESETS[preset](), BATCHES[-1]
    params, given = inference.draw_params(size), training.batch(size, count)
    observation = Observation.of(given)
    noise, t = np.random.default_rng(1).standard_normal(given["actions"].shape, np.float32), np.full(count, 0.3)
    flow = given["actions"], noise, t.astype(np.float32)
    model = convert.from_openpi(params, size)
    contenders = {
        "pi0fast": training.ours(model, observation, flow, "mlp"),
        "pi0fast_remat_none": training.ours(model, observation, flow, "none"),
        "openpi_style": training.baseline(params, size, observation, flow),
    }
    expected = contenders["openpi_style"]()
    for step in contenders.values():
        np.testing.assert_allclose(step(), expected, rtol=TOLERANCE)
    return timing.interleaved({name: timing.timed(step) for name, step in contenders.items()}, ROUNDS)


@pytest.mark.benchmark(timer=timing.CLOCK)
@pytest.mark.skipif(ACCELERATOR, reason="in float32, on a CPU")
@pytest.mark.parametrize("contender", ["pi0fast", "pi0fast_remat_none", "openpi_style"])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradients(benchmark, preset, contender):
    benchmark.group = f"loss and gradients {preset}"
    benchmark.extra_info.update(info_of(preset, BATCHES[-1], contender))
    timing.CLOCK.replay(benchmark, gradients_of(preset)[contender])
    if benchmark.enabled:
        benchmark.extra_info.update(rates(preset, BATCHES[-1], benchmark.stats.stats.median))
