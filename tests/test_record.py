"""Records of results: what they hold, what is refused, and that the regression check names what got slower."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from bench import compare, record, results

ROOT = Path(__file__).parent.parent
H100 = {
    "device": "NVIDIA H100 80GB HBM3",
    "processor": "AMD EPYC",
    "cores": 16,
    "versions": {"jax": "0.11.2", "libtpu": None},
    "commit": "0123456789ab",
    "date": "2026-11-24T12:00:00+00:00",
    "ceilings": {"flops": 800e12, "bandwidth": 3.0e12},
}
CPU = {**H100, "device": "cpu"}
ROUNDS = 10 * [1.00, 1.008, 0.992, 1.02, 0.98, 1.00]  # a spread of 0.8 %


def put(path: Path, entries: dict[str, tuple], group: str = "attention forward") -> Path:
    """Results by contender: (seconds of a round, what else it says)."""
    path.unlink(missing_ok=True)
    for contender, (seconds, info) in entries.items():
        rounds = [seconds * factor for factor in ROUNDS]
        results.append(path, f"test[{contender}]", group, rounds, {**H100, "contender": contender, **info})
    return path


@pytest.fixture
def profiles(tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    shutil.copyfile(ROOT / "profiles" / "README.md", folder / "README.md")
    return folder


@pytest.fixture
def measured(tmp_path):
    rates = {"tflops_per_s": 465.0, "gb_per_s": 120.0, "of_ceiling": 0.581, "of_peak": 0.47, "mfu": 0.47}
    return put(
        tmp_path / "kernels.jsonl",
        {
            "triton": (400e-6, {**rates, "ours": True}),
            "cudnn": (520e-6, {"ours": False}),
            "sdpa": (0.6e-3, {"ours": False}),
        },
    )


# ── Records ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_record(measured, profiles, tmp_path):
    trace = tmp_path / "trace"
    (trace / "plugins").mkdir(parents=True)
    (trace / "plugins" / "some-host.xplane.pb").write_bytes(b"events")
    for run in ("b", "a"):
        (trace / run).mkdir()
        (trace / run / "stages.json").write_text(run)
    before = (profiles / "README.md").read_text()
    folder = record.write(
        measured, "Kernels, B 32", "- Ours | is fastest,\n  so far.\n- More.", trace=trace, profiles=profiles
    )
    assert folder == profiles / "2026-11-24_h100_kernels_b_32"
    assert (folder / "results.jsonl").read_text() == measured.read_text()
    assert [(folder / f"stages_{n}.json").read_text() for n in (0, 1)] == ["a", "b"]
    with tarfile.open(folder / "trace.tar.xz") as packed:
        assert "trace/plugins/host0.xplane.pb" in packed.getnames()
        assert not any("some-host" in name for name in packed.getnames())
        assert {(member.uid, member.uname) for member in packed.getmembers()} == {(0, "")}
    said = (folder / "README.md").read_text()
    assert said.startswith("# Kernels, B 32\n\n**Every figure below was measured on NVIDIA H100 80GB HBM3**")
    assert "commit 0123456789ab, jax 0.11.2. Medians of 60 rounds" in " ".join(said.split())
    assert "Ceilings measured first: 800 TFLOP/s (matrix product), 3000 GB/s (copy" in " ".join(said.split())
    assert "Datasheet: 989 TFLOP/s (bf16), 3350 GB/s." in " ".join(said.split())
    rows = [
        "| attention forward | triton | 400 µs | ± 0.8% | 465 | 120 | 58.1% | 47.0% | 47.0% | 1.30 × |",
        "|  | cudnn | 520 µs | ± 0.8% |  |  |  |  |  | 1.00 × |",
        "|  | sdpa | 600 µs | ± 0.8% |  |  |  |  |  | 0.867 × |",
    ]
    assert "\n".join(rows) in said
    assert said.endswith("## What was learned\n\n- Ours | is fastest,\n  so far.\n- More.\n")

    row = "| [2026-11-24, Kernels, B 32](2026-11-24_h100_kernels_b_32/README.md) | measured on NVIDIA H100 80GB HBM3 | "
    row += "Ours \\| is fastest, so far. |\n"
    after = (profiles / "README.md").read_text()
    assert after.count(row) == 1 and after.replace(row, "") == before
    above, below = after.split(row)
    assert above.splitlines()[-1].startswith("| [") and below.startswith("\n## ")  # the table's last row

    record.write(measured, "Kernels, B 32", "Again.", profiles=profiles)
    again = (profiles / "README.md").read_text()
    assert again == after.replace("Ours \\| is fastest, so far.", "Again.")
    assert (folder / "results.jsonl").read_text() == measured.read_text()
    assert (folder / "trace.tar.xz").exists() and "`trace.tar.xz`" in (folder / "README.md").read_text()


def test_baseline_and_columns(measured):
    said = record.table(results.read(measured), baseline="sdpa")
    assert "as fast as sdpa |" in said and "| triton | 400 µs |" in said and "| 1.50 × |" in said
    alone = [x for x in results.read(measured) if x.contender == "cudnn" and x.peer]
    assert "GB/s" not in record.table(alone)


def test_command(measured, profiles, tmp_path, capsys):
    learned = tmp_path / "learned.md"
    learned.write_text("A word.\n")
    arguments = [str(measured), "--topic=norms", f"--learned={learned}", f"--profiles={profiles}"]
    record.main(arguments)
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "README.md").read_text().endswith("## What was learned\n\nA word.\n")
    learned.write_text("")
    with pytest.raises(SystemExit, match="ValueError: nothing was learned; say it"):
        record.main(arguments)


def test_pytest_benchmarks_own_file(tmp_path):
    seconds = [2.0, 1.0, 3.0]
    info = {**CPU, "contender": "a"}
    entry = {"fullname": "bench/x.py::test", "group": None, "stats": {"data": seconds}, "extra_info": info}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"machine_info": {"node": "some-host"}, "benchmarks": [entry]}, indent=4))
    (result,) = results.read(path)
    assert (result.name, result.seconds, result.group, result.info) == ("bench/x.py::test", (2.0, 1.0, 3.0), "", info)
    entry["stats"] = {"median": 2.0}
    path.write_text(json.dumps({"benchmarks": [entry]}, indent=4))
    with pytest.raises(ValueError, match="bench/x.py::test has no raw times; run it again"):
        results.read(path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"device": None}, "has no device; run it again"),
        ({"versions": None}, "has no versions; run it again"),
        ({"commit": None}, "has no commit; run it again"),
        ({"date": None}, "has no date; run it again"),
        ({"commit": "0123456789ab-dirty"}, "0123456789ab-dirty; commit first"),
    ],
)
def test_refused(tmp_path, profiles, info, message):
    path = put(tmp_path / "some.jsonl", {"triton": (1.0, info)})
    before = (profiles / "README.md").read_bytes()
    with pytest.raises(ValueError, match=message):
        record.write(path, "kernels", "Nothing.", profiles=profiles)
    assert (profiles / "README.md").read_bytes() == before and len(list(profiles.iterdir())) == 1


@pytest.mark.parametrize(
    "other", [{"device": "NVIDIA H200"}, {"commit": "ba9876543210"}, {"versions": {"jax": "0.11.3"}}]
)
def test_one_source(tmp_path, profiles, other):
    path = put(tmp_path / "some.jsonl", {"triton": (1.0, {}), "cudnn": (1.0, other)})
    with pytest.raises(ValueError, match="in one file; give each a file of its own"):
        record.write(path, "kernels", "Nothing.", profiles=profiles)


def test_refused_arguments(measured, profiles, tmp_path):
    for keywords, message in (
        ({"learned": " \n"}, "nothing was learned; say it"),
        ({"topic": "×"}, "letters or digits"),
        ({"baseline": "openpi"}, "no such contender; there are cudnn, sdpa, triton"),
        ({"trace": tmp_path / "none"}, "no folder with a trace"),
    ):
        with pytest.raises(ValueError, match=message):
            record.write(measured, **{"topic": "kernels", "learned": "This.", "profiles": profiles, **keywords})
    measured.write_text(2 * measured.read_text())
    with pytest.raises(ValueError, match=r"test\[triton\] was measured twice"):
        results.read(measured)
    with pytest.raises(ValueError, match="the leaderboard has no table"):
        record.enter("# Leaderboard\n", "folder", "| row |")


def test_cut_off(measured):
    measured.write_text(measured.read_text()[:-40])
    assert [result.contender for result in results.read(measured)] == ["triton", "cudnn"]
    first = results.read(measured)[0]
    results.append(measured, "after", first.group, first.seconds, first.info)
    assert [result.name for result in results.read(measured)][2:] == ["after"]


def test_a_trace_does_not_tell_where_it_was_made(tmp_path):
    folder = tmp_path / "trace"
    with jax.profiler.trace(folder):
        jax.block_until_ready(jax.jit(lambda x: x @ x + 1)(jnp.ones((64, 64))))
    (path,) = folder.rglob("*.xplane.pb")
    host = path.name.removesuffix(".xplane.pb")
    path.write_bytes(path.read_bytes() + b"\x2a" + bytes([len(host)]) + host.encode())  # XSpace.hostnames
    whole = len(list(ProfileData.from_file(str(path)).planes))
    root = str(Path(record.__file__).parent.parent).encode()
    told = root + b"/bench/record.py\n" + root + b"/.venv/bin/pytest"
    content = record._without_places(path.read_bytes() + told, host)
    assert root not in content and bytes([len(host)]) + host.encode() not in content
    path.write_bytes(record._without_places(path.read_bytes(), host))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert len(list(ProfileData.from_file(str(path)).planes)) == whole


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", "cpu"),
    ],
)
def test_short_name(device, name):
    assert record.short_name(device) == name


@pytest.mark.parametrize(
    ("seconds", "said"), [(123.4, "123 s"), (1.5, "1.50 s"), (0.0123, "12.3 ms"), (2e-5, "20.0 µs"), (5e-9, "5.00 ns")]
)
def test_duration(seconds, said):
    assert record.duration(seconds) == said


# ── The regression check ──────────────────────────────────────────────────────────────────────────────────────────────


def compared(tmp_path, old, new):
    return compare.compare(*(results.read(put(tmp_path / f"{i}.jsonl", x)) for i, x in enumerate((old, new))))


def test_names_what_changed(tmp_path, capsys):
    old = {name: (1e-3, {"ours": True}) for name in ("same", "slower", "faster", "gone")}
    new = {"same": (1.02e-3, {}), "slower": (1.10e-3, {}), "faster": (0.9e-3, {}), "added": (1e-3, {})}
    found = compared(tmp_path, old, new)
    assert [change.name for change in found.slower] == ["test[slower]"]
    assert found.slower[0].ratio == pytest.approx(1.10)
    assert [change.name for change in found.faster] == ["test[faster]"]
    assert [change.name for change in found.alike] == ["test[same]"]
    assert (found.vanished, found.added, found.passed) == (
        ["test[gone] of attention forward"],
        ["test[added] of attention forward"],
        False,
    )
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "slower: 1.00 ms → 1.10 ms, 1.10 × (1.03 would be noise): test[slower]" in said
    assert "vanished: test[gone] of" in said and "1 slower, 1 faster, 1 alike" in said
    compare.main([str(tmp_path / "0.jsonl"), str(tmp_path / "0.jsonl")])
    assert "0 slower, 0 faster, 4 alike" in capsys.readouterr().out


def test_what_is_not_ours_excuses(tmp_path):
    old = {"triton": (1e-3, {}), "sdpa": (2e-3, {"ours": False})}
    slowed = {"triton": (1.3e-3, {}), "sdpa": (2.6e-3, {"ours": False})}
    assert compared(tmp_path, old, slowed).passed  # the machine got slower
    found = compared(tmp_path, old, {**slowed, "sdpa": (2e-3, {"ours": False})})
    assert [change.name for change in found.slower] == ["test[triton]"]
    found = compared(tmp_path, old, {**old, "sdpa": (1e-3, {"ours": False})})  # a faster peer accuses nobody
    assert found.passed and [change.name for change in found.peers] == ["test[sdpa]"]


def test_ceilings_excuse_where_they_bind(tmp_path):
    halved = {"ceilings": {"flops": 800e12, "bandwidth": 1.5e12}}
    copying, computing = {"flops": 1e6, "bytes": 1e9}, {"flops": 1e15, "bytes": 1e9}
    old = {"norm": (1e-3, copying), "attention": (1e-3, computing)}
    new = {name: (1.8e-3, {**info, **halved}) for name, (_, info) in old.items()}
    assert [change.name for change in compared(tmp_path, old, new).slower] == ["test[attention]"]


def test_noise_hides(tmp_path):
    """Half of the rounds are disturbed: 1.3 times the median, and not told from the old ones by their ranks."""
    paths = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for path, rounds in zip(paths, ([1.0, 1.0, 1.0, 1.6, 1.6], [1.0, 1.0, 1.3, 1.6, 1.6]), strict=True):
        results.append(path, "test", "", rounds, H100)
    found = compare.compare(*map(results.read, paths))
    assert found.passed and len(found.alike) == 1
    results.append(paths[0], "few", "", [1.0], H100)
    results.append(paths[1], "few", "", [9.0], H100)
    assert compare.compare(*map(results.read, paths)).unjudged == ["few"]


def test_short_calls_need_many_rounds(tmp_path):
    """An interruption of 10 ms could explain five calls of 30 µs that took 2 ms each, and no more."""
    path = tmp_path / "cpu.jsonl"

    def found(seconds, rounds, calls):
        path.unlink(missing_ok=True)
        results.append(path, "test", "", rounds * [seconds], {**CPU, "calls_per_round": calls})
        return results.read(path)

    assert compare.compare(found(30e-6, 5, 1), found(2.0e-3, 5, 1)).passed
    assert not compare.compare(found(30e-6, 5, 1), found(2.1e-3, 5, 1)).passed
    assert not compare.compare(found(30e-6, 5, 1000), found(40e-6, 5, 1000)).passed


def test_one_device(tmp_path):
    cpu, more = CPU, {**CPU, "cores": 32}
    with pytest.raises(ValueError, match="one is of NVIDIA H100 80GB HBM3, one of 16 CPU cores .AMD EPYC.; compare"):
        compared(tmp_path, {"a": (1.0, {})}, {"a": (1.0, cpu)})
    with pytest.raises(ValueError, match="one is of 16 CPU cores .AMD EPYC., one of 32 CPU cores"):
        compared(tmp_path, {"a": (1.0, cpu)}, {"a": (1.0, more)})
    assert compared(tmp_path, {"a": (1.0, {})}, {"a": (1.0, {"cores": 32})}).passed


# Each of the many runs needs the last one's result, to which it adds too little to matter.
SLOWED = """
import jax
from pi0fast_kernels.prefix_lm_attention import reference

