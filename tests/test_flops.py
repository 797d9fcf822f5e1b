"""FLOPs and bytes: weights counted as the model holds them, and the floors of one inference call."""

import pytest

from pi0fast import Pi0, config, flops
from pi0fast.params import flatten

# What an H100 does, as measured by others: an 8192³ bf16 matmul, and a large copy.
H100_MEASURED = flops.DeviceSpec("H100", 798e12, 3.0e12, memory=80e9)


def matrices(preset: str) -> dict[str, int]:
    """Sizes of the weights that take part in matrix products, by path."""
    model = Pi0.abstract(config.PRESETS[preset]())
    return {
        path: variable.size
        for path, variable in flatten(model).items()
        if variable.ndim - ("/layers/" in path) == 2 and not path.endswith(("embedding", "position"))
    }


@pytest.mark.parametrize("preset", config.PRESETS)
def test_bytes_are_those_of_the_models_weights(preset):
    size, weights = config.PRESETS[preset](), matrices(preset)
    cost = flops.inference(size, num_cameras=1, prompt_len=8)
    width, depth = size.action_expert.width, size.action_expert.depth
    cache = 2 * (size.tokens_per_image + 8) * size.vlm.num_kv_heads * size.vlm.head_dim

    def total(*prefixes: str) -> int:
        return sum(count for path, count in weights.items() if path.startswith(prefixes) and "modulation" not in path)

    assert cost.vision.bytes == 2 * total("siglip")
    assert cost.prefix.bytes == 2 * total("vlm")
    if size.pi05:  # what only time decides is computed before, and its results are read
        conditions = (2 * depth + 1) * 3 * width - total("head/time")
        assert cost.state.bytes == 0
    else:
        conditions = -(width**2) - total("head/state_in")
        assert cost.state.bytes == 2 * total("head/state_in")
    assert cost.step.bytes == 2 * (total("action_expert", "head") + conditions + depth * cache)


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_product_belongs_to_one_part(preset):
    parts = flops.parts(config.PRESETS[preset](), num_cameras=1, prompt_len=8)
    owners = [[part for part in parts if path.startswith(f"{part}/")] for path in matrices(preset)]
    assert all(len(found) == 1 for found in owners)
    assert {found[0] for found in owners} == set(parts)


@pytest.mark.parametrize(("preset", "prompt_len", "milliseconds"), [("pi0_base", 48, 7.1), ("pi05_base", 200, 7.9)])
def test_floors_of_the_released_models(preset, prompt_len, milliseconds):
    """Three cameras, ten steps, batch 1, whole prompts, against floors that were derived independently.

    Those count the VLM's last layer whole (0.2 to 0.3 ms).
    """
    cost = flops.inference(config.PRESETS[preset](), num_cameras=3, prompt_len=prompt_len)
    assert cost.floor_seconds(H100_MEASURED) * 1e3 == pytest.approx(milliseconds, rel=0.03)
    arithmetic = (cost.vision.flops + cost.prefix.flops + cost.state.flops) / H100_MEASURED.flops
    traffic = 10 * cost.step.bytes / H100_MEASURED.bandwidth
    assert cost.floor_seconds(H100_MEASURED) == pytest.approx(arithmetic + traffic)


def test_a_batch_shares_the_weights():
    size = config.pi0_base()
    one, many = (flops.inference(size, 3, 48, batch_size=batch) for batch in (1, 32))
    for stage in ("vision", "prefix", "state", "step"):
        assert getattr(many, stage).flops == 32 * getattr(one, stage).flops
    assert many.prefix.bytes == one.prefix.bytes
    cache = 2 * 2 * (3 * 256 + 48) * 18 * 256
    assert many.step.bytes == one.step.bytes + 31 * cache


def test_one_training_step_of_the_released_model():
    """387 TFLOP for Pi0 at batch 32, derived independently; that counts the VLM's last layer whole."""
    tokens = 3 * 256 + 48
    dead = 2 * tokens * (2 * 2048 * 8 * 256 + 3 * 2048 * 16384 + 2 * tokens * 8 * 256)
    assert flops.train_step(config.pi0_base(), 3, 48, 32) + 3 * 32 * dead == pytest.approx(387e12, rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12)],
)
def test_peaks_by_device_kind(kind, peak):
    assert flops.peak(kind) == peak
    assert flops.device(kind) is not None


def test_unknown_device():
    assert flops.device("cpu") is None and flops.peak("cpu") is None
