"""Which tiles the campaign times on a Hopper GPU, and what it does where there is none."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import bench_mosaic_gpu, sanitizer
from bench.bench_mosaic_gpu import attention, contender, passes, promising
from bench.hopper.figures import INSTRUCTIONS
from bench.hopper.programs import NAMED
from pi0fast_kernels.prefix_lm_attention import reference


def entry(kernel: str, keys: int, seconds: float, **changes) -> dict:
    counts = dict.fromkeys(INSTRUCTIONS, 0) | {"HGMMA": 1, "UTMALDG": 1}
    compiled = {"registers": 168, "highest": 200, "spilled": 0, "shared": 1, "notes": [], "instructions": counts}
    what = {"contender": "pi0fast", "kernel": kernel, "case": "pi0_prefix", "tile": {"keys": keys}, "shipped": False}
    times = {"seconds": {"overlapped": seconds, "alone": seconds}, "cycles": {}, "loops": [], "work": {}}
    return what | compiled | times | changes


def test_the_shipped_tile_and_the_best_others(tmp_path):
    record = tmp_path / "resources.json"
    dq = [entry("dq", keys, float(keys)) for keys in (5, 4, 3, 2)]
    dq += [entry("dq", 1, 0.5, spilled=8), entry("dq", 9, 9.0, shipped=True), entry("dq", 6, 0.1, contender="jax")]
    alone = [entry("dkv", 7, 1.0, shipped=True)]
    record.write_text(json.dumps({"kernels": dq + alone}))
    assert promising(record) == {("dq", "pi0_prefix"): [{"keys": keys} for keys in (9, 2, 3)]}


def test_the_record_fits_the_kernels():
    """The tiles of the newest record are ones that the kernels still take."""
    found = promising()
    assert {kernel for kernel, _ in found} == {"forward", "few_rows", "dq", "dkv"}
    for (kernel, case), tiles in found.items():
        for tile in tiles:
            assert all(callable(each) for each in passes(NAMED[case], kernel, tile))


@pytest.mark.parametrize("ranges", [True, False])
def test_the_timed_op_is_the_op(monkeypatch, ranges):
    """Its two passes and its optional ranges are put together rightly: with the reference's passes for the kernel's."""
    case = NAMED["pi0_suffix"].shrunk()

    def forward(*arrays, device, **how):
        return reference.forward(*arrays, **how)

    def backward(*arrays, device, **how):
        return reference.backward(*arrays, **how)

    monkeypatch.setattr(bench_mosaic_gpu, "passes", lambda *_: (forward, backward))
    q, k, v, start, end = case.inputs(dtype=jnp.float32)
    bounds = (start, end) if ranges else (None, None)
    assert start is not None and end is not None
    exact = bounds if ranges else (jnp.zeros_like(start), jnp.full_like(end, case.keys))

    def total(op, q, k, v, bounds):
        return jnp.sum(op(q, k, v, *bounds) ** 2)

    op = attention(case, "forward", {})
    ours = jax.grad(total, (1, 2, 3))(op, q, k, v, bounds)
    theirs = jax.grad(total, (1, 2, 3))(lambda *x: reference.attention(*x, scale=case.scale), q, k, v, exact)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_without_a_gpu_they_are_left_out():
    assert contender("dq", {"keys": 64}).refusal(NAMED["pi0_prefix"], True) == "it needs an NVIDIA GPU"


@pytest.mark.parametrize(
    ("backend", "tool", "said"),
    [
        ("cpu", "/bin/true", "skipped: compute-sanitizer needs an NVIDIA GPU"),
        ("gpu", None, "skipped: compute-sanitizer is not on this machine"),
        ("gpu", "/usr/bin/env", "memcheck: exit status 0"),
    ],
)
def test_the_sanitizer_says_why_it_did_not_run(monkeypatch, capsys, backend, tool, said):
    monkeypatch.setattr(sanitizer, "backend", lambda: backend)
    monkeypatch.setattr(sanitizer, "find", lambda: tool)
    monkeypatch.setattr(sanitizer, "command", lambda found, name: [found, "true"])
    sanitizer.main(["memcheck"])
    assert capsys.readouterr().out.startswith(said)


def test_what_the_sanitizer_finds_fails_the_section(monkeypatch):
    monkeypatch.setattr(sanitizer, "backend", lambda: "gpu")
    monkeypatch.setattr(sanitizer, "find", lambda: "/usr/bin/env")
    monkeypatch.setattr(sanitizer, "command", lambda found, name: [found, "true" if name == "memcheck" else "false"])
    with pytest.raises(SystemExit, match="failed: racecheck"):
        sanitizer.main(["memcheck", "racecheck"])


@pytest.mark.slow
def test_the_sanitizer_selects_one_small_case_of_each_kernel():
    """What its selection of tests is, asked of pytest: one case, our two kernels."""
    command = sanitizer.command("", "memcheck")
    done = subprocess.run(
        [*command[command.index("-m") - 1 :], "--collect-only"], cwd=sanitizer.ROOT, capture_output=True, text=True
    )
    chosen = [line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert sorted(chosen) == [
        f"test_prefix_lm_attention[pi0_prefix-shrunk-{implementation}]" for implementation in ("mosaic_gpu", "triton")
    ]
