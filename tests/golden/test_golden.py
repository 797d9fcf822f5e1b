"""Our numbers are openpi's, in float32: values, masks, keys and values, gradients, samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import convert, flow
from pi0fast.execution import Execution
from pi0fast.layout import PrefixLayout
from pi0fast.sampling import sample_actions
from tests.golden import golden

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5

EXECUTIONS = {
    "plain": Execution(),
    "not_compacted": Execution(compact=False),
    "remat_mlp": Execution(remat="mlp"),
    "remat_full": Execution(remat="full"),
    "triton": Execution(kernels="triton", remat="mlp"),
}
# Of Triton, whose interpreter takes a minute, Pi0.5 alone: it launches every kernel that Pi0 does.
RUNS = [
    ("pi0_tiny", "plain"),
    ("pi05_tiny", "plain"),
    pytest.param(("pi0_tiny", "not_compacted"), marks=pytest.mark.long),
    ("pi05_tiny", "remat_mlp"),
    pytest.param(("pi0_tiny", "remat_mlp"), marks=pytest.mark.long),
    pytest.param(("pi0_tiny", "remat_full"), marks=pytest.mark.long),
    pytest.param(("pi05_tiny", "not_compacted"), marks=pytest.mark.long),
    pytest.param(("pi05_tiny", "remat_full"), marks=pytest.mark.long),
    pytest.param(("pi05_tiny", "triton"), marks=pytest.mark.long),
]


@pytest.fixture(params=golden.NAMES, scope="module")
def case(request) -> golden.Golden:
    return golden.load(request.param)


def assert_close(actual, expected, tolerance):
    """Relative norm of the difference."""
    assert actual.shape == expected.shape
    error = np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture(params=RUNS, ids="-".join, scope="module")
def computed(request):
    """The case, and its velocity, loss and gradients (by openpi's names) in one configuration."""
    case, execution = golden.load(request.param[0]), EXECUTIONS[request.param[1]]
    model = case.model()
    actions, noise, t = (case.inputs[name] for name in ("actions", "noise", "time"))
    x_t = flow.interpolate(actions, noise, t)
    velocity = jax.jit(lambda m: m.velocity(case.observation, x_t, t, execution=execution))(model)

    def mean_loss(model):
        loss = model.loss(case.observation, actions, noise, t, execution=execution)
        return jnp.mean(loss), loss

    (_, loss), grads = nnx.jit(nnx.value_and_grad(mean_loss, has_aux=True))(model)
    grads = convert.to_openpi(nnx.merge(nnx.graphdef(model), grads))
    return case, velocity, loss, grads


def test_velocity_and_loss(computed):
    case, velocity, loss, _ = computed
    assert_close(velocity, case.values["velocity"], VALUE_TOLERANCE)
    assert_close(loss, case.values["loss"], VALUE_TOLERANCE)


def test_gradients(computed):
    case, _, _, grads = computed
    paths = sorted(case.params)
    assert paths == list(grads)
    norms = np.array([np.linalg.norm(grads[path]) for path in paths])
    np.testing.assert_allclose(norms, case.values["grad_norms"], rtol=1e-5, atol=1e-7)
    whole = {key.removeprefix("grad/"): value for key, value in case.values.items() if key.startswith("grad/")}
    assert whole
    for path, expected in whole.items():
        assert_close(grads[path], expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("num_steps", [1, pytest.param(4, marks=pytest.mark.long), 10])
@pytest.mark.parametrize("execution", ["plain", pytest.param("not_compacted", marks=pytest.mark.long)])
def test_samples(case, execution, num_steps):
    execution = EXECUTIONS[execution]
    sample = jax.jit(lambda m, noise: sample_actions(m, case.observation, noise, num_steps, execution=execution))
    assert_close(sample(case.model(), case.inputs["noise"]), case.values[f"sampled_{num_steps}"], VALUE_TOLERANCE)


def openpi_order(case: golden.Golden, layout: PrefixLayout):
    """Where openpi's prefix tokens and its suffix tokens (state, actions) stand among our keys."""
    horizon, num_suffix = case.config.action_horizon, case.config.suffix_len
    suffix = [*range(horizon, num_suffix), *range(horizon)]
    order = layout.token_order if layout.token_order is not None else layout.key_order
    assert order is not None
    return np.argsort(order, axis=1) + num_suffix, np.array(suffix)


@pytest.mark.parametrize("compact", [True, False])
def test_prefix_tokens_positions_masks_keys_values(case, compact):
    """The layout in openpi's order of tokens: its positions, its mask, its keys and values."""
    values, model = case.values, case.model()
    execution = Execution(compact=compact)
    tokens, valid = jax.jit(lambda m: m.embed_prefix(case.observation, execution))(model)
    assert_close(np.mean(tokens, axis=-1), values["prefix_tokens_mean"], VALUE_TOLERANCE)

    cache, layout = jax.jit(lambda m: m.prefix(case.observation, execution))(model)
    places, suffix = openpi_order(case, layout)
    query_places = places - len(suffix) if compact else np.broadcast_to(np.arange(places.shape[1]), places.shape)

    positions = np.take_along_axis(np.asarray(layout.prefix_positions), query_places, axis=1)
    positions = np.concatenate([positions, np.asarray(layout.suffix_positions)[:, suffix]], axis=1)
    np.testing.assert_array_equal(positions, values["positions"])

    size = positions.shape[1]
    mask = np.unpackbits(values["mask_packed"], axis=-1, count=size).astype(bool)
    np.testing.assert_array_equal(visible(layout, places, query_places, suffix), mask)

    valid = np.asarray(valid[0])
    k = np.asarray(cache.k[0, 0, :, 0, :8])[places[0]]
    v = np.asarray(cache.v[-1, 0, :, 0, :8])[places[0]]
    num_prefix = len(valid)
    assert_close(k, values["k_layer0_row0"][:num_prefix], VALUE_TOLERANCE)
    assert_close(v[valid], values["v_last_row0"][:num_prefix][valid], VALUE_TOLERANCE)


def visible(layout: PrefixLayout, places, query_places, suffix):
    """The `[B, P+S, P+S]` mask that the key ranges stand for, in openpi's order of tokens."""
    batch = len(places)
    num_suffix = len(suffix)
    starts = np.take_along_axis(np.asarray(layout.prefix_start), query_places, axis=1) + num_suffix
    ends = np.take_along_axis(np.asarray(layout.prefix_end), query_places, axis=1) + num_suffix
    starts = np.concatenate([starts, np.asarray(layout.suffix_start)[:, suffix]], axis=1)
    ends = np.concatenate([ends, np.asarray(layout.suffix_end)[:, suffix]], axis=1)
    keys = np.concatenate([places, np.broadcast_to(suffix, (batch, num_suffix))], axis=1)
    return (starts[:, :, None] <= keys[:, None]) & (keys[:, None] < ends[:, :, None])


def test_masked_camera_can_be_dropped(case):
    """A camera masked for the whole batch gives the same numbers as one left out."""
    model, observation = case.model(), case.observation
    camera = "right_wrist_0_rgb"
    masked = {**observation.image_masks, camera: jnp.zeros(2, bool)}
    images = {name: image for name, image in observation.images.items() if name != camera}
    run = jax.jit(lambda m, o: m.velocity(o, case.inputs["noise"], case.inputs["time"]))
    with_masked = run(model, dataclasses.replace(observation, image_masks=masked))
    dropped = run(
        model,
        dataclasses.replace(observation, images=images, image_masks={name: masked[name] for name in images}),
    )
    assert_close(dropped, np.asarray(with_masked), VALUE_TOLERANCE)


def test_round_trip_is_bit_exact(case):
    assert convert.openpi_shapes(case.config) == {path: tuple(array.shape) for path, array in case.params.items()}
    dead = convert.dead_params(case.params, case.config)
    back = convert.to_openpi(case.model(), dead)
    assert list(back) == sorted(case.params)
    for path, array in case.params.items():
        np.testing.assert_array_equal(back[path], array)


def test_round_trip_without_dead_parameters_zeroes_them(case):
    back = convert.to_openpi(case.model())
    linear = np.asarray(back["PaliGemma/llm/layers/mlp/linear"])
    np.testing.assert_array_equal(linear[:-1], case.params["PaliGemma/llm/layers/mlp/linear"][:-1])
    assert not linear[-1].any()


def test_conversion_lists_every_problem(case):
    params = dict(case.params)
    del params["state_proj/bias" if not case.config.pi05 else "time_mlp_in/bias"]
    params["action_in_proj/lora"] = np.zeros(3, np.float32)
    params["action_in_proj/bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="3 parameters") as error:
        convert.from_openpi(params, case.config)
    message = str(error.value)
    assert "missing: " in message and "extra: action_in_proj/lora" in message
    assert "misshaped: action_in_proj/bias is (7,), expected (48,)" in message
