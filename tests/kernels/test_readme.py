"""The kernels' README: its examples run and compute what they say; the base install is enough."""

import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from pi0fast_kernels import _triton

README = Path(__file__).parents[2] / "kernels" / "README.md"
TOKENS = np.arange(12)
query, key = TOKENS[:, None], TOKENS
DOCUMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]])

# Which keys a query sees, `[B, T, S]` or `[T, S]`, by the title above the example.
MASKS = {
    "A causal language model": key <= query,
    "A sliding window": (key <= query) & (key > query - 4),
    "Packed documents": (DOCUMENTS[:, :, None] == DOCUMENTS[:, None]) & (DOCUMENTS[:, :, None] > 0) & (key <= query),
    "A padded encoder": np.stack([(query < length) & (key < length) for length in (12, 7)]),
    "PaliGemma": np.stack([(key < prefix) | (key <= query) for prefix in (8, 5)]),
}


def examples() -> list[tuple[str, str]]:
    """Every Python block, and the title above it."""
    found, title = [], ""
    for heading, block in re.findall(r"^#+ ([^\n]+)$|^ *```python\n(.*?)^ *```$", README.read_text(), re.M | re.S):
        title = heading or title
        if block:
            found.append((title, textwrap.dedent(block)))
    return found


@pytest.fixture(scope="module")
def run() -> dict[str, dict]:
    """The names after the examples under each title; all run in one namespace, from top to bottom."""
    namespace, after = {}, {}
    for title, code in examples():
        exec(compile(code, f"{README.name}: {title}", "exec"), namespace)
        after[title] = dict(namespace)
    return after


def attention(q, k, v, mask) -> np.ndarray:
    """Softmax over a dense mask; zeros where it is empty."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("btnc,bsc->bnts", q, k[:, :, 0]) / 8
    weights = np.exp(logits) * np.broadcast_to(mask, (2, 12, 12))[:, None]
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsc->btnc", weights / np.where(total, total, 1.0), v[:, :, 0])


@pytest.mark.parametrize("title", MASKS)
def test_attention(run, title):
    names = run[title]
    expected = attention(names["q"], names["k"], names["v"], MASKS[title])
    np.testing.assert_allclose(names["out"], expected, rtol=1e-4, atol=1e-5)
    if title == "A causal language model":
        np.testing.assert_allclose(names["last"], expected[:, -1:], rtol=1e-4, atol=1e-5)


def test_norms(run):
    names = run["Norms"]
    x, residual, scale, shift, gate = (
        np.asarray(names[name], np.float64) for name in ("x", "residual", "scale", "shift", "gate")
    )

    def rms_norm(y):
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)

    np.testing.assert_allclose(names["normed"], rms_norm(x), rtol=1e-5, atol=1e-5)
    added = residual + gate[:, None] * x
    np.testing.assert_allclose(names["new_residual"], added, rtol=1e-5, atol=1e-5)
    expected = rms_norm(added) * (1 + scale[:, None]) + shift[:, None]
    np.testing.assert_allclose(names["adaptive"], expected, rtol=1e-5, atol=1e-5)


def test_remat(run):
    """The sum of a causal layer's output over v's own weights: its gradient is the weights' column sums."""
    names = run["Good to know"]
    q, k, v = (np.asarray(names[name], np.float64) for name in "qkv")
    logits = np.einsum("btnc,bsc->bnts", q, k[:, :, 0]) / 8
    weights = np.exp(logits) * MASKS["A causal language model"]
    weights /= weights.sum(-1, keepdims=True)
    expected = np.broadcast_to(weights.sum((1, 2))[:, :, None, None], v.shape)
    np.testing.assert_allclose(names["gradients"][2], expected, rtol=1e-4, atol=1e-5)
    assert all(np.abs(gradient).max() > 0 for gradient in names["gradients"])


def test_every_example_is_checked(run):
    assert set(run) == {"Attention", *MASKS, "Norms", "Good to know"}


def test_the_table_has_the_devices_of_the_kernels():
    assert ", ".join(f"{number / 10}" for number in sorted(_triton.SHARED_MEMORY)) in README.read_text()


def base_install() -> set[str]:
    """The packages that `pip install pi0fast` brings."""
    found, todo = set(), ["pi0fast"]
    while todo:
        package = todo.pop()
        if package not in found:
            found.add(package)
            requirements = map(Requirement, metadata.requires(package) or ())
            todo += [need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_the_base_install_is_enough(tmp_path):
    """Both ops in an interpreter that sees no other packages than those that the base install brings."""
    packages = base_install()
    assert {"jax", "jaxlib", "jaxtyping", "numpy"} <= packages
    assert not packages & {"flax", "triton", "torch", "optax"}
    for package in packages - {"pi0fast"}:
        files = metadata.distribution(package).files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (tmp_path / top).symlink_to(Path(str(metadata.distribution(package).locate_file(top))))
    (tmp_path / "pi0fast_kernels").symlink_to(README.parent / "pi0fast_kernels")
    code = """
        import importlib.util
        import jax.numpy as jnp
        from pi0fast_kernels import ada_rms_norm, prefix_lm_attention, ranges
        assert all(importlib.util.find_spec(name) is None for name in ("flax", "triton", "jax_triton", "torch"))
        x = jnp.ones((1, 4, 2, 16))
        out = prefix_lm_attention(x, x, x, *ranges.causal(1, 4), scale=1.0, implementation="reference")
        assert (out == 1).all()
        assert abs(ada_rms_norm(x[:, :, 0], jnp.ones(16), implementation="reference") - 2).max() < 1e-5
        assert (prefix_lm_attention(x, x, x, None, None, scale=1.0) == 1).all()
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "COVERAGE"))
    }
    environment |= {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-W", "error", "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
