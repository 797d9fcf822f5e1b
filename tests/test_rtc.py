"""Guided sampling against closed forms and an uncached loop; the weights by hand; leftovers in the model's terms."""

import dataclasses
import threading
from concurrent.futures import wait

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.server import serve

from pi0fast import Observation, Pi0, config, flow
from pi0fast.broker import ActionBroker
from pi0fast.data.demo import Simulator
from pi0fast.normalize import NormStats
from pi0fast.params import flatten, replace
from pi0fast.policy import Policy
from pi0fast.robots import DEMO
from pi0fast.rtc import RtcConfig, guidance, prefix_weights
from pi0fast.sampling import Guidance, Sampler
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer
from pi0fast.transforms import SampleTransform

RNG = np.random.default_rng(0)
B, H, A = 2, 8, 3
X, TARGET = (jnp.asarray(RNG.standard_normal((B, H, A)), jnp.float32) for _ in range(2))
ONES = jnp.ones((B, H))
# mean, std, q01, q99
STATS = {
    "state": NormStats(*np.array([[0.5, 0.5], [0.3, 0.2], [0.0, 0.0], [1.0, 1.0]])),
    "actions": NormStats(*np.array([[0.01, 0.0], [0.1, 0.2], [-0.3, -0.3], [0.3, 0.3]])),
}


def curved(x):
    """A velocity that mixes the steps of a chunk."""
    return jnp.tanh(x + 0.3 * jnp.roll(x, 1, axis=1)), None


class TestGuided:
    def test_no_weight_is_the_plain_velocity(self):
        v, _ = flow.guided(curved, X, jnp.float32(0.4), TARGET, 0 * ONES, 5.0)
        np.testing.assert_array_equal(v, curved(X)[0])

    @pytest.mark.parametrize(
        ("t", "max_guidance", "factor"),
        [(0.3, 5.0, 0.58 / 0.21), (0.5, 5.0, 2.0), (0.9, 5.0, 5.0), (0.9, 20.0, 0.82 / 0.09), (0.1, 5.0, 5.0)],
    )
    def test_closed_form_of_a_linear_field(self, t, max_guidance, factor):
        """v = M x per dimension, so that Â = (I - tM) x, and the correction is its transpose on the weighted error."""
        matrix = RNG.standard_normal((H, H)) / 4
        weight = RNG.uniform(size=(B, H))
        field = lambda x: (jnp.asarray(matrix, jnp.float32) @ x, None)  # noqa: E731
        v, _ = flow.guided(field, X, jnp.float32(t), TARGET, jnp.asarray(weight, jnp.float32), max_guidance)
        x, target = np.float64(X), np.float64(TARGET)
        towards = np.eye(H) - t * matrix
        expected = matrix @ x - factor * (towards.T @ (weight[..., None] * (target - towards @ x)))
        np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("t", [0.0, 1e-30, 1e-7, 1 - 1e-7, 1.0])
    def test_the_ends_are_clipped(self, t):
        v, _ = flow.guided(curved, X, jnp.float32(t), TARGET, ONES, 5.0)
        (pull,) = jax.vjp(lambda x: x - t * curved(x)[0], X)[1](TARGET - (X - t * curved(X)[0]))
        np.testing.assert_allclose(v, curved(X)[0] - 5.0 * pull, rtol=1e-5, atol=1e-5)

    def test_what_the_velocity_caches_is_untouched(self):
        cache = jnp.zeros((B, H, A))

        def caching(x):
            written = cache.at[:].set(2 * x)
            return jnp.sin(written), written

        _, written = flow.guided(caching, X, jnp.float32(0.5), TARGET, ONES, 5.0)
        np.testing.assert_array_equal(written, 2 * X)

    def test_samples_of_a_known_distribution_follow_the_target(self):
        """Chunks from a Gaussian with correlated steps, whose velocity is known: held steps come out as the target, and
        the free ones after them go on from there, as far apart as the distribution then has them."""
        correlation = 0.9 ** np.abs(np.subtract.outer(np.arange(H), np.arange(H)))
        wave = 1.5 * np.cos(np.arange(H) / 3)
        target = jnp.broadcast_to(jnp.asarray(wave, jnp.float32)[:, None], (512, H, 1))
        held = jnp.broadcast_to((jnp.arange(H) < 4).astype(jnp.float32), (512, H))
        noise = jax.random.normal(jax.random.key(0), (512, H, 1))

        def sample(weight):
            def velocity(x_t, t, _):
                def plain(x):
                    spread = (1 - t) ** 2 * correlation + t**2 * jnp.eye(H)
                    clean = (1 - t) * correlation @ jnp.linalg.solve(spread, x)
                    return (x - clean) / t, None

                return flow.guided(plain, x_t, t, target, weight, 5.0)

            times = jnp.asarray(flow.evaluation_times(20, "euler"), jnp.float32)
            return np.asarray(flow.integrate(velocity, noise, times, None, num_steps=20))[..., 0]

        plain, guided, held_all = sample(0 * held), sample(held), sample(jnp.ones_like(held))
        miss = lambda samples, steps: np.sqrt(np.square(samples - target[..., 0])[:, steps].mean())  # noqa: E731
        assert miss(plain, slice(4)) > 1.5 and miss(guided, slice(4)) < 0.15 and miss(held_all, slice(None)) < 0.15
        # the step from the last held to the first free one: its root mean square, exactly and as sampled
        change = lambda samples: np.sqrt(np.square(samples[:, 4] - wave[3]).mean())  # noqa: E731
        exact = np.hypot(np.sqrt(1 - 0.9**2), 0.1 * wave[3])
        assert change(plain) > 2.5 * exact and change(guided) < 1.25 * exact
        np.testing.assert_allclose(guided[:, 4:].std(axis=0), np.sqrt(1 - 0.81 ** np.arange(1, 5)), rtol=0.1)


