"""What the TPU compiler makes of our kernels, beside JAX's own and XLA: cycles, copies, VMEM.

    python -m bench.tpu_resources --out=profiles/<folder>                      what is not there yet
    python -m bench.tpu_resources --out=… --again --contender=mosaic_tpu       ours once more
    python -m bench.tpu.tables profiles/<folder>                               the tables of what is there

Compiles for single chips that are not there, and runs the control flow of each kernel's code: `bench.tpu.figures` says
how. Figures of a compiler and what is derived from them; nothing is measured. A job takes seconds, XLA's attention
minutes.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench import provenance
from bench.tpu import figures
from bench.tpu.figures import OURS, PEERS, TARGETS, Figures, Job
from bench.tpu.peers import blocks
from pi0fast_kernels.ada_rms_norm import cases as norms
from pi0fast_kernels.prefix_lm_attention import cases as attentions

ROOT = Path(__file__).parent.parent
RAW = "figures.jsonl"
FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
# Rows and keys of a peer's blocks, of which the fastest kernel counts. JAX's defaults, 128 of each, are never the
# fastest.
BLOCKS = ((512, 512), (512, 1024), (1024, 1024))
FILTERS = ("target", "op", "case", "contender")
XLA = "reference"


def jobs() -> Iterator[Job]:
    """Ours, then peers, then XLA's, which take the longest to compile."""
    both = False, True
    for target, backward in itertools.product(TARGETS, both):
        yield from (Job(target, "prefix_lm_attention", case.name, backward, OURS) for case in attentions.CASES)
        yield from (Job(target, "ada_rms_norm", case.name, backward, OURS) for case in norms.CASES)
    for case, target, backward, peer in itertools.product(attentions.CASES, TARGETS, both, PEERS):
        for sizes in dict.fromkeys(blocks(case, *sizes) for sizes in BLOCKS):
            yield Job(target, "prefix_lm_attention", case.name, backward, peer, tuple(sizes))
    for case, target, backward in itertools.product(norms.CASES, TARGETS, both):
        yield Job(target, "ada_rms_norm", case.name, backward, XLA)
    for case, target, backward in itertools.product(attentions.CASES, TARGETS, both):
        yield Job(target, "prefix_lm_attention", case.name, backward, XLA)


# ── Collected in a process of its own: libtpu reads its flags when it is loaded ───────────────────────────────────────


def collect(chosen: Iterable[Job]) -> Iterator[Figures]:
    """One after the other, as they come."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": FLAGS.format(folder)}
        command = [sys.executable, "-m", "bench.tpu_resources", "--collect", folder, json.dumps(list(chosen))]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for line in run.stdout:
                yield figures.read(json.loads(line))
        if run.returncode:
            raise subprocess.CalledProcessError(run.returncode, command[:4])


def _collect_here(folder: Path, chosen: list[list]) -> None:
    for names in chosen:
        job = figures.job(names)
        try:
            found = figures.figures(job, folder)
        except ValueError as error:  # code that cannot be run; the others still can
            found = Figures(job, provenance.commit(), 0.0, 0.0, error=f"{type(error).__name__}: {error}")
        print(json.dumps(dataclasses.asdict(found)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the compiler for every TPU kernel, and for its peers.")
    parser.add_argument("--out", type=Path, help="the folder of the record")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    for name in FILTERS:
        parser.add_argument(f"--{name}", action="append", help=f"only this {name}; may be repeated")
    parser.add_argument("--collect", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.collect:
        _collect_here(Path(arguments.collect[0]), json.loads(arguments.collect[1]))
        return
    if arguments.out is None:
        parser.error("give --out, the folder of the record")
    raw = arguments.out / RAW
    there = load(raw)
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [
        job
        for job in jobs()
        if (arguments.again or job not in there)
        and all(getattr(arguments, x) is None or getattr(job, x) in getattr(arguments, x) for x in FILTERS)
    ]
    for found in collect(chosen):
        there[found.job] = found
        lines = (json.dumps(dataclasses.asdict(there[job])) for job in jobs() if job in there)
        raw.write_text("\n".join(lines) + "\n")
        print(*found.job, found.error or f"{found.seconds * 1e6:.0f} us", flush=True)


def load(raw: Path) -> dict[Job, Figures]:
    """What was collected before."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    return {found.job: found for found in map(figures.read, map(json.loads, lines))}


if __name__ == "__main__":
    main()
