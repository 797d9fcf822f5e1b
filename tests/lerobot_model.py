"""lerobot's PyTorch Pi0 and Pi0.5 in any size, without downloads, and our observations as it takes them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from jaxtyping import Array

from pi0fast import Observation
from pi0fast.config import Pi0Config
from pi0fast.observation import image_to_float


def modeling(sizes: Pi0Config) -> ModuleType:
    """lerobot's module of the model."""
    name = "pi05" if sizes.pi05 else "pi0"
    return importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")


@contextmanager
def resized(sizes: Pi0Config) -> Iterator[None]:
    """Meanwhile lerobot builds models in sizes that its own configuration has no fields for.

    sizes: with 8 heads, which lerobot's code takes for granted; its dtype float32 or bfloat16.
    """
    module = modeling(sizes)
    real, real_expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def paligemma(config):
        config.text_config.vocab_size = sizes.vocab_size
        config.vision_config.hidden_size = sizes.siglip.width
        config.vision_config.num_hidden_layers = sizes.siglip.depth
        config.vision_config.intermediate_size = sizes.siglip.mlp_dim
        config.vision_config.num_attention_heads = sizes.siglip.num_heads
        config.vision_config.patch_size = sizes.siglip.patch_size
        config.vision_config.projection_dim = sizes.vlm.width
        return real(config)

    def expert(config):
        config.vocab_size = sizes.vocab_size
        return real_expert(config)

    experts = {"gemma_2b": sizes.vlm, "gemma_300m": sizes.action_expert}
    with (
        torch.random.fork_rng(),
        mock.patch.object(module, "get_gemma_config", experts.__getitem__),
        mock.patch.object(module, real.__name__, paligemma),
        mock.patch.object(module, real_expert.__name__, expert),
    ):
        torch.manual_seed(0)
        yield


def build(sizes: Pi0Config) -> Any:
    """lerobot's model, with no weight left at zero; sizes: as in `resized`."""
    module = modeling(sizes)
    prefix = "PI05" if sizes.pi05 else "PI0"
    config = getattr(module, f"{prefix}Config")(
        dtype=sizes.dtype,
        device="cpu",
        max_action_dim=sizes.action_dim,
        max_state_dim=sizes.action_dim,
        chunk_size=sizes.action_horizon,
        n_action_steps=sizes.action_horizon,
        image_resolution=(sizes.image_size, sizes.image_size),
    )
    with resized(sizes):
        model = getattr(module, f"{prefix}Pytorch")(config)
        for weight in model.parameters():
            std = 0.1 if weight.ndim < 2 else 0.7 * weight[0].numel() ** -0.5
            weight.data += std * torch.randn_like(weight)
    return model


def weights(model: Any) -> dict[str, np.ndarray]:
    """The state dict, for `convert_lerobot_rules.to_openpi`."""
    return {name: weight.float().numpy() for name, weight in model.state_dict().items()}


def arguments(sizes: Pi0Config, observation: Observation) -> tuple[Any, ...]:
    """The observation as the model's `forward` and `sample_actions` take it, images and masks of all cameras."""
    images = [to_torch(image_to_float(observation.images[camera])).permute(0, 3, 1, 2) for camera in sizes.cameras]
    masks = [to_torch(observation.image_masks[camera]) for camera in sizes.cameras]
    prompt = to_torch(observation.tokenized_prompt), to_torch(observation.tokenized_prompt_mask)
    return images, masks, *prompt, *(() if sizes.pi05 else (to_torch(observation.state),))


def to_torch(array: Array) -> torch.Tensor:
    return torch.tensor(np.asarray(array))