@pytest.fixture(scope="module", params=["pi0_tiny", "pi05_tiny"])
def model(request):
    """With every weight drawn, so that Pi0.5's conditions, which start at zero, count."""
    abstract = Pi0.abstract(config.PRESETS[request.param]())
    rng = np.random.default_rng(1)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)  # noqa: E731
    return replace(abstract, {path: draw(variable.shape) for path, variable in flatten(abstract).items()})


def test_guided_sampling_matches_a_loop_without_a_cache(model):
    size = model.config
    shape = (B, size.action_horizon, size.action_dim)
    image = RNG.integers(0, 256, (B, size.image_size, size.image_size, 3), np.uint8)
    observation = Observation(
        images={"base_0_rgb": jnp.asarray(image)},
        image_masks={"base_0_rgb": jnp.array([True, False])},
        state=jnp.asarray(RNG.standard_normal(shape[::2]), jnp.float32),
        tokenized_prompt=jnp.full((B, size.max_token_len), 7),
        tokenized_prompt_mask=jnp.arange(size.max_token_len) < jnp.array([[5], [3]]),
    )
    noise, target = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for _ in range(2))
    weight = jnp.stack([prefix_weights(shape[1], 2, 3), np.zeros(shape[1], np.float32)])
    sampler = Sampler.of(model, num_steps=4)
    guided = jax.jit(lambda s, o, n, g: s(o, n, g))(sampler, observation, noise, Guidance(target, weight, 5.0))

    @jax.jit
    def step(model, x, t):
        def clean(x):
            v = model.velocity(observation, x, jnp.full(B, t))
            return x - t * v, v

        actions, pull, v = jax.vjp(clean, x, has_aux=True)
        factor = jnp.minimum(5.0, (t**2 + (1 - t) ** 2) / (t * (1 - t)))
        return x - 0.25 * (v - factor * pull(weight[..., None] * (target - actions))[0])

    x = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        x = step(model, x, t)
    np.testing.assert_allclose(guided, x, rtol=2e-5, atol=2e-5)
    plain = jax.jit(lambda s, o, n: s(o, n))(sampler, observation, noise)
    np.testing.assert_allclose(guided[1], plain[1], rtol=1e-5, atol=1e-5)  # the one without weight
    gap = lambda actions: np.abs(actions[0] - target[0])[:2].mean()  # noqa: E731
    assert gap(guided) < 0.5 * gap(plain)


