"""openpi's checkpoints ↔ ours. The modules that are called `convert…` alone know foreign parameter names.

    python -m pi0fast.convert from-openpi SRC OUT      SRC: an openpi checkpoint folder `<step>`, local or gs://
    python -m pi0fast.convert to-openpi RUN OUT        RUN: a run of ours; OUT: a new openpi checkpoint folder
    python -m pi0fast.convert from-lerobot SRC OUT     lerobot's policies: `pi0fast.convert_lerobot`
    python -m pi0fast.convert to-lerobot RUN OUT

openpi stores dead parameters too: the last layer's VLM query, output projection, MLP and its norm, and the VLM's final
norm, which no loss and no sample depends on. They are no part of our model; conversion carries them beside the run, so
that a round trip is bit-exact.

Flat dictionaries have openpi's paths joined by "/" as keys, e.g. `PaliGemma/llm/layers/mlp/linear`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, ArrayLike, DTypeLike

from pi0fast import checkpoint, fsdp, integrity, lora, normalize, robots, storage
from pi0fast.checkpoint import Checkpoints, RunConfig, Step
from pi0fast.cli import one_line_errors
from pi0fast.config import DType, Pi0Config, StateMode
from pi0fast.convert_rules import FINAL_NORM, Params, Rule, Shape, infer_config, rules
from pi0fast.normalize import NormStats
from pi0fast.params import flatten, replace
from pi0fast.pi0 import Pi0
from pi0fast.robots import Robot


def openpi_shapes(config: Pi0Config) -> dict[str, Shape]:
    """Every parameter of openpi's model of this config."""
    shapes = {FINAL_NORM: (config.vlm.width,)}
    for rule in rules(config):
        lead = (rule.depth,) if rule.depth else ()
        shapes |= {path: lead + shape for path, shape in rule.theirs.items()}
    return dict(sorted(shapes.items()))


def check(shapes: Mapping[str, Shape], config: Pi0Config) -> None:
    """Raises: ValueError, listing every missing, extra and misshaped parameter."""
    problems = storage.shape_problems(shapes, openpi_shapes(config))
    if problems:
        raise ValueError(
            f"{len(problems)} parameters do not fit this config; convert with the config they were trained with:\n  "
            + "\n  ".join(problems)
        )


def from_openpi(flat_params: Mapping[str, ArrayLike], config: Pi0Config) -> Pi0:
    """openpi's parameters → our model, dtypes kept.

    Raises:
        ValueError: listing every missing, extra and misshaped parameter.
    """
    check({path: np.shape(array) for path, array in flat_params.items()}, config)
    weights: Params = {}
    for rule in rules(config):
        weights |= rule.read([jnp.asarray(flat_params[path]) for path in rule.theirs])
    return replace(Pi0.abstract(config), weights)


def dead_params(flat_params: Mapping[str, Array], config: Pi0Config) -> Params:
    """What openpi stores and nothing depends on: last-layer slices, and the VLM's final norm; of those given."""
    dead = {path for rule in rules(config) if rule.peeled and not rule.last for path in rule.theirs}
    found = {path: flat_params[path][-1] for path in sorted(dead & set(flat_params))}
    return found | {path: array for path, array in flat_params.items() if path == FINAL_NORM}


def fitting_dead(dead: Mapping[str, Array], config: Pi0Config, *, updates: bool) -> Params:
    """Those dead parameters that a model of this config has too. updates: LoRA's among them; else they are others'."""
    shapes = openpi_shapes(config)
    return {
        path: array
        for path, array in dead.items()
        if array.shape == (shapes.get(path) if path == FINAL_NORM else shapes.get(path, ())[1:])
        and path in shapes
        and (updates or "lora_" not in path)
    }


def to_openpi(model: Pi0, dead: Mapping[str, Array] | None = None) -> Params:
    """Our model → openpi's parameters, dtypes kept; dead entries that are not given are zeros."""
    dead = dead or {}
    weights = {path: variable[...] for path, variable in flatten(model).items()}
    final_norm = dead.get(FINAL_NORM, jnp.zeros((model.config.vlm.width,), weights["embedding"].dtype))
    params = {FINAL_NORM: final_norm}
    for rule in rules(model.config):
        params |= rule.write(weights, dead)
    return dict(sorted(params.items()))


