import numpy as np
import pytest

from pi0fast.data import demo
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"


def success_rate(policy, episodes: int, seed: int = 1) -> float:
    simulator, successes = demo.Simulator(seed, size=8), 0
    for _ in range(episodes):
        simulator.reset()
        done, info = False, {}
        while not done:
            _, done, info = simulator.step(policy(simulator))
        successes += info["success"]
    return successes / episodes


def test_observation_shapes_and_prompt():
    simulator = demo.Simulator(seed=0, size=40)
    observation = simulator.reset()
    assert observation[TOP].shape == observation[WRIST].shape == (40, 40, 3)
    assert observation[TOP].dtype == observation[WRIST].dtype == np.uint8
    np.testing.assert_array_equal(observation[STATE], simulator.agent.astype(np.float32))
    assert observation[STATE].dtype == np.float32
    assert observation["prompt"] == f"touch the {simulator.colours[simulator.wanted]} block"


def test_cameras_show_the_blocks_where_they_are():
    simulator = demo.Simulator(seed=3)
    observation = simulator.reset()
    for centre, colour in zip(simulator.blocks, simulator.colours, strict=True):
        if np.linalg.norm(centre - simulator.agent) > 0.05:  # else the agent covers the centre
            column, row = (centre * 56).astype(int)
            np.testing.assert_array_equal(observation[TOP][row, column], demo.PALETTES["primary"][colour])
    # at the prompted block, the middle of the wrist camera shows it, unobstructed
    simulator.agent = simulator.goal.copy()
    observation, _, _ = simulator.step(simulator.goal)
    np.testing.assert_array_equal(
        observation[WRIST][28, 28], demo.PALETTES["primary"][simulator.colours[simulator.wanted]]
    )


def test_palettes_share_no_colour_and_the_tokenizer_has_each_as_one_token():
    primary, secondary = demo.PALETTES["primary"], demo.PALETTES["secondary"]
    assert not set(primary) & set(secondary) and not set(primary.values()) & set(secondary.values())
    tokenizer = PromptTokenizer(DEMO_TOKENIZER, max_len=8)
    lengths = {tokenizer.longest([f"touch the {colour} block"]) for colour in (*primary, *secondary)}
    assert lengths == {6}


def test_another_palette_changes_colours_and_prompt_alone():
    simulator, other = demo.Simulator(seed=3), demo.Simulator(seed=3, palette="secondary")
    primary, secondary = simulator.reset(), other.reset()
    np.testing.assert_array_equal(simulator.blocks, other.blocks)
    np.testing.assert_array_equal(primary[STATE], secondary[STATE])
    assert simulator.wanted == other.wanted
    assert set(other.colours) < set(demo.PALETTES["secondary"])
    assert secondary["prompt"] == f"touch the {other.colours[other.wanted]} block"
    # each pixel that differs belongs to a block, and a block's centre has its new colour
    column, row = (other.goal * 56).astype(int)
    np.testing.assert_array_equal(secondary[TOP][row, column], demo.PALETTES["secondary"][other.colours[other.wanted]])
    differs = (primary[TOP] != secondary[TOP]).any(axis=-1)
    rows, columns = np.nonzero(differs)
    centres = (np.stack([columns, rows], axis=1) + 0.5) / 56
    distances = np.linalg.norm(centres[:, None] - simulator.blocks, axis=-1).min(axis=1)
    assert len(centres) and distances.max() < demo.BLOCK_RADIUS + 1 / 56


def test_wrist_camera_shows_the_edge_of_the_table():
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    simulator.agent = np.array([0.0, 0.5])
    wrist = simulator.step([0.0, 0.5])[0][WRIST]
    assert (wrist[:, :27] == wrist[0, 0]).all() and (wrist[0, 0] < 100).all()
    assert (wrist[:, 29:].max(axis=(1, 2)) > 120).all()


def test_layouts_are_valid_and_differ():
    simulator = demo.Simulator(seed=7)
    layouts = []
    for _ in range(100):
        simulator.reset()
        distances = np.linalg.norm(simulator.blocks[:, None] - simulator.blocks, axis=-1)[np.triu_indices(3, 1)]
        assert distances.min() > 2 * demo.BLOCK_RADIUS
        assert simulator.blocks.min() > demo.BLOCK_RADIUS and simulator.blocks.max() < 1 - demo.BLOCK_RADIUS
        assert len(set(simulator.colours)) == demo.NUM_BLOCKS
        assert np.linalg.norm(simulator.agent - simulator.goal) > demo.BLOCK_RADIUS
        layouts.append((simulator.colours[simulator.wanted], *simulator.goal))
    assert len(set(layouts)) == 100
    assert {colour for colour, *_ in layouts} == set(demo.PALETTES["primary"])


