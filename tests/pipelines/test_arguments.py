"""Arguments: taken for what they mean, or refused by name before anything is computed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longsana.encoders.text import GemmaTextEncoder
from longsana.pipelines.arguments import ARGUMENTS
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from tests.pipelines.repository import OTHER, PROMPT, SIZE, quiet
from tests.pipelines.test_options import inputs

NOT_NUMBERS = (True, np.bool_(True), "9", b"9", [9], {}, 9j, object(), math.nan, math.inf, -math.inf)
NOT_WHOLE = (*NOT_NUMBERS, 9.5, np.float32(0.5), 10**30, -(10**30), 10**5000)
WHOLE = ("num_inference_steps", "num_videos_per_prompt", "height", "width", "num_frames", "frames")
SETTINGS = ("motion_score", "chunk_frames", "first_chunk_frames", "latents_per_call")
OPTIONAL = (
    "num_inference_steps",
    "chunk_frames",
    "first_chunk_frames",
    "height",
    "width",
    "frames",
    "motion_score",
    "flow_shift",
    "guidance_scale",
)


def tensors(*shape: int) -> list[Any]:
    """Tensors that hold no numbers that can be computed with."""
    zeros = torch.zeros(*shape)
    kinds = [zeros.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)]
    return [*kinds, zeros.to("meta"), zeros.to_sparse()]


BAD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((*WHOLE, *SETTINGS), NOT_WHOLE),
    "guidance_scale": (*NOT_NUMBERS, -1, 1e308, 10**5000),
    "flow_shift": (*NOT_NUMBERS, 0, -1.0, 1e308),
    "timesteps": (9, "1000", [1000.5], [True], [1001], [-1], [math.nan], [], [0], [500, 500], np.array([9.5]), {}),
    "output_type": ("mp4", "", None, 3, ["pil"], "x" * 9999),
    "return_dict": (None, 1, "yes"),
    "generator": (0, "0", [torch.Generator(), 3], [], object()),
    "latents": (0, "noise", [[0.0]], np.zeros((1, 16, 3, 4, 6)), *tensors(1, 16, 3, 4, 6)),
    "prompt": (3, [3], [], [None], {}, b"text", torch.zeros(1), "a<image>b.png", "a<split>", "a<split><split>b"),
    "negative_prompt": (3, [3], [], {}, b"text", [PROMPT, OTHER], ["a\ud800"], ["\udfffb", None]),
    "prompt_embeds": (3, "a", [[0.0]], torch.zeros(1, 7), torch.zeros(2, 7, 64), *tensors(1, 7, 64)),
    "prompt_attention_mask": (3, [1], torch.zeros(1, 7), torch.ones(1, 7, device="meta")),
    "fps": (*NOT_NUMBERS, 0, -1.0, 1e308),
    "prompt_change": (3, [], "", "recahe=2", "recache", "recache=0", "cut=1", "rebuild=1.5", b"keep"),
    "transition_chunks": (*NOT_WHOLE, -1, 1001),
    "transition": (3, "round", "", ["linear"], "linear"),  # the last is without transition_chunks
    "callback_on_step_end": (3, "print"),
    "callback_on_step_end_tensor_inputs": (None, "latents", [3], ["prompt_embeds"], 3),
}
BAD["video"] = (3, [], [3], "", "nowhere.mp4", b"film.mp4", np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 3), np.uint8), {})
BAD["image"] = (3, [], [3], "", "nowhere.png", b"a.png", np.zeros((2, 2, 3)), np.zeros((1, 2, 2, 3), np.uint8), {})
BAD["image"] += ({}, {1: np.zeros((8, 8, 3), np.uint8)}, {-1: "a.png"}, {"a": "a.png"}, {0: 3}, {0: "nowhere.png"})
BAD["image_fit"] = (3, "crop", "", ["cover"], "cover")  # the last is without image
BAD["image_first"] = (3, "first", "", ["pin"], "pin")
BAD["fps"] = (*NOT_NUMBERS, 0, -1, 1e9)
BAD["new_frames_only"] = (1, "yes", None, True)
BAD |= {name: (*BAD[name], 0, -1) for name in (*WHOLE, *SETTINGS) if name not in ("motion_score", "first_chunk_frames")}
BAD |= {name: (*BAD[name], None) for name in (*WHOLE, *SETTINGS) if name not in OPTIONAL}
for _name in ("motion_score", "first_chunk_frames"):
    BAD[_name] += (-1,)


ENDLESS = ("num_frames", "prompt", "generator")
"""Arguments of `stream` that take None."""


def bad(name: str, method: Callable[..., Any], *, wrong: Sequence[Any] | None = None) -> None:
    """The method refuses each of some values, by the argument's name, with a generator that stays as it was."""
    for value in BAD[name] if wrong is None else wrong:
        call = inputs(num_inference_steps=None if name == "timesteps" else 2) | {name: value}
        generator = call["generator"]
        before = generator.get_state() if isinstance(generator, torch.Generator) else None
        with pytest.raises(InputError) as refusal:
            method(**call)
        message = str(refusal.value)
        assert message.startswith(name) and "\n" not in message and len(message) < 300, (value, message)
        assert before is None or torch.equal(generator.get_state(), before), value


