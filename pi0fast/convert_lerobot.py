"""lerobot's policies on disk ↔ our runs: weights, sizes, and the statistics of its processors.

A policy is a folder: `model.safetensors`, `config.json`, and the two pipelines `policy_preprocessor.json` and
`policy_postprocessor.json`, whose normalisers keep their statistics in safetensors files of their own. lerobot has one
normaliser for states and actions and divides by std + 1e-8, or by q99 - q01, where openpi adds 1e-6.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pi0fast import convert, lora, storage
from pi0fast.checkpoint import RunConfig, Step
from pi0fast.config import BASE_CAMERAS, Pi0Config, TransformerConfig
from pi0fast.convert_lerobot_rules import (
    EMBEDDING,
    EXPERT_OUTPUT,
    HEADS,
    TIED,
    VISION_HEADS,
    Arrays,
    check,
    infer_config,
    plain_names,
    sources,
)
from pi0fast.convert_rules import FINAL_NORM, rules
from pi0fast.normalize import NormStats
from pi0fast.robots import Robot, find_robot

WEIGHTS = "model.safetensors"
IMAGES = "observation.images."
FEATURES = {"state": "observation.state", "actions": "action"}  # our statistics → lerobot's features
PERIODS = {"min_period": 4e-3, "max_period": 4.0}
VARIANTS = {(2048, 18, 16384): "gemma_2b", (1024, 18, 4096): "gemma_300m"}  # width, depth, mlp_dim
TOKENIZER = "google/paligemma-3b-pt-224"
UNUSED = "dead_lerobot"  # in a run: the action expert's output embedding


@dataclass(frozen=True)
class Policy:
    """What a folder of lerobot's holds besides its arrays.

    names: the tensors of `sources` → those of the file. stats: empty where its processors have none.
    delta_mask: as a robot's (`pi0fast.robots.Robot`); () where actions are absolute.
    """

    config: Pi0Config
    names: dict[str, str]
    stats: dict[str, NormStats]
    delta_mask: tuple[bool, ...]


def describe_lerobot(src: Path) -> Policy:
    """Without reading a weight.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no Pi0 or Pi0.5 that we compute the same, or a tensor is missing, extra or misshaped.
    """
    for name in ("config.json", WEIGHTS):
        if not (src / name).is_file():
            raise FileNotFoundError(f"{src} has no {name}; give the folder that lerobot's save_pretrained wrote")
    given = json.loads((src / "config.json").read_text())
    if given.get("type") not in ("pi0", "pi05"):
        raise ValueError(f"{src} is a policy of type {given.get('type')!r}; only pi0 and pi05 are read")
    _check_settings(given)
    pi05 = given["type"] == "pi05"
    with safe_open(src / WEIGHTS, "numpy") as file:
        names = plain_names(file.keys())
        shapes = {name: tuple(file.get_slice(theirs).get_shape()) for name, theirs in names.items()}
    config = infer_config(
        shapes,
        pi05=pi05,
        dtype=given.get("dtype", "float32"),
        action_horizon=given.get("chunk_size", 50),
        max_token_len=given.get("tokenizer_max_length", 200 if pi05 else 48),
    )
    check(shapes, config)
    cameras = tuple(
        name.removeprefix(IMAGES)
        for name, feature in (given.get("input_features") or {}).items()
        if feature["type"] == "VISUAL" and not name.startswith(f"{IMAGES}empty_camera_")
    )
    config = dataclasses.replace(config, cameras=cameras or BASE_CAMERAS)
    return Policy(config, names, _read_stats(src, pi05), _delta_mask(given))


def convert_from_lerobot(src: Path, out: Path, *, robot: str | None = None) -> None:
    """Make a run of a policy that lerobot saved, for `--init-from` and for inference.

    Args:
        src: the folder with `model.safetensors` and `config.json`.
        out: a new folder.
        robot: name or YAML file; needed for inference, not for `--init-from`. Its cameras are named as the policy's
            image features are, without `observation.images.`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    policy, found = describe_lerobot(src), find_robot(robot) if robot else None
    relative = list(policy.delta_mask)
    if found is None and relative:
        raise ValueError(
            f"{src}: its actions are relative to the state, which a run says by its robot; give --robot, with "
            f"delta_mask={relative}"
        )
    if found is not None and list(found.delta_mask if any(found.delta_mask) else ()) != relative:
        raise ValueError(
            f"robot {found.name!r} has delta_mask={list(found.delta_mask)}, the policy {relative}; give a robot whose "
            "actions are relative where the policy's are"
        )
    made, weights, dead = sources(policy.config), {}, {}
    with safe_open(src / WEIGHTS, "numpy") as file:

        def read(path: str) -> jnp.ndarray:
            tensors = {name: file.get_tensor(policy.names[name]) for name in made[path].tensors()}
            return jnp.asarray(made[path].read(tensors))

        for rule in rules(policy.config):
            arrays = {path: read(path) for path in rule.theirs}
            weights |= rule.read(list(arrays.values()))
            dead |= convert.dead_params(arrays, policy.config)
        dead |= convert.dead_params({FINAL_NORM: read(FINAL_NORM)}, policy.config)
        convert.save_run(out, policy.config, found, weights, dead, policy.stats)
        if EXPERT_OUTPUT in policy.names:
            output = jnp.asarray(file.get_tensor(policy.names[EXPERT_OUTPUT]))
            storage.save_arrays(out / UNUSED, {EXPERT_OUTPUT: output})
    if not policy.stats:
        print(f"{src} has no statistics: {out} serves as --init-from, not for inference")


