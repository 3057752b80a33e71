"""Prompt to text embedding, with Gemma 2 (method.md 5). The only file that knows transformers."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longsana.config import TextEncoderConfig, check_chi_prompt
from longsana.encoders.headers import check_text_folder, open_text_weights
from longsana.models.embeddings import TextEmbedding
from longsana.published import INSTRUCTION_SHA256, NEGATIVE_PROMPT_SHA256
from longsana.runtime.arguments import settled
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError
from longsana.runtime.finite import require_finite
from longsana.runtime.foreign import check_characters, read_json
from longsana.runtime.hub import SEEDED, locate

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma2Model, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SEED = 0


class GemmaTextEncoder:
    """A tokenizer, the decoder of a Gemma 2, and the instruction ("" for none) put before prompts.

    Prompts are encoded one at a time: an embedding is a function of its prompt alone. `encode_together` is for many
    prompts and a small encoder.

    there: has the weights where they are used, inside; see `runtime.offload`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: Gemma2Model, instruction: str, caption_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.there: Callable[[], AbstractContextManager[None]] = nullcontext
        self.instruction = instruction
        self.caption_length = caption_length
        # Two less than both together: <bos> is counted twice, and the instruction's last token, a lone space,
        # becomes part of the prompt's first word.
        self._instructed_length = len(tokenizer.encode(instruction)) + caption_length - 2

    @classmethod
    @plain_defaults()
    def load(
        cls,
        config: TextEncoderConfig,
        *,
        caption_length: int,
        caption_channels: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> GemmaTextEncoder:
        """Build the encoder that `config` names, on `device` in `dtype`, without gradients.

        Raises:
            InputError: the folder is missing, incomplete or no Gemma 2 of width `caption_channels`, a setting has
                another type, or the installed diffusers has no published instruction.
        """
        config = settled(config, "text_encoder")
        name = config.text_encoder_name
        seeded = name.startswith(SEEDED)
        folder = locate(name.removeprefix(SEEDED), "text_encoder.text_encoder_name")
        gemma = _read_config(folder)
        check_text_folder(folder, caption_channels)
        tokenizer = _load_tokenizer(folder, gemma.vocab_size)
        instruction = instruction_text(config.chi_prompt)
        model: Any = _random_model(gemma) if seeded else _load_model(folder, gemma, device, dtype)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        _exact_rotations(model)
        _set_softcap(model, config.softcap)
        log.info(
            "text encoder: %s, %s, instruction of %d characters, attention %s",
            name,
            dtype,
            len(instruction),
            "softcapped" if config.softcap else "without a cap",
        )
        return cls(tokenizer, model, instruction, caption_length)

    @classmethod
    @plain_defaults()
    def around(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        *,
        chi_prompt: str,
        softcap: bool,
        caption_length: int,
        caption_channels: int,
    ) -> GemmaTextEncoder:
        """Take a tokenizer and a model that are loaded already, and set them to what `load` would set them to.

        model: a Gemma 2 with or without its language head. chi_prompt, softcap: see `TextEncoderConfig`.

        Raises:
            InputError: see `load`.
        """
        gemma: Any = model.config
        if gemma.model_type != "gemma2" or gemma.hidden_size != caption_channels:
            raise InputError(
                f"text_encoder: a {gemma.model_type} {gemma.hidden_size} wide; the transformer needs a gemma2 of "
                f"{caption_channels} (its caption_channels)"
            )
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        _check_tokenizer(tokenizer, gemma.vocab_size, "text_encoder: its tokenizer")
        decoder: Any = model.base_model
        if gemma._attn_implementation != _ATTENTION:
            model.set_attn_implementation(_ATTENTION)
        _exact_rotations(decoder)
        _set_softcap(decoder, softcap)
        return cls(tokenizer, decoder, instruction_text(chi_prompt), caption_length)

    def encode(self, prompt: str, *, instruction: bool = True) -> TextEmbedding:
        """One prompt: tokens (1, L, C) in the encoder's dtype and mask (1, L); L = caption_length.

        instruction: put the instruction (if the encoder has one) before it, as in training; negative prompts
            go without. Of the hidden states <bos> and the last L - 1 are kept: the prompt's, which have seen
            the instruction.
        A prompt that is too long loses its end: see `overflow`. Tokens where the mask is False mean nothing.
        """
        return self.encode_together([prompt], instruction=instruction)

    @torch.no_grad()
    @plain_defaults()
    def encode_together(self, prompts: Sequence[str], *, instruction: bool = True) -> TextEmbedding:
        """Encode B prompts together: tokens (B, L, C) and mask (B, L). Products of another size round differently.

        Raises:
            InputError: one has a NUL or half a character in it.
        """
        for prompt in prompts:
            check_characters(prompt, "prompt")
        prefix, length = self._frame(instruction)
        texts = [prefix + prompt for prompt in prompts]
        tokenized = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with self.there():
            ids: Tensor = tokenized["input_ids"].to(self.model.device)
            mask: Tensor = tokenized["attention_mask"].to(self.model.device)
            hidden: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        tail = length - (self.caption_length - 1)
        tokens = torch.cat([hidden[:, :1], hidden[:, tail:]], dim=1)
        return TextEmbedding(tokens, torch.cat([mask[:, :1], mask[:, tail:]], dim=1).bool())

    def overflow(self, prompt: str, *, instruction: bool = True) -> int:
        """Count the tokens that `encode` cuts from the end of this prompt; 0 if it fits."""
        prefix, length = self._frame(instruction)
        # Not `encode`, which warns about texts beyond the model's limit: the caller's warning says more.
        return max(0, len(self.tokenizer(prefix + prompt, verbose=False)["input_ids"]) - length)

    def _frame(self, instruction: bool) -> tuple[str, int]:
        """Return what stands before the prompt, and the length of both in tokens."""
        if instruction and self.instruction:
            return self.instruction, self._instructed_length
        return "", self.caption_length


class CompactEmbedding(NamedTuple):
    """The part of a TextEmbedding that is worth keeping, on the host.

    tokens: (n, C), the rows whose mask is True, of all captions in order.
    mask: (B, L), bool.
    """

    tokens: Tensor
    mask: Tensor


def compact(embedding: TextEmbedding) -> CompactEmbedding:
    """Drop what the network may not look at, and move the rest to the host.

    Raises:
        FloatingPointError: tokens that it may look at are not finite.
    """
    tokens = embedding.tokens[embedding.mask].cpu()
    require_finite("text encoder", {"hidden states": tokens})
    return CompactEmbedding(tokens, embedding.mask.cpu())


def expand(compacted: CompactEmbedding, device: torch.device | str) -> TextEmbedding:
    """The embedding on `device`, with zeros where the mask is False."""
    mask = compacted.mask.to(device)
    tokens = compacted.tokens.new_zeros((*mask.shape, compacted.tokens.shape[-1]), device=device)
    tokens[mask] = compacted.tokens.to(device)
    return TextEmbedding(tokens, mask)


@functools.cache
def complex_human_instruction() -> str:
    """The published instruction, 1,057 characters, ending in "User Prompt: ".

    It is the default of diffusers' image pipeline with double quotes for single ones, and checked by its hash.

    Raises:
        InputError: the installed diffusers has another text.
    """
    import diffusers

    lines = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return _verified(
        "\n".join(lines).replace("'", '"'),
        INSTRUCTION_SHA256,
        f"diffusers {diffusers.__version__}: the instruction in its SanaPipeline is not the published one; install "
        "diffusers 0.36 to 0.42.1, or give the text (text_encoder.chi_prompt; none for a network without one)",
    )


@functools.cache
def published_negative_prompt() -> str:
    """The negative prompt of the base model and of distillation's teacher, 285 characters.

    It stands in the example of diffusers' video pipeline, and is checked by its hash.

    Raises:
        InputError: the installed diffusers has another text, or none.
    """
    import diffusers

    try:
        from diffusers.pipelines.sana_video.pipeline_sana_video import EXAMPLE_DOC_STRING
    except ImportError:
        EXAMPLE_DOC_STRING = ""
    found = re.search(r'negative_prompt = "([^"]*)"', EXAMPLE_DOC_STRING)
    return _verified(
        found[1] if found else "",
        NEGATIVE_PROMPT_SHA256,
        f"diffusers {diffusers.__version__}: the negative prompt in the example of its SanaVideoPipeline is not the "
        "published one; install diffusers 0.36 to 0.42.1, or give the text (sampling.negative_prompt; '' for none)",
    )


def _verified(text: str, sha256: str, complaint: str) -> str:
    if text_sha256(text) != sha256:
        raise InputError(complaint)
    return text


def text_sha256(text: str) -> str:
    """SHA-256 in hex of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def instruction_text(chi_prompt: str) -> str:
    """The instruction that `TextEncoderConfig.chi_prompt` asks for; "" for none.

    Raises:
        InputError: it is a single word other than sana and none, or the published text is not to be had.
    """
    check_chi_prompt(chi_prompt)
    if chi_prompt == "sana":
        return complex_human_instruction()
    return "" if chi_prompt == "none" else chi_prompt


def with_motion(text: str, score: int | None, *, high: bool = False) -> str:
    """The text with the suffix that the network was trained on (method.md 5); unchanged where the score is None.

    high: with a score of 0 or less, whether much motion is wanted.
    """
    if score is None:
        return text
    return f"{text.strip()} motion score: {score}." if score > 0 else f"{text} {'high' if high else 'low'} motion"


def negative_text(negative_prompt: str | None) -> str:
    """The negative prompt that `SamplingConfig.negative_prompt` asks for: None is the published one.

    Raises:
        InputError: the published text is not to be had.
    """
    return published_negative_prompt() if negative_prompt is None else negative_prompt


def _read_config(folder: Path) -> Gemma2Config:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; expected a transformers folder with a Gemma 2 text encoder")
    read_json(folder / "config.json")  # a file that is none has a clearer word here
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # depending on what is wrong in the file, one of many classes
        raise InputError(f"{folder}/config.json: cannot be read: {_first_line(error)}") from error
    if config.model_type != "gemma2":
        raise InputError(f"{folder}: model_type is '{config.model_type}'; the text encoder must be a gemma2")
    return config


def _load_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            padding_side="right",
            truncation_side="right",
        )
        tokenizer.encode("a")
    except Exception as error:  # as above
        raise InputError(f"{folder}: its tokenizer cannot be read: {_first_line(error)}") from error
    _check_tokenizer(tokenizer, vocabulary, f"{folder}: its tokenizer")
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, what: str) -> None:
    if tokenizer.bos_token_id is None or tokenizer.encode("a")[:1] != [tokenizer.bos_token_id]:
        raise InputError(f"{what} does not put <bos> before a text, as Gemma's does")
    if len(tokenizer) > vocabulary:
        raise InputError(f"{what} has {len(tokenizer)} tokens, its config.json {vocabulary}")


# The one attention that every version of transformers has for Gemma 2, with a cap and without: "sdpa", in which the
# published networks' captions were encoded, has none, and newer versions refuse it for this model.
_ATTENTION = "eager"


def _load_model(folder: Path, config: Gemma2Config, device: torch.device | str, dtype: torch.dtype) -> Gemma2Model:
    from transformers import Gemma2Model

    entries = open_text_weights(folder, config.to_dict())
    assert entries is not None
    config._attn_implementation = _ATTENTION
    # Not by transformers' own reader, which opens whatever an index names, and holds all weights on the host.
    with torch.device("meta"):
        model = Gemma2Model(config)
    # A copy always: memory that maps the file would change, or crash us, with it. Popped, so that a file that could
    # not be mapped is freed as it is used up.
    weights = {name: entries.pop(name).read().to(device, dtype, copy=True) for name in list(entries)}
    model.load_state_dict(weights, strict=True, assign=True)
    _fill_buffers(model, device)
    return model


def _fill_buffers(model: Any, device: torch.device | str) -> None:
    """Compute what no file holds, as the model's class does: the rotations, and in newer versions a constant."""
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(model.config)
        embedding = model.embed_tokens
        if hasattr(embedding, "embed_scale"):
            scale = torch.tensor(model.config.hidden_size**0.5, dtype=torch.get_default_dtype(), device=device)
            embedding.embed_scale = scale
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not missing, f"this version of transformers computes {missing}, which nobody else does"


def _exact_rotations(model: Any) -> None:
    """Frequencies in float32, as in training; casting a model casts them too.

    In bfloat16 the words of a prompt, which stand behind the instruction, would be turned by up to a radian too much.
    """
    rotary = model.rotary_emb
    if rotary.inv_freq.dtype != torch.float32:
        model.rotary_emb = type(rotary)(model.config).to(rotary.inv_freq.device)


def _set_softcap(model: Any, softcap: bool) -> None:
    """Cap the attention's logits as the model's config says, or not at all.

    The config stays: a pipeline that saves the model writes what was read.
    """
    cap = model.config.attn_logit_softcapping
    if softcap and cap is None:
        raise InputError("text_encoder.softcap=true: the text encoder's config.json has no attn_logit_softcapping")
    for layer in model.layers:
        # Not created here: where transformers keeps the cap elsewhere, nothing would read it.
        assert hasattr(layer.self_attn, "attn_logit_softcapping"), "transformers keeps Gemma 2's cap elsewhere"
        layer.self_attn.attn_logit_softcapping = cap if softcap else None


def _random_model(config: Gemma2Config) -> Gemma2Model:
    from transformers import Gemma2Model

    before = torch.random.default_generator.get_state()
    # Not torch.manual_seed: that would reseed the GPUs as well.
    torch.random.default_generator.manual_seed(SEED)
    try:
        config._attn_implementation = _ATTENTION
        return Gemma2Model(config)
    finally:
        torch.random.default_generator.set_state(before)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
