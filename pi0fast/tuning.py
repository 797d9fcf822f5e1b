"""What is trained: `--tune` names the usual choices, `--freeze` adds to them.

- `full`: everything.
- `expert`: the action expert and its head. No backward pass goes through SigLIP and the VLM: it ends at the prefix's
  keys and values.
- `lora`: low-rank updates of both experts, and the head.
- `lora+expert`: low-rank updates of the VLM, the whole action expert, and the head.

What is frozen is held in the model's dtype, and has no gradient, no moments and no average.
"""

import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from flax import nnx

from pi0fast.config import Pi0Config
from pi0fast.lora import is_lora
from pi0fast.params import flatten
from pi0fast.settings import LoraSettings, Settings

VLM = ("siglip", "embedding", "vlm")
FROZEN = {"full": (), "expert": VLM, "lora": (*VLM, "action_expert"), "lora+expert": VLM}


def adapted(model: Pi0Config, settings: Settings) -> Pi0Config:
    """The config with the updates that `--tune` asks for, and the state where `--input.state-mode` puts it.

    Raises: ValueError: LoRA of rank 0 in all that would have it, or asked for where nothing has it; a mode that the
        model does not have.
    """
    if settings.input.state_mode is not None:
        model = dataclasses.replace(model, state_mode=settings.input.state_mode)
    default = LoraSettings()
    without = default if "lora" not in settings.tune else dataclasses.replace(settings.lora, expert=default.expert)
    if settings.tune != "lora" and settings.lora != without:
        raise ValueError(f"--tune={settings.tune} has none of the updates that --lora asks for; use --tune=lora, say")
    if "lora" not in settings.tune:
        return model
    expert = settings.lora.expert if settings.tune == "lora" else None
    made = model.with_lora(settings.lora.vlm, expert)
    if made == model.without_lora():
        flags = "--lora.vlm.rank=0" + " --lora.expert.rank=0" * (expert is not None)
        raise ValueError(
            f"--tune={settings.tune} with {flags} has no update to train; raise a rank, or use another --tune"
        )
    return made


def frozen_filter(model: nnx.Module, settings: Settings) -> Callable[[Any, Any], bool]:
    """An nnx filter for the weights that are not trained.

    Raises:
        ValueError: a pattern of `--freeze` that matches no weight, or nothing left to train.
    """
    paths = list(flatten(model))
    patterns = _patterns(settings.freeze)
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in paths):
            tops = sorted({path.split("/")[0] for path in paths})
            raise ValueError(f"--freeze: {pattern!r} matches no weight; the top-level parts are {', '.join(tops)}")
    preset = _frozen_by_preset(settings.tune, settings.lora.siglip)

    def is_frozen(path: str) -> bool:
        by_preset = not is_lora(path) and any(_matches(path, part) for part in preset)
        return by_preset or any(_matches(path, pattern) for pattern in patterns)

    if all(map(is_frozen, paths)):
        raise ValueError(
            f"--tune={settings.tune} --freeze={settings.freeze!r} leaves nothing to train; name fewer parts"
        )
    return lambda path, _: is_frozen("/".join(map(str, path)))


def check_resumes(begun: Mapping[str, Any], settings: Settings) -> None:
    """Raises: ValueError: a run that began with these settings trains other weights than this one would."""
    tune, siglip = begun.get("tune", "full"), begun.get("lora", {}).get("siglip", False)
    was = {*_frozen_by_preset(tune, siglip), *_patterns(begun.get("freeze", ""))}
    if was != {*_frozen_by_preset(settings.tune, settings.lora.siglip), *_patterns(settings.freeze)}:
        raise ValueError(
            f"the run began with {_flags(tune, siglip, begun.get('freeze', ''))} and trains other weights than "
            f"{_flags(settings.tune, settings.lora.siglip, settings.freeze)}: give the same, or another --out and this "
            "run as --init-from, which starts with its weights and new moments"
        )


def _flags(tune: str, siglip: bool, freeze: str) -> str:
    flags = f"--tune={tune} --freeze={freeze!r}"
    return f"{flags} --lora.siglip={siglip}" if "lora" in tune else flags


def _frozen_by_preset(tune: str, siglip: bool) -> tuple[str, ...]:
    trained = ("siglip",) if siglip and "lora" in tune else ()
    return tuple(part for part in FROZEN[tune] if part not in trained)


def _patterns(freeze: str) -> list[str]:
    return [pattern.strip() for pattern in freeze.split(",") if pattern.strip()]


def _matches(path: str, pattern: str) -> bool:
    """A folder (`vlm`) stands for everything in it, `*` for any characters."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")
