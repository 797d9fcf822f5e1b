"""Traces: what a real one tells of the trainer's step, how events become stages, and what ends early or makes no sense.

The policy's is in tests/test_infer.py.
"""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from pi0fast import checkpoint, flops, trace, train
from pi0fast.distributed import Processes
from pi0fast.estimate import estimate, stages
from pi0fast.hlo import Program
from pi0fast.trace import Event
from tests.mini import MINI


@pytest.fixture
def settings(mini_settings):
    return dataclasses.replace(mini_settings, steps=5, profile=2)


def told(folder: Path) -> dict:
    """What is written beside the only trace in the folder."""
    (path,) = folder.rglob("stages.json")
    assert list(path.parent.glob("*.xplane.pb"))
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_tells_its_stages(settings, capsys):
    found = told(train.train("pi0_tiny", settings) / "profile")
    assert (found["program"], found["device"], found["devices"], found["calls"]) == ("jit_step", "cpu", 1, 2)
    by_name = {stage["name"]: stage for stage in found["stages"]}
    forward = flops.forward(MINI, len(MINI.cameras), MINI.max_token_len)
    assert by_name["siglip"]["flops"] == pytest.approx(8 * forward.siglip, rel=0.02)
    assert by_name["prefix"]["flops"] == pytest.approx(8 * forward.prefix, rel=0.02)
    assert by_name["prefix, backward"]["flops"] == pytest.approx(16 * forward.prefix, rel=0.02)
    assert {"suffix", "suffix, backward", "siglip, backward", "optimizer"} <= by_name.keys()
    assert by_name["optimizer"]["flops"] is None
    assert sum(stage["share"] for stage in found["stages"]) == pytest.approx(1)
    assert by_name.get("other", {"share": 0})["share"] < 0.1
    assert all(stage["seconds"] > 0 and stage["roofline"] is None for stage in found["stages"])
    printed = capsys.readouterr().out
    assert "Measured by the trace, 2 x jit_step on 1 x cpu" in printed and "prefix, backward" in printed
    assert "Share: of the operations' time" in printed and "The peaks of 'cpu' are not known" in printed


@pytest.mark.long
def test_a_signal_keeps_what_was_traced(settings, monkeypatch, capsys):
    check_finite = train.check_finite

    def check(step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return check_finite(step, *rest)

    monkeypatch.setattr(train, "check_finite", check)
    run = train.train("pi0_tiny", dataclasses.replace(settings, steps=20, profile=10), Processes())
    step = int(checkpoint.newest_checkpoint(run).name)
    assert step == 5 and told(run / "profile")["calls"] == step - trace.WARM
    assert "Stopped after step 5 and saved" in capsys.readouterr().out
    jax.profiler.start_trace(settings.out)  # the last one has ended
    jax.profiler.stop_trace()


def test_an_error_ends_the_trace(tmp_path):
    profile = trace.Profile(tmp_path, range(0, 4), done=0, say=print)
    with pytest.raises(RuntimeError, match="planted"), profile:
        profile.run(jax.jit(jnp.sin).lower(jnp.ones(3)).compile(), jnp.ones(3))
        raise RuntimeError("planted")
    jax.profiler.start_trace(tmp_path)
    jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"profile": -1}, "--profile=-1 must be at least 0"), ({"profile": 4}, "traces steps 3 to 6, and the run has 5")],
)
def test_a_profile_that_makes_no_sense_is_refused_before_anything_is_made(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train("pi0_tiny", dataclasses.replace(settings, **changes))
    assert not settings.out.exists()


def test_a_resumed_run_traces_what_is_left():
    assert trace.steps_to_trace(0, 0, 1) == range(0)
    assert trace.steps_to_trace(3, 0, 5) == range(2, 5)
    assert trace.steps_to_trace(3, 10, 14) == range(12, 14)
    assert not trace.steps_to_trace(3, 10, 11)


def test_a_program_from_disk_has_the_scopes_of_this_code(monkeypatch):
    name = "jax_compilation_cache_include_metadata_in_key"
    before, unique = getattr(jax.config, name), np.random.default_rng().random(3)

    def scopes(stage: str) -> set[str]:
        def function(x):
            with jax.named_scope(stage):
                return jnp.sin(x) + unique

        return set(stages(Program(jax.jit(function).lower(unique).compile().as_text() or "")).values())

    try:
        trace.keep_scopes()
        assert "prefix" in scopes("prefix") and "suffix" in scopes("suffix")
    finally:
        jax.config.update(name, before)


# ── Traces of devices that are not here ───────────────────────────────────────────────────────────────────────────────

# A loop of three products in one stage, a copy for it that XLA added, and a gather.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (b: (s32[], f32[2,2])) -> (s32[], f32[2,2]) {
  %b = (s32[], f32[2,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[2,2]{1,0} get-tuple-element(%b), index=1
  %dot.1 = f32[2,2]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[2,2]{1,0}) tuple(%i, %dot.1)
}

ENTRY %main (p: f32[2,2], q: f32[2,1]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0), metadata={op_name="state.weights['suffix']"}
  %q = f32[2,1]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %copy.2 = f32[2,2]{1,0} copy(%p)
  %start = (s32[], f32[2,2]{1,0}) tuple(%zero, %copy.2)
  %while.3 = (s32[], f32[2,2]{1,0}) while(%start), condition=%c, body=%body, BACKWARD
  %all-gather.4 = f32[2,2]{1,0} all-gather(%q), replica_groups=[1,2]<=[2], metadata={op_name="jit(step)/jvp(siglip)/x"}
  ROOT %add.5 = f32[2,2]{1,0} add(%all-gather.4, %p), metadata={op_name="jit(step)/optimizer/add"}
}

