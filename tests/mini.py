"""A model with weights of a few kilobytes, which compiles in seconds, and batches of random samples for it.

As a program, the trainer's command line with `pi0_tiny` standing for that model.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from pi0fast import config
from pi0fast.config import Pi0Config, SiglipConfig, TransformerConfig

MINI = dataclasses.replace(
    config.pi0_tiny(),
    vlm=TransformerConfig(width=32, depth=2, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=16),
    action_expert=TransformerConfig(width=32, depth=2, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=16),
    siglip=SiglipConfig(width=32, depth=1, mlp_dim=48, num_heads=2, patch_size=14),
)


def batches(model: Pi0Config, batch_size: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Global batches as the loader gives them: prompts of any length, some images missing, some actions padded."""
    rng = np.random.default_rng(seed)
    first = 0
    while True:
        lengths = rng.integers(1, model.max_token_len + 1, batch_size)
        mask = np.arange(model.max_token_len) < lengths[:, None]
        pads = np.arange(model.action_horizon) >= rng.integers(1, model.action_horizon + 1, batch_size)[:, None]
        size = (batch_size, model.image_size, model.image_size, 3)
        yield {
            "images": {camera: rng.integers(0, 256, size, np.uint8) for camera in model.cameras},
            "image_masks": {camera: rng.random(batch_size) < 0.8 for camera in model.cameras},
            "state": rng.normal(size=(batch_size, model.action_dim)).astype(np.float32),
            "tokenized_prompt": np.where(mask, rng.integers(0, model.vocab_size, mask.shape), 0).astype(np.int32),
            "tokenized_prompt_mask": mask,
            "actions": rng.normal(size=(batch_size, model.action_horizon, model.action_dim)).astype(np.float32),
            "action_is_pad": pads,
            "example": np.arange(first, first + batch_size),
        }
        first += batch_size


if __name__ == "__main__":
    from pi0fast import train

    config.PRESETS["pi0_tiny"] = lambda: MINI
    train.main(sys.argv[1:])