def convert_to_lerobot(run: Path, out: Path, *, step: Step | None = None) -> None:
    """Write a checkpoint of a run as a policy that lerobot's `from_pretrained` loads.

    LoRA updates are merged. The host holds the weights twice.

    Args:
        run: the folder of a run.
        out: a new folder.
        step: of the checkpoint, or `best`, that with the lowest validation loss; by default the newest.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; convert into a new folder")
    settings = RunConfig.load(run)
    config = settings.model.without_lora()
    _check_representable(config)
    model, dead, stats = convert.load_model(run, step)
    weights = convert.to_openpi(lora.merge(model), dead)
    made, tensors = sources(config), {}
    for path in list(weights):
        tensors |= made[path].write(np.asarray(weights.pop(path)))
    tensors[TIED] = tensors.pop(EMBEDDING)
    if (run / UNUSED).exists():
        tensors[EXPERT_OUTPUT] = np.asarray(storage.load_arrays(run / UNUSED)[EXPERT_OUTPUT])
    else:
        shape = (config.vocab_size, config.action_expert.width)
        tensors[EXPERT_OUTPUT] = np.zeros(shape, tensors[TIED].dtype)
    given = _settings(config, settings.robot, stats)
    out.mkdir(parents=True)
    _write_json(out / "config.json", given)
    _write_processors(out, given, settings.robot, stats)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
    if not {_size(config.vlm), _size(config.action_expert)} <= set(VARIANTS):
        print("lerobot has no variant of these sizes: its own classes need a get_gemma_config that knows them")


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_settings(given: Mapping[str, Any]) -> None:
    for name, ours in PERIODS.items():
        if given.get(name, ours) != ours:
            raise ValueError(f"{name}={given[name]} of the time embedding is not supported; only {ours} is")
    state, action = given.get("max_state_dim", 32), given.get("max_action_dim", 32)
    if given["type"] == "pi0" and state != action:
        raise ValueError(
            f"max_state_dim={state} is not max_action_dim={action}; a model here pads states and actions to one width"
        )


def _check_representable(config: Pi0Config) -> None:
    heads = config.vlm.num_heads, config.siglip.num_heads
    if heads != (HEADS, VISION_HEADS):
        raise ValueError(
            f"lerobot's Pi0 has {HEADS} heads and its SigLIP {VISION_HEADS}, this model {heads[0]} and {heads[1]}; "
            "export it with to-openpi"
        )
    if config.state_mode == "unused":
        raise ValueError(
            "lerobot's Pi0.5 always has the state in its prompt, this model never (state_mode='unused'); export it "
            "with to-openpi"
        )
    if config.dtype == "float16":
        raise ValueError("lerobot's Pi0 computes in float32 or bfloat16, this model in float16; export with to-openpi")


def _settings(config: Pi0Config, robot: Robot | None, stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """lerobot's config.json; what it leaves out, lerobot has as we do."""
    modes = dict.fromkeys(("STATE", "ACTION"), _mode(config.pi05))
    dims = {key: stats[key].dim if key in stats else config.action_dim for key in FEATURES}
    mask = robot.delta_mask if robot else ()
    return {
        "type": "pi05" if config.pi05 else "pi0",
        "paligemma_variant": VARIANTS.get(_size(config.vlm), "gemma_2b"),
        "action_expert_variant": VARIANTS.get(_size(config.action_expert), "gemma_300m"),
        "dtype": config.dtype,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "image_resolution": [config.image_size] * 2,
        "tokenizer_max_length": config.max_token_len,
        "normalization_mapping": {"VISUAL": "IDENTITY", **modes},
        "input_features": {
            "observation.state": {"type": "STATE", "shape": [dims["state"]]},
            **{
                f"{IMAGES}{camera}": {"type": "VISUAL", "shape": [3, *[config.image_size] * 2]}
                for camera in config.cameras
            },
        },
        "output_features": {"action": {"type": "ACTION", "shape": [dims["actions"]]}},
        "use_relative_actions": any(mask),
        "relative_exclude_joints": [f"[{i}]" for i, relative in enumerate(mask) if not relative],
        "action_feature_names": [f"[{i}]" for i in range(len(mask))] or None,
    }


