"""`LongSanaVideoPipeline`: prompts to videos as a diffusers pipeline, by the same parts as the batch command.

Sampler, noise, network, text encoder and decoder are those of `longsana.sampling`: for the same weights, prompt and
seed the latents are the same to the bit. Here is what diffusers' users expect around them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import is_peft_available, logging
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longsana.chunks import ChunkPlan, ImageFirst
from longsana.config import SamplingConfig, check_chi_prompt
from longsana.data.films import frames_used
from longsana.data.pictures import Fit
from longsana.data.prompts import check_words
from longsana.data.story import Change, Mark, Outline, place_parts, shared_changes
from longsana.encoders.geometry import GEOMETRIES, VAEGeometry
from longsana.encoders.text import CompactEmbedding, GemmaTextEncoder, compact, with_motion
from longsana.encoders.tiny_layouts import check_encodes, check_latents, fitting, latents_told
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import VAES, DecodeCache, VideoVAE, kind_of
from longsana.encoders.vae_files import check_geometry
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import TIMESTEPS, FlowSchedule, uniform_sigmas
from longsana.flow.solvers import DPMSolver, Euler, Solver
from longsana.models.embeddings import CaptionEmbedding, Text, TextEmbedding
from longsana.pipelines import transformer as networks
from longsana.pipelines.arguments import ARGUMENTS, MOST_LATENTS, PARTS, refuse_ignored
from longsana.pipelines.files import check_repository, folder_of
from longsana.pipelines.films import Film, FilmLike
from longsana.pipelines.images import PictureLike, PicturesLike, is_first, picture_of, pictures_of, places_of
from longsana.pipelines.noise import batch_noise, check_generator, check_noise, take_seed
from longsana.pipelines.outputs import LongSanaVideoChunk, LongSanaVideoOutput
from longsana.pipelines.pictures import as_output, joined
from longsana.pipelines.prompts import given_embeddings, negative_texts, one_for_each, parts_of, whole
from longsana.pipelines.tiny import TinyVideoAutoencoder
from longsana.pipelines.transformer import (
    LoraLoaderMixin,
    SanaVideoCausalTransformer3DModel,
    SanaVideoTransformer3DModel,
    onload,
    uncompiled,
)
from longsana.pipelines.turns import Read, Told, Turn, latents_more, lengths_of, told_by
from longsana.runtime.arguments import OneOf, Whole, checked
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError
from longsana.runtime.finite import require_finite, to_host
from longsana.runtime.later import Later
from longsana.runtime.offload import Part, Turns
from longsana.runtime.peers import Peers
from longsana.sampling.captions import Caption, stacked
from longsana.sampling.checks import check_first_chunk
from longsana.sampling.continuation import (
    Continuation,
    Memory,
    Moment,
    Telling,
    latest,
    mark_of,
    restored,
    vae_mark_of,
)
from longsana.sampling.engine import Videos, decode, sample_latents, stretches
from longsana.sampling.films import absorbed, film_latents
from longsana.sampling.recent import Held, Recent
from longsana.sampling.sampler import Chunk, generate
from longsana.sampling.transition import Way, blend
from longsana.state import CausalState
from longsana.weights.names import BASE_CLASS, CAUSAL_CLASS

log = logging.get_logger(__name__)

Words = str | CompactEmbedding
"""What is encoded, or what a user gives in its place."""
Callback = Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor] | None]
USUAL_FRAMES = 81
USUAL_FPS = 16.0
KEPT_DTYPE: Any = object()
"""Asks `to`, in place of a dtype, to leave each part in its own."""


class Defaults(NamedTuple):
    """Defaults that a model is sampled with."""

    steps: int
    guidance: float
    shift: float
    motion_score: int


OF_DISTILLED = Defaults(steps=4, guidance=1.0, shift=7.0, motion_score=10)
OF_BASE = Defaults(steps=50, guidance=6.0, shift=8.0, motion_score=30)
# The steps that it was distilled for, 1000, 960, 889 and 727, are an even grid of four, shifted by 8 (method.md 3.3).
GRID_SHIFT = 8.0


SIZES = {"WanVAE": (480, 832), "LTX2VAE_diffusers": (704, 1280)}
"""Height and width where none are given, by the VAE."""


SWITCHES_OF_VAES = {
    "use_tiling": "enable_tiling()",
    "use_slicing": "enable_slicing()",
    "use_framewise_decoding": "use_framewise_decoding",
}
"""Switches of diffusers' VAEs that a decoder of streams has no use for, and what sets them."""


class _Shown(NamedTuple):
    """The arguments of a stream that say how its chunks are shown."""

    output_type: str
    chunk_frames: int
    latents_per_call: int
    new_frames_only: bool


