import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from pi0fast import config as presets
from pi0fast.config import pi0_base
from pi0fast.normalize import NormStats
from pi0fast.robots import ALOHA, DEMO, Robot
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer
from pi0fast.transforms import SampleTransform, absolute_actions, delta_actions, pad_to_dim, resize_with_pad

RNG = np.random.default_rng(0)
# mean, std, q01, q99
STATE = NormStats(*np.array([[0.5, 0.25], [0.5, 0.25], [0.0, 0.0], [1.0, 0.5]]))
ACTIONS = NormStats(*np.array([[0.0, 0.1], [0.2, 0.1], [-0.2, 0.0], [0.2, 0.4]]))
STATS = {"state": STATE, "actions": ACTIONS}


def pi0_tiny():
    """With padding behind the demo's two dimensions, and behind its prompts."""
    return dataclasses.replace(presets.pi0_tiny(), action_dim=4, max_token_len=16)


def pi05_tiny():
    return dataclasses.replace(presets.pi05_tiny(), action_dim=4, max_token_len=48)


def make(config=None, robot=DEMO, stats=STATS, **options) -> SampleTransform:
    config = config or pi0_tiny()
    return SampleTransform(config, robot, stats, PromptTokenizer(DEMO_TOKENIZER, config.max_token_len), **options)


def sample(**changes) -> dict:
    fields = {
        "image.base_0_rgb": RNG.integers(0, 256, (60, 80, 3), np.uint8),
        "image.left_wrist_0_rgb": RNG.integers(0, 256, (56, 56, 3), np.uint8),
        "state": np.array([1.0, 0.25], np.float32),
        "actions": np.tile(np.array([[1.2, 0.45]], np.float32), (8, 1)),
        "action_is_pad": np.arange(8) >= 6,
        "prompt": "touch the red block",
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


class TestResize:
    @pytest.mark.parametrize(
        ("old", "content"),
        [
            # (height, width) of the image → top, left, height, width of what is pasted, by hand for 224 x 224
            ((480, 640), (28, 0, 168, 224)),
            ((640, 480), (0, 28, 224, 168)),
            ((100, 50), (0, 56, 224, 112)),
            ((37, 101), (71, 0, 82, 224)),
            ((448, 448), (0, 0, 224, 224)),
        ],
    )
    def test_matches_pillow(self, old, content):
        image = RNG.integers(0, 256, (*old, 3), np.uint8)
        top, left, height, width = content
        expected = Image.new("RGB", (224, 224))
        expected.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), (left, top))
        np.testing.assert_array_equal(resize_with_pad(image, 224, 224), np.asarray(expected))

    def test_other_aspect_and_batch(self):
        images = RNG.integers(0, 256, (2, 3, 31, 17, 3), np.uint8)
        resized = resize_with_pad(images, 40, 64)
        assert resized.shape == (2, 3, 40, 64, 3) and resized.dtype == np.uint8
        np.testing.assert_array_equal(resized[1, 2], resize_with_pad(images[1, 2], 40, 64))
        # 31 → 40 rows, 17 → int(17 / (31 / 40)) = 21 columns, from column (64 - 21) // 2.
        np.testing.assert_array_equal(np.flatnonzero(resized[0, 0].any(axis=(0, 2))), np.arange(21, 42))

    def test_right_size_passes_through(self):
        image = RNG.integers(0, 256, (56, 64, 3), np.uint8)
        assert resize_with_pad(image, 56, 64) is image

    def test_a_sliver_keeps_a_row(self):
        assert resize_with_pad(np.full((1, 1000, 3), 255, np.uint8), 56, 56)[27].all()

    @pytest.mark.parametrize(
        "image", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
    )
    def test_refuses(self, image):
        with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
            resize_with_pad(image, 4, 4)


class TestDelta:
    def test_by_hand(self):
        actions, state = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([10.0, 20.0])
        relative = delta_actions(actions, state, (True, True, False))
        np.testing.assert_array_equal(relative, [[-9, -18, 3], [-6, -15, 6]])
        np.testing.assert_array_equal(actions[0], [1, 2, 3])
        np.testing.assert_array_equal(absolute_actions(relative, state, (True, True, False)), actions)
        np.testing.assert_array_equal(delta_actions(actions, state, ()), actions)
        np.testing.assert_array_equal(delta_actions(actions, state, (False,) * 3), actions)

    def test_each_chunk_has_its_own_state(self):
        actions, state = RNG.standard_normal((5, 4, 2)), RNG.standard_normal((5, 2))
        relative = delta_actions(actions, state, (False, True))
        np.testing.assert_array_equal(relative[3, 2], actions[3, 2] - [0, state[3, 1]])

    @pytest.mark.parametrize("mask", [(True,), (True,) * 4, (False, False, True)])
    def test_refuses_a_mask_that_does_not_fit(self, mask):
        with pytest.raises(ValueError, match=f"delta_mask has {len(mask)} entries"):
            delta_actions(np.zeros((1, 3)), np.zeros(2), mask)


