"""pi0fast: Pi0 and Pi0.5 vision-language-action models in JAX.

Letters used in shapes throughout the package:
    B batch, P prefix tokens (images and prompt), S suffix tokens (actions, and Pi0's state), L prompt tokens,
    H action horizon, A action dimension, D width, F MLP width, N query heads, K key/value heads, C head dimension.

Flow-matching time t: 1 is noise, 0 is data.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0fast.config import Pi0Config as Pi0Config
    from pi0fast.observation import Observation as Observation
    from pi0fast.pi0 import Pi0 as Pi0

_HOMES = {"Pi0Config": "config", "Observation": "observation", "Pi0": "pi0"}


def __getattr__(name: str):
    """Public names are imported when asked for (PEP 562): a robot's computer needs numpy for `pi0fast.broker` alone."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pi0fast' has no attribute {name!r}")
    return getattr(import_module(f"pi0fast.{_HOMES[name]}"), name)
