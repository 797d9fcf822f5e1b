"""A trace of a training step or of the policy's call, and what each stage takes in it.

    python -m bench.trace training|policy FOLDER [--results=FILE]

The first preset and the sizes of `bench_train.py` and `bench_infer.py`; the table of stages lies beside the trace
(`pi0fast.trace`). results: a training step has the batch that was timed there.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pi0fast import trace

CALLS = 3


def training(folder: Path, timed: Path | None) -> None:
    from bench import bench_train, results

    preset = bench_train.PRESETS[0]
    found = results.read(timed) if timed is not None and timed.exists() else []
    batches = [x.info["batch"] for x in found if x.contender == "pi0fast" and x.group.startswith("training step")]
    batch = batches[0] if batches else bench_train.batch_of(preset)
    step = batch if isinstance(batch, str) else bench_train.step_of(preset, batch, "pi0fast")
    if isinstance(step, str):
        sys.exit(step)
    take(folder, step.text, step.run)


def policy(folder: Path, timed: Path | None) -> None:
    from bench import bench_infer

    case = bench_infer.CASES[0]
    policy, requests = bench_infer.policy_of(case), bench_infer.requests_of(case)
    text = policy.program(case.batch, bench_infer.prompt_len(case)).as_text()
    noise = case.workload().noise(case.batch)
    take(folder, text or "", lambda: policy.run(requests, noise=noise))


def take(folder: Path, text: str, call: Callable[[], object]) -> None:
    """call: waits for its result."""
    call()
    trace.start(folder)
    for _ in range(CALLS):
        call()
    print(trace.stop(folder, text, CALLS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace a training step or the policy's call.")
    parser.add_argument("what", choices=["training", "policy"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    trace.keep_scopes()
    {"training": training, "policy": policy}[chosen.what](chosen.folder, chosen.results)


if __name__ == "__main__":
    main()
