"""Make asset/shapes/text_encoder/: a small real tokenizer and a small Gemma 2 config for the shapes world.

    python asset/shapes/make_tokenizer.py [folder]

The tokenizer is trained here, from nothing but captions of the world, and works as Gemma's does: a space belongs
to the word after it, unknown characters fall back to their UTF-8 bytes, <bos> starts every text. The same
library version writes the same bytes each time; nothing is fetched. The weights beside it are trained on it by
`train_video_scripts/shapes_recipe.py`; `seeded:asset/shapes/text_encoder` draws random ones of this shape.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
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

from longsana.encoders.text import with_motion
from longsana.shapes.scenes import draw_scene

FOLDER = Path(__file__).parent / "text_encoder"
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, in Gemma's order
VOCABULARY = 768

SCORES = (1, 5, 10, 20, 30)
CAPTIONS = 6000


def captions() -> Iterator[str]:
    """Captions of training scenes, with the motion scores in turn."""
    for index in range(CAPTIONS):
        yield with_motion(draw_scene(0, index).caption, SCORES[index % len(SCORES)])


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
