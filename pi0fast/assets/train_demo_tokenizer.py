"""Train the demo's tokenizer: `python pi0fast/assets/train_demo_tokenizer.py`.

512 entries and the conventions of PaliGemma's (ids, single digits, byte fallback: any text can be written), with merges
for the words of table-top prompts. BPE counts integers, so the same text gives the same model on every machine.
"""

import io
import itertools
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 512
VERBS = ("touch", "reach", "push", "pull", "move to", "go to", "pick up", "put down", "point at", "stay away from")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "black", "white", "gray")
THINGS = ("block", "cube", "ball", "circle", "square", "triangle", "target", "goal", "corner", "bowl", "robot")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the center of the table", "near the robot")


def sentences() -> list[str]:
    """Prompts in the formats of Pi0 and Pi0.5."""
    prompts = [f"{verb} the {color} {thing}" for verb, color, thing in itertools.product(VERBS, COLORS, THINGS)] + [
        f"{verb} the {thing} {place}" for verb, thing, place in itertools.product(VERBS, THINGS, PLACES)
    ]
    prompts += [f"{prompt}, then {other}." for prompt, other in itertools.pairwise(prompts[::7])]
    states = [f"{index % 257 - 1} {(index * 89) % 257 - 1}" for index in range(len(prompts))]
    return prompts + [
        f"Task: {prompt}, State: {state};\nAction: " for prompt, state in zip(prompts, states, strict=True)
    ]


def train() -> bytes:
    """The serialised sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-",
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    (Path(__file__).parent / "demo_tokenizer.model").write_bytes(train())
