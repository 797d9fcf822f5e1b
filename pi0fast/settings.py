"""The trainer's settings: some ten flags, three groups of finer ones, and each preset's defaults."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pi0fast import config
from pi0fast.execution import Kernels, Remat
from pi0fast.optim import OptimConfig
from pi0fast.report import Tracker
from pi0fast.transforms import MAX_NORMALIZED


@dataclass(frozen=True)
class InputSettings:
    """How samples are read.

    tokenizer: `demo`, `paligemma`, or the path of a sentencepiece model.
    workers: processes that decode; 0 decodes in this one.
    on_bad_sample: `error`, or `replace` it by a good one that is a function of its index.
    augment: crop, rotate and recolour images on the device.
    mask_padding: leave steps past the end of an episode out of the loss; openpi does not.
    max_normalized: larger normalised values are refused; `None` allows any.
    """

    tokenizer: str = "paligemma"
    workers: int = 4
    on_bad_sample: Literal["error", "replace"] = "error"
    augment: bool = True
    mask_padding: bool = False
    max_normalized: float | None = MAX_NORMALIZED


@dataclass(frozen=True)
class OutputSettings:
    """What a run keeps and tells. save_every, log_every: in steps. keep_every: checkpoints kept for good."""

    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    log_every: int = 10
    tracker: Tracker | None = None


@dataclass(frozen=True)
class Settings:
    """Train Pi0 or Pi0.5.

    mesh: devices, e.g. `fsdp:8` or `data:2,fsdp:4`; -1 is what is left.
    data: LeRobot v3 data set, a folder or a Hub id. Left out: the demo's, made once.
    robot: how its keys map to the model's: aloha, droid, libero, demo, or a YAML file.
    steps: optimizer steps.
    batch_size: samples per step, over all devices.
    out: the run's folder, runs/<preset> by default.
    init_from: a run, or an openpi checkpoint folder, whose weights to start from.
    resume: go on from the newest checkpoint in `out`, or start if there is none.
    freeze: comma-separated weights that are not trained, e.g. `siglip,vlm,embedding`.
    seed: of initial weights, data order, noise and augmentation.
    remat: activations recomputed in the backward pass: none, mlp or full.
    kernels: of attention and norms: auto, reference or triton.
    """

    mesh: str = "fsdp:-1"
    data: str | None = None
    robot: str = "demo"
    steps: int = 30_000
    batch_size: int = 32
    out: Path | None = None
    init_from: str | None = None
    resume: bool = False
    freeze: str = ""
    seed: int = 0
    remat: Remat = "mlp"
    kernels: Kernels = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)
    input: InputSettings = field(default_factory=InputSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


# From scratch on a laptop: a higher rate, and no augmentation, whose crops would blur where a block is. After 1400
# steps success depended on rounding: of 100 layouts one run solved 69, another, of the same seed, 99.
TINY = Settings(
    steps=2400,
    batch_size=64,
    remat="none",
    optim=OptimConfig(peak_lr=2e-3, end_lr=1e-4, warmup_steps=100, decay_steps=2400),
    input=InputSettings(tokenizer="demo", workers=0, augment=False),
    output=OutputSettings(save_every=500),
)
SMALL = Settings(input=InputSettings(tokenizer="demo"))
DEFAULTS = {name: TINY if "tiny" in name else SMALL if "small" in name else Settings() for name in config.PRESETS}


def to_dict(settings: Settings) -> dict[str, Any]:
    """As JSON holds them."""
    return {**dataclasses.asdict(settings), "out": settings.out and str(settings.out)}
