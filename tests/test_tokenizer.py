import hashlib
import pickle
import runpy
import warnings

import numpy as np
import pytest
import sentencepiece

from pi0fast import tokenizer
from pi0fast.tokenizer import DEMO_TOKENIZER, PromptTokenizer, find_tokenizer

MODEL = sentencepiece.SentencePieceProcessor(model_file=str(DEMO_TOKENIZER))
NEWLINE = MODEL.piece_to_id("\n")


def text_of(tokens: np.ndarray, mask: np.ndarray) -> str:
    assert tokens[0] == MODEL.bos_id() == 2
    return MODEL.decode(tokens[mask].tolist()[1:])


def test_pi0_format():
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, 16).encode("  touch_the\nRed block \n")
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert text_of(tokens, mask) == "touch the Red block\n"
    expected = [2, *MODEL.encode("touch the Red block"), NEWLINE]
    assert tokens.tolist() == expected + [0] * (16 - len(expected))
    assert mask.tolist() == [True] * len(expected) + [False] * (16 - len(expected))


def test_pi05_format_and_bins():
    # 256 bins of width 1/128 from -1; openpi puts everything from 127/128 upwards into 255.
    state = np.array([-1.01, -1.0, -1.0 + 1 / 128, -1e-9, 0.0, 127 / 128, 1.0, 30.0])
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, 64).encode("touch_the block", state)
    assert text_of(tokens, mask) == "Task: touch the block, State: -1 0 1 127 128 255 255 255;\nAction: "


def test_too_long_is_cut_with_one_warning():
    short = PromptTokenizer(DEMO_TOKENIZER, 4)
    with pytest.warns(UserWarning, match=r"of 6 tokens is cut to 4.*max_token_len"):
        tokens, mask = short.encode("touch the red block")
    assert tokens.tolist() == [2, *MODEL.encode("touch the red")] and mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.encode("touch the red block")


def test_exact_fit_is_no_overflow():
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, 6).encode("touch the red block")
    assert tokens[-1] == NEWLINE and mask.all()


def test_longest_prompt():
    prompts = ["touch the red block", "touch", "touch_the yellow block "]
    tokenizer = PromptTokenizer(DEMO_TOKENIZER, 64)
    assert tokenizer.longest(prompts) == max(tokenizer.encode(prompt)[1].sum() for prompt in prompts) > 5
    longest, rng = tokenizer.longest(prompts, state_dim=3), np.random.default_rng(0)
    states = [np.ones(3), np.full(3, -2.0), *rng.uniform(-1.1, 1.1, (500, 3))]
    assert longest == max(tokenizer.encode(prompt, state)[1].sum() for prompt in prompts for state in states)
    assert PromptTokenizer(DEMO_TOKENIZER, 8).longest(prompts, state_dim=3) == 8


def test_pickles_for_worker_processes():
    original = PromptTokenizer(DEMO_TOKENIZER, 16)
    copy = pickle.loads(pickle.dumps(original))
    np.testing.assert_array_equal(copy.encode("touch")[0], original.encode("touch")[0])


def test_model_without_the_needed_ids(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["touch the red block"]),
        model_prefix=tmp_path / "t5",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"pad id -1, bos id 1 .*pad_id=0"):
        PromptTokenizer(tmp_path / "t5.model", 16)
    with pytest.raises(FileNotFoundError, match=r"find_tokenizer\(\)"):
        PromptTokenizer(tmp_path / "none.model", 16)


def test_demo_tokenizer_is_what_its_script_trains():
    train = runpy.run_path(str(DEMO_TOKENIZER.parent / "train_demo_tokenizer.py"))["train"]
    trained = sentencepiece.SentencePieceProcessor(model_proto=train())
    assert trained.vocab_size() == MODEL.vocab_size() == 512
    assert [trained.id_to_piece(i) for i in range(512)] == [MODEL.id_to_piece(i) for i in range(512)]
    assert MODEL.encode("touch the red block", out_type=str) == ["touch", "▁the", "▁red", "▁block"]
    assert MODEL.decode(MODEL.encode("Würfel 象 12")) == "Würfel 象 12"
    assert DEMO_TOKENIZER.stat().st_size < 20_000


class TestFind:
    @pytest.fixture(autouse=True)
    def bucket(self, tmp_path, monkeypatch):
        """A file in the place of the public bucket, and an empty cache."""
        self.cached = tmp_path / "cache" / "pi0fast" / "paligemma_tokenizer.model"
        self.public = tmp_path / "public.model"
        self.public.write_bytes(b"model")
        monkeypatch.delenv("PI0FAST_TOKENIZER", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(tokenizer, "PALIGEMMA_URL", self.public.as_uri())
        monkeypatch.setattr(tokenizer, "PALIGEMMA_SHA256", hashlib.sha256(b"model").hexdigest())

    def test_downloads_once(self):
        assert find_tokenizer() == self.cached and self.cached.read_bytes() == b"model"
        self.public.unlink()
        assert find_tokenizer() == self.cached
        assert list(self.cached.parent.iterdir()) == [self.cached]

    def test_given_paths_come_first(self, monkeypatch):
        monkeypatch.setenv("PI0FAST_TOKENIZER", str(DEMO_TOKENIZER))
        assert find_tokenizer() == DEMO_TOKENIZER
        assert find_tokenizer(self.public) == self.public
        monkeypatch.setenv("PI0FAST_TOKENIZER", "/nowhere.model")
        with pytest.raises(FileNotFoundError, match=r"/nowhere.model \(\$PI0FAST_TOKENIZER\)"):
            find_tokenizer()
        assert not self.cached.exists()

    def test_other_content_is_refused(self):
        self.public.write_bytes(b"tampered")
        with pytest.raises(ValueError, match=r"SHA-256 .*by hand and set PI0FAST_TOKENIZER"):
            find_tokenizer()
        assert not self.cached.exists()

    def test_offline(self):
        self.public.unlink()
        with pytest.raises(OSError, match=r"could not be downloaded .*by hand and set PI0FAST_TOKENIZER"):
            find_tokenizer()