class TestWeights:
    @pytest.mark.parametrize(
        ("schedule", "between"),
        [
            # c = 3/4, 2/4, 1/4, and c (e^c - 1) / (e - 1)
            ("linear", [0.75, 0.5, 0.25]),
            ("exponential", [0.487551, 0.1887703, 0.041324]),
            ("ones", [1.0, 1.0, 1.0]),
            ("zeros", [0.0, 0.0, 0.0]),
        ],
    )
    def test_by_hand(self, schedule, between):
        weights = prefix_weights(horizon=8, delay=2, execute=3, schedule=schedule)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, [1, 1, *between, 0, 0, 0], atol=1e-6)

    def test_ends(self):
        np.testing.assert_array_equal(prefix_weights(4, 2, 2), [1, 1, 0, 0])
        np.testing.assert_array_equal(prefix_weights(4, 4, 0), [1, 1, 1, 1])
        np.testing.assert_array_equal(prefix_weights(4, 0, 4), [0, 0, 0, 0])
        np.testing.assert_allclose(prefix_weights(2, 0, 1, "linear"), [0.5, 0])

    @pytest.mark.parametrize(("delay", "execute"), [(-1, 2), (5, 4), (0, 9), (2, -1)])
    def test_no_room(self, delay, execute):
        with pytest.raises(ValueError, match=rf"delay={delay}, execute={execute}: .* horizon 8; ask"):
            prefix_weights(8, delay, execute)

    def test_config(self):
        RtcConfig(delay=4, execute=4).check(8)
        with pytest.raises(ValueError, match="horizon 8"):
            RtcConfig(delay=5, execute=4).check(8)
        for fields, message in [
            ({"delay": -1}, "counts of steps"),
            ({"schedule": "cubic"}, "exponential, linear, ones, zeros"),
            ({"max_guidance": float("inf")}, "finite"),
        ]:
            with pytest.raises(ValueError, match=message):
                RtcConfig(**fields)
        with pytest.raises(ValueError, match="cubic"):
            prefix_weights(8, 1, 1, "cubic")  # pyright: ignore[reportArgumentType]