def test_pad_to_dim():
    np.testing.assert_array_equal(pad_to_dim(np.array([[1.0, 2.0]]), 4), [[1, 2, 0, 0]])
    with pytest.raises(ValueError, match=r"raise Pi0Config\.action_dim"):
        pad_to_dim(np.zeros((2, 5)), 4)


class TestSample:
    def test_pi0_by_hand(self):
        data = sample()
        out = make()(data)
        assert list(out["images"]) == ["base_0_rgb", "left_wrist_0_rgb"]
        np.testing.assert_array_equal(out["images"]["base_0_rgb"], resize_with_pad(data["image.base_0_rgb"], 56, 56))
        assert out["images"]["left_wrist_0_rgb"] is data["image.left_wrist_0_rgb"]
        assert out["image_masks"] == {"base_0_rgb": True, "left_wrist_0_rgb": True}
        np.testing.assert_allclose(out["state"], [1, 0, 0, 0], atol=1e-5)
        # delta: (0.2, 0.2); z-scores: 0.2 / 0.2, (0.2 - 0.1) / 0.1
        np.testing.assert_allclose(out["actions"], np.tile([1, 1, 0, 0], (8, 1)), atol=2e-5)
        assert out["state"].dtype == out["actions"].dtype == np.float32
        tokens, mask = PromptTokenizer(DEMO_TOKENIZER, 16).encode("touch the red block")
        np.testing.assert_array_equal(out["tokenized_prompt"], tokens)
        np.testing.assert_array_equal(out["tokenized_prompt_mask"], mask)
        np.testing.assert_array_equal(out["action_is_pad"], data["action_is_pad"])

    def test_pi05_by_hand(self):
        out = make(pi05_tiny())(sample())
        # quantiles: state (1.0, 0.25) → (1, 0); delta (0.2, 0.2) → (1, 0)
        np.testing.assert_allclose(out["state"], [1, 0, 0, 0], atol=1e-5)
        np.testing.assert_allclose(out["actions"], np.tile([1, 0, 0, 0], (8, 1)), atol=1e-5)
        # The prompt has the two dimensions of the robot, none of the padding.
        normalized = (np.array([1.0, 0.25]) - STATE.q01) / (STATE.q99 - STATE.q01 + 1e-6) * 2 - 1
        tokens, _ = PromptTokenizer(DEMO_TOKENIZER, 48).encode("touch the red block", normalized)
        np.testing.assert_array_equal(out["tokenized_prompt"], tokens)

    def test_an_unused_state_is_not_in_the_prompt(self):
        out = make(dataclasses.replace(pi05_tiny(), state_mode="unused"))(sample())
        np.testing.assert_allclose(out["state"], [1, 0, 0, 0], atol=1e-5)  # by quantiles all the same
        tokens, _ = PromptTokenizer(DEMO_TOKENIZER, 48).encode("touch the red block")
        np.testing.assert_array_equal(out["tokenized_prompt"], tokens)

    def test_inference_and_missing_camera(self):
        out = make()(sample(**{"actions": None, "action_is_pad": None, "image.left_wrist_0_rgb": None}))
        assert set(out) == {"images", "image_masks", "state", "tokenized_prompt", "tokenized_prompt_mask"}
        assert out["image_masks"] == {"base_0_rgb": True, "left_wrist_0_rgb": False}
        wrist = out["images"]["left_wrist_0_rgb"]
        assert wrist.shape == (56, 56, 3) and wrist.dtype == np.uint8 and not wrist.any()

    def test_cameras_that_the_robot_lacks_are_left_out(self):
        robot = dataclasses.replace(DEMO, cameras={"base_0_rgb": "observation.images.top"})
        out = make(robot=robot)(sample(**{"image.left_wrist_0_rgb": None}))
        assert list(out["images"]) == list(out["image_masks"]) == ["base_0_rgb"]

    @pytest.mark.parametrize("config", [pi0_tiny(), pi05_tiny()], ids=["pi0", "pi05"])
    def test_invert_actions(self, config):
        transform = make(config, max_normalized=None)
        data = sample(actions=RNG.standard_normal((8, 2)).astype(np.float32))
        model_actions = transform(data)["actions"]
        model_actions[:, 2:] = 7.0  # the model is free to put anything into the padding
        back = transform.invert_actions(model_actions, data["state"])
        assert back.shape == (8, 2) and back.dtype == np.float32
        np.testing.assert_allclose(back, data["actions"], rtol=1e-5, atol=1e-6)
        batch = transform.invert_actions(np.stack([model_actions] * 3), np.stack([data["state"]] * 3))
        np.testing.assert_array_equal(batch[2], back)

    def test_openpis_padded_statistics_are_cut(self):
        wide = {
            key: NormStats(*(np.pad(array, (0, 30)) for array in (stats.mean, stats.std, stats.q01, stats.q99)))
            for key, stats in STATS.items()
        }
        np.testing.assert_array_equal(make(stats=wide)(sample())["actions"], make()(sample())["actions"])

    def test_pickles_for_worker_processes(self):
        data = sample()
        transform = make()
        copy = pickle.loads(pickle.dumps(transform))
        np.testing.assert_array_equal(copy(data)["actions"], transform(data)["actions"])


