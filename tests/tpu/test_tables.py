"""The tables of a TPU record, from made-up figures; and what a compiled step says of its kernels."""

import dataclasses

import pytest

from bench.tpu.figures import OURS, Figures, Job, KernelFigures, read
from bench.tpu.tables import attention, best, comparison, goals, seconds, steps, units
from bench.tpu_resources import BLOCKS, jobs
from bench.tpu_steps import kernel_calls
from pi0fast.hlo import Program

PREFIX = Job("v5e", "prefix_lm_attention", "pi0_prefix", False, OURS)


def figures(job: Job, kernel_s: float, **changes) -> Figures:
    counted = {"matmul": 100, "arithmetic": 3000, "stores": 500, "spill stores": 250}
    kernel = KernelFigures("k.1", kernel_s, 2**21, 600, 7, 1000, 100, 4_000_000, counted)
    return dataclasses.replace(Figures(job, "abc", 8e-4, 1e-4, (kernel,), 2e-4, 5e-4), **changes)


SLOW, FAST, FAILED = (
    PREFIX._replace(contender="flash", blocks=blocks) for blocks in ((512, 512), (512, 896), (1024, 896))
)
FOUND = {
    PREFIX: figures(PREFIX, 1e-3),
    SLOW: figures(SLOW, 3e-3),
    FAST: figures(FAST, 2e-3),
    FAILED: figures(FAILED, 0.0, kernels=(), error="out of memory"),
}


def test_of_a_peer_the_fastest_blocks_count():
    found = best(FOUND, *PREFIX[:4], "flash")
    assert found is not None and found.job == FAST
    assert best(FOUND, *PREFIX[:4], "splash") is None


def test_peers_stand_beside_ours():
    assert "| 800 µs | 1000 µs (1.25 ×) | 2000 µs (2.50 ×) |  | 1200 µs | 2200 µs |  |  |" in comparison(FOUND)


def test_goals_are_by_the_bound_and_the_faster_peer():
    assert "| v5e | pi0_prefix | forward | 1.25 | 1.3 | yes | flash | 50% |" in goals(FOUND)
    missed = {PREFIX: figures(PREFIX, 1.1e-3), FAST: FOUND[FAST]}
    assert "| 1.38 | 1.3 | no | flash | 55% |" in goals(missed)


def test_the_floor_is_the_longer_bound():
    by_memory = {PREFIX: figures(PREFIX, 1e-3, traffic_s=9e-4)}
    assert "| 800 µs | MXU | 1000 µs | 1.25 | 80% | 1,000 | 10% | 4.0 MB | 2.0 MiB | 7 |" in attention(FOUND)
    assert "| 900 µs | memory | 1000 µs | 1.11 | 80% |" in attention(by_memory)


def test_what_is_issued_is_counted_for_each_cycle():
    """100 operations of 16 cycles on four matrix units; stores that spill are stores, too."""
    assert "| mosaic_tpu |  | 40% | 3.00 | 0.00 | 0.00 | 0.00 | 0.75 | 0.25 |" in units(FOUND)


def test_an_eighth_of_the_examples_takes_an_eighth_of_the_time():
    assert seconds(FOUND, "v5e", "prefix_lm_attention_forward 4×6528×256") == 1e-3 / 8
    with pytest.raises(ValueError, match="no case has the shape"):
        seconds(FOUND, "v5e", "prefix_lm_attention_forward 4×6529×256")
    siglip = PREFIX._replace(case="siglip")
    tokens_along_lanes = "prefix_lm_attention_forward 192×72×256"
    assert seconds({siglip: figures(siglip, 8e-4)}, "v5e", tokens_along_lanes) == 8e-4 / 8


def test_attention_in_a_step_has_the_cycles_of_its_code():
    """Twenty layers of 0.125 ms, for which the plan has 1 ms."""
    plan = {"memory": {"peak": 9e9}, "time": {"compute_ms": 50.0, "exposed_ms": 2.0, "step_ms": 52.0}}
    step = {"target": "v5e", "kernels": OURS, "attention_ms": 1.0, "plan": plan}
    step["runs"] = {"prefix_lm_attention_forward 4×6528×256": 20, "ada_rms_norm_forward 4×816×2048": 36}
    assert "| 9.0 GB | 51.5 ms | 2.0 ms | 2.5 ms | 53.5 ms | 52.0 ms |" in steps(FOUND, {"v5e": step})


def test_figures_survive_json():
    entry = dataclasses.asdict(FOUND[FAST])
    assert read({**entry, "job": list(FAST)}) == FOUND[FAST]


def test_every_job_is_there_once():
    every = list(jobs())
    assert len(set(every)) == len(every)
    flash = [job.blocks for job in every if job[:5] == ("v6e", "prefix_lm_attention", PREFIX.case, True, "flash")]
    assert flash == [(512, 512), (512, 896), (1024, 896)] and len(flash) == len(BLOCKS)


STEP = """HloModule step, is_scheduled=true

%body (b: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %b = (s32[], bf16[4,2]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[4,2]{1,0} get-tuple-element(%b), index=1
  %attend.1 = bf16[4,2]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[4,2]{1,0}) tuple(%i, %attend.1)
}

%c (a: (s32[], bf16[4,2])) -> pred[] {
  %a = (s32[], bf16[4,2]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: (s32[], bf16[4,2]), y: bf16[4,2]) -> (s32[], bf16[4,2]) {
  %p = (s32[], bf16[4,2]{1,0}) parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  %norm.2 = bf16[4,2]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %loop = (s32[], bf16[4,2]{1,0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"18"}}
}
"""  # noqa: E501


def test_kernels_in_a_loop_run_once_a_trip():
    program = Program(STEP)
    found = {call.name: times for times, call, _ in kernel_calls(program, program.entry)}
    assert found == {"norm.2": 1, "attend.1": 18}
