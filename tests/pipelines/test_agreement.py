"""The pipeline's videos are those of the batch command, to the bit; and its base model is diffusers' own."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longsana.config import InferenceConfig
from longsana.data.pictures import read_picture
from longsana.data.prompts import Prompt
from longsana.data.story import read_parts
from longsana.pipelines.tiny import TinyVideoAutoencoder
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.clock import Clock
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine, Frames
from tests.pipelines.repository import OTHER, PROMPT, SIZE, around, quiet, shapes_config
from tests.sampling.test_ltx2 import small_720p


def batch_command(
    config: InferenceConfig, *texts: str, device: str = "cpu", image: Path | None = None, **cuts: Path
) -> tuple[Tensor, Tensor]:
    """Latents and pictures of a batch of lines of a prompt file; `part_1` is the picture of part 1."""
    engine, later = Engine(config, device), {int(name[len("part_") :]): path for name, path in cuts.items()}
    prompts = [
        Prompt(line, text, words, texts[:line].count(text), 32, 48, marks=marks, image=image, cuts=later)
        for line, (text, (words, marks)) in enumerate(zip(texts, map(read_parts, texts), strict=True))
    ]
    with caption_encoder(engine.config, engine.device) as encode:
        captions = [encode(prompt) for prompt in prompts]
    frames: list[Frames] = list(engine.sample(*engine.load(), prompts, captions))
    return torch.cat([f.latents for f in frames], dim=2), torch.cat([f.pixels for f in frames], dim=1)


def seed(number: int = 42) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("num_frames", [17, 81])
@pytest.mark.parametrize("decoder", ["full", "tae_shapes"])
def test_distilled(loaded: LongSanaVideoPipeline, distilled_folder: Path, num_frames: int, decoder: str) -> None:
    config = shapes_config(**{"sampling.num_frames": num_frames, "sampling.seed": 42, "vae.decoder": decoder})
    if decoder != "full":
        tiny = TinyVideoAutoencoder.from_file(decoder, "asset/shapes/vae/tae_shapes.safetensors")
        loaded = quiet(distilled_folder, decoder=tiny)
    latents, pixels = batch_command(config, PROMPT)
    call: dict[str, Any] = {"num_frames": num_frames, "latents_per_call": config.vae.latents_per_call, **SIZE}
    assert torch.equal(loaded(PROMPT, output_type="latent", generator=seed(), **call).frames, latents)
    (pictures,) = loaded(PROMPT, generator=seed(), **call).frames
    assert torch.equal(torch.stack([torch.tensor(list(p.tobytes())) for p in pictures]), pixels[0].flatten(1))


@pytest.mark.gpu
def test_distilled_on_a_gpu(distilled_folder: Path) -> None:
    """In bfloat16, with the operations of a GPU."""
    config = shapes_config(**{"sampling.num_frames": 81, "sampling.seed": 42})
    latents, _ = batch_command(config, PROMPT, device="cuda")
    pipe = quiet(distilled_folder, torch_dtype=torch.bfloat16).to("cuda")
    assert torch.equal(pipe(PROMPT, output_type="latent", generator=seed(), num_frames=81, **SIZE).frames, latents)


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["keep", "recache=2", "rebuild=1", "cut"])
def test_a_story_and_its_stream_on_a_gpu(distilled_folder: Path, change: str) -> None:
    """Recorded passes of the batch command, the call, and streams that go on from every chunk: the same to the bit."""
    story = f"{PROMPT}[2s] | [{change}] {OTHER}"
    config = shapes_config(**{"sampling.num_frames": 97, "sampling.seed": 42, "sampling.chunk_frames": 4})
    latents, _ = batch_command(config, story, device="cuda")
    pipe = quiet(distilled_folder, torch_dtype=torch.bfloat16).to("cuda")
    options: dict[str, Any] = {"output_type": "latent", "chunk_frames": 4, **SIZE}
    assert torch.equal(pipe(story, generator=seed(), num_frames=97, **options).frames, latents)
    chunks = list(pipe.stream(story, 97, generator=seed(), **options))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=2), latents)
    for before, chunk in pairwise(chunks):
        (again,) = pipe.stream(num_frames=16, state=before, **options)
        assert torch.equal(again.frames, chunk.frames)


def test_distilled_batch_of_prompts(loaded: LongSanaVideoPipeline) -> None:
    texts = [PROMPT, OTHER, PROMPT]
    latents, _ = batch_command(shapes_config(**{"sampling.num_frames": 17, "sampling.seed": 7}), *texts)
    own = loaded(texts, output_type="latent", generator=seed(7), num_frames=17, **SIZE).frames
    assert torch.equal(own, latents)
    assert not torch.equal(own[0], own[2])


def test_distilled_with_parts(loaded: LongSanaVideoPipeline) -> None:
    text = f"{PROMPT}<split> {OTHER}"
    config = shapes_config(**{"sampling.num_frames": 25, "sampling.seed": 42, "sampling.chunk_frames": 3})
    latents, _ = batch_command(config, text)
    own = loaded(text, output_type="latent", generator=seed(), num_frames=25, chunk_frames=3, **SIZE).frames
    assert torch.equal(own, latents)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        pytest.param("{}[1s] | {}", {}, marks=pytest.mark.slow),  # as below, without a transition
        ("{}[1s] | [cut] {} | [recache=2] {}", {}),
        ("{} | [rebuild=1] {} | {}", {"prompt_change": "recache=1"}),
        ("{}<split>{}", {"prompt_change": "rebuild=2", "transition_chunks": 1, "transition": "spherical"}),
        ("{}[0.5s] | {}", {"fps": 8.0, "transition_chunks": 2}),
        pytest.param(r"{} \| {}[1s]", {}, marks=pytest.mark.slow),  # how lines are read is one function for both
    ],
)
def test_distilled_with_a_story(loaded: LongSanaVideoPipeline, text: str, settings: dict[str, Any]) -> None:
    """Four chunks, to the bit; and two videos at once."""
    text = text.format(PROMPT, OTHER, PROMPT)
    config = shapes_config(
        **{"sampling.num_frames": 33, "sampling.seed": 42, "sampling.chunk_frames": 2},
        **{f"sampling.{name}": value for name, value in settings.items()},
    )
    call: dict[str, Any] = {"output_type": "latent", "num_frames": 33, "chunk_frames": 2, **settings, **SIZE}
    latents, _ = batch_command(config, text)
    assert torch.equal(loaded(text, generator=seed(), **call).frames, latents)
    together, _ = batch_command(config, text, text)
    assert torch.equal(loaded([text] * 2, generator=seed(), **call).frames, together)


def test_base(loaded_base: LongSanaVideoPipeline) -> None:
    config = shapes_config(
        "base",
        **{
            "sampling.num_frames": 17,
            "sampling.seed": 42,
            "sampling.cfg_scale": 2.0,
            "scheduler.num_inference_steps": 3,
            "sampling.negative_prompt": OTHER,
        },
    )
    latents, _ = batch_command(config, PROMPT)
    own = loaded_base(
        PROMPT,
        OTHER,
        guidance_scale=2.0,
        num_inference_steps=3,
        motion_score=10,
        output_type="latent",
        generator=seed(),
        num_frames=17,
        **SIZE,
    ).frames
    assert torch.equal(own, latents)


def given_to_both(loaded_base: LongSanaVideoPipeline, guidance: float) -> dict[str, Any]:
    """Arguments of a call of ours and of diffusers', with the same embeddings, masks and noise."""
    embeds, mask, away, away_mask = loaded_base.encode_prompt(
        PROMPT, do_classifier_free_guidance=True, negative_prompt=OTHER
    )
    assert away is not None and away_mask is not None
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": away,
        "negative_prompt_attention_mask": away_mask,
        "latents": torch.randn(1, 16, 5, 4, 8, generator=seed()),
        "num_inference_steps": 20,
        "guidance_scale": guidance,
        "height": 32,
        "width": 64,
        "frames": 17,
        "output_type": "latent",
    }


