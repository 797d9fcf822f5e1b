"""`--init-from`: another model's weights as the start of training.

The source is a run, or an openpi checkpoint folder. What it holds is kept, but for three things. Another robot may have
states and actions of another width: the projections of these are then initialised anew. The LoRA updates of an expert
are kept if the model has the very same ones; others are added to their projections. openpi's are taken to have alpha =
rank; `pi0fast.convert from-openpi --lora-alpha` first, where they have not. The model's own begin as new ones.

The source may also be PaliGemma's released checkpoint, an .npz file: the action expert and its head are then new.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike

from pi0fast import checkpoint, convert, convert_paligemma, fsdp, lora, storage
from pi0fast.checkpoint import RunConfig
from pi0fast.config import LoraConfig, Pi0Config
from pi0fast.params import flatten, replace
from pi0fast.pi0 import Pi0

Shapes = dict[str, tuple[int, ...]]

EXPERTS = ("vlm", "action_expert")
ROBOT_PARTS = ("head/action_in", "head/action_out", "head/state_in")  # as wide as the robot's actions and state


@dataclass(frozen=True)
class Start:
    """What a source gives a model.

    config: of the source's weights. merged: experts whose updates are added to their projections.
    fresh: paths of the model's weights that are initialised anew. parts: the modules that hold them, a whole expert by
        its name alone.
    """

    config: Pi0Config
    merged: tuple[str, ...]
    fresh: tuple[str, ...]
    parts: tuple[str, ...]

    def __str__(self) -> str:
        """One line each for what is merged and what is new; empty if all is as it was."""
        lines = [f"Merged into their projections: the LoRA updates of {', '.join(self.merged)}"] if self.merged else []
        if self.parts:
            lines.append(f"Initialised anew, not read: {', '.join(self.parts)}")
        return "\n".join(lines)


def plan(source: str, model_config: Pi0Config) -> Start:
    """What a start from `source` would keep, without reading an array.

    Raises:
        FileNotFoundError: it is no run, no openpi checkpoint, and no file.
        ValueError: listing every weight that does not fit the model, with both shapes.
    """
    if source.endswith(".npz"):
        given = set(convert_paligemma.paligemma_weights(source, model_config))
        fresh = tuple(path for path in _shapes(model_config) if path not in given)
        return Start(model_config.without_lora(), (), fresh, _parts(fresh, _shapes(model_config)))
    if (Path(source) / "model.safetensors").exists():
        raise ValueError(f"{source} is a policy of lerobot's; make a run of it: python -m pi0fast.convert from-lerobot")
    if not (Path(source) / "config.json").exists():
        if "://" not in source and not (Path(source) / "params").is_dir():
            raise FileNotFoundError(
                f"{source} is no run (config.json), no openpi checkpoint (params) and no .npz of PaliGemma; give the "
                "folder that --out named, or openpi's folder of one step"
            )
        if (Path(source) / "train_state").exists() and (Path(source) / "checksums").exists():
            raise ValueError(f"{source} is a checkpoint inside a run; give the run, {Path(source).parents[1]}")
        theirs = convert.openpi_config(source, model_config.dtype)
        if theirs.pi05 == model_config.pi05:  # which mode it was trained with, it does not tell
            theirs = dataclasses.replace(theirs, state_mode=model_config.state_mode)
    else:
        theirs = RunConfig.load(Path(source)).model
        storage.check_shapes(checkpoint.newest_checkpoint(Path(source)) / "params", _shapes(theirs))
    return compare(source, theirs, model_config)


def compare(source: str, theirs: Pi0Config, ours: Pi0Config) -> Start:
    """As `plan`, for a source of this config."""
    had, wanted = ({name: getattr(config, name).lora for name in EXPERTS} for config in (theirs, ours))
    other = [name for name in EXPERTS if not _same(had[name], wanted[name])]
    merged = tuple(name for name in other if had[name])
    found = _shapes(theirs.with_lora(*(None if name in merged else had[name] for name in EXPERTS)))
    expected = _shapes(ours)
    new_updates = {path for path in expected if lora.is_lora(path) and path.split("/")[0] in other}
    resized = [
        part
        for part in ROBOT_PARTS
        if any(path.startswith(f"{part}/") and expected.get(path, shape) != shape for path, shape in found.items())
    ]
    fresh = new_updates | {path for path in expected if path.rpartition("/")[0] in resized}
    problems = storage.shape_problems(_without(found, fresh), _without(expected, fresh)) + _hidden(theirs, ours)
    if problems:
        raise ValueError(
            f"{source} does not fit this model; use the preset and the settings it was trained with. Only actions, "
            "states and LoRA may differ:\n  " + "\n  ".join(problems)
        )
    in_order = tuple(path for path in expected if path in fresh)
    return Start(theirs, merged, in_order, _parts(in_order, expected))


def load(
    source: str, model_config: Pi0Config, mesh: Mesh, dtypes: Mapping[str, DTypeLike], seed: int
) -> tuple[Pi0, dict[str, Array]]:
    """The model that training starts with, sharded over the mesh, and openpi's dead parameters.

    dtypes: of each weight; updates are merged before the cast. seed: of what is initialised anew, as a run from scratch
    of that seed has it. Every process reads what its devices need once; `pi0fast.storage` and
    `convert.load_openpi_weights` say what host and devices hold meanwhile.

    Raises: as `plan`, before any array is read; CorruptCheckpointError.
    """
    start = plan(source, model_config)
    abstract, merged = Pi0.abstract(model_config), _projections(start)
    if source.endswith(".npz"):
        read = convert_paligemma.load_paligemma
    elif (Path(source) / "config.json").exists():
        read = _read_run
    else:
        read = convert.load_openpi_weights
    given, dead = read(source, start.config, mesh, _without(dtypes, merged))
    weights = {path: array for path, array in given.items() if path not in start.fresh}
    shardings = fsdp.weight_shardings(abstract, mesh)

    def merge(given: dict[str, Array]) -> dict[str, Array]:
        found = flatten(lora.merge(replace(Pi0.abstract(start.config), given), start.merged))
        return {path: found[path].get_value().astype(dtypes[path]) for path in merged}

    def initialize(key: Array) -> dict[str, Array]:
        made = flatten(Pi0(model_config, rngs=nnx.Rngs(key)))  # what is not returned is never computed
        return {path: made[path].get_value().astype(dtypes[path]) for path in start.fresh}

    if merged:
        weights |= jax.jit(merge, out_shardings={path: shardings[path] for path in merged})(given)
    if start.fresh:
        key = jax.random.key(seed)
        weights |= jax.jit(initialize, out_shardings={path: shardings[path] for path in start.fresh})(key)
    return replace(abstract, weights), convert.fitting_dead(dead, model_config, updates="vlm" not in start.merged)


def _projections(start: Start) -> set[str]:
    """The paths of those that an update is merged into."""
    updates = {path for path in _shapes(start.config) if path.split("/")[0] in start.merged and lora.is_lora(path)}
    return {path.rpartition("/")[0].removesuffix("_lora") for path in updates}


def _read_run(
    run: str, config: Pi0Config, mesh: Mesh, dtypes: Mapping[str, DTypeLike]
) -> tuple[dict[str, Array], dict[str, Array]]:
    dead = Path(run) / "dead"
    weights = checkpoint.load_item(
        checkpoint.newest_checkpoint(Path(run)),
        "params",
        shapes=_shapes(config),
        shardings=fsdp.weight_shardings(Pi0.abstract(config), mesh),
        dtypes=dtypes,
    )
    if not dead.exists():
        return weights, {}
    on_every_device = NamedSharding(mesh, PartitionSpec())
    shardings = dict.fromkeys(storage.array_shapes(dead), on_every_device)
    return weights, storage.load_arrays(dead, shardings=shardings)


def _shapes(config: Pi0Config) -> Shapes:
    return {path: variable.shape for path, variable in flatten(Pi0.abstract(config)).items()}


def _parts(fresh: tuple[str, ...], expected: Shapes) -> tuple[str, ...]:
    whole = {path.split("/")[0] for path in fresh} - {path.split("/")[0] for path in expected if path not in set(fresh)}
    parts = (path.split("/")[0] if path.split("/")[0] in whole else path.rpartition("/")[0] for path in fresh)
    return tuple(dict.fromkeys(parts))


def _without[T](by_path: Mapping[str, T], paths: set[str]) -> dict[str, T]:
    return {path: value for path, value in by_path.items() if path not in paths}


def _same(a: LoraConfig | None, b: LoraConfig | None) -> bool:
    """Whether the updates are the same functions of their factors; alpha = rank may be written or left out."""
    return a == b or (
        a is not None
        and b is not None
        and a.attention_scale == b.attention_scale
        and dataclasses.replace(a, alpha=None) == dataclasses.replace(b, alpha=None)
    )


def _hidden(theirs: Pi0Config, ours: Pi0Config) -> list[str]:
    """One line for each difference that the weights' shapes need not show."""
    values = {
        f"{part}.{name}": [getattr(getattr(config, part), name) for config in (theirs, ours)]
        for part, names in (("vlm", ("num_heads", "num_kv_heads", "head_dim")), ("siglip", ("num_heads",)))
        for name in names
    }
    lines = [f"{name} is {was}, expected {now}" for name, (was, now) in values.items() if was != now]
    if theirs.pi05 == ours.pi05 and theirs.state_mode != ours.state_mode:
        was, now = theirs.state_mode, ours.state_mode
        lines.append(f"state_mode is {was!r}, expected {now!r}; give --input.state-mode={was}")
    return lines
