"""Runs compute-sanitizer over every attention kernel of ours on a small case, where the machine has the tool.

    python -m bench.sanitizer [tool …]          memcheck and racecheck by default

Pallas's interpreter cannot see what wgmma or TMA reads while something else is being written there; this tool sees some
of it. The case is the smallest of `tests/kernels/test_on_gpu.py`: a kernel runs many times slower under it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.campaign import backend

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck")
TEST = ("tests/kernels/test_on_gpu.py", "-k", "shrunk and pi0_prefix and not xla and not norm")
PYTEST = ("-q", "-rs", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts=", "-p", "no:timeout")
FOUND = 99  # exit status where the tool has found something
# XLA takes most of the memory at once, in which the tool sees no bounds.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def find() -> str | None:
    """The tool, on PATH or where CUDA's toolkits are."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (str(toolkits[-1]) if toolkits else None)


def command(sanitizer: str, tool: str) -> list[str]:
    return [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", sys.executable, "-m", "pytest", *PYTEST, *TEST]


def main(tools: Sequence[str]) -> None:
    if backend() != "gpu":  # asked in another process, so that this one holds no memory
        print("skipped: compute-sanitizer needs an NVIDIA GPU")
        return
    sanitizer = find()
    if sanitizer is None:
        print("skipped: compute-sanitizer is not on this machine; it comes with CUDA's toolkit")
        return
    wrong = []
    for tool in tools:
        done = subprocess.run(command(sanitizer, tool), cwd=ROOT, env={**os.environ, **ENVIRONMENT})
        print(f"{tool}: exit status {done.returncode}", flush=True)
        wrong += [tool] if done.returncode else []
    if wrong:
        sys.exit(f"failed: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1:] or TOOLS)
