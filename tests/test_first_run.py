"""The README's first command, as a newcomer runs it, and what it promises."""

import os
import re
import subprocess
import sys
import time

import pytest


def run(module, *arguments, cwd, cache):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_first_run_learns_the_demo(tmp_path):
    start = time.monotonic()
    output = run("pi0fast.train", cwd=tmp_path, cache=tmp_path / "cache")
    minutes = (time.monotonic() - start) / 60
    assert "python -m pi0fast.evaluate runs/pi0_tiny" in output
    report = run("pi0fast.evaluate", "runs/pi0_tiny", cwd=tmp_path, cache=tmp_path / "cache")
    plain, shifted = (int(successes) for successes in re.findall(r"(\d+)/100", report))
    print(f"{minutes:.1f} minutes; {report}")  # the time is a measurement, not a check: it depends on the machine
    assert plain >= 90, report
    assert shifted >= 90, report
    assert (tmp_path / "runs" / "pi0_tiny" / "episodes.gif").exists()
