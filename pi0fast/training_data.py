"""The trainer's batches: opened, placed on devices, and described before there are any."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pi0fast import checkpoint, norm_stats, normalize, validation
from pi0fast import mesh as meshes
from pi0fast.config import Pi0Config
from pi0fast.data import demo_dataset
from pi0fast.data.lerobot_format import LeRobotFiles, find_dataset
from pi0fast.data.lerobot_source import LeRobotSource
from pi0fast.data.loader import Loader
from pi0fast.normalize import NormStats
from pi0fast.robots import find_robot
from pi0fast.settings import Settings
from pi0fast.tokenizer import PromptTokenizer, padded_len, resolve_tokenizer
from pi0fast.transforms import SampleTransform

DEMO_DATA = Path("data/demo")
DEMO_EPISODES = 1000


@dataclass(frozen=True)
class TrainingData:
    """What one process trains on.

    loader: its part of the batches. held_out: its part of the validation's, where episodes are held out.
    transform: from a sample to the model's inputs. stats: what those are normalised with, by key.
    """

    loader: Loader
    held_out: Loader | None
    transform: SampleTransform
    stats: dict[str, NormStats]


def open_data(settings: Settings, model: Pi0Config, resumed: Path | None = None) -> TrainingData:
    """The data set of `settings`. resumed: the checkpoint that training goes on from, for its statistics; without one
    they are those of the whole data set, computed once.

    Raises: ValueError, OSError: data that are not there, not of this robot, or with prompts that are too long.
    """
    robot = find_robot(settings.robot)
    data = settings.data
    if data is None:
        if robot.name != "demo":
            raise ValueError(f"--robot={settings.robot} needs --data; without --data the demo's own data set is used")
        data = str(demo_dataset.find_or_write(DEMO_DATA, DEMO_EPISODES))
    files = LeRobotFiles(find_dataset(data))
    val = settings.val
    held_out = validation.held_out(files.info["total_episodes"], val.fraction) if val.fraction else set()
    source = LeRobotSource(
        files.root,
        robot,
        model.action_horizon,
        model.image_size,
        on_bad_sample=settings.input.on_bad_sample,
        cache_bytes=int(settings.input.cache_gib * (1 << 30)),
    )
    stats_path = norm_stats.norm_stats_path(source.root, robot, model.action_horizon)
    if resumed is None and not stats_path.exists():
        computed = norm_stats.compute_norm_stats(source.root, robot, model.action_horizon, settings.input.on_bad_sample)
        normalize.save(stats_path, computed)
    stats = normalize.load(stats_path) if resumed is None else checkpoint.load_stats(resumed)
    tokenizer = PromptTokenizer(resolve_tokenizer(settings.input.tokenizer), model.max_token_len)
    prompt_len = find_prompt_len(settings.input.prompt_len, tokenizer, source, model)
    transform = SampleTransform(model, robot, stats, tokenizer, settings.input.max_normalized, prompt_len)
    load = partial(Loader, transform=transform, process_index=jax.process_index(), process_count=jax.process_count())
    training = source.part(set(range(source.num_episodes)) - held_out) if held_out else source
    loader = load(training, batch_size=settings.batch_size, seed=settings.seed, workers=settings.input.workers)
    held_out_loader = None
    if held_out:
        microbatch = settings.batch_size // settings.accum
        held_out_loader = load(source.part(held_out), batch_size=microbatch, seed=val.seed)
    return TrainingData(loader, held_out_loader, transform, stats)


def find_prompt_len(asked: int | None, tokenizer: PromptTokenizer, source: LeRobotSource, model: Pi0Config) -> int:
    """Prompt tokens to compute: what was asked for, or what the data's longest prompt is padded to.

    Raises: ValueError if that is longer than what was asked for.
    """
    longest = tokenizer.longest(source.prompts.values(), source.state_dim if model.state_mode == "prompt" else None)
    if asked is None:
        return padded_len(longest, model.max_token_len)
    if asked < longest:
        raise ValueError(f"--input.prompt-len={asked}: the data's prompts take up to {longest} tokens; raise it")
    return asked


def to_device(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This process's part of a batch → global arrays, their first axis over the mesh."""
    batch = {**batch, "example": batch["example"].astype(np.uint32)}
    sharding = meshes.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def abstract_batch(
    model_config: Pi0Config, batch_size: int, cameras: Sequence[str], mesh: Mesh, prompt_len: int | None = None
) -> dict[str, Any]:
    """A batch of the trainer's: shapes, dtypes, and where they lie. prompt_len: the longest by default."""

    def array(*shape: int, dtype: Any = np.float32):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=meshes.batch_sharding(mesh))

    size, prompt = model_config.image_size, prompt_len or model_config.max_token_len
    return {
        "images": {camera: array(size, size, 3, dtype=np.uint8) for camera in cameras},
        "image_masks": {camera: array(dtype=np.bool_) for camera in cameras},
        "state": array(model_config.action_dim),
        "tokenized_prompt": array(prompt, dtype=np.int32),
        "tokenized_prompt_mask": array(prompt, dtype=np.bool_),
        "actions": array(model_config.action_horizon, model_config.action_dim),
        "action_is_pad": array(model_config.action_horizon, dtype=np.bool_),
        "example": array(dtype=np.uint32),
    }
