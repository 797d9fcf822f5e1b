"""A run on disk, and its checkpoints.

    RUN/config.json                      what the model, the robot and the training are
    RUN/metrics.jsonl                    one line per logged step
    RUN/validation.jsonl                 one line per evaluation on held-out episodes
    RUN/checkpoints/<step>/params        the weights that inference uses (the average, when there is one)
    RUN/checkpoints/<step>/train_state   what else training needs to go on: step, optimizer state, raw weights
    RUN/checkpoints/<step>/loader        the position in the data
    RUN/checkpoints/<step>/assets        normalisation statistics
    RUN/checkpoints/<step>/checksums     of the four above (`pi0fast.integrity`), compared whenever they are read
    RUN/checkpoints/<step>/metrics       what validation at this step gave, where there was one
    RUN/dead                             openpi's dead parameters, where the run began from an openpi checkpoint
    RUN/dead_lerobot                     lerobot's, where the run was converted from a policy of its
    RUN/set_aside/<step>                 checkpoints newer than one that training was told to go on from

orbax saves asynchronously into a temporary folder and renames it when complete, so a checkpoint is whole or absent. It
stores global arrays; a checkpoint restores onto any mesh and any number of processes.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint import checkpoint_managers as policies

from pi0fast import config as configs
from pi0fast import integrity, normalize
from pi0fast.config import Pi0Config
from pi0fast.integrity import CorruptCheckpointError
from pi0fast.normalize import NormStats
from pi0fast.robots import Robot
from pi0fast.storage import check_shapes, load_arrays, nest

Step = int | Literal["best"]  # which checkpoint: that of a step, or of the lowest validation loss


@dataclass(frozen=True)
class RunConfig:
    """What a run is, as `config.json` holds it.

    robot: None in a converted checkpoint whose robot was not given.
    tokenizer: `demo`, `paligemma`, or the path of a sentencepiece model.
    train: the trainer's settings, for the record and for resuming.
    """

    model: Pi0Config
    robot: Robot | None
    tokenizer: str
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, run: Path) -> None:
        fields = {
            "model": dataclasses.asdict(self.model),
            "robot": self.robot and self.robot.to_dict(),
            "tokenizer": self.tokenizer,
            "train": self.train,
        }
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / "config.json.tmp"
        temporary.write_text(json.dumps(fields, indent=2) + "\n")
        temporary.replace(run / "config.json")

    @staticmethod
    def load(run: Path) -> "RunConfig":
        """Raises: FileNotFoundError if the folder is not a run; CorruptCheckpointError if config.json does not read."""
        path = run / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{run} is not a run: it has no config.json; give the folder that --out named")
        try:
            fields = json.loads(path.read_text())
            return RunConfig(
                model=configs.from_dict(fields["model"]),
                robot=fields["robot"] and Robot.from_dict(fields["robot"]),
                tokenizer=fields["tokenizer"],
                train=fields["train"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(
                f"{path} cannot be read: {type(error).__name__}: {error}. The checkpoints beside it do not depend on "
                "it: start a run with the same flags in another folder and copy the config.json that it writes"
            ) from error


class SaveError(OSError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of one run.

    keep_last: how many of the newest are kept; keep_every: those at multiples of it are kept for good. keep_best: the
    one with the lowest validation loss is kept, too.
    """

    def __init__(self, run: Path, *, keep_last: int = 2, keep_every: int | None = None, keep_best: bool = False):
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep_last)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=_validation_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_validation_loss if keep_best else None,  # without one, orbax writes no metrics
            best_mode="min",
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train_state": ocp.StandardCheckpointHandler(),
            "loader": ocp.JsonCheckpointHandler("position.json"),
            "assets": ocp.JsonCheckpointHandler("norm_stats.json"),
            "checksums": ocp.JsonCheckpointHandler("checksums.json"),
        }
        self._run, self._keep_best = run, keep_best
        self._step: int | None = None  # that is being written
        self._manager = ocp.CheckpointManager(run.absolute() / "checkpoints", options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        *,
        params: Mapping[str, Array],
        norm_stats: Mapping[str, NormStats],
        train_state: Any = None,
        loader: Mapping[str, Any] | None = None,
        validation: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the arrays off the device, then writes in the background.

        params: weights by path. A checkpoint without train_state and loader serves inference and a new run only.
        validation: what an evaluation of these params gave, its "loss" among it; kept where the best is.

        Raises:
            SaveError: this checkpoint, or the one before, which was still being written, could not be.
        """
        stats = normalize.to_dict(norm_stats)
        items = {"params": ocp.args.StandardSave(nest(params)), "assets": ocp.args.JsonSave(stats)}
        sums = {"params": integrity.checksums(params), "assets": integrity.json_checksum(stats)}
        if train_state is not None and loader is not None:
            leaves = leaves_by_path(train_state)
            items["train_state"] = ocp.args.StandardSave(leaves)
            items["loader"] = ocp.args.JsonSave(dict(loader))
            sums |= {"train_state": integrity.checksums(leaves), "loader": integrity.json_checksum(dict(loader))}
        items["checksums"] = ocp.args.JsonSave({**sums, "checksums": integrity.json_checksum(sums)})
        with self._written():
            self._manager.wait_until_finished()
            self._step = step
            metrics = dict(validation or {}) if self._keep_best else None
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def close(self) -> None:
        """Waits for the last save. Raises: SaveError, as `save`."""
        try:
            with self._written():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """orbax raises what its threads and the file system raise."""
        try:
            yield
        except Exception as error:
            whole = [str(step) for step in steps(self._run) if step != self._step]
            kept = f"The checkpoints of steps {', '.join(whole)} are kept" if whole else "There is no earlier one"
            raise SaveError(
                f"the checkpoint of step {self._step} could not be written to {self._run / 'checkpoints'}: "
                f"{integrity.cause(error)}. {kept}; make room there, then go on with --resume"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def restore(
    run: Path, step: int, params: Mapping[str, jax.ShapeDtypeStruct], train_state: Any
) -> tuple[dict[str, Array], Any, dict[str, Any]]:
    """params, train_state and loader position; the first two as abstract arrays that say where they go.

    Raises:
        CorruptCheckpointError: naming the folder, what is damaged, and the checkpoint before it.
        ValueError: listing every array that is missing, extra or of another shape.
    """
    folder, leaves = step_folder(run, step), leaves_by_path(train_state)
    arrays, state = (
        load_item(
            folder,
            item,
            shapes={path: leaf.shape for path, leaf in abstract.items()},
            shardings={path: leaf.sharding for path, leaf in abstract.items()},
            dtypes={path: leaf.dtype for path, leaf in abstract.items()},
        )
        for item, abstract in (("params", params), ("train_state", leaves))
    )
    restored = jax.tree.unflatten(jax.tree.structure(train_state), [state[path] for path in leaves])
    return arrays, restored, _load_json(folder, "loader", "position.json", read_checksums(folder))


def load_item(
    step: Path, item: str, *, shapes: Mapping[str, tuple[int, ...]] | None = None, **options: Any
) -> dict[str, Array]:
    """The arrays of a checkpoint's `params` or `train_state`, against their checksums.

    A checkpoint without checksums, from before there were any, loads unchecked.

    shapes: what they must be. options: those of `storage.load_arrays`.

    Raises:
        CorruptCheckpointError: naming the folder, what is damaged, and the checkpoint before it.
        ValueError: listing every array that is missing, extra or of another shape.
    """
    sums = read_checksums(step)
    if not (step / item / "_METADATA").exists():
        raise integrity.damaged(step, f"it has no {item}/_METADATA")
    if shapes is not None:
        check_shapes(step / item, shapes)
    return load_arrays(step / item, checksums=sums and sums[item], **options)


def load_stats(step: Path) -> dict[str, NormStats]:
    """The normalisation statistics of a checkpoint. Raises: CorruptCheckpointError, as `load_item`."""
    _load_json(step, "assets", "norm_stats.json", read_checksums(step))
    return normalize.load(step / "assets" / "norm_stats.json")


def read_checksums(step: Path) -> dict[str, Any] | None:
    """What was saved, by item: one number, or one for each array. None where the checkpoint has none."""
    if not (step / "checksums").exists():
        return None
    sums = _load_json(step, "checksums", "checksums.json", None)
    if not isinstance(sums, dict) or sums.pop("checksums", None) != integrity.json_checksum(sums):
        raise integrity.damaged(step, "checksums/checksums.json holds other values than were saved")
    return sums


def _load_json(step: Path, item: str, name: str, sums: Mapping[str, Any] | None) -> Any:
    try:
        value = json.loads((step / item / name).read_text())
    except (OSError, ValueError) as error:
        raise integrity.damaged(step, f"{item}/{name} cannot be read: {integrity.cause(error)}") from error
    if sums is not None and sums[item] != integrity.json_checksum(value):
        raise integrity.damaged(step, f"{item}/{name} holds other values than were saved")
    return value


def steps(run: Path) -> list[int]:
    """The complete checkpoints' steps, oldest first. orbax renames a checkpoint to its step once it is whole."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def newest_step(run: Path) -> int | None:
    return max(steps(run), default=None)


def step_to_resume(run: Path, chosen: int | None) -> int | None:
    """The chosen checkpoint's step, or the newest's; None without any.

    Raises: FileNotFoundError, listing the steps there are, if the chosen one is none of them.
    """
    if chosen is not None and chosen not in steps(run):
        raise FileNotFoundError(f"{run} has no checkpoint of step {chosen}; it has those of {steps(run)}")
    return newest_step(run) if chosen is None else chosen


def set_newer_aside(run: Path, step: int) -> list[Path]:
    """Move the checkpoints newer than that of `step` to `RUN/set_aside`; where they are now. Every process calls it."""
    found, moved = steps(run), []
    if jax.process_index() == 0:
        for newer in reversed(found[found.index(step) + 1 :]):
            names = (f"{newer}.{count}" if count else str(newer) for count in itertools.count())
            moved.append(next(run / "set_aside" / name for name in names if not (run / "set_aside" / name).exists()))
            moved[-1].parent.mkdir(exist_ok=True)
            step_folder(run, newer).rename(moved[-1])
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("set_newer_aside")
    return moved


def best_step(run: Path) -> int:
    """The step of the checkpoint with the lowest validation loss, the newest of equals.

    Raises: FileNotFoundError if no checkpoint has a validation loss.
    """
    losses = {}
    for step in reversed(steps(run)):
        path = step_folder(run, step) / "metrics" / "metrics"
        if path.exists() and math.isfinite(loss := _validation_loss(json.loads(path.read_text()))):
            losses[step] = loss
    if not losses:
        raise FileNotFoundError(f"{run} has no checkpoint with a validation loss; train with --val.fraction=0.1, say")
    return min(losses, key=losses.__getitem__)


def _validation_loss(validation: Mapping[str, float]) -> float:
    """Infinite where there is none, or no number."""
    loss = validation.get("loss", math.nan)
    return loss if math.isfinite(loss) else math.inf


def newest_checkpoint(run: Path) -> Path:
    """The folder of the newest complete checkpoint. Raises: FileNotFoundError if there is none."""
    return find_checkpoint(run, None)


def find_checkpoint(run: Path, step: Step | None) -> Path:
    """The folder of the checkpoint of a step, of the best one, or of the newest. Raises: FileNotFoundError."""
    found = best_step(run) if step == "best" else step_to_resume(run, step)
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint; the run was stopped before its first save, train it again")
    return step_folder(run, found)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their place in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
