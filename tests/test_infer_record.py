"""The record of inference beside its peers: what it holds, and that it times nothing that computes something else."""

import json
import sys

import pytest

from bench import infer_record, openpi_style


@pytest.mark.long
def test_record_of_a_tiny_preset(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["infer_record", str(out), "--rounds=3", "--presets", "pi05_tiny"])
    infer_record.main()
    record = json.loads(out.read_text())
    assert record["rounds"] == 3 and record["platform"] == "cpu" and record["versions"]["jax"] and "commit" in record
    every, one, full = record["cases"]
    assert (every["num_cameras"], one["num_cameras"], full["num_cameras"]) == (2, 1, 2)
    for case in record["cases"]:
        assert case["relative_error_to_openpi_style"]["pi0fast"] < 1e-5
        assert case["prompt_tokens"] <= case["prompt_len"]["pi0fast"] <= case["prompt_len"]["others"] == 32
        for name in ("pi0fast", "openpi_style"):
            times = sorted(case["seconds"][name])
            assert len(times) == 3 and case["median_seconds"][name] == times[1] > 0
        medians = case["median_seconds"]
        assert case["times_as_fast_as"]["openpi_style"] == medians["openpi_style"] / medians["pi0fast"]


def test_nothing_is_timed_when_results_differ(monkeypatch):
    """The planted fault: the baseline sees padding and missing cameras."""
    monkeypatch.setattr(openpi_style, "MASKED", 0.0)
    with pytest.raises(ValueError, match="differ by .*; nothing was timed"):
        infer_record.record("pi0_tiny", rounds=1)