@pytest.fixture
def idle(loaded: LongSanaVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed."""

    def computed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something is computed")

    for part in (loaded.text_encoder, loaded.transformer, loaded.vae):
        monkeypatch.setattr(type(part), "forward", computed)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_by_name(
    name: str, loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline
) -> None:
    bad(name, loaded)
    bad(name, loaded_base)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", sorted(BAD.keys() & signature(LongSanaVideoPipeline.stream).parameters.keys()))
def test_a_stream_refuses_at_once(name: str, loaded: LongSanaVideoPipeline) -> None:
    bad(name, loaded.stream, wrong=[value for value in BAD[name] if value is not None or name not in ENDLESS])


@pytest.mark.parametrize("method", ["__init__", "__call__", "stream", "encode_prompt"])
def test_every_argument_has_a_rule(method: str) -> None:
    """But those that have readers of their own."""
    read = {"self", "prompt", "negative_prompt", "generator", "state", "state_decay", "video", "image"}
    parts = (
        {"vae", "transformer", "tokenizer", "text_encoder", "scheduler", "decoder"} if method == "__init__" else set()
    )
    assert signature(getattr(LongSanaVideoPipeline, method)).parameters.keys() - ARGUMENTS.keys() <= read | parts


def test_whole_numbers_in_any_form(loaded: LongSanaVideoPipeline) -> None:
    usual: dict[str, Any] = {"num_frames": 9, "motion_score": 10, "chunk_frames": 2, "latents_per_call": 2, **SIZE}
    usual |= {"num_inference_steps": 2, "num_videos_per_prompt": 1, "flow_shift": 7}
    expected = loaded(PROMPT, generator=seed(), output_type="latent", **usual).frames
    for form in (float, np.int64, np.float32, np.array, torch.tensor):
        call = {name: form(value) for name, value in usual.items()}
        assert torch.equal(loaded(PROMPT, generator=seed(), output_type="latent", **call).frames, expected)
    del usual["num_inference_steps"]
    steps = [loaded(PROMPT, generator=seed(), timesteps=given, output_type="latent", **usual).frames for given in STEPS]
    assert all(torch.equal(one, steps[0]) for one in steps)


STEPS: list[Any] = [[1000, 727], (1000.0, 727.0, 0), np.array([1000, 727]), torch.tensor([1000.0, 727.0])]


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "a\0b", "\0"])
@pytest.mark.usefixtures("idle")
def test_words_are_words_wherever_they_come_from(
    text: str, loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline
) -> None:
    methods: list[Callable[..., Any]] = [loaded, loaded_base, loaded.stream, loaded.encode_prompt]
    for method in methods:
        with pytest.raises(InputError, match=r"^prompt: (a NUL|half a) character in it"):
            method(text)
    for given in (text, [text]):
        generator = seed()
        with pytest.raises(InputError, match=r"^negative_prompt: (a NUL|half a) character in it"):
            loaded_base(PROMPT, negative_prompt=given, generator=generator)
        assert torch.equal(generator.get_state(), seed().get_state())
        with pytest.raises(InputError, match=r"^negative_prompt: (a NUL|half a) character in it"):
            loaded_base.encode_prompt(PROMPT, True, negative_prompt=given)
    with pytest.raises(InputError, match=r"^chi_prompt: (a NUL|half a) character in it"):
        LongSanaVideoPipeline(**loaded.components | {"chi_prompt": f"write {text}: "})
    with pytest.raises(InputError, match=r"^prompt: (a NUL|half a) character in it"):
        encoder(loaded).encode(text)


def encoder(pipe: LongSanaVideoPipeline) -> GemmaTextEncoder:
    return GemmaTextEncoder(pipe.tokenizer, pipe.text_encoder, "", 48)


@pytest.mark.usefixtures("idle")
def test_numbers_that_are_too_large(loaded_base: LongSanaVideoPipeline) -> None:
    mask = {"prompt_attention_mask": torch.ones(1, 7)}
    for name, given in (
        ("latents", {"latents": torch.full((1, 16, 3, 4, 6), 1e38), "prompt": PROMPT}),
        ("prompt_embeds", {"prompt_embeds": torch.full((1, 7, 64), -1e38), "prompt": None} | mask),
    ):
        call = inputs(**given)
        before = call["generator"].get_state()
        with pytest.raises(InputError, match=rf"^{name}: holds numbers up to 1e\+38; must be at most"):
            loaded_base(**call)
        assert torch.equal(call["generator"].get_state(), before)


def test_parts_that_are_none(loaded: LongSanaVideoPipeline) -> None:
    parts = loaded.components
    with pytest.raises(InputError, match=r"^tokenizer: a int; must be a tokenizer"):
        LongSanaVideoPipeline(parts["vae"], parts["transformer"], 5, 5)  # type: ignore[arg-type]
    for name in ("text_encoder", "scheduler", "transformer", "vae", "tokenizer"):
        for wrong in (5, "x", torch.nn.Linear(1, 1)):
            with pytest.raises(InputError, match=rf"^{name}: a .*; (must be|needed is)"):
                LongSanaVideoPipeline(**parts | {name: wrong})


def test_the_base_model_is_quiet(loaded_base: LongSanaVideoPipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded_base(**inputs())


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_constructor(loaded: LongSanaVideoPipeline) -> None:
    for changes in (
        {"caption_length": 0},
        {"caption_length": "48"},
        {"chi_prompt": None},
        {"softcap": 1},
        {"num_sink_blocks": 0.5},
    ):
        with pytest.raises(InputError, match=f"^{next(iter(changes))}="):
            LongSanaVideoPipeline(**loaded.components | changes)
    again = LongSanaVideoPipeline(**loaded.components, caption_length=48.0)  # type: ignore[arg-type]
    assert again.config["caption_length"] == 48 and isinstance(again.config["caption_length"], int)


EMBEDS, MASK = torch.zeros(1, 7, 64), torch.ones(1, 7)
IGNORED: list[tuple[str, dict[str, Any], str]] = [
    ("distilled", {"negative_prompt": "ugly"}, "negative_prompt: has no meaning with guidance_scale=1"),
    ("distilled", {"negative_prompt": ""}, "negative_prompt: has no meaning"),
    ("distilled", {"negative_prompt_embeds": EMBEDS}, "negative_prompt_embeds: has no meaning"),
    ("base", {"negative_prompt": "ugly", "guidance_scale": 1}, "negative_prompt: has no meaning with guidance_scale=1"),
    ("base", {"negative_prompt_attention_mask": MASK}, "negative_prompt_attention_mask: has no meaning without"),
    (
        "base",
        {"negative_prompt": "a", "negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": MASK},
        "negative_prompt: has no meaning with negative_prompt_embeds",
    ),
    ("base", {"negative_prompt_embeds": EMBEDS}, "negative_prompt_attention_mask: missing"),
    ("base", {"negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": 0 * MASK}, "as one must be"),
    ("distilled", {"prompt_embeds": EMBEDS}, "prompt_attention_mask: missing; .* padding would be attended to"),
    ("distilled", {"prompt_attention_mask": MASK}, "prompt_attention_mask: has no meaning without prompt_embeds"),
    ("distilled", {"prompt_embeds": EMBEDS, "prompt_attention_mask": -10000 * MASK}, "must be 1 where a token is seen"),
    ("distilled", {"prompt_embeds": EMBEDS, "prompt_attention_mask": 0.5 * MASK}, "must be 1 where a token is seen"),
    (
        "distilled",
        {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, "motion_score": 3},
        "motion_score: has no meaning with prompt_embeds",
    ),
    ("distilled", {"timesteps": [1000]}, r"num_inference_steps=2: beside timesteps \[1000\]"),
    ("base", {"num_frames": 40001}, "num_frames=40001: must be at most 39997"),
    ("distilled", {"frames": 13}, "frames=13: an older name of num_frames, which is 9"),
]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("model", "changes", "message"), IGNORED)
def test_nothing_is_ignored_in_silence(
    model: str, changes: dict[str, Any], message: str, loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline
) -> None:
    with pytest.raises(InputError, match=message):
        (loaded if model == "distilled" else loaded_base)(**inputs(**changes))


@pytest.mark.usefixtures("idle")
def test_encode_prompt(loaded: LongSanaVideoPipeline) -> None:
    for changes, message in (
        ({"prompt": 3}, "prompt: must be a text"),
        ({"motion_score": 1.5}, "motion_score=1.5: must be a whole number"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0: must be at least 1"),
        ({"do_classifier_free_guidance": 1}, "do_classifier_free_guidance=1: must be True or False"),
        ({"negative_prompt": "a"}, "negative_prompt: has no meaning without do_classifier_free_guidance"),
        ({"negative_prompt": [3], "do_classifier_free_guidance": True}, "negative_prompt: must be a text"),
        ({"prompt": ["a", "b<split>c"]}, "parts between"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.encode_prompt(**{"prompt": PROMPT} | changes)


def test_a_stream_needs_a_text_encoder(loaded: LongSanaVideoPipeline) -> None:
    """Said before a generator is advanced, as all that it refuses."""
    alone, generator = LongSanaVideoPipeline(vae=loaded.vae, transformer=loaded.transformer), seed()
    with pytest.raises(InputError, match="has no text encoder"):
        alone.stream(PROMPT, generator=generator, **SIZE)
    assert torch.equal(generator.get_state(), seed().get_state())


def test_negative_prompts_one_by_one(loaded_base: LongSanaVideoPipeline) -> None:
    """None is the published one, wherever it stands."""
    call = {"guidance_scale": 3.0, "num_videos_per_prompt": 2, "num_inference_steps": 1, "output_type": "latent"}
    prompts = {"prompt": [PROMPT, OTHER], "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
    mixed = loaded_base(**inputs(negative_prompt=[None, ""], **prompts, **call)).frames
    for negative, rows in ((None, slice(0, 2)), ("", slice(2, 4))):
        prompts["generator"] = [torch.Generator().manual_seed(n) for n in range(4)]
        assert torch.equal(mixed[rows], loaded_base(**inputs(negative_prompt=negative, **prompts, **call)).frames[rows])
    encoded = loaded_base.encode_prompt([PROMPT, OTHER], True, ["", None])
    assert encoded[2] is not None and not torch.equal(encoded[2][0], encoded[2][1])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What diffusers' logger, which does not pass on, has said since it was last asked."""
    logger = logging.getLogger("longsana.pipelines.video")
    logger.addHandler(caplog.handler)

    def since() -> str:
        text = caplog.text
        caplog.clear()
        return text

    yield since
    logger.removeHandler(caplog.handler)


def test_switches_without_effect_are_said_to_be(pipe: LongSanaVideoPipeline, said: Callable[[], str]) -> None:
    expected = pipe(**inputs()).frames
    pipe.enable_attention_slicing()
    assert "enable_attention_slicing changes nothing" in said()
    pipe.disable_attention_slicing()
    assert said() == ""
    pipe.vae.enable_tiling()
    assert torch.equal(pipe(**inputs()).frames, expected)
    assert "vae.enable_tiling() changes nothing here" in said()
    pipe(**inputs(output_type="latent"))
    assert said() == "", "nothing is decoded"
    pipe.vae.disable_tiling()
    pipe.vae.enable_slicing()
    next(pipe.stream(**inputs()))
    assert "vae.enable_slicing() changes nothing here" in said()
    pipe.vae.disable_slicing()
    pipe(**inputs())
    assert said() == ""
    list(pipe.stream(**inputs(prompt=[PROMPT, OTHER, OTHER], num_frames=17, chunk_frames=2)))
    assert "prompt: 3 for 2 chunks, each of which takes one" in said()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_pipe_keeps_dtypes(distilled_folder: Path, dtype: torch.dtype) -> None:
    """Those of each part, in the pipeline that it is made from too; another one is given where it is asked for."""
    pipe = quiet(distilled_folder, torch_dtype=dtype)
    pipe.vae.to(torch.float32)
    before = {name: weight.clone() for name, weight in pipe.vae.named_parameters()}
    for options in ({}, {"torch_dtype": None}, {"caption_length": 32}):
        other = LongSanaVideoPipeline.from_pipe(pipe, **options)
        assert other.transformer is pipe.transformer
        assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (dtype, dtype, torch.float32)
    assert other.config["caption_length"] == 32
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.vae.named_parameters())
    asked = LongSanaVideoPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    assert {asked.transformer.dtype, asked.text_encoder.dtype, asked.vae.dtype} == {torch.float32}
    assert asked.to(torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_callback_that_returns_something_else(loaded: LongSanaVideoPipeline) -> None:
    for returned in (torch.zeros(1), {"latents": 3}, [1]):
        with pytest.raises(InputError, match=r"callback_on_step_end: returned .*; must be None, or a dict"):
            loaded(**inputs(callback_on_step_end=lambda *step, returned=returned: returned))
