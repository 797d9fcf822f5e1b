"""Values computed by openpi for tiny models (see README.md in this folder), as our types."""

import dataclasses
import json
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pi0fast import Observation, Pi0, convert
from pi0fast.config import BASE_CAMERAS, LoraConfig, Pi0Config, SiglipConfig, TransformerConfig

FOLDER = Path(__file__).parent
NAMES = ("pi0_tiny", "pi05_tiny")
LORA = "pi0_lora_tiny"


@dataclasses.dataclass(frozen=True)
class Golden:
    config: Pi0Config
    params: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    observation: Observation
    inputs: dict[str, jax.Array]

    def model(self) -> Pi0:
        return convert.from_openpi(self.params, self.config)


@cache
def load(name: str) -> Golden:
    values = dict(np.load(FOLDER / f"{name}.npz"))
    meta = json.loads(bytes(values["meta_json"]))
    siglip = meta["siglip"] | {"patch_size": meta["siglip"]["patch_size"][0]}
    lora = LoraConfig(**meta["lora"]) if "lora" in meta else None
    config = Pi0Config(
        vlm=TransformerConfig(**meta["paligemma"], lora=lora),
        action_expert=TransformerConfig(**meta["action_expert"], lora=lora),
        siglip=SiglipConfig(**siglip),
        pi05=meta["pi05"],
        action_horizon=meta["action_horizon"],
        action_dim=meta["action_dim"],
        max_token_len=meta["max_token_len"],
        vocab_size=meta["vocab"],
        dtype=meta["dtype"],
    )
    inputs = {key: values[key] for key in ("actions", "noise", "time")}
    params = {path: weight(path, tuple(shape)) for path, shape in meta["params"].items()}
    images = {camera: values[f"image/{camera}"].repeat(8, axis=1).repeat(8, axis=2) for camera in BASE_CAMERAS}
    observation = Observation(
        images=images,
        image_masks={camera: values[f"image_mask/{camera}"] for camera in BASE_CAMERAS},
        **{key: values[key] for key in ("state", "tokenized_prompt", "tokenized_prompt_mask")},
    )
    return Golden(config, params, values, *jax.tree.map(jnp.asarray, (observation, inputs)))


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that both sides draw for a parameter of openpi's."""
    rng = np.random.RandomState(zlib.crc32(path.encode()) & 0x7FFFFFFF)
    std = 0.1 if len(shape) < 2 else 0.7 / np.sqrt(shape[-2])
    return (rng.standard_normal(shape) * std).astype(np.float32)
