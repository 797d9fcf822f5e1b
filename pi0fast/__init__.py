"""pi0fast: Pi0 and Pi0.5 vision-language-action models in JAX.

Letters used in shapes throughout the package:
    B batch, P prefix tokens (images and prompt), S suffix tokens (actions, and Pi0's state), L prompt tokens,
    H action horizon, A action dimension, D width, F MLP width, N query heads, K key/value heads, C head dimension.

Flow-matching time t: 1 is noise, 0 is data.
"""

from pi0fast.config import Pi0Config as Pi0Config
from pi0fast.observation import Observation as Observation
from pi0fast.pi0 import Pi0 as Pi0