%c (b: (s32[], f32[2,2])) -> pred[] {
  %b.1 = (s32[], f32[2,2]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}
""".replace(
    "BACKWARD",
    'metadata={op_name="jit(step)/transpose(jvp(prefix))/while"}, backend_config={"known_trip_count":{"n":"3"}}',
)


def xspace(planes: dict[str, dict[str, list[tuple]]]) -> bytes:
    """A trace of planes of lines of events: name, start and duration in microseconds, and stats."""
    stats = {"hlo_op": 1, "hlo_module": 2}

    def metadata(kind: str, numbers: dict[str, int]) -> str:
        return " ".join(f'{kind}_metadata {{ key: {i} value {{ id: {i} name: "{x}" }} }}' for x, i in numbers.items())

    def event(numbers: dict[str, int], name: str, start: int, duration: int, told: dict[str, str] | None = None) -> str:
        values = (f'stats {{ metadata_id: {stats[key]} str_value: "{x}" }}' for key, x in (told or {}).items())
        times = f"offset_ps: {start}000000 duration_ps: {duration}000000"
        return f"events {{ metadata_id: {numbers[name]} {times} {' '.join(values)} }}"

    text = []
    for plane, lines in planes.items():
        numbers = {name: i for i, (name, *_) in enumerate((x for line in lines.values() for x in line), 1)}
        written = (
            f'lines {{ name: "{name}" {" ".join(event(numbers, *x) for x in line)} }}' for name, line in lines.items()
        )
        known = metadata("event", numbers), metadata("stat", stats)
        text.append(f'planes {{ name: "{plane}" {" ".join((*written, *known))} }}')
    return ProfileData.text_proto_to_serialized_xspace(" ".join(text))


def read(tmp_path: Path, planes: dict, kind: str, calls: int = 1) -> dict[str, trace.Stage]:
    path = tmp_path / "some.xplane.pb"
    path.write_bytes(xspace(planes))
    found = trace.read(path, Program(PROGRAM), trace.program_name(PROGRAM), calls, kind)
    return {stage.name: stage for stage in found.stages}


def test_a_gpus_streams_count_and_not_what_is_derived_from_them(tmp_path):
    step = {"hlo_module": "jit_step"}
    stream = [
        ("copy_2", 0, 4, step),  # in a graph, the kernel's name alone tells
        *(("gemm", at, 2, {"hlo_op": "dot.1", **step}) for at in (4, 6, 8)),
        ("add_kernel", 20, 6, {"hlo_op": "add.5", **step}),
        ("MemcpyH2D", 30, 1),
        ("other_fusion", 40, 3, {"hlo_op": "fusion.7", "hlo_module": "jit_other"}),
    ]
    planes = {
        f"/device:GPU:{i}": {
            "Stream #16(Compute)": stream,
            "Stream #17(Compute)": [("ncclAllGather", 5, 30, {"hlo_op": "all-gather.4", **step})],
            "XLA Ops": stream,
        }
        for i in range(2)
    }
    planes["/host:CPU"] = {"python": [("dot.1", 0, 900, {"hlo_op": "dot.1", **step})]}
    found = read(tmp_path, planes, "NVIDIA H100 80GB HBM3")
    assert {name: pytest.approx(stage.seconds * 1e6) for name, stage in found.items()} == {
        "communication": 30,
        "prefix, backward": 10,
        "optimizer": 6,
        "other programs": 3,
        "other": 1,
    }
    assert found["communication"].share == pytest.approx(0.6)
    products = found["prefix, backward"]
    assert products.flops == 3 * 2 * 2 * 2 * 2
    spec = flops.device("NVIDIA H100 80GB HBM3")
    assert spec is not None
    assert products.floor == estimate(Program(PROGRAM), spec, lambda _: 0.0).stages["prefix, backward"]
    assert products.floor == pytest.approx(
        (3 * 3 + 2) * 16 / 3.35e12
    )  # by traffic: three of each product, two of the copy
    assert products.floor and products.roofline == products.floor / products.seconds
    assert found["communication"].floor is None and found["communication"].roofline is None


def test_a_loop_of_a_tpu_counts_as_what_runs_in_it(tmp_path):
    line = [
        ("%while.3 = (s32[], f32[2,2]) while(%start)", 0, 100),
        *((f"%dot.1 = f32[2,2] dot(%x, %x), trip={at}", at, 20) for at in (10, 40, 70)),
        ("%add.5 = f32[2,2] add(%all-gather.4, %p)", 100, 40),
    ]
    planes = {"/device:TPU:0": {"XLA Ops": line, "XLA Modules": [("jit_step(123)", 0, 140)]}}
    found = read(tmp_path, planes, "TPU v5 lite", calls=2)
    assert {name: pytest.approx(stage.seconds * 1e6) for name, stage in found.items()} == {
        "prefix, backward": 30,
        "optimizer": 20,
    }


def test_a_trace_without_the_program_says_so(tmp_path):
    planes = {"/device:GPU:0": {"Stream #1": [("x", 0, 1, {"hlo_op": "add.5", "hlo_module": "jit_other"})]}}
    with pytest.raises(ValueError, match="no operation of jit_step"):
        read(tmp_path, planes, "cpu")


def test_events_inside_others_count_once():
    def event(op: str, start: float, end: float) -> Event:
        return Event(op, op, None, "", start, end)

    line = [event("a", 0, 10), event("b", 2, 5), event("c", 3, 4), event("d", 5, 9), event("e", 10, 12)]
    found = {each.op: own for each, own in trace.own_times(line[::-1])}
    assert found == {"a": 3, "b": 2, "c": 1, "d": 4, "e": 2}
