"""Numbers that are none raise, whatever they come from and whatever they are wanted as; no picture is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from tests.pipelines.repository import PROMPT, SIZE
from tests.pipelines.test_lora import lora

CALL: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 1, **SIZE}


@contextmanager
def broken(weight: Tensor, value: float) -> Iterator[None]:
    """One number of a weight is another."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


PARTS: dict[str, Callable[[LongSanaVideoPipeline], Tensor]] = {
    "latents": lambda pipe: pipe.transformer.network.final.linear.bias,
    "decoded frames": lambda pipe: pipe.vae.decoder.conv_out.bias,
    "hidden states": lambda pipe: pipe.text_encoder.norm.weight,
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fixture", ["loaded", "loaded_base"])
def test_weights(fixture: str, part: str, output_type: str, value: float, request: pytest.FixtureRequest) -> None:
    pipe: LongSanaVideoPipeline = request.getfixturevalue(fixture)
    call = CALL | {"output_type": output_type}
    with broken(PARTS[part](pipe), value):
        if (part, output_type) == ("decoded frames", "latent"):
            assert pipe(PROMPT, **call).frames.isfinite().all(), "nothing is decoded"
            return
        with pytest.raises(FloatingPointError, match=f"{part} are not finite"):
            pipe(PROMPT, **call)
        if pipe.distilled:
            with pytest.raises(FloatingPointError, match=f"{part} are not finite"):
                next(pipe.stream(iter([PROMPT]), **call))


def test_a_text_encoder_leaves_the_generator_alone(loaded: LongSanaVideoPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with broken(loaded.text_encoder.norm.weight, math.nan):
        with pytest.raises(FloatingPointError, match="text encoder: hidden states"):
            loaded(PROMPT, generator=generator, **CALL)
        with pytest.raises(FloatingPointError, match="text encoder: hidden states"):
            loaded.encode_prompt(PROMPT)
        for prompt in (PROMPT, [PROMPT, PROMPT]):
            with pytest.raises(FloatingPointError, match="text encoder: hidden states"):
                loaded.stream(prompt, generator=generator, **SIZE)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_lora(pipe: LongSanaVideoPipeline, factor: str, value: float) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft: pip install -e '.[lora]'")
    change = lora(pipe.transformer.network)
    change[f"transformer.proj_out.{factor}.weight"][0] = value
    with pytest.raises(InputError, match=rf"^LoRA: .* not finite \(transformer\.proj_out\.{factor}\.weight\)$"):
        pipe.load_lora_weights(change)
    assert pipe.get_list_adapters() == {}


def test_a_callback(loaded: LongSanaVideoPipeline) -> None:
    def spoil(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * math.inf}

    with pytest.raises(FloatingPointError, match="latents are not finite"):
        loaded(PROMPT, callback_on_step_end=spoil, **CALL)


def test_a_decoder_that_looks_ahead(looking_ahead: LongSanaVideoPipeline) -> None:
    """Its frames come at the end, which is looked at as the chunks are."""
    call = {"height": 64, "width": 96, "chunk_frames": 2, "num_inference_steps": 1}
    first = next(looking_ahead.stream(PROMPT, **call))
    with broken(looking_ahead.vae.decoder.conv_out.conv.bias, math.nan):
        with pytest.raises(FloatingPointError, match="end of the video: decoded frames are not finite"):
            next(looking_ahead.stream(num_frames=0, state=first, **call))
        with pytest.raises(FloatingPointError, match="decoded frames are not finite"):
            looking_ahead(PROMPT, num_frames=17, **call)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_given(loaded: LongSanaVideoPipeline, loaded_base: LongSanaVideoPipeline, value: float) -> None:
    """By the argument's name, before anything is computed."""
    embeds, mask, away, away_mask = loaded_base.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    assert away is not None and not mask[0, -1]
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    unseen = embeds.clone()
    unseen[0, -1] = value
    seen = {name: tensor.clone() for name, tensor in (("embeds", embeds), ("away", away), ("noise", noise))}
    for tensor in seen.values():
        tensor.view(-1)[0] = value
    captions = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    captions |= {"negative_prompt_embeds": away, "negative_prompt_attention_mask": away_mask}
    for name, spoilt in (
        ("prompt_embeds", {"prompt_embeds": seen["embeds"]}),
        ("negative_prompt_embeds", {"negative_prompt_embeds": seen["away"]}),
        ("latents", {"latents": seen["noise"]}),
    ):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        with pytest.raises(InputError, match=f"^{name}: holds numbers that are not finite$"):
            loaded_base(generator=generator, **captions | spoilt | CALL)
        assert torch.equal(generator.get_state(), before)
    # Where the mask hides them numbers mean nothing, these too.
    call = CALL | {"output_type": "latent", "latents": noise}
    expected = loaded_base(**captions | call).frames
    assert torch.equal(loaded_base(**captions | call | {"prompt_embeds": unseen}).frames, expected)


def test_a_state(loaded: LongSanaVideoPipeline) -> None:
    call = {"num_inference_steps": 1, "chunk_frames": 2}
    state = next(loaded.stream(PROMPT, **call, **SIZE)).state
    assert state.decoder is not None
    network = state.network
    bad_sums = network._replace(kv=network.kv.clone().fill_(math.nan))
    bad_tail = network._replace(tail=network.tail.clone().fill_(math.inf))
    features = (*state.decoder.features[:-1], state.decoder.features[-1].clone().fill_(math.nan))
    for which, spoilt in (
        ("kv", state._replace(network=bad_sums)),
        ("tail", state._replace(network=bad_tail)),
        ("decoder", state._replace(decoder=state.decoder._replace(features=features))),
    ):
        with pytest.raises(InputError, match=rf"^state: holds numbers that are not finite \({which}"):
            loaded.stream(state=spoilt, **call)
    assert isinstance(loaded.vae, nn.Module) and next(loaded.stream(state=state, **call)).frames


def test_a_state_of_something_else(loaded: LongSanaVideoPipeline) -> None:
    call = {"num_inference_steps": 1, "chunk_frames": 2}
    state = next(loaded.stream(PROMPT, **call, **SIZE)).state
    network = state.network
    fewer = network._replace(kv=network.kv[:-1], k_sum=network.k_sum[:-1], tail=network.tail[:-1])
    for other in (state._replace(network=fewer), state._replace(size=(64, 64))):
        with pytest.raises(InputError, match=r"^state: its .* has shape"):
            loaded.stream(state=other, **call)
    for other in (b"state", network, (1, 2)):
        with pytest.raises(InputError, match=r"^state: a .*; must be a chunk of a stream, or its state"):
            loaded.stream(state=other, **call)  # type: ignore[arg-type]


NO_STATES: dict[str, Any] = {
    r"its seed='x': must be a whole number": {"seed": "x"},
    r"its seed=10+\.*: must be at most": {"seed": 10**30},
    r"its seed=1\.5: must be a whole number": {"seed": 1.5},
    r"its prompt=5: must be a text": {"prompt": 5},
    r"its prompt: half a character in it": {"prompt": "\ud800"},
    r"its network is a NoneType; must be a CausalState": {"network": None},
    r"its network is a tuple": {"network": (1, 2)},
    r"its decoder is a int; must be a DecodeCache, or None": {"decoder": 5},
    r"its size=5: must be a list": {"size": 5},
    r"its size=\(32,\): must be 2 values": {"size": (32,)},
    r"its size\[0\]='a': must be a whole number": {"size": ("a", 48)},
}


@pytest.mark.parametrize("message", NO_STATES)
def test_a_state_that_somebody_changed(loaded: LongSanaVideoPipeline, message: str) -> None:
    state = next(loaded.stream(PROMPT, num_inference_steps=1, chunk_frames=2, **SIZE)).state
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for given in (None, generator):
        with pytest.raises(InputError, match=f"^state: {message}"):
            loaded.stream(state=state._replace(**NO_STATES[message]), generator=given)
    assert torch.equal(generator.get_state(), before)


def test_parts_of_a_state_that_somebody_changed(loaded: LongSanaVideoPipeline) -> None:
    state = next(loaded.stream(PROMPT, num_inference_steps=1, chunk_frames=2, **SIZE)).state
    assert state.decoder is not None
    network, decoder = state.network, state.decoder
    for changed in (
        state._replace(network=network._replace(frames=-1)),
        state._replace(network=network._replace(kv=None)),
        state._replace(network=network._replace(kv=network.kv.int())),
        state._replace(network=network._replace(k_sum=network.k_sum.to("meta"))),
        state._replace(decoder=decoder._replace(features=())),
        state._replace(decoder=decoder._replace(features=5)),
        state._replace(decoder=decoder._replace(features=(None, *decoder.features[1:]))),
        state._replace(decoder=decoder._replace(features=(*decoder.features[:-1], decoder.features[-1].double()))),
        state._replace(decoder=decoder._replace(latents="x")),
        state._replace(decoder=decoder._replace(ended=1)),
    ):
        with pytest.raises(InputError, match=r"^state: ") as caught:
            loaded.stream(state=changed)
        assert "\n" not in str(caught.value)
