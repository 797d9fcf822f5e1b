"""openpi's checkpoints ↔ ours. This module and `convert_rules` alone know foreign parameter names.

    python -m pi0fast.convert from-openpi SRC OUT      SRC: an openpi checkpoint folder `<step>`, local or gs://
    python -m pi0fast.convert to-openpi RUN OUT        RUN: a run of ours; OUT: a new openpi checkpoint folder

openpi stores dead parameters too: the last layer's VLM query, output projection, MLP and its norm, and the VLM's final
norm, which no loss and no sample depends on. They are no part of our model; conversion carries them beside the run, so
that a round trip is bit-exact.

Flat dictionaries have openpi's paths joined by "/" as keys, e.g. `PaliGemma/llm/layers/mlp/linear`.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, ArrayLike

from pi0fast import checkpoint, fsdp, normalize, robots
from pi0fast.checkpoint import Checkpoints, RunConfig
from pi0fast.config import DType, Pi0Config
from pi0fast.convert_rules import FINAL_NORM, Params, Shape, infer_config, rules
from pi0fast.normalize import NormStats
from pi0fast.params import flatten, replace
from pi0fast.pi0 import Pi0


def openpi_shapes(config: Pi0Config) -> dict[str, Shape]:
    """Every parameter of openpi's model of this config."""
    shapes = {FINAL_NORM: (config.vlm.width,)}
    for rule in rules(config):
        lead = (rule.depth,) if rule.depth else ()
        shapes |= {path: lead + shape for path, shape in rule.theirs.items()}
    return dict(sorted(shapes.items()))


def check(shapes: Mapping[str, Shape], config: Pi0Config) -> None:
    """Raises: ValueError, listing every missing, extra and misshaped parameter."""
    problems = checkpoint.shape_problems(shapes, openpi_shapes(config))
    if problems:
        raise ValueError(
            f"{len(problems)} parameters do not fit this config; convert with the config they were trained with:\n  "
            + "\n  ".join(problems)
        )


def from_openpi(
    flat_params: Mapping[str, ArrayLike], config: Pi0Config, shardings: Mapping[str, Sharding] | None = None
) -> Pi0:
    """openpi's parameters → our model, dtypes kept.

    shardings: our path → where that weight goes; the default device without it.

    Raises:
        ValueError: listing every missing, extra and misshaped parameter.
    """
    check({path: np.shape(array) for path, array in flat_params.items()}, config)
    weights: Params = {}
    for rule in rules(config):
        arrays = [jnp.asarray(flat_params[path]) for path in rule.theirs]
        if shardings is None:
            weights |= rule.read(arrays)
        else:
            out = {path: shardings[path] for path in (rule.ours, rule.last) if path}
            weights |= jax.jit(rule.read, out_shardings=out)(arrays)
    return replace(nnx.eval_shape(lambda: Pi0(config, rngs=nnx.Rngs(0))), weights)


def dead_params(flat_params: Mapping[str, Array], config: Pi0Config) -> Params:
    """What openpi stores and nothing depends on: last-layer slices, and the VLM's final norm."""
    dead = {path for rule in rules(config) if rule.peeled and not rule.last for path in rule.theirs}
    return {path: flat_params[path][-1] for path in sorted(dead)} | {FINAL_NORM: flat_params[FINAL_NORM]}


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


def load_openpi_model_and_dead(path: str | Path, config: Pi0Config, mesh: Mesh | None = None) -> tuple[Pi0, Params]:
    """As `load_openpi_checkpoint`, and the dead parameters."""
    folder = _folder(path)
    check(_openpi_shapes_of(folder), config)
    flat = load_openpi_params(folder, mesh)
    shardings = None
    if mesh is not None:
        shardings = fsdp.weight_shardings(nnx.eval_shape(lambda: Pi0(config, rngs=nnx.Rngs(0))), mesh)
    return from_openpi(flat, config, shardings), dead_params(flat, config)


def load_openpi_params(path: str | Path | epath.Path, mesh: Mesh | None = None) -> Params:
    """openpi's parameters from `<step>/params`, by path, dtypes kept, each spread over the mesh where it divides.

    Trees whose paths end in `/value`, as openpi's trainer writes them, and trees without, as released, are read.
    """
    folder = _folder(path) / "params"
    shardings = None
    if mesh is not None:
        shardings = {path: _spread(stored.shape, mesh) for path, stored in checkpoint.array_shapes(folder).items()}
    return {_parameter(path): array for path, array in checkpoint.load_arrays(folder, shardings=shardings).items()}