def load_openpi_checkpoint(path: str | Path, config: Pi0Config, mesh: Mesh | None = None) -> Pi0:
    """The model of an openpi checkpoint folder `<step>`, local or gs://, dtypes kept, sharded if a mesh is given.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: listing every missing, extra and misshaped parameter, before any is read.
    """
    return load_openpi_model_and_dead(path, config, mesh)[0]


def openpi_config(path: str | Path, dtype: DType = "bfloat16", **unseen: Any) -> Pi0Config:
    """The config of an openpi checkpoint, read off its shapes; unseen: what `infer_config` needs to be told.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: its parameters are no Pi0 or Pi0.5, listing those that are not.
    """
    shapes = _openpi_shapes_of(_folder(path))
    config = infer_config(shapes, dtype, **unseen)
    check(shapes, config)
    return config


def load_openpi_model_and_dead(
    path: str | Path, config: Pi0Config, mesh: Mesh | None = None, dtypes: Mapping[str, DTypeLike] | None = None
) -> tuple[Pi0, Params]:
    """As `load_openpi_checkpoint`, and the dead parameters, in shards too. dtypes: as `load_openpi_weights`."""
    weights, dead = load_openpi_weights(path, config, mesh, dtypes)
    return replace(Pi0.abstract(config), weights), dead


def load_openpi_weights(
    path: str | Path, config: Pi0Config, mesh: Mesh | None = None, dtypes: Mapping[str, DTypeLike] | None = None
) -> tuple[Params, Params]:
    """Our weights by path, and the dead parameters, of an openpi checkpoint; in shards if a mesh is given.

    dtypes: our path → the dtype of that weight.

    The rules are followed in groups. openpi's arrays of one group are read in shards that lie where ours will, made
    into ours there, and freed: only one group's shards exist twice. What the host holds `pi0fast.storage` says; the
    largest group is one weight, `vlm/layers/gate_up`, 4.8 of pi0_base's 13 GB in float32.

    Raises: as `load_openpi_checkpoint`.
    """
    folder = _folder(path) / "params"
    shapes = storage.array_shapes(folder)
    names = {_parameter(name): name for name in shapes}
    stored = {path: shapes[name] for path, name in names.items()}
    check({path: array.shape for path, array in stored.items()}, config)

    def read(places: Mapping[str, Sharding | None]) -> Params:
        shardings = {names[path]: place for path, place in places.items() if place is not None}
        arrays = storage.read_arrays(folder, {names[path]: stored[path] for path in places}, shardings)
        return {path: arrays[names[path]] for path in places}

    sizes = {path: storage.nbytes(array) for path, array in stored.items()}
    return follow(rules(config), config, mesh, dtypes or {}, sizes, read)


def follow(
    chosen: Sequence[Rule],
    config: Pi0Config,
    mesh: Mesh | None,
    dtypes: Mapping[str, DTypeLike],
    sizes: Mapping[str, int],
    read: Callable[[Mapping[str, Sharding | None]], Params],
) -> tuple[Params, Params]:
    """Our weights and the dead parameters by these rules. read: arrays of openpi's by path, each where it is told."""
    ours = {}
    if mesh is not None:
        ours = fsdp.weight_shardings(Pi0.abstract(config), mesh)
    by_name = {rule.ours: rule for rule in chosen}
    weights: Params = {}
    dead = dead_params(read({FINAL_NORM: mesh and NamedSharding(mesh, PartitionSpec())}), config)
    for group in integrity.groups({rule.ours: sum(sizes[path] for path in rule.theirs) for rule in chosen}):
        rules_of_group = [by_name[name] for name in group]
        theirs = {path: _source(rule, path, ours.get(rule.ours)) for rule in rules_of_group for path in rule.theirs}
        made = {path: ours.get(path) for rule in rules_of_group for path in (rule.ours, rule.last) if path}
        convert = jax.jit(partial(_follow, rules_of_group, config, dtypes), out_shardings=(made, None))
        read_weights, read_dead = jax.block_until_ready(convert(read(theirs)))
        weights |= read_weights
        dead |= read_dead
    return weights, dead


