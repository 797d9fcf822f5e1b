"""The trainer's settings: the flags, groups of finer ones, and each preset's defaults."""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pi0fast import config
from pi0fast.config import LoraConfig, StateMode
from pi0fast.distributed import DistributedSettings
from pi0fast.execution import Kernels, Remat
from pi0fast.optim import OptimConfig
from pi0fast.report import Tracker
from pi0fast.transforms import MAX_NORMALIZED

Tune = Literal["full", "expert", "lora", "lora+expert"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates; the ranks are openpi's.

    Args:
        vlm: updates of the VLM; rank 0 does without.
        expert: updates of the action expert; rank 0 does without.
        siglip: train SigLIP too, as openpi does when it trains updates.
    """

    vlm: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16))
    expert: LoraConfig = field(default_factory=lambda: LoraConfig(rank=32))
    siglip: bool = False


@dataclass(frozen=True)
class InputSettings:
    """How samples are read.

    Args:
        tokenizer: `demo`, `paligemma`, or the path of a sentencepiece model.
        workers: processes that decode; 0 decodes in this one.
        on_bad_sample: `error`, or `replace` it by a good one that is a function of its index.
        augment: crop, rotate and recolour images on the device.
        max_normalized: larger normalised values are refused; `None` allows any.
        cache_gib: decoded images are kept on disk if they take no more; 0 decodes them at every access.
        prompt_len: prompt tokens computed. Left out, the trainer takes what the data's longest prompt needs.
        state_mode: of Pi0.5: `prompt`, or `unused` to leave the state out, as openpi's LIBERO configs do. By default
            the preset's.
    """

    tokenizer: str = "paligemma"
    workers: int = 4
    on_bad_sample: Literal["error", "replace"] = "error"
    augment: bool = True
    max_normalized: float | None = MAX_NORMALIZED
    cache_gib: float = 2.0
    prompt_len: int | None = None
    state_mode: StateMode | None = None


@dataclass(frozen=True)
class LossSettings:
    """What the loss is the mean over; by default everything, as openpi has it.

    Args:
        mask_padding: leave steps past the end of an episode out.
        mask_dims: leave out the action dimensions that pad the robot's to the model's.
        dim_weights: of the robot's action dimensions in a weighted mean, one each; that of dimensions of padding is 1.
    """

    mask_padding: bool = False
    mask_dims: bool = False
    dim_weights: tuple[float, ...] = ()

    def __post_init__(self):
        own = self.dim_weights
        if own and (not all(math.isfinite(weight) and weight >= 0 for weight in own) or not any(own)):
            raise ValueError(f"--loss.dim-weights={own}: weights must be finite, 0 or more, and not all 0")

    def action_weights(self, robot_dim: int, model_dim: int) -> tuple[float, ...] | None:
        """Of the model's action dimensions, for a robot that has the first `robot_dim` of them; None for a plain mean.

        Raises: ValueError: weights that are not one for each of the robot's dimensions.
        """
        if not self.mask_dims and not self.dim_weights:
            return None
        own = self.dim_weights or (1.0,) * robot_dim
        if len(own) != robot_dim:
            raise ValueError(
                f"--loss.dim-weights has {len(own)} entries, the robot {robot_dim} action dimensions; give one for each"
            )
        return own + (0.0 if self.mask_dims else 1.0,) * (model_dim - robot_dim)


@dataclass(frozen=True)
class ValidationSettings:
    """What is held out of training, and how often the model is evaluated on it.

    Args:
        fraction: of the episodes that are held out, by a hash of each one's number; 0 does without validation.
        every: steps between evaluations, besides those before the first step and at each save.
        batches: microbatches in an evaluation, the same each time; fewer where all that is held out takes fewer.
        seed: of which samples these are, of their noise and times.
    """

    fraction: float = 0.0
    every: int | None = None
    batches: int = 16
    seed: int = 0

    def check(self) -> None:
        """Raises: ValueError: a number out of range."""
        if not 0 <= self.fraction < 1:
            raise ValueError(f"--val.fraction={self.fraction} must be at least 0 and less than 1; 0.1 is usual")
        if self.batches < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"--val.batches={self.batches} and --val.every={self.every} must be at least 1")

    def due(self, step: int, *, saving: bool) -> bool:
        """Whether to evaluate after this step."""
        return saving or (self.every is not None and step % self.every == 0)

    def check_resumes(self, begun: Mapping[str, Any]) -> None:
        """Raises: ValueError: a run that began with these fields was trained on other episodes, or is evaluated on
        other samples, whose losses do not compare."""
        fields = {"fraction": 0.0} | ({"batches": self.batches, "seed": self.seed} if self.fraction else {})
        for name, default in fields.items():
            was, now = begun.get(name, default), getattr(self, name)
            if was != now:
                raise ValueError(
                    f"the run began with --val.{name}={was} and cannot go on with {now}, which is evaluated on other "
                    f"samples: give --val.{name}={was}, or another --out and this run as --init-from"
                )


@dataclass(frozen=True)
class OutputSettings:
    """What a run keeps and tells.

    Args:
        save_every: steps from one checkpoint to the next.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints at multiples of so many steps are kept for good.
        log_every: steps from one line of metrics to the next.
        tracker: tensorboard or wandb, besides metrics.jsonl.
    """

    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    log_every: int = 10
    tracker: Tracker | None = None

    def check(self) -> None:
        """Raises: ValueError: a number out of range. ModuleNotFoundError: the tracker is not installed."""
        for name in ("save_every", "keep_last", "keep_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--output.{name.replace('_', '-')}={value} must be at least 1")
        module = {"tensorboard": "tensorboardX", "wandb": "wandb", None: None}[self.tracker]
        if module and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"--output.tracker={self.tracker} needs {module}; install `pi0fast[{self.tracker}]`"
            )


@dataclass(frozen=True)
class Settings:
    """Train Pi0 or Pi0.5.

    Args:
        mesh: devices, e.g. `fsdp:8` or `data:2,fsdp:4`; -1 is what is left.
        data: LeRobot v3 data set, a folder or a Hub id. Left out: the demo's, made once.
        robot: how its keys map to the model's: aloha, droid, libero, libero_pi05, demo, or a YAML file.
        steps: optimizer steps.
        batch_size: samples per step, over all devices.
        accum: microbatches per step; activations of one at a time.
        flow_samples: draws of noise and time for each sample, behind one pass through SigLIP and the VLM.
        out: the run's folder, runs/<preset> by default.
        init_from: a run, an openpi checkpoint folder, or PaliGemma's .npz, whose weights to start from as far as they
            fit.
        resume: go on from the newest checkpoint in `out`, or start if there is none.
        resume_step: go on from the checkpoint of this step; newer ones are moved to `set_aside` in `out`.
        tune: what is trained: full, expert, lora, or lora+expert (`pi0fast.tuning`).
        freeze: comma-separated weights that are not trained either: a folder (`vlm`) stands for everything in it, `*`
            for any characters (`*/modulation`).
        seed: of initial weights, data order, noise and augmentation.
        remat: activations recomputed in the backward pass: none, mlp or full.
        reduce_dtype: of sharded weights' gradients while they are summed over `fsdp`; bfloat16 halves that traffic.
        kernels: of attention and norms: auto, reference, triton, mosaic_gpu or mosaic_tpu.
        profile: trace so many steps, after two others, into `out`/profile, and tell what each stage takes in them.
        xla: compiler options besides those of `pi0fast.compiler`: name=value, comma-separated; `none` drops those.
    """

    mesh: str = "fsdp:-1"
    data: str | None = None
    robot: str = "demo"
    steps: int = 30_000
    batch_size: int = 32
    accum: int = 1
    flow_samples: int = 1
    out: Path | None = None
    init_from: str | None = None
    resume: bool = False
    resume_step: int | None = None
    tune: Tune = "full"
    freeze: str = ""
    seed: int = 0
    remat: Remat = "mlp"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Kernels = "auto"
    profile: int = 0
    xla: str = ""
    lora: LoraSettings = field(default_factory=LoraSettings)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossSettings = field(default_factory=LossSettings)
    input: InputSettings = field(default_factory=InputSettings)
    val: ValidationSettings = field(default_factory=ValidationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    def __post_init__(self):
        if self.flow_samples < 1:
            raise ValueError(f"--flow-samples={self.flow_samples}: give 1 or more")
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"--steps={self.steps} must be at least 1, --seed={self.seed} at least 0")


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
