"""A run on disk, and its checkpoints.

    RUN/config.json                      what the model, the robot and the training are
    RUN/metrics.jsonl                    one line per logged step
    RUN/checkpoints/<step>/params        the weights that inference uses (the average, when there is one)
    RUN/checkpoints/<step>/train_state   what else training needs to go on: step, optimizer state, raw weights
    RUN/checkpoints/<step>/loader        the position in the data
    RUN/checkpoints/<step>/assets        normalisation statistics
    RUN/dead                             openpi's dead parameters, where the run began from an openpi checkpoint

orbax saves asynchronously into a temporary folder and renames it when complete, so a checkpoint is whole or absent. It
stores global arrays; a checkpoint restores onto any mesh.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, DTypeLike

from pi0fast import config as configs
from pi0fast import normalize
from pi0fast.config import Pi0Config
from pi0fast.normalize import NormStats
from pi0fast.robots import Robot


@dataclass(frozen=True)
class RunConfig:
    """What a run is, as `config.json` holds it.

    robot: None in a checkpoint converted from openpi, which does not say.
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
        """Raises: FileNotFoundError if the folder is not a run."""
        path = run / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{run} is not a run: it has no config.json; give the folder that --out named")
        fields = json.loads(path.read_text())
        return RunConfig(
            model=configs.from_dict(fields["model"]),
            robot=fields["robot"] and Robot.from_dict(fields["robot"]),
            tokenizer=fields["tokenizer"],
            train=fields["train"],
        )


class Checkpoints:
    """The checkpoints of one run.

    keep_last: how many of the newest are kept; keep_every: those at multiples of it are kept for good.
    """

    def __init__(self, run: Path, *, keep_last: int = 2, keep_every: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train_state": ocp.StandardCheckpointHandler(),
            "loader": ocp.JsonCheckpointHandler("position.json"),
            "assets": ocp.JsonCheckpointHandler("norm_stats.json"),
        }
        self._manager = ocp.CheckpointManager(run.absolute() / "checkpoints", options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        *,
        params: Mapping[str, Array],
        norm_stats: Mapping[str, NormStats],
        train_state: Any = None,
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies the arrays off the device, then writes in the background.

        params: weights by path. A checkpoint without train_state and loader serves inference and a new run only.
        """
        items = {
            "params": ocp.args.StandardSave(_nest(params)),
            "assets": ocp.args.JsonSave(normalize.to_dict(norm_stats)),
        }
        if train_state is not None and loader is not None:
            items["train_state"] = ocp.args.StandardSave(_leaves(train_state))
            items["loader"] = ocp.args.JsonSave(dict(loader))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, step: int, params: Mapping[str, jax.ShapeDtypeStruct], train_state: Any
    ) -> tuple[dict[str, Array], Any, dict[str, Any]]:
        """params, train_state and loader position; the first two as abstract arrays that say where they go."""
        leaves = _leaves(train_state)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_nest(params)),
                train_state=ocp.args.StandardRestore(leaves),
                loader=ocp.args.JsonRestore(),
            ),
        )
        restored = jax.tree.unflatten(jax.tree.structure(train_state), [items["train_state"][key] for key in leaves])
        return _flat(items["params"]), restored, items["loader"]

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _quiet(record: logging.LogRecord) -> bool:
    """orbax warns that a folder of arrays is not a whole checkpoint of its own; here it never is."""
    return "Metadata file does not exist" not in record.getMessage()


logging.getLogger("absl").addFilter(_quiet)


def array_shapes(folder: epath.Path | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays saved in a folder, by path. Raises: FileNotFoundError if there are none."""
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(f"{folder} holds no orbax arrays (no _METADATA); is it a checkpoint that was cut off?")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _flat(tree).items()}


def check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: ValueError, listing every array of the folder that is missing, extra or of another shape."""
    problems = shape_problems({path: stored.shape for path, stored in array_shapes(folder).items()}, expected)
    if problems:
        raise ValueError(
            f"{folder} does not fit this model; use the preset it was trained with:\n  " + "\n  ".join(problems)
        )


def shape_problems(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each array that is missing, extra or of another shape."""
    return [
        *(f"missing: {path} {shape}" for path, shape in expected.items() if path not in found),
        *(f"extra: {path} {tuple(shape)}" for path, shape in found.items() if path not in expected),
        *(
            f"misshaped: {path} is {tuple(found[path])}, expected {shape}"
            for path, shape in expected.items()
            if path in found and tuple(found[path]) != shape
        ),
    ]


def load_arrays(
    folder: epath.Path | Path,
    *,
    shardings: Mapping[str, Sharding] | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
) -> dict[str, Array]:
    """Arrays by path, each read straight to where it goes (the default device without `shardings`).

    dtypes: cast to these while reading; a path that is left out keeps its stored dtype.
    """
    default = SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(
            stored.shape,
            (dtypes or {}).get(path, stored.dtype),
            sharding=shardings[path] if shardings is not None else default,
        )
        for path, stored in array_shapes(folder).items()
    }
    tree = _nest(abstract)
    args = ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    with ocp.PyTreeCheckpointer() as checkpointer:
        return _flat(checkpointer.restore(folder.absolute(), args=args))


def save_arrays(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Arrays by path; the folder is there when all of it is."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(_nest(arrays)))


def newest_step(run: Path) -> int | None:
    """The newest complete checkpoint's step. orbax renames a checkpoint to its step once it is whole."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def newest_checkpoint(run: Path) -> Path:
    """The folder of the newest complete checkpoint. Raises: FileNotFoundError if there is none."""
    step = newest_step(run)
    if step is None:
        raise FileNotFoundError(f"{run} has no checkpoint; the run was stopped before its first save, train it again")
    return step_folder(run, step)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step)


def stats_path(checkpoint: Path) -> Path:
    """The normalisation statistics of a checkpoint."""
    return checkpoint / "assets" / "norm_stats.json"


def _nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return nnx.traversals.unflatten_mapping(dict(arrays), sep="/")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return nnx.traversals.flatten_mapping(tree, sep="/")


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their place in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