def _follow(
    chosen: Sequence[Rule], config: Pi0Config, dtypes: Mapping[str, DTypeLike], arrays: Params
) -> tuple[Params, Params]:
    """Our weights and the dead parameters of these rules."""
    weights = {}
    for rule in chosen:
        weights |= rule.read([arrays[path] for path in rule.theirs])
    return {path: x.astype(dtypes.get(path, x.dtype)) for path, x in weights.items()}, dead_params(arrays, config)


def load_openpi_params(path: str | Path | epath.Path) -> Params:
    """openpi's parameters from `<step>/params`, by path, dtypes kept, on the default device.

    Trees whose paths end in `/value`, as openpi's trainer writes them, and trees without, as released, are read.
    """
    arrays = storage.load_arrays(_folder(path) / "params")
    return {_parameter(name): array for name, array in arrays.items()}


def _openpi_shapes_of(folder: epath.Path) -> dict[str, Shape]:
    return {_parameter(name): stored.shape for name, stored in storage.array_shapes(folder / "params").items()}


def _folder(path: str | Path | epath.Path) -> epath.Path:
    folder = epath.Path(path).expanduser()
    return folder if "://" in str(path) else folder.absolute()


def _parameter(path: str) -> str:
    return path.removeprefix("params/").removesuffix("/value")


def _source(rule: Rule, path: str, ours: NamedSharding | None) -> NamedSharding | None:
    """Where one of openpi's arrays goes, so that our weight is made of what each device has; None: on one device.

    Where blocks of ours are not blocks of theirs, along theirs' longest axis that divides.
    """
    if ours is None or "fsdp" not in ours.spec:
        return ours
    shape = rule.theirs[path]
    size, lead = ours.mesh.shape["fsdp"], 1 if rule.depth else 0
    axes = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
    source = rule.source_axis(ours.spec.index("fsdp") - len(ours.spec))
    if source not in axes:
        source = max(axes, key=lambda axis: shape[axis], default=None)
    names: list[str | None] = [None] * (lead + len(shape))
    if source is not None:
        names[lead + source] = "fsdp"
    return NamedSharding(ours.mesh, PartitionSpec(*names))


def find_norm_stats(step: str | Path | epath.Path) -> dict[str, dict[str, NormStats]]:
    """The statistics under an openpi checkpoint's `assets`, by asset id (`name` or `owner/name`)."""
    assets = _folder(step) / "assets"
    files = sorted([*assets.glob("*/norm_stats.json"), *assets.glob("*/*/norm_stats.json")]) if assets.exists() else []
    return {str(file.parent.relative_to(assets)): normalize.load(file) for file in files}


def describe_openpi(
    src: str | Path,
    *,
    asset_id: str | None = None,
    action_horizon: int = 50,
    max_token_len: int | None = None,
    state_mode: StateMode | None = None,
    lora_alpha: float | None = None,
    dtype: DType = "bfloat16",
) -> tuple[Pi0Config, dict[str, NormStats]]:
    """What an openpi checkpoint holds, without reading its arrays; the options are those of `convert_from_openpi`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: its parameters are no Pi0 or Pi0.5, or whose statistics to take is not clear.
    """
    unseen = {} if max_token_len is None else {"max_token_len": max_token_len}
    config = openpi_config(
        src, dtype, action_horizon=action_horizon, state_mode=state_mode, lora_alpha=lora_alpha, **unseen
    )
    return config, _choose_stats(find_norm_stats(src), asset_id)


