"""Fused kernels for vision-language-action transformers, usable from any JAX model.

Letters used in shapes: B batch, T query tokens, S key tokens, N query heads, K key/value heads, C head dimension,
D width.

Every op takes `implementation`: a name runs that implementation or raises every reason why it cannot; None takes the
first that can run, in the order of the op's table (`ORDER` in its `api.py`).
"""

from pi0fast_kernels import ranges as ranges
from pi0fast_kernels.ada_rms_norm.api import ada_rms_norm as ada_rms_norm
from pi0fast_kernels.prefix_lm_attention.api import ATTENTION_RESIDUALS as ATTENTION_RESIDUALS
from pi0fast_kernels.prefix_lm_attention.api import prefix_lm_attention as prefix_lm_attention
