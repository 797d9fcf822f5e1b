"""One command that turns a few minutes on an accelerator into a record: right first, then beside the peers, then whole.

    bash bench/campaign.sh [minutes] [--out=FOLDER]

Sections in the order of their worth, each with a share of the minutes; what one leaves, the next may use. A section is
a program of its own, so that it can be repeated by hand; it is ended when its time is up, and what it measured until
then is kept: each result is written as it ends (`bench.results`). The folder then holds `results.jsonl`, the output of
each section, a trace, and `campaign.json`: what was run, how it ended and how long it took. Last, a table is printed.

    python -m bench.record FOLDER/results.jsonl --topic=campaign --trace=FOLDER/trace …

With `--dry-run` all sections run on the CPU with tiny sizes: a rehearsal, which measures nothing worth keeping.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import provenance, record, results

ROOT = Path(__file__).parent.parent
GRACE_S = 10.0  # between asking a section to end and ending it
TABLE_S = 5.0  # kept for the table
BACKEND_S = 120.0  # for JAX to start


@dataclass(frozen=True)
class Section:
    """arguments: of `python -m`. share: of the minutes."""

    name: str
    arguments: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Outcome:
    """ended: `passed`, `failed`, or `out of time`. measured: results that it wrote. told: the last line of its log."""

    name: str
    ended: str
    seconds: float
    measured: int
    told: str


def sections(out: Path, dry_run: bool) -> list[Section]:
    """dry_run: without a GPU the checks of kernels skip themselves, and their log says so."""
    keep = f"--results={out / 'results.jsonl'}"

    def bench(name: str, share: float, *chosen: str) -> Section:
        return Section(name, ("pytest", *PYTEST, *chosen, "--benchmark-only", keep), share)

    def trace(what: str, share: float) -> Section:
        return Section(f"trace_{what}", ("bench.trace", what, str(out / "trace" / what), keep), share)

    at = "shrunk" if dry_run else "real"
    return [
        Section("correctness", ("pytest", *PYTEST, "--noconftest", "tests/kernels/test_on_gpu.py", "-k", at), 0.2),
        Section("sanitizer", ("bench.sanitizer",), 0.06),
        bench("attention", 0.2, "bench/bench_kernels.py", "-k", "prefix_lm_attention"),
        bench("tiles", 0.1, "bench/bench_mosaic_gpu.py"),
        bench("training", 0.18, "bench/bench_train.py", "-k", "test_step"),
        bench("inference", 0.09, "bench/bench_infer.py"),
        bench("norms", 0.05, "bench/bench_kernels.py", "-k", "ada_rms_norm"),
        trace("training", 0.05),
        trace("policy", 0.03),
        bench("layers", 0.02, "bench/bench_layers.py"),
        bench("first_step", 0.02, "bench/bench_train.py", "-k", "first_step"),
    ]


# Nothing of the project's own test settings that a bare machine may lack; what it warns of is not of interest there.
PYTEST = ("-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts=")


def run(section: Section, out: Path, seconds: float) -> str:
    """How it ended. Its output goes to a file; whatever it started ends with it."""
    with (out / f"{section.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *section.arguments],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return "failed" if process.wait(timeout=max(0.0, seconds)) else "passed"
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
    return "out of time"


def _end(process: subprocess.Popen) -> None:
    """Ends a session: asked first, so that what is being written is finished; then all that is left of it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def campaign(chosen: Sequence[Section], out: Path, seconds: float) -> list[Outcome]:
    """Runs them in order. Never takes longer than `seconds`, but for the grace of ending the last."""
    deadline = time.monotonic() + seconds - TABLE_S - GRACE_S
    budget, outcomes, path = 0.0, [], out / "results.jsonl"
    start = time.monotonic()
    for section in chosen:
        budget += section.share * seconds
        began, before = time.monotonic(), count(path)
        ended = run(section, out, min(start + budget, deadline) - began) if began < deadline else "out of time"
        log = out / f"{section.name}.log"
        told = log.read_text(errors="replace").strip().rpartition("\n")[2] if log.exists() else ""
        outcomes.append(Outcome(section.name, ended, time.monotonic() - began, count(path) - before, told))
        print(f"{section.name}: {ended} after {outcomes[-1].seconds:.0f} s; {told}", flush=True)
        described = [dataclasses.asdict(outcome) for outcome in outcomes]
        (out / "campaign.json").write_text(json.dumps({"seconds": seconds, "sections": described}, indent=1) + "\n")
    return outcomes


def backend() -> str:
    """What JAX finds: asked in a process of its own, so that none holds a device while the sections run."""
    code = "import jax; print(jax.default_backend())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=BACKEND_S).stdout.strip()


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bash bench/campaign.sh", description="Measure everything on this machine.")
    parser.add_argument("--minutes", type=float, default=10.0, help="never more than these")
    parser.add_argument("--out", type=Path, help="a new folder; campaign-<date> by default")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that all of it works")
    parser.add_argument("--only", nargs="+", help="sections to run: what the others would take is theirs")
    chosen = parser.parse_args(arguments)
    out = (chosen.out or ROOT / time.strftime("campaign-%Y-%m-%d-%H%M%S")).absolute()
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty; give another --out")
    if chosen.minutes * 60 <= TABLE_S + GRACE_S:
        sys.exit(f"--minutes={chosen.minutes}: give more than {(TABLE_S + GRACE_S) / 60}")
    if chosen.dry_run:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
        os.environ.pop("PI0FAST_MOSAIC_GPU_INTERPRET", None)  # that one takes minutes, and lacks what tests teach it
    all_of_them = sections(out, chosen.dry_run)
    if unknown := set(chosen.only or ()) - {section.name for section in all_of_them}:
        sys.exit(f"--only: there is no {', '.join(sorted(unknown))}; the sections are {[x.name for x in all_of_them]}")
    picked = [section for section in all_of_them if not chosen.only or section.name in chosen.only]
    total = sum(section.share for section in picked)
    picked = [dataclasses.replace(section, share=section.share / total) for section in picked]
    if not (of := provenance.commit()):
        sys.exit(f"{ROOT} is no git checkout; say which commit it is of: {provenance.COMMIT_VARIABLE}=…")
    if of.endswith("-dirty") and not chosen.dry_run:
        print(f"Files differ from commit {of.removesuffix('-dirty')}: these results will make no record.", flush=True)
    if not chosen.dry_run and (found := backend()) == "cpu":
        sys.exit(f"JAX finds no accelerator, only {found!r}; --dry-run rehearses on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # sections end with this
    signal.signal(signal.SIGINT, signal.default_int_handler)  # sections inherit it, and a background job ignores it
    outcomes = campaign(picked, out, chosen.minutes * 60 - (time.time() - chosen.began))
    path = out / "results.jsonl"
    print(record.table(results.read(path)) if count(path) else "Nothing was measured.")
    print(f"Raw results: {out}")
    if any(outcome.ended == "failed" for outcome in outcomes):
        sys.exit(f"failed: {', '.join(x.name for x in outcomes if x.ended == 'failed')}; see {out}/<section>.log")


if __name__ == "__main__":
    main()
