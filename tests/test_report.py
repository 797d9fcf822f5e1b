"""metrics.jsonl after a resume, and the rates in it."""

import json
import time

import pytest

from pi0fast.report import Report


def report(run, start=0):
    return Report(run, start=start, steps=4, log_every=2, tracker=None, enabled=True)


def step(reporter, number):
    metrics = {"loss": 1.0 / number, "grad_norm": 1.0, "learning_rate": 1e-3}
    reporter.step(number, metrics, wait_s=0.0, samples=8, flops=2e9, peak=1e12)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_first_and_every_second_step_are_logged(tmp_path):
    with report(tmp_path) as reporter:
        for number in range(1, 5):
            step(reporter, number)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    last = lines(tmp_path)[-1]
    assert last["mfu"] == pytest.approx(last["tflops"])  # of a peak of one TFLOP/s
    assert last["tflops"] == pytest.approx(last["samples_per_s"] / 8 * 2e9 / 1e12)
    assert reporter.plot_loss() == tmp_path / "loss.png"


def test_an_evaluation_is_written_drawn_and_left_out_of_the_rates(tmp_path, capsys):
    with report(tmp_path) as reporter:
        for number in (1, 2, 3):
            step(reporter, number)
        found = reporter.validation(3, lambda: time.sleep(1.0) or {"loss": 0.25, "action_error": 0.5})
        step(reporter, 4)
    assert found == {"loss": 0.25, "action_error": 0.5}
    assert json.loads((tmp_path / "validation.jsonl").read_text()) == {"step": 3, **found}
    assert lines(tmp_path)[-1]["samples_per_s"] > 2 * 8  # two steps, which took no second
    assert "step 3  validation: loss 0.2500  action error 0.5000  (1.0 s)" in capsys.readouterr().out
    assert reporter.plot_loss() == tmp_path / "loss.png"
    both = (tmp_path / "loss.png").read_bytes()
    (tmp_path / "validation.jsonl").unlink()
    reporter.plot_loss()
    assert (tmp_path / "loss.png").read_bytes() != both


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 3.0}\n{"step": 3, "loss": 2.0}\n{"step": 4, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 2, "loss": 3.5}\n{"step": 3, "loss": 2.5}\n')
    with report(tmp_path, start=2) as reporter:
        for number in (3, 4):
            step(reporter, number)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 3.0), (4, 0.25)]
    assert (tmp_path / "validation.jsonl").read_text() == '{"step": 2, "loss": 3.5}\n'


def test_a_run_without_a_checkpoint_starts_its_evaluations_anew(tmp_path):
    for loss in (3.0, 2.0):  # stopped before its first save, and resumed
        with report(tmp_path) as reporter:
            reporter.validation(0, lambda loss=loss: {"loss": loss})
    assert json.loads((tmp_path / "validation.jsonl").read_text()) == {"step": 0, "loss": 2.0}
