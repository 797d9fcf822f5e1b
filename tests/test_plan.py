"""The planner: what it compiles is what the trainer runs, and what it advises was compiled."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from pi0fast import compiler, config, fitting, flops, plan, precompile, train_state, training_data
from pi0fast import mesh as meshes
from pi0fast.flops import DeviceSpec
from pi0fast.memory import Memory
from pi0fast.plan import PlanSettings
from pi0fast.settings import TINY
from tests.mini import MINI


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    """`pi0_tiny` stands for a smaller model in this process."""
    monkeypatch.setitem(config.PRESETS, "pi0_tiny", lambda: MINI)


def test_the_planned_batch_is_the_trainers(demo_dataset, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo_dataset.parent / "cache"))
    settings = dataclasses.replace(TINY, data=str(demo_dataset), batch_size=8)
    data = training_data.open_data(settings, MINI)
    loader, transform = data.loader, data.transform
    mesh = meshes.make("fsdp:8")
    batch = next(loader)
    loader.close()
    del batch["index"]
    real = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), training_data.to_device(batch, mesh))
    planned = training_data.abstract_batch(MINI, 8, transform.cameras, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned) == real


def test_the_planned_step_is_the_trainers():
    """The same shapes and places as a state that was made."""
    mesh = meshes.make("data:2,fsdp:4")
    settings = dataclasses.replace(TINY, freeze="siglip", batch_size=8)
    state, frozen, _ = train_state.initialize(MINI, settings, mesh)
    _, *abstract = train_state.abstract_state(MINI, settings, mesh)
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    made, planned = ([describe(x) for x in jax.tree.leaves(tree)] for tree in ((state, frozen), tuple(abstract)))
    assert made == planned


def test_memory_is_sharded():
    """Vectors aside, which are more of this small model's weights than of a real one's."""
    held = {}
    for spec in ("fsdp:1", "fsdp:8"):
        _, state, _ = train_state.abstract_state(MINI, TINY, meshes.make(spec))
        held[spec] = [train_state.device_bytes(part) for part in (state.weights, state.opt_state, state.average)]
    for whole, shard in zip(held["fsdp:1"], held["fsdp:8"], strict=True):
        assert whole / 8 <= shard <= 1.05 * whole / 8 + 0.05 * whole


def test_levers_do_what_they_say():
    def held(**changes):
        optim = dataclasses.replace(TINY.optim, **changes)
        _, state, _ = train_state.abstract_state(MINI, dataclasses.replace(TINY, optim=optim), meshes.make("fsdp:8"))
        return train_state.device_bytes(state.opt_state), train_state.device_bytes(state.average)

    (plain, average), (half, _), (same, none) = held(), held(mu_dtype="bfloat16"), held(ema_decay=None)
    assert average > 0 and none == 0 and same == plain
    assert held(ema_on_host=True) == (plain, 0)
    assert half == pytest.approx(plain * 3 / 4, abs=16)  # of two moments, one; the counts stay


@pytest.fixture
def small_device(monkeypatch):
    """This CPU, as a device with so many bytes."""

    def make(memory):
        monkeypatch.setattr(flops, "DEVICES", (DeviceSpec("cpu", 1e12, 1e11, memory, 1e10),))

    return make


@pytest.mark.long
def test_advice_was_compiled(small_device):
    settings = dataclasses.replace(TINY, mesh="fsdp:2", batch_size=8)
    mesh = meshes.make("fsdp:2")
    changed = dict(fitting.changes(settings, mesh))["--accum=4"]
    needed = precompile.compile_step(MINI, changed, mesh, 2).memory
    assert needed.peak > needed.parameters + needed.optimizer + needed.average
    small_device(needed.peak)
    made = plan.plan("pi0_tiny", PlanSettings(target="cpu:2", train=settings))
    assert not made.fits and made.time is not None and made.time.step_ms > 0
    advice = {x.flags: x for x in made.advice}
    assert advice["--accum=4"].peak == needed.peak and advice["--accum=4"].fits
    assert all(x.fits == (x.peak <= needed.peak) for x in made.advice)
    assert advice["--accum=4"].peak < advice["--accum=2"].peak < made.memory.peak
    assert all(" " not in flags for flags in advice)


def test_changes_together_where_none_is_enough():
    mesh = meshes.make("data:2,fsdp:1")
    tried = [flags for flags, _ in fitting.changes(dataclasses.replace(TINY, batch_size=4), mesh)]
    singles = ["--remat=full", "--optim.mu-dtype=bfloat16", "--mesh=fsdp:2", "--accum=2"]
    assert tried == [*singles, *(" ".join(singles[:count]) for count in (2, 3, 4))]


@pytest.mark.parametrize(("per_device", "expected"), [(9, [3, 9]), (3, [3]), (8, [2, 4, 8]), (1, [])])
def test_microbatches_that_divide_are_tried(per_device, expected):
    tried = [
        flags for flags, _ in fitting.changes(dataclasses.replace(TINY, batch_size=per_device), meshes.make("fsdp:1"))
    ]
    assert [flags for flags in tried if flags.startswith("--accum")] == [f"--accum={n}" for n in expected]
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("first", [1, 3, 40])
@pytest.mark.parametrize("capacity", [90, 100, 1015, 5000])
def test_bisection(first, capacity):
    """Peaks that are a line with steps."""
    tried = []

    def memory(size):
        tried.append(size)
        return Memory(0, 0, 0, 0, capacity, peak=90 + 10 * size + 7 * (size // 5))

    largest = fitting.bisect(memory, first)
    assert largest == max((size for size in range(1000) if memory(size).fits and size), default=0)
    searched = tried[:-1000]
    assert len(searched) == len(set(searched)) < 12


@pytest.mark.long
def test_the_largest_batch_fits_and_one_more_does_not(small_device):
    settings = dataclasses.replace(TINY, mesh="fsdp:2", batch_size=4)
    mesh = meshes.make("fsdp:2")
    peak = {
        n: precompile.compile_step(MINI, dataclasses.replace(settings, batch_size=n), mesh, 2).memory.peak
        for n in (12, 14)
    }
    small_device((peak[12] + peak[14]) / 2)
    assert fitting.largest_batch(MINI, settings, mesh, 2) == 12


def test_an_inference_call_is_planned():
    made = plan.plan("pi0_tiny", PlanSettings(target="cpu", infer=True, train=TINY))
    model = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(precompile.abstract_sampler(MINI)))
    assert made.kind == "inference call" and made.memory.parameters == 4 * model
    assert not made.collectives


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cameras": 3}, "has 2 cameras"), ({"target": "tpu:8"}, "is not known")],
)
def test_plans_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        plan.plan("pi0_tiny", dataclasses.replace(PlanSettings(target="cpu", train=TINY), **changes))


def test_the_command_line_prints_json():
    command = [sys.executable, "-m", "pi0fast.plan", "pi0_tiny", "--target=cpu", "--infer", "--json"]
    made = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)
    assert made["fits"] and made["memory"]["peak"] > made["memory"]["parameters"] > 0


# ── Compiler options ──────────────────────────────────────────────────────────────────────────────────────────────────


class Chip:
    device_kind = "TPU v6 lite"


SLICE: Any = SimpleNamespace(size=8, devices=np.array([Chip()] * 8))

ALL_GATHER, REDUCE_SCATTER = compiler.SPARSE_CORE


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("", compiler.SPARSE_CORE),
        ("none", {}),
        (f"{ALL_GATHER}=", {REDUCE_SCATTER: True}),
        (f"none,{ALL_GATHER}=false,xla_other=3", {ALL_GATHER: False, "xla_other": "3"}),
    ],
)
def test_options_of_the_table_and_ones_own(chosen, expected):
    assert compiler.options(SLICE, chosen) == expected


def test_an_option_of_another_form_is_refused():
    with pytest.raises(ValueError, match="'fast' is not of the form"):
        compiler.options(SLICE, "fast")


def test_a_cpu_needs_none():
    assert not compiler.options(meshes.make("fsdp:8"), "")
