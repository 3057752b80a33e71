"""Make asset/shapes/text_encoder/: a small real tokenizer and a small Gemma 2 config for the shapes world.

    python asset/shapes/make_tokenizer.py [folder]

The tokenizer is trained here, from nothing but the captions below, and works as Gemma's does: a space belongs
to the word after it, unknown characters fall back to their UTF-8 bytes, <bos> starts every text. The same
library version writes the same bytes each time; nothing is drawn at random and nothing is fetched. There are
no weights in the folder: `seeded:asset/shapes/text_encoder` draws them from a fixed seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

FOLDER = Path(__file__).parent / "text_encoder"
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, in Gemma's order
VOCABULARY = 768

SIZES = ("tiny", "small", "medium", "big", "large", "huge")
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
    "brown",
    "gray",
    "white",
    "black",
)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SPEEDS = ("very slowly", "slowly", "steadily", "quickly", "very fast")
MOTIONS = (
    "moves {} to the right",
    "moves {} to the left",
    "moves {} up",
    "moves {} down",
    "slides {} across the frame from left to right",
    "drifts {} from the top toward the bottom",
    "travels {} along the diagonal",
    "bounces {} between the left and right walls",
    "bounces {} off every edge of the picture",
    "orbits {} around the center, clockwise",
    "orbits {} around the middle, counterclockwise",
    "swings {} from side to side",
    "spins {} in place",
    "grows {} and then shrinks",
    "falls {} and comes to rest",
    "turns {} and goes back",
)
STILL = (
    "stays still",
    "rests in the center without moving",
    "does not move",
    "waits in the upper left corner",
)
TWO = (
    "{0} while {1}",
    "{0}, and {1}",
    "{0}; at the same time {1}",
    "{0}. Behind it {1}",
    "Two shapes: {0}, then {1}",
)
BACKGROUNDS = (
    "on a {} background",
    "over a plain {} background",
    "in front of a dark {} wall",
    "on a light {} floor",
)
SCORES = (1, 5, 10, 20, 30)


def captions() -> Iterator[str]:
    """Every shape with every motion, alone and in pairs; the other words take turns."""
    actors = tuple(f"a {size} {color} {shape}" for size, color, shape in product(SIZES, COLORS, SHAPES))
    moves = (*(motion.format(speed) for motion, speed in product(MOTIONS, SPEEDS)), *STILL)
    scenes = tuple(scene.format(color) for scene, color in product(BACKGROUNDS, COLORS))
    for turn, actor in enumerate(actors):
        # Steps without a common factor with the lists' lengths visit every entry.
        first = f"{actor} {moves[turn * 5 % len(moves)]}"
        second = f"{actors[(turn * 7 + 3) % len(actors)]} {moves[(turn * 11 + 1) % len(moves)]}"
        scene = scenes[turn * 5 % len(scenes)]
        yield _finish(f"{first} {scene}", turn)
        yield _finish(f"{TWO[turn % len(TWO)].format(first, second)} {scene}", turn + 1)


def _finish(sentence: str, turn: int) -> str:
    if turn % 2:
        sentence = sentence[0].upper() + sentence[1:] + "."
    return f"{sentence} motion score: {SCORES[turn % len(SCORES)]}."


def train(texts: Sequence[str]) -> Tokenizer:
    """A byte-fallback BPE tokenizer whose merges never cross a word, a digit or a punctuation mark."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    blank = Tokenizer(models.BPE())
    _split_like_gemma(blank)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIALS, *byte_tokens],
        initial_alphabet=["\u2581", "\n", *map(chr, range(33, 127))],
        show_progress=False,
    )
    # Behind an instruction a caption starts after a space, alone it does not: learn both.
    blank.train_from_iterator((text for caption in texts for text in (caption, f" {caption}")), trainer)
    learned = json.loads(blank.to_str())["model"]

    # Built anew, so that the byte tokens are ordinary entries and a prompt cannot spell them.
    tokenizer = Tokenizer(
        models.BPE(
            vocab=learned["vocab"],
            merges=[(left, right) for left, right in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _split_like_gemma(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
    )
    return tokenizer


def _split_like_gemma(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\u2581", "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\p{L}\u2581]"), "isolated"),
        ]
    )


def encoder_config(vocabulary: int) -> dict[str, object]:
    """A Gemma 2 of 0.1 M parameters."""
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 4096,
        "sliding_window": 4096,
        # At this width the usual 0.02 would drown the words and make all attention uniform.
        "initializer_range": 0.1,
        "pad_token_id": SPECIALS.index("<pad>"),
        "eos_token_id": SPECIALS.index("<eos>"),
        "bos_token_id": SPECIALS.index("<bos>"),
    }


def main() -> None:
    """Write tokenizer.json, tokenizer_config.json and config.json."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(list(captions()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "right",
        **{f"{name.strip('<>')}_token": name for name in SPECIALS},
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    for name, values in (
        ("tokenizer_config.json", settings),
        ("config.json", encoder_config(tokenizer.get_vocab_size())),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
