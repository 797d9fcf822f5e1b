"""The measurement campaign: in order, within its minutes, and what is cut off leaves what it had."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import campaign, results
from bench.campaign import Section

ROOT = Path(__file__).parent.parent

# A program of `python -m` that writes one result, and goes on for as long as it is told.
WRITER = """
import json, sys, time
name, seconds, path = sys.argv[1:]
where = {"device": "gpu", "versions": {"jax": "1"}, "commit": "c", "date": "2026-11-25"}
with open(path, "a") as file:
    file.write(json.dumps({"name": name, "group": "group", "seconds": [0.5, 0.25, 1.0], **where}) + "\\n")
print("wrote", name, flush=True)
time.sleep(float(seconds))
"""


@pytest.fixture
def section(tmp_path, monkeypatch):
    (tmp_path / "campaign_writer.py").write_text(WRITER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    out = tmp_path / "out"
    out.mkdir()
    return lambda name, seconds: Section(name, ("campaign_writer", name, str(seconds), f"{out}/results.jsonl"), 0.25)


def test_what_is_cut_off_leaves_what_it_had(tmp_path, section, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "GRACE_S", 1.0)
    monkeypatch.setattr(campaign, "TABLE_S", 1.0)
    out, start = tmp_path / "out", time.monotonic()
    sections = [section("quick", 0), section("endless", 600), section("late", 600), section("never", 600)]
    outcomes = campaign.campaign(sections, out, seconds=10.0)
    assert time.monotonic() - start < 10
    assert [outcome.ended for outcome in outcomes] == ["passed", *3 * ["out of time"]]
    found = results.read(out / "results.jsonl")
    assert [each.name for each in found][:2] == ["quick", "endless"] and found[0].median == 0.5
    assert [x["ended"] for x in json.loads((out / "campaign.json").read_text())["sections"]][1] == "out of time"


def test_a_failed_section_is_told_and_the_others_run(tmp_path, section):
    out = tmp_path / "out"
    sections = [Section("broken", ("no_such_module",), 0.1), section("quick", 0)]
    outcomes = campaign.campaign(sections, out, seconds=120.0)
    assert [(outcome.ended, outcome.measured) for outcome in outcomes] == [("failed", 0), ("passed", 1)]
    assert outcomes[1].told == "wrote quick"
    assert "no_such_module" in (out / "broken.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=0.1"], "give more than"),
        (["--only", "atention"], "there is no atention; the sections are"),
        ([f"--out={ROOT}"], "is not empty; give another --out"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        campaign.main(["--dry-run", *([] if "--out" in arguments[0] else [f"--out={tmp_path / 'out'}"]), *arguments])


@pytest.mark.long
def test_a_stopped_campaign_leaves_nothing_running(tmp_path, section):
    """By a real signal: the section, and what it started, end with it."""
    out = tmp_path / "out"
    code = f"""
import signal, sys
from pathlib import Path
from bench import campaign
from bench.campaign import Section
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
arguments = ("campaign_writer", "endless", "600", "{out}/results.jsonl")
campaign.campaign([Section("endless", arguments, 1.0)], Path("{out}"), 900.0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels")))}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    while not (out / "results.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait(timeout=60) == 143 and children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_cpu_is_not_measured_by_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit, match="JAX finds no accelerator, only 'cpu'; --dry-run rehearses"):
        campaign.main([f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_dry_run(tmp_path):
    """All of it, with tiny sizes, by its one command, where nothing is that reads data, videos or command lines."""
    missing = ("lerobot", "grain", "augmax", "tyro", "av", "torchcodec", "websockets", "beartype")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n")
    out = tmp_path / "campaign"
    command = ["bash", "bench/campaign.sh", "15", "--dry-run", f"--out={out}"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((out / "campaign.json").read_text())["sections"]
    assert [section["ended"] for section in sections] == ["passed"] * len(sections)
    found = results.read(out / "results.jsonl")
    assert {"pi0fast", "openpi_style", "reference", "xla"} <= {each.contender for each in found}
    for group in {each.group for each in found}:
        assert group in done.stdout
    assert sections[0]["told"].startswith("33 skipped")  # in an interpreter's place there are tests of their own
    assert len(list((out / "trace").rglob("stages.json"))) == 2