class TestLeftovers:
    @pytest.fixture(params=["pi0_tiny", "pi05_tiny"])
    def transform(self, request):
        size = dataclasses.replace(config.PRESETS[request.param](), action_dim=4)
        return SampleTransform(size, DEMO, STATS, PromptTokenizer(DEMO_TOKENIZER, size.max_token_len))

    def test_target_is_relative_to_the_new_state(self, transform):
        """The policy's own output for one state, cut, and given back at another state, names the same actions."""
        old, new = np.array([0.2, 0.3], np.float32), np.array([0.4, 0.25], np.float32)
        chunk = transform.invert_actions(np.pad(RNG.standard_normal((8, 2)), [(0, 0), (0, 2)]), old)
        target, weight = guidance(transform, chunk[3:], 2, new, RtcConfig())
        assert target.shape == (8, 4) and target.dtype == weight.dtype == np.float32
        np.testing.assert_allclose(transform.invert_actions(target, new)[:5], chunk[3:], atol=1e-6)
        np.testing.assert_array_equal(target[5:], 0)
        np.testing.assert_array_equal(target[:, 2:], 0)
        np.testing.assert_array_equal(weight, prefix_weights(8, 2, 3))

    def test_values_by_hand(self, transform):
        target, _ = guidance(transform, [[0.5, 0.3]], None, np.array([0.4, 0.1]), RtcConfig())
        expected = [1 / 3, 2 / 3] if transform.config.pi05 else [0.9, 1.0]
        np.testing.assert_allclose(target[0, :2], expected, rtol=2e-5)

    def test_which_steps_are_held(self, transform):
        left, state, linear = np.full((5, 2), 0.5), np.full(2, 0.5), RtcConfig(1, 4, "linear")
        weights = lambda left, delay: guidance(transform, left, delay, state, linear)[1]  # noqa: E731
        np.testing.assert_array_equal(weights(left, None), prefix_weights(8, 1, 4, "linear"))
        np.testing.assert_array_equal(weights(left, np.int64(3)), prefix_weights(8, 3, 4, "linear"))
        np.testing.assert_array_equal(weights(left[:2], 3), [1, 1, 0, 0, 0, 0, 0, 0])

    @pytest.mark.parametrize(
        ("previous", "delay", "message"),
        [
            (np.zeros((9, 2)), 1, r"rtc/previous_actions has shape \[9, 2\], expected \[m, 2\] with m from 1 to 8"),
            (np.zeros((0, 2)), 1, "rtc/previous_actions has shape"),
            (np.zeros((3, 4)), 1, "rtc/previous_actions has shape"),
            (np.zeros(2), 1, "rtc/previous_actions has shape"),
            (np.full((3, 2), np.nan), 1, "rtc/previous_actions is not finite"),
            (np.full((3, 2), 1e4), 1, "rtc/previous_actions, dimension"),
            (np.zeros((3, 2)), 9, "rtc/delay is 9, expected a whole number of steps from 0 to 8"),
            (np.zeros((3, 2)), -1, "rtc/delay is -1"),
            (np.zeros((3, 2)), 1.5, "rtc/delay is 1.5"),
            (np.zeros((3, 2)), [1], "rtc/delay is"),
        ],
    )
    def test_errors_name_the_key(self, transform, previous, delay, message):
        with pytest.raises(ValueError, match=message):
            guidance(transform, previous, delay, np.full(2, 0.5), RtcConfig())


@pytest.fixture(scope="module")
def untrained():
    model = Pi0(config.pi0_tiny(), rngs=nnx.Rngs(0))
    return model, SampleTransform(model.config, DEMO, STATS, PromptTokenizer(DEMO_TOKENIZER, 8))


@pytest.fixture(scope="module")
def policy(untrained):
    return Policy(*untrained, batch_sizes=(1, 3), rtc=RtcConfig(schedule="linear", max_guidance=4.0))


@pytest.fixture
def asking():
    """An observation, and what is left of some chunk: six steps of a line."""
    observation = Simulator(seed=5).reset()
    left = observation["observation.state"] + np.linspace(0, 0.2, 6)[:, None]
    return {**observation, "rtc/previous_actions": np.float32(left), "rtc/delay": 2}


@pytest.mark.long
def test_actions_are_the_guided_samples_in_the_robots_units(untrained, policy, asking):
    model, transform = untrained
    cameras = {f"image.{camera}": asking[key] for camera, key in DEMO.cameras.items()}
    state = asking["observation.state"]
    inputs = transform({**cameras, "state": state, "prompt": asking["prompt"]})
    batch = Observation(**jax.tree.map(lambda x: jnp.asarray(x)[None], inputs))
    noise = RNG.standard_normal((8, 2)).astype(np.float32)
    target = transform.model_actions(asking["rtc/previous_actions"], np.float64(state), steps=6)
    target, weight = np.pad(target, [(0, 2), (0, 0)]), prefix_weights(8, 2, 2, "linear")
    guide = Guidance(jnp.asarray(target)[None], jnp.asarray(weight)[None], 4.0)
    expected = jax.jit(lambda s, o, n, g: s(o, n, g))(Sampler.of(model), batch, jnp.asarray(noise)[None], guide)
    expected = transform.invert_actions(np.asarray(expected)[0], state)
    actions = policy.infer(asking, noise=noise)["actions"]
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
    nested = {key: value for key, value in asking.items() if not key.startswith("rtc/")}
    nested["rtc"] = {"previous_actions": asking["rtc/previous_actions"].tolist(), "delay": 2}
    np.testing.assert_array_equal(policy.infer(nested, noise=noise)["actions"], actions)