def _openpi_shapes_of(folder: epath.Path) -> dict[str, Shape]:
    return {_parameter(path): stored.shape for path, stored in checkpoint.array_shapes(folder / "params").items()}


def _folder(path: str | Path | epath.Path) -> epath.Path:
    folder = epath.Path(path).expanduser()
    return folder if "://" in str(path) else folder.absolute()


def _parameter(path: str) -> str:
    return path.removeprefix("params/").removesuffix("/value")


def _spread(shape: Shape, mesh: Mesh) -> NamedSharding:
    """Along the longest axis that divides, so that no device holds a whole large array."""
    size = mesh.shape["fsdp"]
    axes = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
    names: list[str | None] = [None] * len(shape)
    if axes and len(shape) > 1:
        names[max(axes, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*names))


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
    dtype: DType = "bfloat16",
) -> tuple[Pi0Config, dict[str, NormStats]]:
    """What an openpi checkpoint holds, without reading its arrays; the options are those of `convert_from_openpi`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: its parameters are no Pi0 or Pi0.5, or whose statistics to take is not clear.
    """
    folder = _folder(src)
    shapes = _openpi_shapes_of(folder)
    unseen = {} if max_token_len is None else {"max_token_len": max_token_len}
    config = infer_config(shapes, dtype, action_horizon=action_horizon, **unseen)
    check(shapes, config)
    return config, _choose_stats(find_norm_stats(folder), asset_id)


def convert_from_openpi(
    src: str,
    out: Path,
    *,
    action_horizon: int = 50,
    max_token_len: int | None = None,
    dtype: DType = "bfloat16",
    asset_id: str | None = None,
    robot: str | None = None,
) -> None:
    """Make a run of an openpi checkpoint, for `--init-from` and for inference.

    src: the folder `<step>` with `params` and `assets`, local or gs://.
    out: a new folder.
    action_horizon, max_token_len: what no parameter tells; the released models' by default (48 tokens for Pi0, 200 for
        Pi0.5).
    dtype: of activations and matmuls. Weights keep the dtype that they are stored in.
    asset_id: whose statistics to take, where the checkpoint has those of several data sets.
    robot: name or YAML file; needed for inference, not for `--init-from`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    config, stats = describe_openpi(
        src, asset_id=asset_id, action_horizon=action_horizon, max_token_len=max_token_len, dtype=dtype
    )
    model, dead = load_openpi_model_and_dead(src, config)
    RunConfig(config, robots.find_robot(robot) if robot else None, tokenizer="paligemma").save(out)
    checkpoint.save_arrays(out / "dead", dead)
    checkpoints = Checkpoints(out)
    checkpoints.save(0, params={path: variable[...] for path, variable in flatten(model).items()}, norm_stats=stats)
    checkpoints.close()


def convert_to_openpi(run: Path, out: Path, *, asset_id: str = "pi0fast") -> None:
    """Write the newest checkpoint of a run as an openpi checkpoint folder `<step>`.

    out: a new folder. asset_id: the name of the statistics under its `assets`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    step = checkpoint.newest_checkpoint(run)
    config = RunConfig.load(run).model
    weights = checkpoint.load_arrays(step / "params")
    dead = checkpoint.load_arrays(run / "dead") if (run / "dead").exists() else None
    model = replace(nnx.eval_shape(lambda: Pi0(config, rngs=nnx.Rngs(0))), weights)
    params = to_openpi(model, dead)
    checkpoint.save_arrays(out / "params", {f"params/{path}": array for path, array in params.items()})
    normalize.save(out / "assets" / asset_id / "norm_stats.json", normalize.load(checkpoint.stats_path(step)))


def _choose_stats(found: Mapping[str, dict[str, NormStats]], asset_id: str | None) -> dict[str, NormStats]:
    if asset_id is None and len(found) == 1:
        return next(iter(found.values()))
    if asset_id is None or asset_id not in found:
        raise ValueError(f"the checkpoint has statistics for {sorted(found)}; choose one with --asset-id")
    return found[asset_id]


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"from-openpi": convert_from_openpi, "to-openpi": convert_to_openpi})
