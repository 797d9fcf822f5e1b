"""Sizes, dtypes, initial values and input checks of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pi0fast import Pi0, config, flow
from pi0fast.execution import Execution
from pi0fast.params import flatten, replace
from tests.golden import golden


@pytest.mark.parametrize(("preset", "count"), [("pi0_base", 3_128_992_528), ("pi05_base", 3_244_377_872)])
def test_live_parameter_counts(preset, count):
    model = Pi0.abstract(config.PRESETS[preset]())
    assert sum(variable.size for variable in flatten(model).values()) == count


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_weight_has_axis_names(preset):
    model = Pi0.abstract(config.PRESETS[preset]())
    for path, variable in flatten(model).items():
        assert len(variable.get_metadata()["out_sharding"]) == variable.ndim, path
        assert variable.dtype == jnp.float32, path


def test_config_survives_json():
    for preset in config.PRESETS.values():
        assert config.from_dict(dataclasses.asdict(preset())) == preset()


@pytest.mark.parametrize(("preset", "mode"), [("pi0_tiny", "token"), ("pi05_tiny", "prompt")])
def test_runs_from_before_there_were_state_modes_have_the_usual_one(preset, mode):
    fields = dataclasses.asdict(config.PRESETS[preset]())
    del fields["state_mode"]
    assert config.from_dict(fields).state_mode == mode


def test_a_model_has_no_other_models_state_mode():
    unused = dataclasses.replace(config.pi05_tiny(), state_mode="unused")
    assert config.from_dict(dataclasses.asdict(unused)) == unused != config.pi05_tiny()
    for preset, mode in (("pi0_tiny", "prompt"), ("pi0_tiny", "unused"), ("pi05_tiny", "token")):
        with pytest.raises(ValueError, match=f"state_mode='{mode}' is none of Pi0.*choose one"):
            dataclasses.replace(config.PRESETS[preset](), state_mode=mode)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vlm", {"num_kv_heads": 3}, "not a multiple of num_kv_heads=3"),
        ("vlm", {"head_dim": 31}, "head_dim=31 is odd"),
        ("vlm", {"depth": 9}, "must be equal"),
        ("siglip", {"num_heads": 7}, "not a multiple of num_heads=7"),
        ("siglip", {"patch_size": 15}, "not a multiple of patch_size=15"),
    ],
)
def test_sizes_that_do_not_fit(part, change, message):
    tiny = config.pi0_tiny()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny, **{part: dataclasses.replace(getattr(tiny, part), **change)})


@pytest.fixture(scope="module")
def case():
    return golden.load("pi0_tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": jnp.zeros((2, 7))}, r"state has shape \(2, 7\), expected \(2, 8\)"),
        ({"images": {}}, "give one mask per image"),
        ({"images": {"front": jnp.zeros((2, 224, 224, 3))}}, "not in Pi0Config.cameras"),
        ({"tokenized_prompt_mask": jnp.ones((2, 3), bool)}, "tokenized_prompt_mask has shape"),
    ],
)
def test_inputs_that_do_not_fit(case, change, message):
    observation = dataclasses.replace(case.observation, **change)
    model = nnx.eval_shape(case.model)
    with pytest.raises(ValueError, match=message):
        model.velocity(observation, case.inputs["noise"], case.inputs["time"])


def test_bfloat16_is_close_to_float32(case):
    """Activations in bfloat16 from the same float32 weights: a few percent, and float32 out."""
    model = case.model()
    half = replace(
        Pi0.abstract(dataclasses.replace(case.config, dtype="bfloat16")),
        {path: variable[...] for path, variable in flatten(model).items()},
    )
    velocity = jax.jit(lambda m: m.velocity(case.observation, case.inputs["noise"], case.inputs["time"]))
    exact, rounded = velocity(model), velocity(half)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_strict_dtype_promotion(case):
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            lambda m: m.loss(*(case.observation, *(case.inputs[k] for k in ("actions", "noise", "time")))), case.model()
        )


def test_unknown_remat_policy(case):
    with pytest.raises(ValueError, match="remat='some'"):
        Execution(remat="some").checkpoint(lambda x: x)  # pyright: ignore[reportArgumentType]: the fault under test


def test_noise_and_time_depend_on_the_example_alone():
    key = jax.random.key(0)
    noise, t = flow.draw(key, jnp.arange(6, dtype=jnp.uint32), (3, 2))
    part_noise, part_t = flow.draw(key, jnp.array([4, 1], jnp.uint32), (3, 2))
    np.testing.assert_array_equal(part_noise, noise[jnp.array([4, 1])])
    np.testing.assert_array_equal(part_t, t[jnp.array([4, 1])])


def test_further_draws_are_others_and_leave_the_first():
    key, examples = jax.random.key(0), jnp.arange(6, dtype=jnp.uint32)
    noise, t = flow.draw(key, examples, (3, 2))
    more_noise, more_t = flow.draw(key, examples, (3, 2), samples=4)
    np.testing.assert_array_equal(more_noise[::4], noise)
    np.testing.assert_array_equal(more_t[::4], t)
    assert len(np.unique(more_t)) == len(np.unique(more_noise[:, 0, 0])) == 24


@pytest.mark.long
def test_draws_behind_one_prefix_are_as_many_passes(case):
    """Four of each example: losses, and the gradient of their mean."""
    model, actions, draws = case.model(), case.inputs["actions"], 4
    noise, t = flow.draw(jax.random.key(0), jnp.arange(2, dtype=jnp.uint32), actions.shape[1:], draws)

    def mean_loss(model, noise, t):
        losses = model.loss(case.observation, actions, noise, t)
        return jnp.mean(losses), losses

    run = nnx.jit(nnx.value_and_grad(mean_loss, has_aux=True))
    (_, together), gradients = run(model, noise, t)
    singles = [run(model, noise[draw::draws], t[draw::draws]) for draw in range(draws)]
    for draw, ((_, losses), _) in enumerate(singles):
        np.testing.assert_allclose(together[draw::draws], losses, rtol=1e-5)
    expected = [flatten(gradients) for _, gradients in singles]
    for path, gradient in flatten(gradients).items():
        mean = np.mean([np.asarray(single[path][...]) for single in expected], axis=0)
        assert np.linalg.norm(gradient[...] - mean) <= 1e-5 * np.linalg.norm(mean) + 1e-7, path


def test_draws_that_are_not_as_many_for_each_example(case):
    noise = jnp.zeros((3, *case.inputs["noise"].shape[1:]))
    with pytest.raises(ValueError, match=r"actions has shape \(3, .*expected \(2, "):
        case.model().velocity(case.observation, noise, jnp.zeros(3))


def test_weights_of_the_dimensions_make_a_weighted_mean():
    velocity, zeros = jnp.array([[[1.0, 2.0, 3.0]]]), jnp.zeros((1, 1, 3))
    np.testing.assert_allclose(flow.loss(velocity, zeros, zeros), [[14 / 3]], rtol=1e-6)
    weighted = flow.loss(velocity, zeros, zeros, jnp.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(weighted, [[13 / 4]], rtol=1e-6)


def test_distribution_of_time():
    """Beta(1.5, 1) * 0.999 + 0.001 has mean 0.6004 and variance 0.0685 * 0.999²."""
    noise, t = flow.draw(jax.random.key(1), jnp.arange(20_000, dtype=jnp.uint32), (2, 2))
    assert t.min() >= 0.001 and t.max() <= 1
    np.testing.assert_allclose(t.mean(), 0.001 + 0.999 * 0.6, atol=0.006)
    np.testing.assert_allclose(t.var(), 0.999**2 * 1.5 / (2.5**2 * 3.5), atol=0.002)
    np.testing.assert_allclose(noise.std(), 1, atol=0.01)


def test_steps_and_solvers_that_are_none():
    with pytest.raises(ValueError, match="num_steps=0"):
        flow.evaluation_times(0, "euler")
    with pytest.raises(ValueError, match="solver='rk4' is not one of euler, midpoint, heun"):
        flow.evaluation_times(3, "rk4")


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_the_solvers(solver, order):
    """On dx/dt = x (1 + t), halving the step divides the error by 2^order."""

    def error(num_steps):
        times = jnp.asarray(flow.evaluation_times(num_steps, solver))

        def velocity(x, t, calls):
            return x * (1 + t), calls + 1

        noise = jnp.ones((1, 1, 1))
        x = flow.integrate(velocity, noise, times, jnp.zeros((), jnp.int32), num_steps=num_steps, solver=solver)
        return abs(float(x[0, 0, 0]) - np.exp(-3 / 2))

    ratio = error(8) / error(16)
    np.testing.assert_allclose(np.log2(ratio), order, atol=0.15)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["pi0_base", "pi05_base"])
def test_full_size_forward_pass_in_bfloat16(preset):
    """One example with three cameras; the weights are bfloat16, so that model and activations fit 24 GB."""
    size = config.PRESETS[preset]()
    abstract = Pi0.abstract(size)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 20, dtype=np.float32)

    def weight(shape):
        std = 0.02 if len(shape) < 2 else shape[-2] ** -0.5
        return jnp.asarray(np.resize(noise * std, shape).astype(jnp.bfloat16))

    model = replace(abstract, {path: weight(variable.shape) for path, variable in flatten(abstract).items()})
    shapes = dict.fromkeys(size.cameras, (1, size.image_size, size.image_size, 3))
    observation = golden.Observation(
        images={camera: jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8)) for camera, shape in shapes.items()},
        image_masks={camera: jnp.ones(1, bool) for camera in size.cameras},
        state=jnp.ones((1, size.action_dim)),
        tokenized_prompt=jnp.full((1, size.max_token_len), 7),
        tokenized_prompt_mask=jnp.arange(size.max_token_len)[None] < 9,
    )
    x_t = jnp.asarray(rng.standard_normal((1, size.action_horizon, size.action_dim), dtype=np.float32))
    velocity = jax.jit(lambda m, o, x: m.velocity(o, x, jnp.ones(1)))(model, observation, x_t)
    assert velocity.shape == x_t.shape and velocity.dtype == jnp.float32
    assert np.isfinite(velocity).all() and velocity.std() > 0