def test_a_batch_mixes_those_with_and_without(policy, asking):
    free = Simulator(seed=6).reset()
    noise = RNG.standard_normal((3, 8, 2)).astype(np.float32)
    observations = [asking, free, {**asking, "rtc/delay": 0}]
    together = policy.run([policy.prepare(each) for each in observations], noise=noise)
    for observation, one, reply in zip(observations, noise, together, strict=True):
        alone = policy.infer(observation, noise=one)["actions"]
        np.testing.assert_allclose(reply["actions"], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(together[0]["actions"] - together[2]["actions"]).max() > 1e-3


def test_without_leftovers_it_is_the_plain_policy(untrained, policy, asking):
    plain = Policy(*untrained)
    noise = RNG.standard_normal((8, 2)).astype(np.float32)
    free = {key: value for key, value in asking.items() if not key.startswith("rtc/")}
    replies = [each.infer(free, noise=noise) for each in (plain, policy)]
    np.testing.assert_array_equal(replies[0]["actions"], replies[1]["actions"])
    assert plain.metadata["rtc"] is None
    assert policy.metadata["rtc"] == {"delay": 0, "execute": 0, "schedule": "linear", "max_guidance": 4.0}
    with pytest.raises(ValueError, match="rtc/previous_actions was sent to a policy without"):
        plain.infer(asking)


def test_errors_leave_the_policy_usable(untrained, policy, asking):
    with pytest.raises(ValueError, match="rtc/previous_actions is not finite"):
        policy.infer({**asking, "rtc/previous_actions": np.full((2, 2), np.nan)})
    policy.warmup()
    assert np.isfinite(policy.infer(asking)["actions"]).all()
    with pytest.raises(ValueError, match="horizon 8"):
        Policy(*untrained, rtc=RtcConfig(delay=6, execute=4))


class Remote:
    """The policy behind openpi-client's protocol; keeps the requests and the actions that it answered with."""

    def __init__(self, policy):
        self.policy, self.requests, self.chunks = policy, [], []
        self.server = serve(self.answer, "127.0.0.1", 0, compression=None)
        self.port = self.server.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()

    def answer(self, connection):
        connection.send(msgpack_numpy.packb(self.policy.metadata))
        for message in connection:
            self.requests.append(msgpack_numpy.unpackb(message))
            reply = self.policy.infer(self.requests[-1])
            self.chunks.append(reply["actions"])
            connection.send(msgpack_numpy.packb(reply))


@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")  # the client's
def test_the_broker_and_openpis_client_drive_a_robot(policy):
    """Through a socket and threads; the robot waits in each tick, so that a chunk is late by one."""
    simulator, executed, states = Simulator(seed=5), [], []
    observation = simulator.reset()
    with Remote(policy) as remote:
        client = WebsocketClientPolicy("127.0.0.1", remote.port)
        with ActionBroker(client, execute=3) as broker:
            for _ in range(12):
                if broker._pending is not None:
                    assert not wait([broker._pending], timeout=60).not_done
                states.append(observation["observation.state"])
                executed.append(broker.step(observation))
                observation, _, _ = simulator.step(executed[-1])
            assert (broker.held, broker.delay) == (0, 1)
        client._ws.close()
    np.testing.assert_array_equal(
        executed,
        np.concatenate([remote.chunks[0][:4], *(chunk[1:4] for chunk in remote.chunks[1:3]), remote.chunks[3][1:3]]),
    )
    first, *others = remote.requests
    assert "rtc/delay" not in first
    for number, request in enumerate(others):
        np.testing.assert_array_equal(request["observation.state"], states[3 * (number + 1)])
        np.testing.assert_array_equal(request["rtc/previous_actions"], remote.chunks[number][3:])
        assert request["rtc/delay"] == 1
