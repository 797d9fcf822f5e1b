"""The prompt as tokens, in the formats of Pi0 and Pi0.5, and where PaliGemma's tokenizer comes from."""

import hashlib
import os
import tempfile
import urllib.request
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

DEMO_TOKENIZER = Path(__file__).parent / "assets" / "demo_tokenizer.model"

PALIGEMMA_URL = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"
PALIGEMMA_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
PATH_VARIABLE = "PI0FAST_TOKENIZER"

STATE_BINS = np.linspace(-1.0, 1.0, 257)[:-1]  # left edges


def padded_len(tokens: int, max_len: int) -> int:
    """To how many tokens prompts of so many are padded: whole tiles of 16, and no more than the model takes."""
    return min(-(-tokens // 16) * 16, max_len)


class PromptTokenizer:
    """A sentencepiece model that writes prompts as openpi does (models/tokenizer.py).

    Raises FileNotFoundError when there is no such file, and ValueError when the model lacks what the formats need: pad
    id 0, a beginning-of-sequence id, and a token for a lone newline.
    """

    def __init__(self, model_path: str | Path, max_len: int):
        if not Path(model_path).is_file():
            raise FileNotFoundError(f"no tokenizer at {model_path}; find_tokenizer() gives PaliGemma's")
        self.max_len = max_len
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=Path(model_path).read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{model_path} is no sentencepiece model; give another, or download it again") from error
        self._bos = self._model.bos_id()
        self._newline = self._model.encode("\n")
        self._warned = False
        if self._model.pad_id() != 0 or self._bos < 0 or not self._newline:
            raise ValueError(
                f"{model_path} has pad id {self._model.pad_id()}, bos id {self._bos} and encodes a newline as "
                f"{self._newline}; train it with pad_id=0, a bos_id, and the newline among its user_defined_symbols"
            )

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model.vocab_size()

    def encode(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 `[max_len]`, padded on the right with 0, and their mask bool `[max_len]`, False on the padding.

        Without `state`: Pi0's format. With `state [d]`, normalised but not padded: Pi0.5's, the state as text, one of
        256 bins over [-1, 1] per dimension (-1 below them, 255 above). A prompt that is too long loses its end; the
        first time, with a warning.
        """
        tokens = self._tokens(prompt, state)
        if len(tokens) > self.max_len:
            self._warn_truncated(prompt, len(tokens))
        tokens = tokens[: self.max_len]
        padded = np.zeros(self.max_len, np.int32)
        padded[: len(tokens)] = tokens
        return padded, np.arange(self.max_len) < len(tokens)

    def longest(self, prompts: Iterable[str], state_dim: int | None = None) -> int:
        """How many tokens the longest of these prompts takes, at most `max_len`. state_dim: in Pi0.5's format, at any
        state, if each digit is a token of its own, as PaliGemma's tokenizer has it."""
        state = None if state_dim is None else np.ones(state_dim)  # the last bin, 255: no other has more digits
        return min(max(len(self._tokens(prompt, state)) for prompt in prompts), self.max_len)

    def _tokens(self, prompt: str, state: np.ndarray | None) -> list[int]:
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return [self._bos, *self._model.encode(text), *self._newline]
        bins = " ".join(str(index) for index in np.digitize(state, STATE_BINS) - 1)
        return [self._bos, *self._model.encode(f"Task: {text}, State: {bins};\nAction: ")]

    def _warn_truncated(self, prompt: str, length: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a prompt of {length} tokens is cut to {self.max_len}, and so will others be: {prompt!r}; shorten the "
                "prompts or raise Pi0Config.max_token_len",
                stacklevel=3,
            )


def resolve_tokenizer(name: str) -> Path:
    """The sentencepiece model that a run names: `demo` (shipped), `paligemma` (`find_tokenizer`), or a path."""
    if name == "demo":
        return DEMO_TOKENIZER
    return find_tokenizer(None if name == "paligemma" else name)


def find_tokenizer(path: str | Path | None = None) -> Path:
    """PaliGemma's sentencepiece model: `path`, else $PI0FAST_TOKENIZER, else the cache, else downloaded into it.

    The cache is `$XDG_CACHE_HOME/pi0fast` (by default `~/.cache/pi0fast`). Raises FileNotFoundError when a path that
    was given has no file, OSError when the download fails, ValueError when it does not have the known SHA-256.
    """
    for given, origin in ((path, "the path given"), (os.environ.get(PATH_VARIABLE), f"${PATH_VARIABLE}")):
        if given:
            if not Path(given).is_file():
                raise FileNotFoundError(f"no tokenizer at {given} ({origin}); correct it, or leave it out to download")
            return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache / "pi0fast" / "paligemma_tokenizer.model"
    if not cached.is_file():
        _download(cached)
    return cached


def _download(target: Path) -> None:
    by_hand = f"fetch {PALIGEMMA_URL} by hand and set {PATH_VARIABLE} to its path"
    try:
        with urllib.request.urlopen(PALIGEMMA_URL, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise OSError(f"PaliGemma's tokenizer could not be downloaded ({error}); {by_hand}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != PALIGEMMA_SHA256:
        raise ValueError(f"{PALIGEMMA_URL} came with SHA-256 {digest}, not {PALIGEMMA_SHA256}; {by_hand}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
        partial.write(content)
    os.replace(partial.name, target)
