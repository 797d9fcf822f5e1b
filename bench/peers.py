"""Other people's kernels behind our ops' signatures, so that benchmarks can time them beside ours.

Nothing here is imported before a benchmark needs it, and a peer that cannot do a case says why. What no peer defines is
left out of the comparison: queries without keys, which we give zeros.

`jax.nn.dot_product_attention`, through XLA and cuDNN, is no peer: it is our `implementation="xla"` and `"cudnn"`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

EPS = 1e-6


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    refusal: (case, backward) → why it cannot do that here, or None.
    build: case → the op for that case, on its arrays by name.
    torch: the op takes and returns torch tensors.
    dtype: what it takes instead of bfloat16; the cast is not timed.
    """

    name: str
    refusal: Callable[[Any, bool], str | None]
    build: Callable[[Any], Callable[..., Any]]
    torch: bool = False
    dtype: Any = jnp.bfloat16
    ours: bool = False


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def missing(module: str, *, gpu: bool = True) -> str | None:
    """Why a library cannot be used here, or None."""
    if gpu and not on_gpu():
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if module == "torch" and gpu and not torch().cuda.is_available():
        return "torch sees no GPU"
    return None


def torch() -> Any:
    return importlib.import_module("torch")


def torch_device() -> str:
    return "cuda" if on_gpu() else "cpu"


def _ranges(case: Any) -> tuple[Any, Any]:
    """key_start and key_end, without the large arrays."""
    return jax.jit(lambda: case.inputs()[3:])()


def _visible(case: Any, *, without_keys: bool) -> jax.Array | None:
    """Which keys each query sees, `[B, 1, T, S]`. without_keys: what queries without keys see of the first key."""
    start, end = _ranges(case)
    if start is None:
        return None
    key = jnp.arange(case.keys)
    visible = (start[..., None] <= key) & (key < end[..., None])
    return (visible | ((start >= end)[..., None] & (key == 0) & without_keys))[:, None]


def _sdpa(case: Any) -> Callable[..., Any]:
    """With a dense mask where there are ranges that are not causal.

    One key/value head is then repeated, without a copy: torch's fused kernels take no mask with grouped heads.
    """
    functional = torch().nn.functional
    mask = None
    if case.mask not in ("all", "causal"):
        mask = to_torch(_visible(case, without_keys=True))
    shared = case.kv_heads == 1 and mask is not None

    def attention(q, k, v, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if shared:
            k, v = (x.expand(-1, case.heads, -1, -1) for x in (k, v))
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=case.mask == "causal",
            scale=case.scale,
            enable_gqa=case.heads != case.kv_heads and not shared,
        )
        return out.transpose(1, 2)

    return attention