def of_ours(mine: LongSanaVideoPipeline, call: dict[str, Any]) -> Tensor:
    unheard = () if call["guidance_scale"] > 1 else ("negative_prompt_embeds", "negative_prompt_attention_mask")
    frames: Tensor = mine(**{name: value for name, value in call.items() if name not in unheard}).frames
    return frames


def of_diffusers(theirs: Any, call: dict[str, Any]) -> Tensor:
    # Euler's timesteps are fractions, which it embeds and no checkpoint was trained on.
    def whole(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        return arguments, named | {"timestep": named["timestep"].float().floor()}

    theirs.set_progress_bar_config(disable=True)
    theirs.transformer.register_forward_pre_hook(whole, with_kwargs=True)
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    call = call | {name: call[name].long() for name in masks}
    frames: Tensor = theirs(negative_prompt=None, use_resolution_binning=False, **call).frames
    return frames


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("solver", ["flow_dpm-solver", "flow_euler"])
def test_base_is_that_of_diffusers(
    loaded_base: LongSanaVideoPipeline, base_folder: Path, solver: str, guidance: float
) -> None:
    """With the same embeddings, masks, noise and scheduler."""
    import diffusers

    scheduler = loaded_base.scheduler  # as published: DPMSolverMultistepScheduler
    assert (scheduler.config.solver_order, scheduler.config.flow_shift) == (2, 8.0)
    if solver == "flow_euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    mine = LongSanaVideoPipeline(
        **{**loaded_base.components, "scheduler": scheduler}, caption_length=48, chi_prompt="none", softcap=True
    )
    mine.set_progress_bar_config(disable=True)
    theirs = diffusers.SanaVideoPipeline(
        tokenizer=loaded_base.tokenizer,
        text_encoder=loaded_base.text_encoder,
        vae=loaded_base.vae,
        transformer=diffusers.SanaVideoTransformer3DModel.from_pretrained(base_folder / "transformer"),
        scheduler=copy.deepcopy(scheduler),
    )
    call = given_to_both(loaded_base, guidance)
    own, peer = of_ours(mine, call), of_diffusers(theirs, call)
    torch.testing.assert_close(own, peer, rtol=1e-3, atol=1e-3 * peer.abs().max().item())
    assert own.std() > 0.1