def test_same_seed_same_episodes_other_seed_other_episodes():
    def play(seed):
        pairs, _ = demo.demonstrate(demo.Simulator(seed), np.random.default_rng(0))
        return np.stack([np.concatenate([o[STATE], a]) for o, a in pairs]), pairs[-1][0][TOP]

    states, image = play(5)
    again, same_image = play(5)
    np.testing.assert_array_equal(states, again)
    np.testing.assert_array_equal(image, same_image)
    assert not np.array_equal(states[0], play(6)[0][0])


def test_step_moves_at_most_the_limit_and_stays_on_the_table():
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    before = simulator.agent.copy()
    simulator.step([5.0, -5.0])
    assert np.linalg.norm(simulator.agent - before) == pytest.approx(demo.MAX_STEP)
    before, near = simulator.agent.copy(), simulator.agent + np.array([0.0, 0.01])
    simulator.step(near)
    np.testing.assert_allclose(simulator.agent, near)
    simulator.agent = np.array([0.99, 0.01])
    simulator.step([5.0, -5.0])
    assert simulator.agent.min() >= 0 and simulator.agent.max() <= 1


def test_a_block_counts_after_resting_on_it():
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    simulator.agent = simulator.goal.copy()
    for _ in range(demo.DWELL_STEPS - 1):
        assert simulator.step(simulator.goal)[1:] == (False, {"touched": None, "success": False})
    _, done, info = simulator.step(simulator.goal)
    assert done and info == {"touched": simulator.colours[simulator.wanted], "success": True}
    with pytest.raises(RuntimeError, match="reset"):
        simulator.step(simulator.goal)


def test_resting_on_another_block_fails():
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    other = (simulator.wanted + 1) % demo.NUM_BLOCKS
    simulator.agent = simulator.blocks[other].copy()
    done, info = False, {}
    while not done:
        _, done, info = simulator.step(simulator.blocks[other])
    assert info == {"touched": simulator.colours[other], "success": False}


@pytest.mark.parametrize("speed", [demo.MAX_STEP, demo.EXPERT_SPEED])
def test_passing_over_a_block_does_not_count(speed):
    simulator = demo.Simulator(seed=0)
    for offset in np.linspace(0, speed, 7):
        simulator.reset()
        simulator.blocks[:] = [(0.5, 0.5), (0.1, 0.1), (0.9, 0.1)]
        simulator.agent = np.array([0.3 + offset, 0.5])
        while simulator.agent[0] < 0.7:
            _, done, info = simulator.step(simulator.agent + np.array([speed, 0]))
            assert not done and info["touched"] is None


def test_episode_ends_after_max_steps():
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    simulator.blocks[:] = [(0.5, 0.5), (0.1, 0.1), (0.9, 0.1)]
    simulator.agent = np.array([0.1, 0.9])
    steps = [simulator.step(simulator.agent)[1] for _ in range(demo.MAX_STEPS)]
    assert steps == [False] * (demo.MAX_STEPS - 1) + [True]


@pytest.mark.parametrize("action", [[0.5], [np.nan, 0.5], [[0.1, 0.2]]])
def test_malformed_action_is_an_error(action):
    simulator = demo.Simulator(seed=0)
    simulator.reset()
    with pytest.raises(ValueError, match="two finite numbers"):
        simulator.step(action)


def test_expert_succeeds_and_blind_policies_do_not():
    rng = np.random.default_rng(0)
    assert success_rate(demo.expert_action, 150) == 1.0
    assert success_rate(lambda simulator: rng.uniform(0, 1, 2), 80) <= 0.12
    assert success_rate(lambda simulator: [0.5, 0.5], 80) <= 0.12
    assert success_rate(lambda simulator: simulator.agent, 20) == 0.0


def test_demonstrations_record_clean_actions_and_cover_recovery():
    simulator, rng = demo.Simulator(seed=0), np.random.default_rng(0)
    successes, off_course = [], []
    for _ in range(100):
        pairs, success = demo.demonstrate(simulator, rng)
        successes.append(success)
        states = np.stack([observation[STATE] for observation, _ in pairs])
        actions = np.stack([action for _, action in pairs])
        goal = simulator.goal
        distance = np.linalg.norm(goal - states, axis=1)
        # the recorded action always goes straight to the block, at the expert's speed
        step = np.minimum(demo.EXPERT_SPEED, distance)
        np.testing.assert_allclose(np.linalg.norm(goal - actions, axis=1), distance - step, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(actions - states, axis=1), step, atol=1e-6)
        off_course.extend(np.linalg.norm(states[1:] - actions[:-1], axis=1))
    assert np.mean(successes) >= 0.97
    assert 0.01 < np.median(off_course) < 0.03 < np.max(off_course)
