"""From prompts to frames: the parts that a config names, and how they work together."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import Dtype, InferenceConfig
from longsana.data.prompts import Prompt, parts_per_chunk
from longsana.encoders.geometry import geometry
from longsana.encoders.text import CompactEmbedding, GemmaTextEncoder, compact, expand, negative_text, with_motion
from longsana.encoders.vae import VideoVAE, load_vae
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule, euler_sigmas
from longsana.flow.solvers import DPMSolver, Euler
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text, TextEmbedding, null_embedding
from longsana.models.float8 import to_float8
from longsana.ops import backend
from longsana.runtime.arguments import settled
from longsana.runtime.clock import Clock
from longsana.runtime.errors import InputError
from longsana.runtime.finite import to_host
from longsana.sampling.checks import DISTILLED, DPM, WHOLE_CLIP, blame, check_config, chunk_plan
from longsana.sampling.graphs import ReplayedNetwork
from longsana.sampling.sampler import Chunk, generate, sample_chunks, sample_clip
from longsana.weights.build import build_model


class Caption(NamedTuple):
    """The embeddings of one prompt, on the host: of each of its parts, and of the negative prompt.

    negative: None without guidance, and where the checkpoint's own null caption takes its place.
    """

    parts: tuple[CompactEmbedding, ...]
    negative: CompactEmbedding | None


class Frames(NamedTuple):
    """A finished stretch of the videos of a batch.

    chunk: its index in the video, from 0.
    latents: (B, C, T, H, W), float32, on the device.
    pixels: (B, F, H, W, 3), uint8, on the host; those that are settled, if the decoder looks into the future.
    """

    chunk: int
    latents: Tensor
    pixels: Tensor


class VideoPipeline:
    """Loads what a config names and samples videos with it.

    Text first: `encode` needs the text encoder alone, which is gone before `load` brings the network and the decoder.

    Raises:
        InputError: a setting has another type, or no video can be made with it; see `check_config`.
    """

    def __init__(self, config: InferenceConfig, device: torch.device | str) -> None:
        config = settled(config)
        check_config(config)
        self.config = config
        self.device = torch.device(device)
        self.geometry = geometry(config.vae)
        self.schedule = FlowSchedule.from_config(config.scheduler)
        self.plan = chunk_plan(config)
        self._negative: CompactEmbedding | None = None  # one for all captions
        self._loaded: LongSanaDiT | None = None
        self._network: ReplayedNetwork | None = None  # of what is loaded
        self.model: LongSanaDiT
        self.vae: VideoVAE

    @contextmanager
    def text_encoder(self) -> Iterator[GemmaTextEncoder]:
        """The text encoder, for as long as it is needed."""
        model, text = self.config.model, self.config.text_encoder
        with blame("text_encoder.text_encoder_name"):
            encoder = GemmaTextEncoder.load(
                text,
                caption_length=model.caption_length,
                caption_channels=model.caption_channels,
                device=self.device,
                dtype=resolve_dtype(text.dtype, self.device),
            )
        try:
            yield encoder
        finally:
            del encoder
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def encode(self, encoder: GemmaTextEncoder, prompt: Prompt) -> Caption:
        """One prompt at a time: an embedding never depends on its neighbours."""
        sampling = self.config.sampling
        if self._negative is None and sampling.has_negative_prompt:
            self._negative = compact(encoder.encode(negative_text(sampling.negative_prompt), instruction=False))
        return Caption(tuple(compact(encoder.encode(self.words(part))) for part in prompt.parts), self._negative)

    def words(self, part: str) -> str:
        """What the text encoder is given for a part of a prompt."""
        sampling = self.config.sampling
        return with_motion(part, sampling.motion_score, high=sampling.high_motion)

    def noise(self, prompts: Sequence[Prompt]) -> PromptNoise:
        """Where the noise of these prompts' videos comes from."""
        sampling = self.config.sampling
        keys = [("", 0) if sampling.unified_noise else (prompt.text, prompt.repetition) for prompt in prompts]
        seeds = [sampling.seed if prompt.seed is None else prompt.seed for prompt in prompts]
        return PromptNoise(seeds, keys)

    def plan_of(self, prompt: Prompt) -> ChunkPlan:
        """The chunks of this prompt's video: `plan`, unless it says a length of its own."""
        return self.plan if prompt.frames is None else chunk_plan(self.config, prompt.frames)

    def load(self) -> None:
        self.load_model()
        config = self.config.vae
        with blame("vae.vae_pretrained"):
            self.vae = load_vae(config, self.device, resolve_dtype(config.weight_dtype, self.device))

    def load_model(self) -> None:
        """The network alone, for those who need latents and no pictures."""
        config = self.config
        self.model = build_model(
            config.model, device=self.device, dtype=resolve_dtype(config.model.dtype, self.device)
        ).requires_grad_(False)
        if config.model.float8:
            try:
                to_float8(self.model)
            except ValueError as error:
                raise InputError(f"model.float8=true: {error}") from error
        if self.device.type == "cuda" and backend() == "triton":
            self.model.optimize_layout()
        self._loaded = self.model
        if self.device.type == "cuda" and config.sampling.cuda_graphs:
            self._network = ReplayedNetwork(self.model)
        if config.sampling.cfg_scale != 1 and config.sampling.null_caption == "learned":
            self._null(1)

    def captions(self, captions: Sequence[Caption]) -> list[Text]:
        """On the device, for a batch: the (first part of the) captions, and with guidance the negative one."""
        texts = [self._batch([caption.parts[0] for caption in captions])]
        if self.config.sampling.cfg_scale != 1 and self.config.sampling.null_caption == "learned":
            texts.append(self._null(len(captions)))
        elif self.config.sampling.cfg_scale != 1:
            texts.append(self._batch([caption.negative for caption in captions if caption.negative is not None]))
        return [self._cached(text) for text in texts]

    def _null(self, batch: int) -> TextEmbedding:
        try:
            return null_embedding(self.model, batch)
        except ValueError as error:
            raise InputError(
                f"sampling.null_caption=learned: {self.config.model.load_from}: {error}; "
                "use sampling.null_caption=negative_prompt"
            ) from error

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], captions: Sequence[Caption], clock: Clock, *, to_the_end: bool = False
    ) -> Iterator[Frames]:
        """Frames of the videos of a batch of prompts of one size and length, stretch by stretch.

        to_the_end: after numbers that are not finite nothing is given, but all passes are made before that is raised,
            since other processes may take part in them.

        Raises:
            FloatingPointError: latents or decoded frames are not finite.
        """
        cache, left = None, self.plan_of(prompts[0]).frames
        failure: FloatingPointError | None = None
        for chunk in self._latents(prompts, captions, clock):
            # The base model's clip is one chunk; decoding it in pieces bounds memory.
            for latents in chunk.latents.split(self.config.sampling.chunk_frames, dim=2):
                left -= latents.shape[2]
                with clock.part("decode"):
                    decoded, cache = self.vae.decode_stream(latents, cache, more=left > 0)
                    try:
                        pixels = to_host(
                            self.vae.to_uint8(decoded),
                            f"chunk {chunk.index}",
                            {"latents": latents, "decoded frames": decoded},
                        )
                    except FloatingPointError as error:
                        if not to_the_end:
                            raise
                        failure = failure or error
                if failure is None:
                    yield Frames(chunk.index, latents, pixels)
        if failure is not None:
            raise failure

    def _latents(self, prompts: Sequence[Prompt], captions: Sequence[Caption], clock: Clock) -> Iterator[Chunk]:
        config = self.config
        latent_size = self.geometry.latent_size(prompts[0].height, prompts[0].width)
        shape = (self.geometry.channels, *latent_size)
        noise, plan = self.noise(prompts), self.plan_of(prompts[0])
        if config.scheduler.sampling_algo == DISTILLED:
            parts = [parts_per_chunk(len(prompt.parts), len(plan)) for prompt in prompts]

            @lru_cache(maxsize=1)  # most videos have one prompt
            def text(chosen: tuple[int, ...]) -> Text:
                batch = [caption.parts[part] for caption, part in zip(captions, chosen, strict=True)]
                with clock.part("denoise"):
                    return self._cached(self._batch(batch))

            own = self._network if self.model is self._loaded else None
            return generate(
                own or self.model,
                self.schedule,
                map(text, zip(*parts, strict=True)),
                plan,
                shape=shape,
                rng=noise,
                device=self.device,
                clock=clock,
            )
        with clock.part("denoise"):
            embeddings = self.captions(captions)
        steps, cfg_scale = config.scheduler.num_inference_steps, config.sampling.cfg_scale
        shift = config.scheduler.inference_flow_shift
        if config.scheduler.sampling_algo in WHOLE_CLIP:
            return sample_clip(
                self.model,
                embeddings[0],
                embeddings[1] if len(embeddings) > 1 else None,
                solver=(DPMSolver if config.scheduler.sampling_algo == DPM else Euler.shifted)(shift, steps),
                cfg_scale=cfg_scale,
                noise=noise.draw(0, 0, (shape[0], plan.frames, *shape[1:]), self.device),
                clock=clock,
            )
        return sample_chunks(
            self.model,
            embeddings,
            plan,
            sigmas=euler_sigmas(shift, steps).tolist(),
            interval=config.scheduler.interval_k,
            cfg_scale=cfg_scale,
            shape=shape,
            rng=noise,
            device=self.device,
            clock=clock,
        )

    def _cached(self, text: TextEmbedding) -> Text:
        """Ahead of its passes, where the network stays as it was loaded; a trainer's changes, and may be sharded."""
        return self.model.cache_caption(text) if self.model is self._loaded else text

    def _batch(self, embeddings: Sequence[CompactEmbedding]) -> TextEmbedding:
        expanded = [expand(embedding, self.device) for embedding in embeddings]
        return TextEmbedding(*(torch.cat(parts) for parts in zip(*expanded, strict=True)))


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved
