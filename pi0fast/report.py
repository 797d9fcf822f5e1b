"""What a training run tells: a progress bar, metrics.jsonl, optional trackers, and a loss curve at the end."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Tracker = Literal["tensorboard", "wandb"]


class Report:
    """Collects the metrics of steps and writes them, one process only; a context manager.

    metrics.jsonl and validation.jsonl keep the lines of steps up to `start`, so a resumed run has one line per step.
    """

    def __init__(self, run: Path, *, start: int, steps: int, log_every: int, tracker: Tracker | None, enabled: bool):
        self._log_every, self._enabled = log_every, enabled
        self._console = Console(quiet=not enabled)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, shown="compiling")
        self._path, self._validation_path = run / "metrics.jsonl", run / "validation.jsonl"
        self._waited, self._counted = 0.0, 0
        self._since = time.perf_counter()
        if enabled:
            _cut(self._path, start)
            _cut(self._validation_path, start or -1)  # what training starts from is evaluated again
            self._file = self._path.open("a")
            self._track = _open_tracker(tracker, run)

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        if self._enabled:
            self._file.close()

    def print(self, text: RenderableType) -> None:
        self._console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def step(
        self, step: int, metrics: Mapping[str, float], *, wait_s: float, samples: int, flops: float, peak: float | None
    ):
        """Count one finished step; every `log_every` of them, write the rates since the last time.

        flops: of one step. peak: FLOP/s of all devices together; without it, TFLOP/s stand for MFU.
        """
        self._waited, self._counted = self._waited + wait_s, self._counted + 1
        self._progress.update(self._task, completed=step)
        if step % self._log_every and step > 1:
            return
        now = time.perf_counter()
        elapsed, count = now - self._since, self._counted
        line = {
            "step": step,
            **metrics,
            "samples_per_s": samples * count / elapsed,
            "data_wait": self._waited / elapsed,
            "tflops": flops * count / elapsed / 1e12,
        }
        if peak:
            line["mfu"] = flops * count / elapsed / peak
        self._since, self._waited, self._counted = now, 0.0, 0
        efficiency = f"MFU {line['mfu']:.1%}" if peak else f"{line['tflops']:.3g} TFLOP/s"
        shown = (
            f"loss {line['loss']:.4f}  grad {line['grad_norm']:.2f}  lr {line['learning_rate']:.1e}  "
            f"{line['samples_per_s']:.1f} samples/s  data wait {line['data_wait']:.0%}  {efficiency}"
        )
        self._progress.update(self._task, shown=shown)
        if not self._console.is_terminal:  # a log file gets lines, a terminal the bar
            self.print(f"step {step}  {shown}")
        if self._enabled:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._track(line)

    def validation(self, step: int, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Evaluate the model of this step, and write what that gives. Its time is left out of the training's rates."""
        start = time.perf_counter()
        values = evaluate()
        seconds = time.perf_counter() - start
        self._since += seconds
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.print(f"step {step}  validation: {shown}  ({seconds:.1f} s)")
        if self._enabled:
            with self._validation_path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self._track({"step": step, **{f"validation_{name}": value for name, value in values.items()}})
        return values

    def plot_loss(self) -> Path | None:
        """Draw the losses of metrics.jsonl and validation.jsonl as loss.png beside them; None where this process writes
        nothing."""
        if not self._enabled:
            return None
        import matplotlib.figure  # only now: it takes a second to import

        figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for path, label in ((self._path, "training"), (self._validation_path, "validation")):
            if path.exists():
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=label)
        if self._validation_path.exists():
            axes.legend()
        axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log", title=self._path.parent.name)
        target = self._path.with_name("loss.png")
        figure.savefig(target, dpi=120)
        return target


def _cut(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`, and a line that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
        if step <= start:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _open_tracker(tracker: Tracker | None, run: Path) -> Any:
    """A function that takes one line of metrics."""
    if tracker == "tensorboard":
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]: an optional dependency

        writer = SummaryWriter(str(run / "tensorboard"))
        return lambda line: [writer.add_scalar(key, value, line["step"]) for key, value in line.items()]
    if tracker == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]: an optional dependency

        wandb.init(project="pi0fast", name=run.name, dir=run)
        return lambda line: wandb.log(line, step=line["step"])
    return lambda line: None