def test_prompt_len_leaves_padding_out():
    whole, short = make()(sample()), make(prompt_len=6)(sample())
    for name in ("tokenized_prompt", "tokenized_prompt_mask"):
        np.testing.assert_array_equal(short[name], whole[name][:6])
    assert short["tokenized_prompt_mask"].all()
    with pytest.raises(ValueError, match=r"'touch the red block' takes 6 tokens, more than prompt_len=5"):
        make(prompt_len=5)(sample())
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=rf"prompt_len={wrong} is not between 1 and the model's 16"):
            make(prompt_len=wrong)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"state": None}, r"has no \['state'\]"),
            ({"prompt": None}, r"has no \['prompt'\]"),
            ({"state": np.zeros(3)}, r"state has shape \[3\], expected \[2\]"),
            ({"actions": np.zeros((7, 2))}, r"actions has shape \[7, 2\], expected \[8, 2\]"),
            ({"actions": np.zeros((8, 3))}, r"actions has shape \[8, 3\], expected \[8, 2\]"),
            ({"state": np.array([0.5, np.nan])}, r"state is not finite: nan at \[1\]"),
            ({"actions": np.full((8, 2), np.inf)}, r"actions is not finite: inf at \[0, 0\]"),
            ({"image.base_0_rgb": np.zeros((3, 60, 80), np.float32)}, r"image.base_0_rgb: an image is float32 \(3, 60"),
            ({"image.top": np.zeros((60, 80, 3), np.uint8)}, r"'demo' has no \['image.top'\]; its images are"),
        ],
    )
    def test_bad_sample(self, changes, message):
        with pytest.raises(ValueError, match=message):
            make()(sample(**changes))

    def test_beyond_the_bound(self):
        actions = np.zeros((8, 2))
        actions[5, 1] = -90.0
        data = sample(actions=actions)
        # -90 - 0.25 = -90.25 → (-90.25 - 0.1) / 0.1 = -903.5 and, by quantiles, -90.25 / 0.4 * 2 - 1 = -452.25
        for config, message in (
            (pi0_tiny(), r"actions, dimension 1: -90.25 normalises to -903.\d+ with mean=0.1, std=0.1, beyond ±100;"),
            (pi05_tiny(), r"actions, dimension 1: -90.25 normalises to -452.\d+ with q01=0, q99=0.4, beyond ±100;"),
        ):
            with pytest.raises(ValueError, match=message):
                make(config)(data)
            with pytest.raises(ValueError, match="beyond ±300"):
                make(config, max_normalized=300.0)(data)
            assert np.abs(make(config, max_normalized=None)(data)["actions"]).max() > 400
        with pytest.raises(ValueError, match="state, dimension 0: 200 normalises to"):
            make()(sample(state=np.array([200.0, 0.0])))

    def test_bad_model_output(self):
        transform = make()
        with pytest.raises(ValueError, match=r"the model's actions is not finite: nan at \[0, 3\]"):
            transform.invert_actions(np.array([[0, 0, 0, np.nan]]), np.zeros(2))
        with pytest.raises(ValueError, match=r"expected \[8, 4\]"):
            transform.invert_actions(np.zeros((8, 2)), np.zeros(2))

    def test_parts_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"cameras \['right_wrist_0_rgb'\], which the model does not know"):
            make(robot=ALOHA)
        with pytest.raises(ValueError, match=r"ids go up to 511, the model embeds 400; .*vocab_size"):
            make(dataclasses.replace(pi0_tiny(), vocab_size=400))
        with pytest.raises(ValueError, match="pads to 16 tokens, the model takes 48"):
            SampleTransform(pi0_base(), DEMO, STATS, PromptTokenizer(DEMO_TOKENIZER, 16))
        with pytest.raises(ValueError, match="have no 'actions'"):
            make(stats={"state": STATE})
        with pytest.raises(ValueError, match="statistics of 'state' have 2 dimensions, robot 'arm' has 3"):
            make(robot=Robot("arm", ("q",), ("u",), {}, state_dim=3))
        with pytest.raises(ValueError, match="delta_mask has 1 entries"):
            make(robot=Robot("arm", ("q",), ("u",), {}, delta_mask=(True,)))
        five = NormStats(*np.ones((4, 5)))
        with pytest.raises(ValueError, match="5 dimensions in its state, the model 4"):
            make(robot=Robot("arm", ("q",), ("u",), {}), stats={"state": five, "actions": ACTIONS})