def convert_from_openpi(
    src: str,
    out: Path,
    *,
    action_horizon: int = 50,
    max_token_len: int | None = None,
    state_mode: StateMode | None = None,
    lora_alpha: float | None = None,
    dtype: DType = "bfloat16",
    asset_id: str | None = None,
    robot: str | None = None,
) -> None:
    """Make a run of an openpi checkpoint, for `--init-from` and for inference.

    Args:
        src: the folder `<step>` with `params` and `assets`, local or gs://.
        out: a new folder.
        action_horizon: what no parameter tells; 50 in openpi's base models, 10 in pi0_droid.
        max_token_len: of prompts; by default the released models', 48 for Pi0 and 200 for Pi0.5.
        state_mode: `unused` for Pi0.5 trained with `discrete_state_input=False`, as openpi's LIBERO configs are.
        lora_alpha: of LoRA updates; the rank by default, as in all of openpi's configs.
        dtype: of activations and matmuls. Weights keep the dtype that they are stored in.
        asset_id: whose statistics to take, where the checkpoint has those of several data sets.
        robot: name or YAML file; needed for inference, not for `--init-from`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    config, stats = describe_openpi(
        src,
        asset_id=asset_id,
        action_horizon=action_horizon,
        max_token_len=max_token_len,
        state_mode=state_mode,
        lora_alpha=lora_alpha,
        dtype=dtype,
    )
    model, dead = load_openpi_model_and_dead(src, config)
    weights = {path: variable[...] for path, variable in flatten(model).items()}
    save_run(out, config, robots.find_robot(robot) if robot else None, weights, dead, stats)


def convert_to_openpi(
    run: Path, out: Path, *, step: Step | None = None, asset_id: str = "pi0fast", merged: bool = False
) -> None:
    """Write a checkpoint of a run as an openpi checkpoint folder `<step>`.

    Args:
        run: the folder of a run.
        out: a new folder.
        step: of the checkpoint, or `best`, that with the lowest validation loss; by default the newest.
        asset_id: the name of the statistics under its `assets`.
        merged: add LoRA updates to their projections; else they are written by openpi's names, for a config of openpi's
            with the same ranks.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    model, dead, stats = load_model(run, step)
    params = to_openpi(lora.merge(model) if merged else model, dead)
    storage.save_arrays(out / "params", {f"params/{path}": array for path, array in params.items()})
    normalize.save(out / "assets" / asset_id / "norm_stats.json", stats)


def save_run(
    out: Path,
    config: Pi0Config,
    robot: Robot | None,
    weights: Mapping[str, Array],
    dead: Mapping[str, Array],
    stats: Mapping[str, NormStats],
) -> None:
    """Converted weights as a run with one checkpoint, of step 0."""
    RunConfig(config, robot, tokenizer="paligemma").save(out)
    storage.save_arrays(out / "dead", dead)
    with Checkpoints(out) as checkpoints:
        checkpoints.save(0, params=weights, norm_stats=stats)


def load_model(run: Path, step: Step | None = None) -> tuple[Pi0, Params, dict[str, NormStats]]:
    """The model, openpi's dead parameters and the statistics of a run's checkpoint, by default the newest."""
    found, config = checkpoint.find_checkpoint(run, step), RunConfig.load(run).model
    dead = storage.load_arrays(run / "dead") if (run / "dead").exists() else {}
    abstract = Pi0.abstract(config)
    return replace(abstract, checkpoint.load_item(found, "params")), dead, checkpoint.load_stats(found)


def _choose_stats(found: Mapping[str, dict[str, NormStats]], asset_id: str | None) -> dict[str, NormStats]:
    if asset_id is None and len(found) == 1:
        return next(iter(found.values()))
    if asset_id is None or asset_id not in found:
        raise ValueError(f"the checkpoint has statistics for {sorted(found)}; choose one with --asset-id")
    return found[asset_id]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import tyro

    from pi0fast import convert_lerobot

    tyro.extras.subcommand_cli_from_dict(
        {
            "from-openpi": convert_from_openpi,
            "to-openpi": convert_to_openpi,
            "from-lerobot": convert_lerobot.convert_from_lerobot,
            "to-lerobot": convert_lerobot.convert_to_lerobot,
        },
        prog="python -m pi0fast.convert",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
