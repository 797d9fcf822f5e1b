"""Sizes of the model: frozen dataclasses; a preset is a function that returns one.

Nothing here says how the model runs (mesh, remat, kernels): that is `pi0fast.execution.Execution`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
StateMode = Literal["token", "prompt", "unused"]

BASE_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of one expert's projections (`pi0fast.lora`).

    Args:
        rank: 0 stands for no updates at all.
        alpha: the updates of attention are scaled by alpha / rank; None is alpha = rank. Those of the MLP are not
            scaled.
        attention: whether the projections of attention have one.
        mlp: whether those of the MLP have one.
    """

    rank: int
    alpha: float | None = None
    attention: bool = True
    mlp: bool = True

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"LoRA rank={self.rank} must be positive, or 0 for none")
        if not (self.attention or self.mlp):
            raise ValueError("LoRA of neither attention nor mlp updates nothing; choose at least one")

    @property
    def attention_scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TransformerConfig:
    """One expert of the two-expert transformer."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of channels, so make it even")


@dataclass(frozen=True)
class SiglipConfig:
    """The vision encoder (Zhai et al. 2023, https://arxiv.org/abs/2303.15343)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"SigLIP width={self.width} is not a multiple of num_heads={self.num_heads}")


@dataclass(frozen=True)
class Pi0Config:
    """Everything that decides what Pi0 or Pi0.5 computes.

    Pi0: Black et al. 2024 (https://arxiv.org/abs/2410.24164). Pi0.5: https://arxiv.org/abs/2504.16054.
    `cameras` is the order of the image tokens; a camera that an observation leaves out is not computed.
    `state_mode` is how the state is seen: by Pi0 as a token, by Pi0.5 as text in the prompt, or not at all (openpi's
    `discrete_state_input=False`). None stands for the first that the model has.
    """

    vlm: TransformerConfig
    action_expert: TransformerConfig
    siglip: SiglipConfig
    pi05: bool = False
    action_horizon: int = 50
    action_dim: int = 32
    max_token_len: int = 48
    vocab_size: int = 257_152
    image_size: int = 224
    dtype: DType = "bfloat16"
    cameras: tuple[str, ...] = BASE_CAMERAS
    state_mode: StateMode | None = None

    def __post_init__(self):
        modes = ("prompt", "unused") if self.pi05 else ("token",)
        if self.state_mode is None:
            object.__setattr__(self, "state_mode", modes[0])
        elif self.state_mode not in modes:
            raise ValueError(
                f"state_mode={self.state_mode!r} is none of {'Pi0.5' if self.pi05 else 'Pi0'}'s, {', '.join(modes)}; "
                "choose one, or None for the first"
            )
        vlm, action = self.vlm, self.action_expert
        shared = ("depth", "num_heads", "num_kv_heads", "head_dim")
        if any(getattr(vlm, name) != getattr(action, name) for name in shared):
            raise ValueError(
                f"the experts attend jointly, so {', '.join(shared)} must be equal; got {vlm} and {action}"
            )
        if vlm.depth < 2:
            raise ValueError(f"depth={vlm.depth}: the VLM's last layer is a module of its own; use at least 2 layers")
        if self.image_size % self.siglip.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.siglip.patch_size}")
        if action.width % 2:
            raise ValueError(f"action_expert.width={action.width} is odd; the time embedding is half sine, half cosine")

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.siglip.patch_size) ** 2

    @property
    def suffix_len(self) -> int:
        """Suffix tokens: the actions, and Pi0's state token."""
        return self.action_horizon + (0 if self.pi05 else 1)

    def with_lora(self, vlm: LoraConfig | None, action_expert: LoraConfig | None) -> "Pi0Config":
        """The same model with these updates, in place of any that it has."""

        def update(expert: TransformerConfig, lora: LoraConfig | None) -> TransformerConfig:
            return dataclasses.replace(expert, lora=lora if lora and lora.rank else None)

        return dataclasses.replace(
            self, vlm=update(self.vlm, vlm), action_expert=update(self.action_expert, action_expert)
        )

    def without_lora(self) -> "Pi0Config":
        return self.with_lora(None, None)


def from_dict(fields: dict[str, Any]) -> Pi0Config:
    """Inverts `dataclasses.asdict`, for JSON. Raises: TypeError for unknown or missing fields."""

    def expert(of: dict[str, Any]) -> TransformerConfig:
        lora = of.get("lora")  # runs from before there was LoRA do not say
        return TransformerConfig(**{**of, "lora": lora and LoraConfig(**lora)})

    parts = {
        "vlm": expert(fields["vlm"]),
        "action_expert": expert(fields["action_expert"]),
        "siglip": SiglipConfig(**fields["siglip"]),
        "cameras": tuple(fields["cameras"]),
    }
    return Pi0Config(**{**fields, **parts})


def pi0_base() -> Pi0Config:
    """The released Pi0: PaliGemma 2B with a 300M action expert."""
    return Pi0Config(
        vlm=TransformerConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
        action_expert=TransformerConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
        siglip=SiglipConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14),
    )


def pi05_base() -> Pi0Config:
    """The released Pi0.5: the same parts, AdaRMS time conditioning, the state as text."""
    return _as_pi05(pi0_base(), max_token_len=200)


def pi0_small() -> Pi0Config:
    """Pi0 at a size that two CPU cores can measure, with the released token counts."""
    return Pi0Config(
        vlm=TransformerConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
        action_expert=TransformerConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
        siglip=SiglipConfig(width=384, depth=6, mlp_dim=1536, num_heads=6, patch_size=14),
        vocab_size=4096,
        dtype="float32",
    )


def pi05_small() -> Pi0Config:
    """Pi0.5 at the size of `pi0_small`."""
    return _as_pi05(pi0_small(), max_token_len=200)


def pi0_tiny() -> Pi0Config:
    """Pi0 at a size that learns the demo from scratch on a laptop in minutes."""
    return Pi0Config(
        # Four key/value heads: with one of 32 channels the demo's loss after 1000 steps was 0.47 instead of 0.23.
        vlm=TransformerConfig(width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=4, head_dim=32),
        action_expert=TransformerConfig(width=128, depth=3, mlp_dim=512, num_heads=4, num_kv_heads=4, head_dim=32),
        siglip=SiglipConfig(width=128, depth=1, mlp_dim=256, num_heads=4, patch_size=14),
        action_horizon=8,
        action_dim=2,
        max_token_len=8,
        vocab_size=512,
        image_size=56,
        dtype="float32",
        cameras=BASE_CAMERAS[:2],
    )


def pi05_tiny() -> Pi0Config:
    """Pi0.5 at the size of `pi0_tiny`."""
    return _as_pi05(pi0_tiny(), max_token_len=32)


def _as_pi05(config: Pi0Config, max_token_len: int) -> Pi0Config:
    return dataclasses.replace(config, pi05=True, state_mode=None, max_token_len=max_token_len)


PRESETS = {preset.__name__: preset for preset in (pi0_base, pi05_base, pi0_small, pi05_small, pi0_tiny, pi05_tiny)}