def _delta_mask(given: Mapping[str, Any]) -> tuple[bool, ...]:
    """As lerobot's RelativeActionsProcessorStep makes it: a name that holds an excluded one is absolute."""
    if not given.get("use_relative_actions"):
        return ()
    action = (given.get("output_features") or {}).get("action")
    dim = action["shape"][0] if action else given.get("max_action_dim", 32)
    names = given.get("action_feature_names")
    excluded = [name.lower() for name in given.get("relative_exclude_joints") or [] if name]
    if names is None:
        return (True,) * dim
    mask = [not any(token in name.lower() for token in excluded) for name in names[:dim]]
    return (*mask, *[True] * (dim - len(mask)))


def _size(expert: TransformerConfig) -> tuple[int, int, int]:
    return expert.width, expert.depth, expert.mlp_dim


def _mode(pi05: bool) -> str:
    return "QUANTILES" if pi05 else "MEAN_STD"


# ── Processors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_stats(src: Path, pi05: bool) -> dict[str, NormStats]:
    """Of both processors, which must agree; {} where they have none."""
    before = _step_stats(src, "policy_preprocessor", "normalizer_processor", pi05)
    after = _step_stats(src, "policy_postprocessor", "unnormalizer_processor", pi05)
    for name in before.keys() & after.keys():
        if not np.array_equal(before[name], after[name]):
            raise ValueError(f"{src}: its processors hold different statistics in {name}; make them one")
    tensors, stats = before | after, {}
    needed = ("q01", "q99") if pi05 else ("mean", "std")
    neutral = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}  # of what this model does not use
    for key, feature in FEATURES.items():
        if not any(name.startswith(f"{feature}.") for name in tensors):
            continue
        if missing := [name for name in needed if f"{feature}.{name}" not in tensors]:
            raise ValueError(f"{src}: the statistics of {feature} have no {missing}, by which this model normalises")
        like = tensors[f"{feature}.{needed[0]}"]
        stats[key] = NormStats(
            **{
                field.name: tensors.get(f"{feature}.{field.name}", np.full(like.shape, neutral[field.name]))
                for field in fields(NormStats)
            }
        )
    return stats


def _step_stats(src: Path, pipeline: str, step: str, pi05: bool) -> Arrays:
    path = src / f"{pipeline}.json"
    steps = json.loads(path.read_text())["steps"] if path.is_file() else []
    found = next((entry for entry in steps if entry.get("registry_name") == step and "state_file" in entry), None)
    if found is None:
        return {}
    tensors = load_file(src / found["state_file"])
    for kind, feature in (("STATE", "observation.state"), ("ACTION", "action")):
        mode = found["config"]["norm_map"].get(kind, "IDENTITY")
        if mode != _mode(pi05) and any(name.startswith(f"{feature}.") for name in tensors):
            raise ValueError(
                f"{path} normalises {kind} by {mode}, and {'Pi0.5' if pi05 else 'Pi0'} here by {_mode(pi05)}; remove "
                "the file to convert the weights alone, and train them with statistics of that kind"
            )
    return tensors


def _write_processors(out: Path, given: Mapping[str, Any], robot: Robot | None, stats: Mapping[str, NormStats]) -> None:
    """The steps of lerobot's make_pi0_pre_post_processors and make_pi05_pre_post_processors."""
    pi05, relative = given["type"] == "pi05", given["use_relative_actions"]
    tensors = {
        f"{feature}.{field.name}": getattr(stats[key], field.name)
        for key, feature in FEATURES.items()
        if key in stats
        for field in fields(NormStats)
    }
    normalizer = {"eps": 1e-8, "norm_map": given["normalization_mapping"]}
    relative_step = {
        "enabled": relative,
        "exclude_joints": given["relative_exclude_joints"],
        "action_names": given["action_feature_names"],
    }
    tokenizer = {
        "max_length": given["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": TOKENIZER,
    }
    cameras = robot.cameras if robot else {}
    renamed = {key: f"{IMAGES}{camera}" for camera, key in cameras.items() if key != f"{IMAGES}{camera}"}
    first = [("rename_observations_processor", {"rename_map": renamed}), ("to_batch_processor", {})]
    relative_actions = ("relative_actions_processor", relative_step)
    normalize = ("normalizer_processor", normalizer | {"features": given["input_features"] | given["output_features"]})
    tokenize = ("tokenizer_processor", tokenizer)
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    if pi05:
        state = ("pi05_prepare_state_tokenizer_processor_step", {})
        before = [*first, relative_actions, normalize, state, tokenize, device]
    else:
        before = [*first, ("pi0_new_line_processor", {}), tokenize, device, relative_actions, normalize]
    after = [
        ("unnormalizer_processor", normalizer | {"features": given["output_features"]}),
        ("absolute_actions_processor", {"enabled": relative}),
        device,
    ]
    for pipeline, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        entries = [{"registry_name": name, "config": step} for name, step in steps]
        for index, entry in enumerate(entries):
            name = entry["registry_name"]
            if tensors and name in ("normalizer_processor", "unnormalizer_processor"):
                entry["state_file"] = f"{pipeline}_step_{index}_{name}.safetensors"
                save_file(tensors, out / entry["state_file"])
        _write_json(out / f"{pipeline}.json", {"name": pipeline, "steps": entries})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