@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler"])
def test_a_picture_first_of_the_command_is_the_pipelines(
    loaded_base: LongSanaVideoPipeline, tmp_path: Path, sampler: str
) -> None:
    """To the bit, in a batch of two, and by Euler's steps whatever the sampler."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(path)
    steps = {"scheduler.num_inference_steps": 3, "scheduler.sampling_algo": sampler}
    config = shapes_config(
        "base", **{"sampling.num_frames": 17, "sampling.seed": 42, "sampling.cfg_scale": 6.0}, **steps
    )
    engine = Engine(config, "cpu")
    prompts = [Prompt(line, text, (text,), 0, 32, 48, image=path) for line, text in enumerate((PROMPT, OTHER), 1)]
    with caption_encoder(engine.config, engine.device) as encode:
        captions = [encode(prompt) for prompt in prompts]
    clock = Clock()
    frames = list(engine.sample(*engine.load(), prompts, captions, clock))
    latents = torch.cat([part.latents for part in frames], dim=2)
    call: dict[str, Any] = {"num_frames": 17, "num_inference_steps": 3, "motion_score": 10, "output_type": "latent"}
    own = loaded_base([PROMPT, OTHER], image=path, generator=seed(), **call, **SIZE).frames
    assert torch.equal(own, latents) and clock.seconds()["encode"] > 0
    shown = torch.cat([part.pixels for part in frames], dim=1)[0, 0].double()
    without = loaded_base(PROMPT, generator=seed(), **call | {"output_type": "np"}, **SIZE).frames[0, 0] * 255
    picture = torch.from_numpy(read_picture(path, 32, 48)).double()
    assert (shown - picture).abs().mean() < 0.7 * np.abs(without - picture.numpy()).mean()


@pytest.mark.parametrize("first", ["absorb", "pin"])
def test_a_cut_to_a_picture_of_the_command_is_the_pipelines(
    loaded: LongSanaVideoPipeline, tmp_path: Path, first: Any
) -> None:
    """To the bit, in a batch of two, with a picture at the beginning too, and as a stream that is cut anywhere."""
    story = f"{PROMPT}[1s] | [cut] {OTHER}[0.5s] | [recache=2] {PROMPT}"
    settings = {"sampling.num_frames": 41, "sampling.seed": 42, "sampling.chunk_frames": 2}
    config = shapes_config(**settings, **{"sampling.image_first": first})
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for number, path in enumerate((one, two)):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (50, 90, 3), np.uint8)).save(path)
    options: dict[str, Any] = {"output_type": "latent", "chunk_frames": 2, "image_first": first, **SIZE}
    latents, _ = batch_command(config, story, story, part_1=two)
    own = loaded([story] * 2, image={1: two}, generator=seed(), num_frames=41, **options).frames
    assert torch.equal(own, latents)
    alone, _ = batch_command(config, story, part_1=two)
    assert torch.equal(loaded(story, image={1: [two]}, generator=seed(), num_frames=41, **options).frames, alone)
    torch.testing.assert_close(alone, latents[:1], rtol=1e-4, atol=1e-4)
    chunks = list(loaded.stream(story, 41, image={1: two}, generator=seed(), **options))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], dim=2), alone)
    assert [list(chunk.state.pictures) for chunk in chunks] == [[1], [1], [], [], []]
    for number, chunk in enumerate(chunks[:-1]):
        loaded.save_state(chunk, tmp_path / "state.safetensors")
        rest = loaded.stream(num_frames=8 * (4 - number), state=tmp_path / "state.safetensors", **plain(options))
        assert torch.equal(torch.cat([more.frames for more in rest], dim=2), alone[:, :, 3 + 2 * number :])
    both, _ = batch_command(config, story, image=one, part_1=two)
    assert torch.equal(loaded(story, image={0: one, 1: two}, generator=seed(), num_frames=41, **options).frames, both)
    streamed = loaded.stream(story, 41, image={0: one, 1: two}, generator=seed(), **options)
    assert torch.equal(torch.cat([chunk.frames for chunk in streamed], dim=2), both)
    picture = loaded._vae(1).encode_pictures([read_picture(two, 32, 48)])
    starts = [
        start for start in range(11) if torch.equal(own[:, :, start : start + 1], picture.expand(2, -1, -1, -1, -1))
    ]
    assert starts == [5]
    assert torch.equal(both[:, :, :1], loaded._vae(1).encode_pictures([read_picture(one, 32, 48)]))


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a stream that its state says."""
    return {name: value for name, value in options.items() if name not in ("chunk_frames", "image_first")}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_first_is_that_of_diffusers(
    loaded_base: LongSanaVideoPipeline, base_folder: Path, guidance: float
) -> None:
    """With the same weights, embeddings, picture and noise, within 1e-4; the picture's latent is there to the bit."""
    import diffusers

    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((64, 32))  # of the video's size: diffusers stretches others
    theirs = diffusers.SanaImageToVideoPipeline(
        tokenizer=loaded_base.tokenizer,
        text_encoder=loaded_base.text_encoder,
        vae=loaded_base.vae,
        transformer=diffusers.SanaVideoTransformer3DModel.from_pretrained(base_folder / "transformer"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0),
    )
    call = given_to_both(loaded_base, guidance)
    own, peer = of_ours(loaded_base, call | {"image": picture}), of_diffusers(theirs, call | {"image": picture})
    torch.testing.assert_close(own, peer, rtol=0, atol=1e-4 * peer.abs().max().item())
    assert own.std() > 0.1
    vae = loaded_base._vae(1)
    assert torch.equal(own[:, :, :1], vae.encode_pictures([np.asarray(picture)]))
    without = of_ours(loaded_base, call)
    assert not torch.equal(without[:, :, 1:], own[:, :, 1:])


def test_720p(tmp_path: Path) -> None:
    """Its VAE has other strides, and one latent is one patch."""
    config = small_720p(tmp_path)
    engine, prompt = Engine(config, "cpu"), Prompt(1, PROMPT, (PROMPT,), 0, 64, 96)
    with caption_encoder(engine.config, engine.device) as encode:
        caption, text = encode(prompt), (encode.encoder.tokenizer, encode.encoder.model)
    network, decoder = engine.load()
    frames = list(engine.sample(network, decoder, [prompt], [caption]))
    pipe = around(network, decoder, *text, tmp_path)
    own = pipe(
        PROMPT, height=64, width=96, num_frames=41,
        chunk_frames=2, latents_per_call=config.vae.latents_per_call, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert own.shape == (1, 41, 64, 96, 3)
    whole = torch.cat([piece.pixels for piece in frames], dim=1)
    assert (torch.from_numpy(own * 255) - whole).abs().max() <= 1

    pipe.save_pretrained(tmp_path / "repository")
    again = LongSanaVideoPipeline.from_pretrained(tmp_path / "repository")
    pictures = again(
        PROMPT, height=64, width=96, num_frames=41,
        chunk_frames=2, latents_per_call=config.vae.latents_per_call, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert (pictures == own).all()