fast = reference.attention

def slowed(q, *others, **keywords):
    return jax.lax.fori_loop(0, 2000, lambda _, out: fast(q + 1e-9 * out, *others, **keywords), q)

reference.attention = slowed
"""


def run_benchmarks(path, selected, *options):
    """Results of a process of its own."""
    arguments = ["-p", "no:cacheprovider", *options, "bench/bench_kernels.py", "--benchmark-only", "-k", selected]
    command = [sys.executable, "-m", "pytest", *arguments, f"--results={path}"]
    places = os.pathsep.join([str(path.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": places}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return results.read(path)


@pytest.mark.slow
def test_a_slowed_kernel_is_caught(tmp_path):
    """Two real runs of one case, the reference slowed in the second, XLA's attention as it was."""
    (tmp_path / "slowed_reference.py").write_text(SLOWED)
    selected = "siglip and forward and (reference or xla)"
    old = run_benchmarks(tmp_path / "old.jsonl", selected)
    new = run_benchmarks(tmp_path / "new.jsonl", selected, "-p", "slowed_reference")
    found = compare.compare(old, new)
    assert [re.sub(r".*\[|\]", "", change.name) for change in found.slower] == ["siglip-forward-reference"]
    assert [re.sub(r".*\[|\]", "", change.name) for change in found.alike] == ["siglip-forward-xla"]


@pytest.mark.long
def test_the_same_code_is_not_accused(tmp_path):
    """Three real runs of one commit, every pair of them."""
    runs = [run_benchmarks(tmp_path / f"{i}.jsonl", "forward and (reference or xla)") for i in range(3)]
    for old, new in itertools.permutations(runs, 2):
        found = compare.compare(old, new)
        assert found.passed and len(found.alike) + len(found.faster) == len(old), compare.tell(found)