def _flex(case: Any) -> Callable[..., Any]:
    """The block mask is made beforehand, in its favour."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = _compiled(flex.flex_attention)
    blocks = None
    start, end = _ranges(case)
    if start is not None:
        start, end = to_torch(start), to_torch(end)

        def sees(b, head, query, key):
            return (start[b, query] <= key) & (key < end[b, query])

        blocks = flex.create_block_mask(sees, case.batch, None, case.queries, case.keys, device=torch_device())

    def attention(q, k, v, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = case.heads != case.kv_heads
        return compiled(q, k, v, block_mask=blocks, scale=case.scale, enable_gqa=grouped).transpose(1, 2)

    return attention


def _tokamax(implementation: str) -> Callable[[Any], Callable[..., Any]]:
    def build(case: Any) -> Callable[..., Any]:
        """Lengths where they say what the ranges say; a dense mask for a state, which does not see the actions."""
        op = importlib.import_module("tokamax").dot_product_attention
        _, end = _ranges(case)
        how: dict[str, Any] = {"is_causal": case.mask == "causal"}
        if case.states:
            how["mask"] = _visible(case, without_keys=False)
        elif case.mask in ("prefix", "suffix"):
            how["key_value_seq_lengths"] = jnp.max(end, axis=1)

        def attention(q, k, v, **_):
            return op(q, k, v, scale=case.scale, implementation=implementation, **how)

        return attention

    return build


def _pallas_triton_refusal(case: Any, backward: bool) -> str | None:
    if case.mask not in ("all", "causal"):
        return "it takes no ranges"
    if case.heads != case.kv_heads:
        return "it takes as many key/value heads as query heads"
    if case.queries % 128 or case.keys % 128:
        return "it takes token counts in multiples of 128"
    return missing("jax")


def _pallas_triton(case: Any) -> Callable[..., Any]:
    mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha

    def attention(q, k, v, **_):
        return mha(q, k, v, None, sm_scale=case.scale, causal=case.mask == "causal")

    return attention


def _pallas_mosaic_refusal(case: Any, backward: bool) -> str | None:
    if case.mask not in ("all", "causal"):
        return "it takes no ranges"
    if case.head_dim % 64:
        return "it takes head dimensions in multiples of 64"
    if case.queries % 128 or case.keys % 128:
        return "it takes token counts in multiples of its tiles"
    if backward:
        return "it has no backward pass for causal attention, and tiles of its own for others"
    return missing("jax")


def _pallas_mosaic(case: Any) -> Callable[..., Any]:
    """It has no scale, so q is scaled; its tile of keys is the largest that fits. Its buffers are float16."""
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    keys = 64 if case.head_dim > 128 else 128
    config = module.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=case.mask == "causal")

    def attention(q, k, v, **_):
        return module.attention(q * jnp.asarray(case.scale, q.dtype), k, v, config)

    return attention


def _torch_norm(case: Any) -> Callable[..., Any]:
    """Torch's own kernel after torch's addition: what a program runs that is not compiled."""
    functional = torch().nn.functional

    def norm(x, scale, residual=None):
        total = x if residual is None else residual + x
        normed = functional.rms_norm(total, (case.width,), weight=(1.0 + scale).to(x.dtype), eps=EPS)
        return normed if residual is None else (normed, total)

    return norm


def _torch_compiled_norm(case: Any) -> Callable[..., Any]:
    """The whole op written out, fused by torch.compile."""
    functional = torch().nn.functional

    def norm(x, scale, shift=None, residual=None, gate=None):
        total = x
        if residual is not None:
            added = x.float() if gate is None else x.float() * gate.float().unsqueeze(-2)
            total = (residual.float() + added).to(x.dtype)
        normed = functional.rms_norm(total.float(), (case.width,), eps=EPS) * (1.0 + scale.float().unsqueeze(-2))
        if shift is not None:
            normed = normed + shift.float().unsqueeze(-2)
        normed = normed.to(x.dtype)
        return normed if residual is None else (normed, total)

    return _compiled(norm)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Benchmarks run the backward pass of a graph many times: its buffers must stay.
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    torch().compiler.reset()
    return torch().compile(function, dynamic=False)


def _torch_norm_refusal(case: Any, backward: bool) -> str | None:
    if case.adaptive:
        return "torch's kernel takes one weight for all examples"
    return missing("torch", gpu=False)


ATTENTION = (
    Contender("torch_sdpa", lambda case, backward: missing("torch", gpu=False), _sdpa, torch=True),
    Contender("torch_flex", lambda case, backward: missing("torch"), _flex, torch=True),
    Contender("tokamax_mosaic", lambda case, backward: missing("tokamax"), _tokamax("mosaic")),
    Contender("tokamax_triton", lambda case, backward: missing("tokamax"), _tokamax("triton")),
    Contender("pallas_triton", _pallas_triton_refusal, _pallas_triton),
    Contender("pallas_mosaic", _pallas_mosaic_refusal, _pallas_mosaic, dtype=jnp.float16),
)

NORMS = (
    Contender("torch_rms_norm", _torch_norm_refusal, _torch_norm, torch=True),
    Contender("torch_compile", lambda case, backward: missing("torch"), _torch_compiled_norm, torch=True),
)


def to_torch(array: jax.Array | None) -> Any:
    """The same memory as a torch tensor."""
    return None if array is None else torch().from_dlpack(array)


def to_jax(tensor: Any) -> jax.Array:
    """The same memory as a JAX array."""
    return jnp.from_dlpack(tensor.detach().contiguous())