class Interrupted(Exception):
    """Somebody set `interrupt`: `latents` is what the chunk in progress had become."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class LongSanaVideoPipeline(DiffusionPipeline, LoraLoaderMixin):
    """Text to video: of any length with LongSANA, or clips with the bidirectional SANA-Video.

    `from_pretrained` reads the published repositories, `save_pretrained` writes their layout. The class of the
    transformer tells which model it is.

    Args:
        vae: `AutoencoderKLWan` of Wan 2.1 or `AutoencoderKLLTX2Video`. None: a `decoder` is in its place.
        transformer: distilled (`SanaVideoCausalTransformer3DModel`) or base model (`SanaVideoTransformer3DModel`).
        tokenizer, text_encoder: of Gemma 2; not needed where `prompt_embeds` are given.
        scheduler: the base model samples with it if it is a `DPMSolverMultistepScheduler` (None: the published one, see
            `DPMSolver`), and with Euler steps on the shift of any other.
        caption_length: tokens of a prompt that the network sees.
        chi_prompt: the instruction put before prompts, as in training: sana (the published one), none, or the text.
        softcap: cap the text encoder's attention logits; the published networks' captions were encoded without.
        num_cached_blocks, state_decay, num_sink_blocks: distilled: what is kept of the past (see
            `longsana.models.past`), from now on, whoever else has this transformer. None is what its files say, for
            published ones all; that is asked for with -1, 1.0 and 0.
        base_chunk_frames: latent frames of a chunk where a call does not say it.
        absorb: distilled: the state after a chunk is that of a pass over its clean latents (clean), or, of a network
            that was trained so, of its last step (last_step), one pass less.
        decoder: a tiny network that decodes in the VAE's place; films and pictures are still encoded by the VAE.
        tiny_encoder: encode them with the tiny network's own encoder.

    Raises:
        InputError: the parts do not belong together, a setting of the past means nothing, or another argument has no
            value that it may have.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder", "scheduler", "decoder"]  # noqa: RUF012 (as diffusers declares it)
    _exclude_from_cpu_offload = ["decoder"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    vae: Any
    transformer: Any
    tokenizer: Any
    text_encoder: Any
    scheduler: Any
    decoder: Any

    @checked(ARGUMENTS | PARTS)
    def __init__(
        self,
        vae: AutoencoderKLWan | AutoencoderKLLTX2Video | None,
        transformer: SanaVideoCausalTransformer3DModel | SanaVideoTransformer3DModel,
        tokenizer: object = None,
        text_encoder: nn.Module | None = None,
        scheduler: SchedulerMixin | None = None,
        caption_length: int = 300,
        chi_prompt: str = "sana",
        softcap: bool = False,
        num_cached_blocks: int | None = None,
        state_decay: float | list[float] | str | None = None,
        num_sink_blocks: int | None = None,
        base_chunk_frames: int = 10,
        absorb: str = "clean",
        decoder: TinyVideoAutoencoder | None = None,
        tiny_encoder: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(uncompiled(transformer), SanaVideoCausalTransformer3DModel):
            raise InputError(
                f"transformer: a {type(transformer).__module__}.{type(transformer).__name__}; needed is "
                f"{CAUSAL_CLASS} or {BASE_CLASS} of {networks.__name__}, which from_pretrained builds"
            )
        name = _checked_vae(uncompiled(vae), uncompiled(decoder), tiny_encoder=tiny_encoder)
        check_words(chi_prompt, "chi_prompt")
        check_chi_prompt(chi_prompt)
        taken, given = transformer.config["in_channels"], GEOMETRIES[name].channels
        if taken != given:
            raise InputError(
                f"transformer: in_channels is {taken}; latents of a {VAES[name].kind.__name__} have {given}"
            )
        self.register_modules(
            vae=vae,
            transformer=transformer,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=scheduler,
            decoder=decoder,
        )
        self.register_to_config(
            caption_length=caption_length,
            chi_prompt=chi_prompt,
            softcap=softcap,
            base_chunk_frames=base_chunk_frames,
            absorb=absorb,
            tiny_encoder=tiny_encoder,
        )
        past = {"num_cached_blocks": num_cached_blocks, "state_decay": state_decay, "num_sink_blocks": num_sink_blocks}
        asked = [name for name, value in past.items() if value is not None]
        if not self.distilled and (meant := [*asked, *(["absorb"] if absorb != "clean" else [])]):
            raise InputError(f"{meant[0]}: has no meaning for the base model, which samples a clip as one chunk")
        if asked:
            uncompiled(transformer).set_past(**past)
        self._interrupt = False
        self._text_part: Part | None = None  # the text encoder's, if it waits on the host
        self._peers: Peers | None = None
        self._num_timesteps = 0
        self._guidance_scale = 1.0

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Load as diffusers' own does, but a transformer under the name of a library that may lack its class is ours.

        Raises:
            InputError: the repository is of another kind of model.
        """
        loaded = super().load_config(*arguments, **options)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        _, name = index.get("transformer") or (None, None)
        if name not in (CAUSAL_CLASS, BASE_CLASS):
            raise InputError(
                f"model_index.json: transformer is {name}; this pipeline is for {CAUSAL_CLASS} and {BASE_CLASS}"
            )
        index["transformer"] = [networks.__name__, name]
        return loaded

    def register_to_config(self, **entries: Any) -> None:
        """Register as diffusers' own does, but the transformer is written as in the published repositories."""
        if (entries.get("transformer") or (None,))[0] == networks.__name__:
            entries["transformer"] = ("diffusers", entries["transformer"][1])
        super().register_to_config(**entries)

    @property
    def distilled(self) -> bool:
        """True if the model samples chunk by chunk in few steps, and not a clip at once in many."""
        # Not isinstance: torch.compile wraps it.
        return bool(self.config["transformer"][1] != BASE_CLASS)

    @property
    def _defaults(self) -> Defaults:
        return OF_DISTILLED if self.distilled else OF_BASE

    @property
    def geometry(self) -> VAEGeometry:
        return GEOMETRIES[self._vae_name]

    @property
    def _vae_name(self) -> str:
        if self.vae is None:
            return str(uncompiled(self.decoder).network.kind.vae_type)
        return kind_of(uncompiled(self.vae)).name

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest call, of all its chunks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set it, in a callback or from another thread, to stop after the step in progress."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = bool(value)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the latest call. A callback may set `_guidance_scale` for the steps to come."""
        return self._guidance_scale

    @torch.no_grad()
    @checked(ARGUMENTS)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = USUAL_FRAMES,
        frames: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        motion_score: int | None = None,
        flow_shift: float | None = None,
        chunk_frames: int | None = None,
        first_chunk_frames: int | None = None,
        latents_per_call: int = 2,
        fps: float | None = None,
        prompt_change: str | None = None,
        transition_chunks: int | None = None,
        transition: Way | None = None,
        video: FilmLike | None = None,
        new_frames_only: bool = False,
        image: PicturesLike | None = None,
        image_fit: Fit | None = None,
        image_first: ImageFirst | None = None,
    ) -> LongSanaVideoOutput | tuple[Any]:
        """Videos of prompts.

        Args:
            prompt: a text, or one for each video; `first<split>then`, or a story `first[5s] | [cut] then`, divides a
                video of the distilled model (see `longsana.data.story`).
            negative_prompt: that of the base model's guidance, for all videos or each; None is the published
                text, "" is empty.
            num_inference_steps: of a chunk; 4 (distilled), 50 (base).
            timesteps: distilled: the steps themselves, falling, instead of their number; a trailing 0 is dropped.
            guidance_scale: 1 (distilled, which takes no other), 6 (base).
            height, width: pixels, multiples of 16 (Wan) or 32 (LTX-2); 480 x 832, or 704 x 1280.
            num_frames: 4 n + 1 (Wan) or 8 n + 1 (LTX-2).
            frames: older name of num_frames.
            generator: its `initial_seed()` is the seed if nothing was drawn from it yet; each call advances it. A list
                has one for each video. None draws a seed from torch's global generator.
            latents: (B, C, T, h, w), initial noise that does not come from the seed.
            prompt_embeds: (B, L, caption_channels), instead of encoding the prompt, which then only tells apart whose
                noise it is; with `prompt_attention_mask` (B, L), 1 where a token is seen. `negative_...`: likewise.
            output_type: pil, np, pt (on the host) or latent; see `LongSanaVideoOutput`.
            return_dict: False returns a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": x})`, x of the chunk in
                progress; the `latents` it returns take their place. step counts through all chunks.
            motion_score: appended to every prompt; 10 (distilled), 30 (base); 0 appends nothing.
            flow_shift: 7 (distilled); the scheduler's, or 8 (base).
            chunk_frames: latent frames of a chunk, 10 unless the pipeline was made otherwise; what remains goes to the
                first.
            first_chunk_frames: distilled: latent frames of the first chunk, which is there sooner the shorter it is, at
                most chunk_frames + 1; what remains is a shorter last chunk then. 0 (None): it has what remains.
            latents_per_call: latent frames decoded together; frames differ by rounding alone.
            fps: distilled: pictures a second: by which the lengths of a story's parts are counted, and that are taken
                of a film's file; 16.
            prompt_change: distilled: what becomes of the past where a part begins that does not say it itself: keep
                (None), recache=K, rebuild=W or cut. It must be the same for all videos of a call.
            transition_chunks: distilled: chunks over which one part's caption becomes the next one's; 0.
            transition: linear (None) or spherical, the way between the two.
            video: a film or picture that the videos go on from (distilled): a file, pictures of PIL, or an array
                (F, H, W, 3) of uint8. It is fitted to their size, and absorbed under the first part of each prompt.
                num_frames says then how many more, 4 n (Wan) or 8 n (LTX-2); 80 unless said otherwise.
            new_frames_only: leave the film out of the result.
            image: a picture that the videos begin with, for all or one for each prompt: a file, a picture of PIL, or an
                array (H, W, 3) of uint8. A mapping has such by the number of a story's part, from 0: a later part
                begins with one where it cuts. Of the base model its latent stays the first one in every step; steps are
                Euler's, as published, whatever the scheduler.
            image_fit: cover (None): scaled to cover the video, and cut; stretch: to its size.
            image_first: distilled: pin (None): the picture is the first latent of its chunk in every step; absorb: it
                is a chunk of one latent, which the others follow.

        Raises:
            InputError: what is asked for cannot be made, or part of it would be ignored; the message names the argument
                and says what can be. Nothing is computed then, and no generator advanced.
            FloatingPointError: captions, latents or decoded frames are not finite, as weights that are not make them.
        """
        size = self._check(*self._size(height, width))
        chunk_frames = chunk_frames or self.config["base_chunk_frames"]
        if frames is not None and num_frames not in (frames, USUAL_FRAMES):
            raise InputError(f"frames={frames}: an older name of num_frames, which is {num_frames}; give one of them")
        num_frames = num_frames if frames is None else frames
        film = self._film(video, fps or USUAL_FPS, new_frames_only, height, width)
        if film is None:
            length = self.geometry.latent_frames(num_frames)
        else:
            refuse_ignored({"latents": latents}, "with video")
            length = latents_more(num_frames - (num_frames == USUAL_FRAMES), self.geometry)
        if not self.distilled:
            # All at once.
            Whole(most=self.geometry.pixel_frames(MOST_LATENTS)).settle("num_frames", num_frames)
            refuse_ignored({"first_chunk_frames": first_chunk_frames}, "for the base model, whose clip is one chunk")
        first_chunk = first_chunk_frames or 0
        check_first_chunk(first_chunk, chunk_frames, ("first_chunk_frames", "chunk_frames"))
        if film is None:
            plan = ChunkPlan.split(length, chunk_frames if self.distilled else length, first_chunk)
        else:
            plan = ChunkPlan.going_on(length, chunk_frames, first_chunk)
        if others := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise InputError(f"callback_on_step_end_tensor_inputs: {', '.join(others)}: there are only latents")
        guidance = self._guidance(guidance_scale)
        schedule = self._schedule(num_inference_steps, timesteps, flow_shift, euler=image is not None)
        copies = num_videos_per_prompt
        texts = one_for_each(prompt, prompt_embeds, copies)
        pictures: dict[int, list[np.ndarray]] = {}
        if image is None:
            refuse_ignored({"image_fit": image_fit, "image_first": image_first}, "without image")
        else:
            if is_first(image):
                refuse_ignored({"video": video}, "with image; a video goes on from one of them")
            self._check_encodes("image")
            if not self.distilled:
                refuse_ignored({"image_first": image_first}, "for the base model, in whose clip the picture is pinned")
            sides = self._size(height, width)
            pictures = pictures_of(image, len(texts) // copies, sides, image_fit or "cover", copies)
            if length == 1:
                raise InputError("num_frames=1: shows the picture that it begins with alone; it must be longer")
        if 0 in pictures and self.distilled:
            way = image_first or SamplingConfig.image_first
            plan = ChunkPlan.with_picture(length, chunk_frames, way, first_chunk)
        check_noise(len(texts), generator, latents, (len(texts), self.geometry.channels, length, *size))
        wanted: Sequence[Sequence[Words]]  # the parts of each video's prompt
        if prompt_embeds is None:
            refuse_ignored({"prompt_attention_mask": prompt_attention_mask}, "without prompt_embeds")
            parts = [parts_of(text) if self.distilled else ((whole(text),), ()) for text in texts]
            wanted = [[self._worded(part, motion_score) for part in own] for own, _ in parts]
        else:
            refuse_ignored({"motion_score": motion_score}, "with prompt_embeds: it is words of a prompt")
            given = self._given("prompt", prompt_embeds, prompt_attention_mask, copies, len(texts))
            wanted, parts = [[embedding] for embedding in given], [(("",), ())] * len(given)
        telling = {"prompt_change": prompt_change, "transition_chunks": transition_chunks, "transition": transition}
        if not self.distilled:
            refuse_ignored({"fps": fps, **telling}, "for the base model, whose prompts have one part")
        if prompt_embeds is not None:
            refuse_ignored(telling | ({} if film else {"fps": fps}), "with prompt_embeds, which are of one part each")
        if not transition_chunks:
            refuse_ignored({"transition": transition}, "without transition_chunks")
        place = partial(self._placed, fps=fps or USUAL_FPS, change=self._change(prompt_change))
        placed = [place(len(own), marks, plan) for own, marks in parts]
        shared_changes(placed)
        places = places_of(list(pictures), placed)
        negatives = {
            "negative_prompt": negative_prompt,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        unwanted: Sequence[Words] | None = None
        if guidance > 1:
            unwanted = self._unwanted(
                negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask, copies, len(texts)
            )
        else:
            refuse_ignored(negatives, f"with guidance_scale={guidance:g}: nothing is guided away from it")
        everything = list(chain.from_iterable(wanted))
        self._check_encoder([*everything, *(unwanted or [])])
        # Nothing is refused from here on.
        embedded = iter(self._embedded(everything))
        shown = [tuple(islice(embedded, len(own))) for own in wanted]
        negative = [None] * len(shown) if unwanted is None else self._embedded(unwanted, instruction=False)
        captions = list(map(Caption, shown, negative))
        filmed: list[Tensor] = []
        videos = Videos(
            schedule,
            plan,
            (self.geometry.channels, *size),
            batch_noise(texts, generator, latents),
            self._execution_device,
            lambda: self._guidance_scale,
            outlines=placed,
            transition_chunks=transition_chunks or 0,
            transition=transition or "linear",
            first={places[part]: self._latents_of(own) for part, own in pictures.items()},
            apart=image_first == "absorb",
        )
        if film is not None:
            recent = videos.recent(chunk_frames + 1)
            filmed, begun = self._begun(film, captions, chunk_frames, latents_per_call, recent)
            videos = replace(videos, begun=begun)
        steps = schedule.steps if isinstance(schedule, FlowSchedule) else [int(t) for t in schedule.timesteps]
        given_chunks = sum(plan.lengths[chunk] == 1 for chunk in places.values())  # which take no step
        self._interrupt, self._num_timesteps = False, (len(plan) - given_chunks) * len(steps)
        self._guidance_scale = guidance
        finished: list[Tensor] = []
        hidden = self.geometry.pixel_frames(sum(part.shape[2] for part in filmed)) if new_frames_only else 0
        with self.progress_bar(total=self._num_timesteps) as bar:
            given_to_callback = tuple(callback_on_step_end_tensor_inputs)
            on_step = _Watch(self, steps, self._num_timesteps, callback_on_step_end, given_to_callback, bar)
            try:
                for chunk in sample_latents(self._passes, captions, videos, on_step=on_step):
                    finished.append(chunk.latents)
            except Interrupted as stop:
                finished.append(stop.latents)

        if output_type == "latent":
            result: Any = torch.cat([*([] if new_frames_only else filmed), *finished], dim=2)
            require_finite("video", {"latents": result})
        else:
            self._bring_vae()
            vae = self._vae(latents_per_call)
            result, *_ = self._pictures(vae, [*filmed, *finished], None, output_type, chunk_frames, hidden=hidden)
        self.maybe_free_model_hooks()
        return LongSanaVideoOutput(result) if return_dict else (result,)

    @checked(ARGUMENTS)
    def stream(
        self,
        prompt: str | Iterable[str | Mapping[str, Any]] | None = None,
        num_frames: int | None = None,
        state: Continuation | LongSanaVideoChunk | str | Path | None = None,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        motion_score: int | None = None,
        flow_shift: float | None = None,
        chunk_frames: int | None = None,
        first_chunk_frames: int | None = None,
        latents_per_call: int = 2,
        video: FilmLike | None = None,
        fps: float | None = None,
        new_frames_only: bool = False,
        prompt_change: str | None = None,
        transition_chunks: int | None = None,
        transition: Way | None = None,
        image: PictureLike | Mapping[int, PictureLike] | None = None,
        image_fit: Fit | None = None,
        image_first: ImageFirst | None = None,
    ) -> Iterator[LongSanaVideoChunk]:
        """One video, chunk by chunk as it is sampled, in memory that does not grow.

        A chunk's frames come before the pass that absorbs it, and its state is made when that is first asked for, or as
        the next chunk begins. Cut between chunks and continued with the same options the video is the same to the bit;
        and what `__call__` gives where the chunks are the same: of an endless one the first has a latent more, unless
        `first_chunk_frames` says how many it has.

        Args:
            prompt: a text or a story; or a text for each chunk, taken as it begins, of which the last one stays. None
                goes on with that of the state, a story as it was planned. A text that is another one than that of the
                chunk before may begin with what becomes of the past there: `[cut] a lighthouse`. In place of a text may
                stand `{"prompt": text, "image": picture}`, first of all or where the text cuts. A chunk's noise is a
                function of the seed and its own prompt.
            num_frames: as there; after a state, how many more, 4 n (Wan) or 8 n (LTX-2). None never ends.
            state: of the chunk (or the chunk itself, or a file of it) after which the video goes on, with its size, and
                its seed if no generator is given.
            prompt_change: what becomes of the past where the prompt changes and does not say it itself. The stream and
                its states hold as much as this reaches back to, and no text can reach back farther.
            transition_chunks: as there; a transition that another change interrupts ends with it.
            image: as there, of one video: of a text or a story; its state holds the latents of pictures to come.

        `chunk_frames`, `first_chunk_frames`, `fps`, `prompt_change`, `transition_chunks`, `transition` and
        `image_first` are the state's own where they are not given. The others are those of `__call__`; a film's chunks
        come first, each with a state. `interrupt` ends it without the chunk in progress.

        A decoder that looks ahead (LTX-2's may) gives frames later: the first chunks have none, and the last of
        `num_frames` has all that waited. Such an end is final. Stopped anywhere else, frames wait in the state, and
        num_frames=0 with it gives them, without sampling: then within rounding what an end after that chunk gives.

        Raises:
            InputError: as there, `generator` is a list, this is the base model, or the state's video has ended, or is
                not one of this model's.
            FloatingPointError: as there; of the first prompt, if it is known, at once and before a generator is
                advanced.
        """
        if not self.distilled:
            raise InputError("stream: the base model makes whole clips; use the pipeline itself, or a distilled model")
        if state is not None and video is not None:
            raise InputError("video: beside a state; a video goes on from one of them")
        if isinstance(state, LongSanaVideoChunk):
            state = state.state
        if isinstance(state, str | Path):
            state = Continuation.load(state, self._execution_device)
        if state is not None and not isinstance(state, Continuation):
            raise InputError(f"state: a {type(state).__name__}; must be a chunk of a stream, or its state")
        state = None if state is None else state.settled()
        size = self._size(height, width) if state is None else state.size
        if state is not None and self._size(height, width, size) != size:
            raise InputError(f"height={height}, width={width}: the video that goes on has {size[0]} and {size[1]}")
        self._check(*size)
        usual = Telling(self.config["base_chunk_frames"], USUAL_FPS)
        if state is not None and state.telling is not None:
            usual = state.telling
        telling = Telling(
            chunk_frames or usual.chunk_frames,
            fps or usual.fps,
            usual.prompt_change if prompt_change is None else prompt_change,
            usual.transition_chunks if transition_chunks is None else transition_chunks,
            transition or usual.transition,
            image_first or usual.image_first,
            usual.first_chunk_frames if first_chunk_frames is None else first_chunk_frames,
        )
        check_first_chunk(telling.first_chunk_frames, telling.chunk_frames, ("first_chunk_frames", "chunk_frames"))
        if not telling.transition_chunks:
            refuse_ignored({"transition": transition}, "without transition_chunks")
        film = self._film(video, telling.fps, new_frames_only, *size)
        begins = state is None and film is None
        pictures, read = self._pictures_of_stream(image, image_fit, image_first, prompt, size, begins=begins)
        if state is not None:
            state = self._gone_on_from(state, output_type)
            if num_frames == 0 and state.decoder is not None and self._vae(latents_per_call).ahead:
                refuse_ignored({"prompt": prompt, "generator": generator}, "with num_frames=0, which samples nothing")
                return self._end(state, state.decoder, output_type, latents_per_call)
        if prompt is None and state is None:
            raise InputError("prompt: missing; without a state there is none to go on with")
        self._check_encoder([""])
        schedule = self._schedule(num_inference_steps, timesteps, flow_shift)
        assert isinstance(schedule, FlowSchedule)
        lengths = lengths_of(num_frames, telling, self.geometry, begins=begins, picture=0 in pictures)
        if isinstance(prompt, list | tuple) and isinstance(lengths, tuple) and len(prompt) > len(lengths):
            log.warning(
                "prompt: %d for %d chunks, each of which takes one; the last are not shown", len(prompt), len(lengths)
            )
        change = self._change(telling.prompt_change)
        place = partial(self._placed, fps=telling.fps, change=change)
        own: dict[str, Any] = {"film": film is not None, "pictures": pictures, "read": read}
        told = told_by(prompt, state, lengths, place, change, telling.transition_chunks, **own)
        if generator is not None:
            check_generator(generator)

        @lru_cache(maxsize=2)
        def embedding(words: str) -> CompactEmbedding:
            return self._embed(self._worded(words, motion_score))

        def caption(turn: Turn) -> CompactEmbedding:
            if turn.share == 1:
                return embedding(turn.words)
            return blend(embedding(turn.before), embedding(turn.words), turn.share, telling.transition)

        if prompt is None or isinstance(prompt, str | list | tuple):  # others say what they are when their chunks begin
            count = len(prompt) if isinstance(prompt, list | tuple) else max(1, len(told.plan) - told.done)
            known = list(islice(told.turns, count))
            if state is not None:
                for chunk, turn in enumerate(known):
                    state.recent.check(turn.change, chunk)
            told = told._replace(turns=chain(known, told.turns))
            with torch.no_grad():
                caption(known[0])
        # Last of all that may be refused: a generator is advanced.
        seed = state.seed if state is not None and generator is None else take_seed(generator)
        return self._stream(
            told,
            caption,
            lengths,
            schedule,
            size,
            seed,
            state,
            film,
            telling,
            _Shown(output_type, telling.chunk_frames, latents_per_call, new_frames_only),
        )

    @torch.no_grad()
    def _stream(
        self,
        told: Told,
        caption: Callable[[Turn], CompactEmbedding],
        lengths: Iterable[int],
        schedule: FlowSchedule,
        size: tuple[int, int],
        seed: int,
        state: Continuation | None,
        film: Film | None,
        telling: Telling,
        shown: _Shown,
    ) -> Iterator[LongSanaVideoChunk]:
        """film: that it goes on from."""
        shape, device = (self.geometry.channels, *self.geometry.latent_size(*size)), self._execution_device
        known, text, past = None, None, uncompiled(self.transformer).network.past
        said: dict[str, Any] = {}
        turns, begun = told.turns, ("", 0) if state is None else (state.prompt, state.repetition)
        recent, self._interrupt = self._room(told, lengths, state, shown.chunk_frames), False
        where: dict[str, Any] = {"shape": shape, "device": device, "on_step": _Watch(self, schedule.steps)}
        to_come = {part: self._latents_of_one(picture) for part, picture in told.pictures.items()}
        apart = telling.image_first == "absorb"
        sample: Any = partial(generate, self._passes, schedule, recent=recent, apart=apart, **where)
        try:
            if film is not None:
                first = next(turns)
                turns = chain([first], turns)
                said = {"plan": told.plan, "past": past, "telling": telling, **told.said(first, to_come)}
                begins = Continuation(self._nothing(size), None, seed, first.prompt, size, **said)
                state = yield from self._absorbed(film, begins, caption(first), recent, shown)
            showing = _Showing(self, shown, state)
            memory = None if state is None else state.network
            following = chain(islice(lengths, 1, None), [0]) if isinstance(lengths, tuple) else repeat(1)
            for count, (length, more, turn) in enumerate(zip(lengths, following, turns, strict=False), told.done + 1):
                if known != (turn.before, turn.words, turn.share):
                    known = turn.before, turn.words, turn.share
                    text = self._passes.cache_caption(stacked([caption(turn)], device))
                repetition = begun[1] if turn.prompt == begun[0] else 0
                noise, changes = PromptNoise(seed, [(turn.prompt, repetition)]), {0: turn.change}
                own = {"state": memory, "changes": changes, "first": self._picture_of(turn, to_come)}
                chunk = next(sample([text], ChunkPlan((length,)), rng=noise, **own))
                frames = showing(chunk.latents, more=more > 0)
                said = {"latents": showing.last, "waiting": showing.hidden, "repetition": repetition, "chunk": count}
                said |= {"past": past, "telling": telling, "plan": told.plan, **told.said(turn, to_come)}
                said |= {"decoder": showing.whole, "seed": seed, "prompt": turn.prompt, "size": size}
                after = Later(partial(_after, chunk, recent if turn.later else None, said))
                yield LongSanaVideoChunk(frames, after)
                memory = after().network
        except Interrupted:
            return
        finally:
            self.maybe_free_model_hooks()

    def _room(self, told: Told, lengths: Iterable[int], state: Continuation | None, chunk_frames: int) -> Recent:
        """Make room for the last chunks that a stream's changes reach back to, and take those of its state."""
        held = Held() if state is None else state.recent
        sizes = [kept.latents.shape[2] for kept in held.chunks]
        recent = Recent(told.changes, max([chunk_frames + 1, *sizes, *(lengths if isinstance(lengths, tuple) else ())]))
        if state is not None:
            recent.take(held)
        return recent

    def _nothing(self, size: tuple[int, int]) -> CausalState:
        """The network's state before the first frame of a video of this size."""
        empty: CausalState = uncompiled(self.transformer).network.empty_state(1, *self.geometry.latent_size(*size))
        return empty

    def _absorbed(
        self,
        film: Film,
        state: Continuation,
        caption: CompactEmbedding,
        recent: Recent,
        shown: _Shown,
    ) -> Generator[LongSanaVideoChunk, None, Continuation]:
        """Absorb a film under one caption, chunk by chunk; returns the state after it. state: before it."""
        self._bring_vae(encodes=True)
        showing = _Showing(self, shown, None)
        if shown.new_frames_only and shown.output_type != "latent":
            showing.hidden = frames_used(film.count, self.geometry.time_stride)
        latents = film_latents(showing.vae, film.pictures(), chunk_frames=shown.chunk_frames)
        text = self._passes.cache_caption(stacked([caption], self._execution_device))
        self._bring_vae(encodes=True)
        for given, memory in absorbed(self._passes, text, 1, latents, recent, state=state.network):
            frames = showing(given, more=True)
            state = state._replace(
                network=memory,
                decoder=showing.whole,
                latents=showing.last,
                waiting=showing.hidden,
                recent=recent.copy(),
            )
            if not shown.new_frames_only:
                yield LongSanaVideoChunk(frames, state)
            self._bring_vae(encodes=True)
        return state

    def _begun(
        self, film: Film, captions: Sequence[Caption], chunk_frames: int, latents_per_call: int, recent: Recent
    ) -> tuple[list[Tensor], Moment]:
        """Latents of a film for each caption, chunk by chunk, and what the videos go on from after it."""
        self._bring_vae(encodes=True)
        # All at first: where parts take turns on the GPU, they take two.
        latents = list(film_latents(self._vae(latents_per_call), film.pictures(), chunk_frames=chunk_frames))
        text = self._passes.cache_caption(stacked([caption.parts[0] for caption in captions], self._execution_device))
        given: list[Tensor] = []
        state: CausalState | None = None
        for own, after in absorbed(self._passes, text, len(captions), latents, recent):
            given.append(own)
            state = after
        assert state is not None
        return given, Moment(state, None, None, recent=recent.copy())

    def _latents_of(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Latents (B, C, 1, h, w) of pictures (H, W, 3)."""
        self._bring_vae(encodes=True)
        return self._vae(1).encode_pictures(pictures)

    def _latents_of_one(self, picture: np.ndarray | Tensor) -> Tensor:
        """Latents (1, C, 1, h, w) of a picture (H, W, 3), or of one that a state holds as such."""
        return picture.to(self._execution_device) if isinstance(picture, Tensor) else self._latents_of([picture])

    def _picture_of(self, turn: Turn, to_come: dict[int, Tensor]) -> Tensor | None:
        """Latents (1, C, 1, h, w) of the picture that a turn's chunk begins with, if any; those to come lose it."""
        return to_come.pop(turn.begins, None) if turn.picture is None else self._latents_of([turn.picture])

    def _pictures_of_stream(
        self,
        image: PictureLike | Mapping[int, PictureLike] | None,
        fit: Fit | None,
        first: ImageFirst | None,
        prompt: str | Iterable[str | Mapping[str, Any]] | None,
        size: tuple[int, int],
        *,
        begins: bool,
    ) -> tuple[dict[int, np.ndarray], Read]:
        """The pictures (height, width, 3), uint8, of a stream by the part that each begins, and a reader of others.

        begins: nothing comes before the stream.
        """
        if image is None and (prompt is None or isinstance(prompt, str)):
            refuse_ignored({"image_fit": fit, "image_first": first if begins else None}, "without image")
        if image is not None and is_first(image) and not begins:
            raise InputError("image: a picture to begin with, and what the video goes on from; give one of them")
        pictures: dict[int, list[np.ndarray]] = {}
        if image is not None:
            self._check_encodes("image")
            pictures = pictures_of(image, 1, size, fit or "cover")

        def read(picture: PictureLike) -> np.ndarray:
            self._check_encodes("prompt: its image")
            return picture_of(picture, size, fit or "cover", name="prompt: its image")

        return {part: own for part, (own,) in pictures.items()}, read

    def _film(
        self, video: FilmLike | None, fps: float, new_frames_only: bool, height: int | None, width: int | None
    ) -> Film | None:
        """The film that videos go on from, if there is one, all of it looked at."""
        if video is None:
            refuse_ignored({"new_frames_only": new_frames_only or None}, "without video")
            return None
        if not self.distilled:
            raise InputError("video: the base model makes whole clips; a distilled one goes on from a film")
        self._check_encodes("video")
        return Film.of(video, fps, self._size(height, width))

    @torch.no_grad()
    def _end(
        self, state: Continuation, cache: DecodeCache, output_type: str, latents_per_call: int
    ) -> Iterator[LongSanaVideoChunk]:
        """Give the frames that wait in a decoder that looks ahead."""
        self._bring_vae()
        pictures, cache = self._vae(latents_per_call).decode_end(cache)
        pictures = to_host(pictures, "end of the video", {"decoded frames": pictures})
        self.maybe_free_model_hooks()
        yield LongSanaVideoChunk(as_output(pictures, output_type), state._replace(decoder=cache))

    @torch.no_grad()
    def save_state(
        self, state: Continuation | LongSanaVideoChunk, path: str | Path, memory: Memory = "latents"
    ) -> None:
        """Write what a video goes on from to a file, whole or not at all, for `stream` and the batch command.

        Args:
            state: of a chunk of a stream, or the chunk itself.
            memory: full keeps all that the decoder remembers, for frames that are the same to the bit; latents keeps
                the last 12 latents, from which it is rebuilt.

        Raises:
            InputError: no file can have this path, or the state is none.
        """
        state = state.state if isinstance(state, LongSanaVideoChunk) else state
        if not isinstance(state, Continuation):
            raise InputError(f"state: a {type(state).__name__}; must be a chunk of a stream, or its state")
        OneOf(get_args(Memory)).settle("memory", memory)
        state._replace(marks=self._marks()).save(path, memory)

    def _marks(self) -> tuple[str, str]:
        """Fingerprints of the transformer and the VAE."""
        return mark_of(uncompiled(self.transformer).network), vae_mark_of(self._vae(1))

    @torch.no_grad()
    @checked(ARGUMENTS)
    def encode_prompt(
        self,
        prompt: str | list[str],
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_videos_per_prompt: int = 1,
        motion_score: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """prompt_embeds (B, L, C) and their mask (B, L); and with guidance the negative prompt's, else None.

        Raises:
            InputError: an argument has no value that it may have, or there is no text encoder.
            FloatingPointError: embeddings are not finite.
        """
        texts = one_for_each(prompt, None, num_videos_per_prompt)
        wanted = [self._worded(whole(text), motion_score) for text in texts]
        self._check_encoder(wanted)
        if not do_classifier_free_guidance:
            refuse_ignored({"negative_prompt": negative_prompt}, "without do_classifier_free_guidance")
            return (*stacked(self._embedded(wanted), self._execution_device), None, None)
        unwanted = self._unwanted(negative_prompt, None, None, num_videos_per_prompt, len(texts))
        both = self._embedded(wanted), self._embedded(unwanted, instruction=False)
        return tuple(chain.from_iterable(stacked(part, self._execution_device) for part in both))  # type: ignore[return-value]

    @plain_defaults()
    def load_lora_weights(self, *arguments: Any, **options: Any) -> None:
        """Load a LoRA as diffusers' own does: names are those of `SanaVideoTransformer3DModel`, after `transformer.`.

        Raises:
            InputError: peft is not installed, or the LoRA is for another network.
        """
        if not is_peft_available():
            raise InputError("load_lora_weights: LoRA needs peft: pip install -e '.[lora]', and start Python again")
        super().load_lora_weights(*arguments, **options)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *arguments: Any, **options: Any
    ) -> None:
        """Save as diffusers' own does, all parts or none.

        Raises:
            InputError: a LoRA is loaded, for which these files have no place.
        """
        uncompiled(self.transformer).check_savable()
        super().save_pretrained(save_directory, *arguments, **options)

    def save_lora_weights(  # type: ignore[override]
        self, save_directory: str | Path, adapter_name: str = "default", *, weight_name: str | None = None
    ) -> None:
        """Write a LoRA that was loaded or added, by the names of diffusers' layers; see the transformer's
        `save_lora_adapter`.

        Raises:
            InputError: see there.
        """
        uncompiled(self.transformer).save_lora_adapter(save_directory, adapter_name, weight_name=weight_name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> LongSanaVideoPipeline:
        """Load as diffusers' own does, whatever PyTorch's default dtype and device, after a look at a folder's headers.

        Raises:
            InputError: there is no such folder or it is no whole repository; or see the class.
        """
        folder = folder_of(pretrained_model_name_or_path)
        own = inspect.signature(cls.__init__).parameters
        for name in own.keys() & ARGUMENTS.keys() & options.keys():  # before diffusers looks at their types
            if options[name] is not None:
                options[name] = ARGUMENTS[name].settle(name, options[name])
        if type(options.get("state_decay")) is int:
            options["state_decay"] = float(options["state_decay"])
        if folder is not None:
            if not (folder / cls.config_name).is_file():
                raise InputError(f"{folder}: no {cls.config_name}; name the folder of the whole repository")
            cls.load_config(folder)
            if options.get("variant") is None:
                check_repository(folder, without=options)
        with plain_defaults():
            pipe: LongSanaVideoPipeline = super().from_pretrained(folder or pretrained_model_name_or_path, **options)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> LongSanaVideoPipeline:
        """Convert as diffusers' own does, but parts keep their dtypes unless `dtype` or `torch_dtype` asks for another.

        diffusers' makes float32 of all, in the pipeline that they are taken from too.
        """
        with warnings.catch_warnings():
            if options.get("dtype") is None and options.get("torch_dtype") is None:
                options = {name: value for name, value in options.items() if name != "dtype"}
                options["torch_dtype"] = KEPT_DTYPE
                # By the name that all versions of diffusers have; newer ones want another.
                warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe: LongSanaVideoPipeline = super().from_pipe(pipeline, **options)
        return pipe

    def to(self, *arguments: Any, **options: Any) -> LongSanaVideoPipeline:
        """Move as diffusers' own does; see `KEPT_DTYPE`."""
        if options.get("dtype") is KEPT_DTYPE:
            return self
        if self._text_part is not None:
            raise InputError("to: enable_text_encoder_offload has put every part in its place; call it afterwards")
        pipe: LongSanaVideoPipeline = super().to(*arguments, **options)
        return pipe

    def set_attention_slice(self, slice_size: int | str | None) -> None:
        """Say that it changes nothing: attention's memory is linear here. See `enable_attention_slicing`."""
        if slice_size is not None:
            log.warning("enable_attention_slicing changes nothing here: the memory of linear attention is constant")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Say that it changes nothing. See `enable_xformers_memory_efficient_attention`."""
        if valid:
            log.warning("enable_xformers_memory_efficient_attention changes nothing here: attention is linear")

    def enable_text_encoder_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the text encoder on the host, and have it on `device` while a prompt is encoded; all else stays there.

        A change of prompt then costs the copy of its weights, which wait in pinned memory. In place of
        `to(device)`, and of diffusers' own offloads, which are ended.

        Raises:
            InputError: there is no text encoder.
        """
        if self.text_encoder is None:
            raise InputError("enable_text_encoder_offload: this pipeline has no text encoder")
        if self._text_part is not None:
            return
        self.remove_all_hooks()
        # First, and by itself: the host never has its weights twice, and the GPU not with all others.
        self._text_part = Turns(torch.device(device)).add(self.text_encoder.to(device))
        for part in self.components.values():
            if isinstance(part, nn.Module) and part is not self.text_encoder:
                part.to(device)

    def enable_parallelism(self, group: ProcessGroup | None = None) -> None:
        """Make videos together with other processes: each of them has this pipeline and makes the same calls.

        Each computes some of a chunk's latents and some rows of the pictures, and all return the whole video, which is
        that of one process to rounding. States of a stream then have no memory of the decoder, which is rebuilt.

        group: of `torch.distributed`, with NCCL where parts are on GPUs; None is all processes.

        Raises:
            InputError: `torch.distributed` is not initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "enable_parallelism: there are no other processes; start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._peers = uncompiled(self.transformer).peers = Peers(group)

    @property
    def _execution_device(self) -> torch.device:
        """The device that all parts work on."""
        if self._text_part is not None:
            return self._text_part.device
        device: torch.device = super()._execution_device
        return device

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Not possible: operations take weights from modules that are never called, so none would be there.

        Raises:
            InputError: always.
        """
        raise InputError("enable_sequential_cpu_offload: not possible here; use enable_model_cpu_offload")

    def _size(self, height: int | None, width: int | None, usual: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width in pixels; `usual` where none are given, or else the VAE's."""
        usual = usual or SIZES[self._vae_name]
        return usual[0] if height is None else height, usual[1] if width is None else width

    def _check(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents; InputError for what no video can be made with."""
        _, *patch = self.transformer.config.patch_size
        self.geometry.check_size(height, width, (patch[0], patch[1]))
        return self.geometry.latent_size(height, width)

    def _gone_on_from(self, state: Continuation, output_type: str) -> Continuation:
        """A state for this output, without a decoder where latents are wanted; InputError if none can go on from it."""
        if state.network.tail.dtype != self.transformer.dtype:
            raise InputError(
                f"state: of a transformer in {state.network.tail.dtype}, this one is in {self.transformer.dtype}"
            )
        past, own = uncompiled(self.transformer).network.past, state.network
        if own.kv.shape[2] != past.entries or own.sinks > past.sinks:
            raise InputError("state: of another num_cached_blocks or num_sink_blocks than this transformer has")
        if state.past not in (None, past):
            raise InputError(f"state: its sums were made with {state.past}; this transformer has {past}")
        needed = uncompiled(self.transformer).network.empty_state(1, *self.geometry.latent_size(*state.size))
        for name in own._fields:
            given, like = getattr(own, name), getattr(needed, name)
            if isinstance(like, Tensor) and given.shape != like.shape:
                raise InputError(
                    f"state: its {name} has shape {tuple(given.shape)}: this transformer needs {tuple(like.shape)} for "
                    f"{state.size[0]}x{state.size[1]}"
                )
        known = self.geometry.latent_size(*state.size)
        if any(tuple(own.shape) != (1, self.geometry.channels, 1, *known) for own in state.pictures.values()):
            raise InputError(f"state: its pictures to come are of another size or VAE than {known} latents of this one")
        if state.latents is not None and tuple(state.latents.shape[3:]) != known:
            raise InputError(
                f"state: its latents have size {tuple(state.latents.shape[3:])}, its pictures need {known}"
            )
        if any(state.marks):
            state = state.fitted(*self._marks(), "state")
        if output_type == "latent":
            return state._replace(decoder=None)
        if state.decoder is None:
            if state.latents is None:
                raise InputError("state: of latents that were not decoded; go on with output_type='latent'")
            return state
        if state.decoder.ended:
            raise InputError(
                "state: its video has ended: this VAE's decoder looks ahead, and took this end for final. Go on from "
                "the state of a chunk before, or stream with num_frames=None and end with num_frames=0"
            )
        own_dtype = (self.vae if self.decoder is None else self.decoder).dtype
        for part in state.decoder.features:
            if part.dtype != own_dtype:
                raise InputError(f"state: of a VAE in {part.dtype}, this one is in {own_dtype}")
        return state

    def _guidance(self, scale: float | None) -> float:
        if scale is None:
            return self._defaults.guidance
        if self.distilled and scale > 1:
            raise InputError(
                f"guidance_scale={scale:g}: the distilled model has learned its teacher's guidance, and a second pass "
                "would only cost time and break it; use guidance_scale=1, or the base model"
            )
        return scale

    def _schedule(
        self, steps: int | None, timesteps: Sequence[int] | None, flow_shift: float | None, *, euler: bool = False
    ) -> FlowSchedule | Solver:
        count = self._defaults.steps if steps is None else steps
        shift = self._shift(flow_shift)
        if not self.distilled:
            if timesteps is not None:
                raise InputError("timesteps: the base model's follow from num_inference_steps and flow_shift")
            if not euler and (self.scheduler is None or isinstance(self.scheduler, DPMSolverMultistepScheduler)):
                return DPMSolver(shift, count, self.scheduler)
            return Euler.shifted(shift, count)
        if timesteps is not None and steps not in (None, sum(step > 0 for step in timesteps)):
            raise InputError(f"num_inference_steps={steps}: beside timesteps {list(timesteps)}, which take its place")
        grid = [round(sigma * TIMESTEPS) for sigma in uniform_sigmas(GRID_SHIFT, count)[:-1].tolist()]
        try:
            given = tuple(grid if timesteps is None else timesteps)
            return FlowSchedule(shift, given, absorb=self.config["absorb"])
        except ValueError as error:
            many = f"num_inference_steps={count}: too many steps to tell apart" if timesteps is None else ""
            raise InputError(many or f"timesteps: {error}") from error

    def _shift(self, given: float | None) -> float:
        if given is None and not self.distilled:
            given = scheduler_shift(self.scheduler)
        return self._defaults.shift if given is None else given

    def _change(self, prompt_change: str | None) -> Change:
        """Read what becomes of the past where a prompt changes; InputError for what is none."""
        try:
            return Change.parse("keep" if prompt_change is None else prompt_change)
        except InputError as error:
            raise InputError(f"prompt_change: {error}") from error

    def _placed(self, parts: int, marks: Sequence[Mark], plan: ChunkPlan, *, fps: float, change: Change) -> Outline:
        """Place the parts of a prompt; InputError where they do not fit."""
        try:
            return Outline(place_parts(parts, marks, plan, self.geometry, fps, change), len(plan))
        except InputError as error:
            raise InputError(f"prompt: {error}") from error

    def _check_encodes(self, name: str) -> None:
        """Refuse (InputError) what the argument `name` gives where nothing here encodes it."""
        if self.vae is None and not self.config["tiny_encoder"]:
            raise InputError(
                f"{name}: there is no VAE here to encode it (vae=None); load the pipeline with one, or with "
                "tiny_encoder=True for the tiny network's own encoder"
            )

    def _bring_vae(self, *, encodes: bool = False) -> None:
        """Bring what decodes where it runs; and, if something `encodes`, what does that."""
        if self.decoder is not None:
            onload(self.decoder)
        if self.decoder is None or (encodes and not self.config["tiny_encoder"]):
            onload(self.vae)

    def _vae(self, latents_per_call: int) -> VideoVAE:
        """The VAE, or the tiny decoder in its place, which leaves encoding to it."""
        if self.decoder is None:
            return self._whole_vae(latents_per_call)
        encoder = None if self.config["tiny_encoder"] else partial(self._whole_vae, latents_per_call)
        return TinyVAE.around(uncompiled(self.decoder).network, latents_per_call, encoder)

    def _whole_vae(self, latents_per_call: int) -> VideoVAE:
        model = uncompiled(self.vae)
        for switch, name in SWITCHES_OF_VAES.items():
            if getattr(model, switch, False):
                log.warning("vae.%s changes nothing here: it is decoded in pieces anyway; see latents_per_call", name)
        vae = kind_of(model).around(model, latents_per_call)
        if self._peers is not None:
            vae.divide(self._peers)
        return vae

    def _pictures(
        self,
        vae: VideoVAE,
        latents: Sequence[Tensor],
        cache: DecodeCache | None,
        output_type: str,
        chunk_frames: int,
        *,
        more: bool = False,
        hidden: int = 0,
    ) -> tuple[Any, DecodeCache | None, int]:
        """Stretches of latents, one after another, as `LongSanaVideoOutput` describes; the cache; and what of `hidden`
        is left.

        more: of latents to come. hidden: frames to come first that are not shown.
        """
        # The batch command's cuts: the first chunk may be long, and the base model's is all of the clip.
        pieces: list[Tensor] = []
        start = 0 if cache is None else cache.latents
        for stretch in latents:
            pieces += stretches(stretch, start, chunk_frames)
            start += stretch.shape[2]
        shown = []
        for index, piece in enumerate(pieces, 1):
            last = index == len(pieces)
            own: dict[str, Any] = {"more": more or not last, "consumed": index > 1}
            frames, cache = decode(vae, piece, cache, "video", finish=lambda frames: frames.movedim(2, 1), **own)
            frames = frames.movedim(1, 2)
            shown.append(as_output(frames[:, :, hidden:], output_type))
            hidden = max(hidden - frames.shape[2], 0)
        return joined(shown), cache, hidden

    def _worded(self, text: str, motion_score: int | None) -> str:
        """Return what the text encoder is given for a prompt, or a part of one."""
        score = self._defaults.motion_score if motion_score is None else motion_score
        return with_motion(text, score or None)

    def _unwanted(
        self,
        prompt: str | Sequence[str | None] | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        copies: int,
        count: int,
    ) -> Sequence[Words]:
        """The negative prompt of each of `count` videos."""
        if embeds is not None:
            refuse_ignored({"negative_prompt": prompt}, "with negative_prompt_embeds, which take its place")
            return self._given("negative_prompt", embeds, mask, copies, count)
        refuse_ignored({"negative_prompt_attention_mask": mask}, "without negative_prompt_embeds")
        return [text for text in negative_texts(prompt, count // copies) for _ in range(copies)]

    def _given(self, name: str, embeds: Tensor, mask: Tensor | None, copies: int, count: int) -> list[CompactEmbedding]:
        """One of embeddings (B, L, C) that a user gave, for each of `count` videos."""
        return given_embeddings(
            name,
            embeds,
            mask,
            channels=self.transformer.config.caption_channels,
            count=count // copies,
            copies=copies,
            device=self._execution_device,
        )

    def _check_encoder(self, captions: Iterable[Words]) -> None:
        """Refuse words where nothing can read them."""
        if (self.text_encoder is None or self.tokenizer is None) and any(isinstance(one, str) for one in captions):
            raise InputError("prompt: this pipeline has no text encoder; give prompt_embeds instead")

    def _embedded(self, captions: Sequence[Words], *, instruction: bool = True) -> list[CompactEmbedding]:
        """Embeddings of captions; texts are encoded, equal ones once."""
        words = dict.fromkeys(caption for caption in captions if isinstance(caption, str))
        encoded = {text: self._embed(text, instruction=instruction) for text in words}
        return [encoded[caption] if isinstance(caption, str) else caption for caption in captions]

    def _embed(self, text: str, *, instruction: bool = True) -> CompactEmbedding:
        onload(self.text_encoder)
        encoder = GemmaTextEncoder.around(
            self.tokenizer,
            self.text_encoder,
            chi_prompt=self.config["chi_prompt"],
            softcap=self.config["softcap"],
            caption_length=self.config["caption_length"],
            caption_channels=self.transformer.config.caption_channels,
        )
        if self._text_part is not None:
            encoder.there = self._text_part.there
        if surplus := encoder.overflow(text, instruction=instruction):
            log.warning("a prompt is too long by %d tokens; its end is cut off: %s", surplus, text)
        return compact(encoder.encode(text, instruction=instruction))

    @property
    def _passes(self) -> _Passes:
        return _Passes(self.transformer)


def _checked_vae(vae: Any, decoder: Any, *, tiny_encoder: bool = False) -> str:
    """The name in VAES of the VAE whose latents these parts take.

    Raises:
        InputError: they are none that can be used here, or not of one kind.
    """
    if decoder is None:
        if tiny_encoder:
            raise InputError("tiny_encoder: has no meaning without decoder, whose encoder it is")
        kind = kind_of(vae)
        check_geometry(vae, GEOMETRIES[kind.name], "vae")
        return kind.name
    if not isinstance(decoder, TinyVideoAutoencoder):
        raise InputError(f"decoder: a {type(decoder).__name__}; must be a {TinyVideoAutoencoder.__name__}")
    tiny = decoder.network.kind
    if tiny_encoder:
        check_encodes(tiny, "tiny_encoder=True", "leave it out, and give vae= for films and pictures")
    if vae is not None and (name := _checked_vae(vae, None)) != tiny.vae_type:
        raise InputError(
            f"decoder: a {tiny.name} decodes latents of {tiny.vae_type}, and the VAE is a {name}; give "
            f"{' or '.join(fitting(name))}, or none"
        )
    if vae is not None:
        check_latents(decoder.config["latents"], latents_told(vae.config), "decoder", "vae", "none")
    return tiny.vae_type


class _Passes(NamedTuple):
    """A transformer as samplers call it."""

    transformer: Any

    @property
    def text_embed(self) -> CaptionEmbedding:
        embedding: CaptionEmbedding = uncompiled(self.transformer).network.text_embed
        return embedding

    def cache_caption(self, text: TextEmbedding) -> Text:
        cached: Text = self.transformer.cache_caption(text)
        return cached

    def __call__(
        self, x: Tensor, t: Tensor, text: Text, *, plan: ChunkPlan | None = None, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        assert plan is None, "chunks come one by one"
        velocity, after = self.transformer(x, text, t, state=state, return_dict=False)
        return velocity, after


def _after(chunk: Chunk, recent: Recent | None, said: Mapping[str, Any]) -> Continuation:
    """The state after a chunk, by its absorbing pass.

    recent: what the stream holds, in place; None: nothing will reach back to it. said: all other fields of the state.
    """
    assert chunk.state is not None
    return Continuation(chunk.state, recent=Held() if recent is None else recent.copy(), **said)


class _Showing:
    """Shows a stream's chunks, as latents or decoded, and keeps what the next one needs.

    cache: what the decoder remembers. last: the last latents. hidden: frames to come that are not shown.
    """

    def __init__(self, pipe: LongSanaVideoPipeline, shown: _Shown, state: Continuation | None) -> None:
        self._pipe, self._shown, self._state = pipe, shown, state
        self.cache: DecodeCache | None = None if state is None else state.decoder
        self.last: Tensor | None = None if state is None else state.latents
        self.hidden = 0 if state is None else state.waiting

    @cached_property
    def vae(self) -> VideoVAE:
        return self._pipe._vae(self._shown.latents_per_call)

    @property
    def whole(self) -> DecodeCache | None:
        """The decoder's memory; None of some rows of it, which would mean nothing without those of other processes."""
        return None if self.cache is None or self.cache.rows else self.cache

    def __call__(self, latents: Tensor, *, more: bool) -> Any:
        """The next chunk's frames, of latents (1, C, T, h, w), as `LongSanaVideoOutput` has them. more: of chunks to
        come."""
        self.last = latest(self.last, latents)
        if self._shown.output_type == "latent":
            require_finite("chunk", {"latents": latents})
            return latents
        self._pipe._bring_vae()
        self.cache = self.cache and self.vae.own(self.cache)
        if self.cache is None and self._state is not None:
            before = restored(self._state.moment, self.vae)
            self.cache, self.hidden = before.decoder, before.waiting
        frames, self.cache, self.hidden = self._pipe._pictures(
            self.vae, [latents], self.cache, *self._shown[:2], more=more, hidden=self.hidden
        )
        return frames


class _Watch:
    """The follower of a video's steps: it runs the callback, moves the progress bar, and ends after an interrupt."""

    def __init__(
        self,
        pipe: LongSanaVideoPipeline,
        timesteps: Sequence[int],
        total: int | None = None,
        callback: Callback | None = None,
        wanted: Sequence[str] = (),
        bar: Any = None,
    ) -> None:
        """timesteps: of a chunk; total: steps of the video, after whose last there is nothing to interrupt; wanted:
        names of tensors that the callback is given."""
        self._pipe, self._timesteps, self._total, self._callback, self._bar = pipe, timesteps, total, callback, bar
        self._wanted = wanted
        self._done = 0

    def __call__(self, step: int, x: Tensor) -> Tensor:
        if self._callback is not None:
            given = {"latents": x} if "latents" in self._wanted else {}
            returned = self._callback(self._pipe, self._done, self._timesteps[step], given)
            changed = x if returned is None else returned.get("latents", x) if isinstance(returned, dict) else None
            if not isinstance(changed, Tensor):
                raise InputError(
                    f"callback_on_step_end: returned {type(returned).__name__}; must be None, or a dict of tensors"
                )
            if changed.shape != x.shape:
                raise InputError(
                    f"callback_on_step_end: returned latents of shape {tuple(changed.shape)} for {tuple(x.shape)}"
                )
            x = changed.to(x)
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        if self._pipe.interrupt and self._done != self._total:
            raise Interrupted(x)
        return x


def scheduler_shift(scheduler: Any) -> float:
    """The shift that a diffusers scheduler was built with, or was set to; the base model's if it has none.

    Its config may hold what a scheduler before it was built with: only arguments of its own count.
    """
    own = inspect.signature(type(scheduler).__init__).parameters
    if "flow_shift" in own:
        return float(scheduler.config["flow_shift"] or OF_BASE.shift)
    return float(scheduler.shift) if "shift" in own else OF_BASE.shift
