"""A `Sampler` gives what the loop over the velocity gives, written out; what may be left out changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Observation, Pi0, config
from pi0fast.execution import Execution
from pi0fast.hlo import loop_instructions
from pi0fast.params import flatten
from pi0fast.policy import default_buckets
from pi0fast.sampling import Sampler, matmul_weights, sample_actions
from tests.golden import golden

TOLERANCE = 1e-5


@pytest.fixture(params=golden.NAMES, scope="module")
def case(request) -> golden.Golden:
    return golden.load(request.param)


@pytest.fixture(scope="module")
def sampler(case) -> Sampler:
    return jax.jit(Sampler.of)(case.model())


sample = jax.jit(Sampler.__call__)


def assert_close(actual, expected):
    """Relative norm of the difference."""
    error = np.linalg.norm(np.asarray(actual) - np.asarray(expected)) / np.linalg.norm(expected)
    assert error < TOLERANCE, f"relative error {error:.2e}"


def with_prompt(case: golden.Golden, length: int, valid: int) -> Observation:
    """The case's observation with prompts cut to `length` tokens, of which `valid` count."""
    tokens = case.observation.tokenized_prompt[:, :length]
    mask = jnp.broadcast_to(jnp.arange(length) < valid, tokens.shape)
    return dataclasses.replace(case.observation, tokenized_prompt=tokens, tokenized_prompt_mask=mask)


@pytest.mark.parametrize("solver", ["euler", "heun", pytest.param("midpoint", marks=pytest.mark.long)])
def test_cached_and_uncached_sampling_agree(case, solver):
    """Against whole forward passes, prefix and state computed anew at every time."""
    model, noise = case.model(), case.inputs["noise"]
    velocity = jax.jit(lambda m, x, t: m.velocity(case.observation, x, jnp.full(x.shape[:1], t)))
    step = 1 / 3
    x = noise
    for i in range(3):
        t = 1 - i * step
        slope = velocity(model, x, t)
        if solver == "midpoint":
            slope = velocity(model, x - step / 2 * slope, t - step / 2)
        if solver == "heun":
            slope = (slope + velocity(model, x - step * slope, t - step)) / 2
        x = x - step * slope
    ours = jax.jit(lambda m: sample_actions(m, case.observation, noise, 3, solver=solver))(model)
    assert_close(ours, x)


@pytest.mark.long
def test_prompt_buckets_agree(case, sampler):
    longest = case.config.max_token_len
    expected = sample(sampler, with_prompt(case, longest, 5), case.inputs["noise"])
    for length in (5, 7, longest - 1):
        assert_close(sample(sampler, with_prompt(case, length, 5), case.inputs["noise"]), expected)


def test_masked_and_dropped_cameras_agree(case, sampler):
    observation, kept = case.observation, "base_0_rgb"
    masks = {camera: jnp.full(2, camera == kept) for camera in observation.images}
    masked = sample(sampler, dataclasses.replace(observation, image_masks=masks), case.inputs["noise"])
    one = {"images": {kept: observation.images[kept]}, "image_masks": {kept: masks[kept]}}
    assert_close(sample(sampler, dataclasses.replace(observation, **one), case.inputs["noise"]), masked)


def test_a_batch_is_its_singles(case, sampler):
    noise = case.inputs["noise"]
    singles = [
        sample(sampler, *jax.tree.map(lambda x, i=i: x[i : i + 1], (case.observation, noise)))
        for i in range(len(noise))
    ]
    assert_close(sample(sampler, case.observation, noise), np.concatenate(singles))


def test_half_precision_is_close():
    """The sampler of a bfloat16 model is within bfloat16's rounding of the float32 one's."""
    case = golden.load("pi05_tiny")
    half = dataclasses.replace(case.config, dtype="bfloat16")
    model = case.model()
    rounded = nnx.merge(nnx.graphdef(Pi0.abstract(half)), nnx.state(model))
    exact, ours = (jax.jit(sample_actions)(m, case.observation, case.inputs["noise"]) for m in (model, rounded))
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_what_is_read_in_the_matmul_dtype(case):
    """All large weights; neither the float32 heads and patches nor vectors."""
    paths = matmul_weights(case.model())
    assert {"embedding", "vlm/layers/gate_up", "vlm/last/kv", "action_expert/layers/q", "siglip/head/kernel"} <= paths
    rest = set(flatten(case.model())) - paths
    assert {
        "head/action_in/kernel",
        "siglip/patches/position",
        "siglip/layers/up/bias",
        "vlm/last/attention_norm/scale",
    } <= rest
    assert ("action_expert/norm/modulation/kernel" in paths) == case.config.pi05


@pytest.mark.parametrize("longest", [8, 32, 48, 200])
def test_buckets_end_at_the_longest_prompt(longest):
    expected = {8: (8,), 32: (16, 32), 48: (16, 32, 48), 200: (64, 112, 160, 200)}
    assert default_buckets(longest) == expected[longest]


@pytest.mark.parametrize("preset", ["pi0_small", "pi05_small"])
def test_the_loop_never_copies_the_cache(preset):
    """In the compiled call, nothing in the loop makes an array of a cache's size but the updates in place, two for each
    layer, and nothing calls back to the host."""
    size = dataclasses.replace(config.PRESETS[preset](), cameras=("base_0_rgb",))
    keys = size.suffix_len + size.tokens_per_image + 48
    model = Pi0.abstract(size)
    sampler = jax.eval_shape(Sampler.of, model)
    observation = Observation(
        images={"base_0_rgb": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)},  # pyright: ignore[reportArgumentType]
        image_masks={"base_0_rgb": jax.ShapeDtypeStruct((1,), bool)},  # pyright: ignore[reportArgumentType]
        state=jax.ShapeDtypeStruct((1, size.action_dim), jnp.float32),  # pyright: ignore[reportArgumentType]
        tokenized_prompt=jax.ShapeDtypeStruct((1, 48), jnp.int32),  # pyright: ignore[reportArgumentType]
        tokenized_prompt_mask=jax.ShapeDtypeStruct((1, 48), bool),  # pyright: ignore[reportArgumentType]
    )
    noise = jax.ShapeDtypeStruct((1, size.action_horizon, size.action_dim), jnp.float32)
    compiled = jax.jit(lambda *args: Sampler.__call__(*args, execution=Execution(kernels="reference")))
    text = compiled.lower(sampler, observation, noise).compile().as_text()
    assert text is not None and "callback" not in text
    made = loop_instructions(text, keys * size.vlm.head_dim)
    updates = [line for line in made if "dynamic-update-slice" in line]
    assert len(updates) == len(made) == 2 * size.vlm.depth, made
