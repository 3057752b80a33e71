"""The engine, from captions to frames, of the batch command, validation, scores and the diffusers pipeline.

Network and decoder are arguments, as a video's state is: `Engine` holds settings, and whose turn on the GPU it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig
from longsana.data.pictures import read_picture
from longsana.data.prompts import Prompt
from longsana.data.story import Outline, shared_changes
from longsana.encoders.geometry import geometry
from longsana.encoders.loading import load_vae
from longsana.encoders.tiny_layouts import FULL
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import DecodeCache, VideoVAE
from longsana.flow.noise import Noise, PromptNoise
from longsana.flow.schedule import FlowSchedule, euler_sigmas
from longsana.flow.solvers import DPMSolver, Euler, Solver
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Captioned, Text, TextEmbedding, null_embedding
from longsana.models.float8 import to_float8
from longsana.ops import backend
from longsana.runtime.arguments import settled
from longsana.runtime.clock import Clock
from longsana.runtime.errors import InputError
from longsana.runtime.finite import to_host
from longsana.runtime.later import Later
from longsana.runtime.offload import Turns
from longsana.runtime.peers import Peers
from longsana.sampling.captions import Caption, stacked
from longsana.sampling.checks import (
    DISTILLED,
    DPM,
    WHOLE_CLIP,
    blame,
    check_config,
    check_division,
    chunk_plan,
    placed_parts,
)
from longsana.sampling.continuation import Moment, latest
from longsana.sampling.graphs import ReplayedNetwork
from longsana.sampling.recent import Held, Recent
from longsana.sampling.sampler import (
    Chunk,
    ChunkedNetwork,
    Network,
    StepEnd,
    generate,
    go_on,
    sample_chunks,
    sample_clip,
)
from longsana.sampling.transition import Shown, Way, embedding_of, shown_in
from longsana.state import CausalState
from longsana.weights.build import build_model, resolve_dtype


def never(chunk: int) -> bool:
    """Want the state after no chunk."""
    return False


class CaptionedNetwork(ChunkedNetwork, Captioned, Protocol):
    """A network for the engine: its passes, and what it makes of a caption ahead of them."""

    def cache_caption(self, text: TextEmbedding) -> Text: ...


class Staggered(NamedTuple):
    """The block-causal base model's method: chunks that begin while those before them are in progress.

    sigmas, interval: see `sample_chunks`.
    """

    sigmas: tuple[float, ...]
    interval: float


@dataclass(frozen=True)
class Videos:
    """A batch of videos, and how they are sampled, apart from their captions.

    method: of the distilled model, chunk by chunk (FlowSchedule); of a whole clip (Solver); of staggered chunks.
    plan: the chunks of each video.
    shape: (C, H, W) of a latent frame.
    noise: where all of their noise comes from.
    cfg_scale: of guidance, asked for at each step if it is a function; not used where there is no negative caption.
    peers: processes that make every pass of these videos together; None: this one alone.
    replayed: makes the passes of the distilled model's network, on a GPU, as CUDA graphs; None: they are launched.
    null_caption: guidance leads away from the checkpoint's own null caption, and not from the captions' negative ones.
    outlines: of the distilled model, where the parts of each video's prompt begin, from the first of these chunks on;
        their changes of the past are the same.
    transition_chunks, transition: the captions between two parts; see `shown_in` and `blend`.
    begun: the videos go on from here, with the decoder's memory (see `restored`); the distilled model's alone do.
    first: (B, C, 1, H, W), clean latents of the pictures that each chunk of the videos begins with, by chunk; of those
        after the plan, for whoever goes on. apart: see `generate`, and `solve` of a clip.
    """

    method: FlowSchedule | Solver | Staggered
    plan: ChunkPlan
    shape: tuple[int, int, int]
    noise: Noise
    device: torch.device
    cfg_scale: float | Callable[[], float] = 1.0
    peers: Peers | None = None
    replayed: ReplayedNetwork | None = None
    null_caption: bool = False
    outlines: Sequence[Outline] = ()
    transition_chunks: int = 0
    transition: Way = "linear"
    begun: Moment | None = None
    first: Mapping[int, Tensor] = field(default_factory=dict)
    apart: bool = False

    def recent(self, film_frames: int = 0) -> Recent:
        """Make room for the last chunks that changes of the past reach back to, and take those of the beginning.

        film_frames: latent frames of the longest chunk of a film that comes first.
        """
        held, changes = self._begun_with.chunks, shared_changes(self.outlines)
        longest = max(*self.plan.lengths, film_frames, *(kept.latents.shape[2] for kept in held))
        # Chunks that there are before the last change; of a film nobody has counted them.
        most = None if film_frames else max(changes, default=0) + len(held)
        recent = Recent(changes.values(), longest, most)
        if self.begun is not None:
            recent.take(self._begun_with)
        return recent

    def after(self, chunk: int) -> dict[int, Tensor]:
        """The pictures to come after a chunk, by the chunk from the next one on: (B, C, 1, H, W)."""
        return {index - chunk - 1: latents for index, latents in self.first.items() if index > chunk}

    @property
    def _begun_with(self) -> Held:
        return Held() if self.begun is None else self.begun.recent


class Frames(NamedTuple):
    """A finished stretch of the videos of a batch.

    chunk: its index in what is sampled of the video, from 0; -1 of a film that the video goes on from.
    latents: (B, C, T, H, W), float32, on the device, of the stretch; none (T = 0) where more of its frames follow.
    pixels: (B, F, H, W, 3), uint8, on the host; those that are settled, if the decoder looks into the future.
    later: makes `after`, by the pass that absorbs the chunk, for which its frames do not wait; None: nobody wants it.
    """

    chunk: int
    latents: Tensor
    pixels: Tensor
    later: Later[Moment] | None = None

    @property
    def after(self) -> Moment | None:
        """The moment that the videos go on from, where it was asked for and the chunk ends with this stretch.

        It is made when it is first asked for, or else when the next stretch is.
        """
        return None if self.later is None else self.later()


class Engine:
    """Samples videos as a config says.

    Text first: the text encoder (`longsana.sampling.captions`) is best gone before `load` brings the rest.

    config: with values of the types that it names.
    peers: processes with an engine of the same config each, which make every video together, by the same calls; None:
        this one alone.
    geometry: of the VAE's latents.
    plan: the chunks of a video whose prompt says no length of its own.
    turns: of the parts that `sampling.offload` lets wait on the host; None where all stay.

    Raises:
        InputError: a setting has another type, or no video can be made with it; see `check_config`.
    """

    def __init__(self, config: InferenceConfig, device: torch.device | str, peers: Peers | None = None) -> None:
        self.config, self.peers = settled(config), peers
        self._replayed: ReplayedNetwork | None = None
        check_config(self.config)
        if peers is not None:
            check_division(self.config)
        self.device = torch.device(device)
        self.geometry = geometry(self.config.vae)
        self.plan = chunk_plan(self.config)
        self.turns = None if self.config.sampling.offload == "none" else Turns(self.device)

    def load(self) -> tuple[LongSanaDiT, VideoVAE]:
        """The network and the decoder that the config names.

        Raises:
            InputError: files are missing or do not fit; the message names the setting.
        """
        return self.load_network(), self.load_decoder()

    def load_decoder(self) -> VideoVAE:
        """The decoder alone, for those who have latents. Raises: see `load`."""
        config = self.config.vae
        with blame("vae.vae_pretrained" if config.decoder == FULL else "vae.decoder_pretrained"):
            vae = load_vae(config, self.device, resolve_dtype(config.weight_dtype, self.device))
        if isinstance(vae, TinyVAE):
            if self.recorded:
                vae.replay()
        elif self.turns is not None:
            encoder = vae.model.encoder
            vae.encoding = Turns(self.device).add(encoder).there
            if self.config.sampling.offload == "all":
                vae.bring = self.turns.add(vae.model, without=encoder).bring
        if self.peers is not None:
            vae.divide(self.peers)
        return vae

    def load_network(self) -> LongSanaDiT:
        """The network alone, for those who need latents and no pictures. Raises: see `load`."""
        config = self.config
        network = build_model(
            config.model, device=self.device, dtype=resolve_dtype(config.model.dtype, self.device)
        ).requires_grad_(False)
        if config.model.float8:
            try:
                to_float8(network)
            except ValueError as error:
                raise InputError(f"model.float8=true: {error}") from error
        if self.device.type == "cuda" and backend() == "triton":
            network.optimize_layout()
        if config.sampling.cfg_scale != 1 and config.sampling.null_caption == "learned":
            try:
                null_embedding(network, 1)
            except ValueError as error:
                raise InputError(
                    f"sampling.null_caption=learned: {config.model.load_from}: {error}; "
                    "use sampling.null_caption=negative_prompt"
                ) from error
        if self.turns is not None and (self.turns or config.sampling.offload == "all"):
            bring = self.turns.add(network).bring
            # All ways in: a pass, and a caption ahead of passes, which goes through this layer first.
            for module in (network, network.text_embed):
                module.register_forward_pre_hook(lambda *_: bring())
        return network

    def plan_of(self, prompt: Prompt, *, goes_on: bool = False) -> ChunkPlan:
        """The chunks of this prompt's video, or of what is added to one that goes on.

        That has one latent less, the single picture that opens a video.
        """
        return chunk_plan(self.config, prompt.frames, goes_on=goes_on, picture=prompt.image is not None)

    def videos(
        self,
        prompts: Sequence[Prompt],
        begun: Moment | None = None,
        outlines: Sequence[Outline] | None = None,
    ) -> Videos:
        """Describe a batch of videos, of one size and length.

        begun, outlines: see `Videos`; None: as the prompts say.
        """
        outlines = outlines or [placed_parts(self.config, prompt, goes_on=begun is not None) for prompt in prompts]
        sampling, first = self.config.sampling, prompts[0]
        keys = [("", 0) if sampling.unified_noise else (prompt.text, prompt.repetition) for prompt in prompts]
        seeds = [sampling.seed if prompt.seed is None else prompt.seed for prompt in prompts]
        return Videos(
            self._method(picture=first.image is not None),
            self.plan_of(first, goes_on=begun is not None),
            (self.geometry.channels, *self.geometry.latent_size(first.height, first.width)),
            PromptNoise(seeds, keys),
            self.device,
            sampling.cfg_scale,
            self.peers,
            null_caption=sampling.cfg_scale != 1 and sampling.null_caption == "learned",
            outlines=outlines,
            transition_chunks=sampling.transition_chunks,
            transition=sampling.transition,
            begun=begun,
            first={} if begun is None else begun.pictures,
            apart=sampling.image_first == "absorb",
        )

    def sample(
        self,
        network: CaptionedNetwork,
        decoder: VideoVAE,
        prompts: Sequence[Prompt],
        captions: Sequence[Caption],
        clock: Clock | None = None,
        *,
        to_the_end: bool = False,
        begun: Moment | None = None,
        outlines: Sequence[Outline] | None = None,
        wanted: Callable[[int], bool] = never,
    ) -> Iterator[Frames]:
        """Frames of the prompts' videos, of one size and length, as the config says; see the function `sample`."""
        videos, clock = self.videos(prompts, begun, outlines), clock or Clock(self.device)
        videos = replace(videos, replayed=self._replaying(network))
        if any(prompt.pictures for prompt in prompts):
            with clock.part("encode"):
                videos = replace(videos, first=self.first_of(decoder, prompts, videos))
        return sample(
            network,
            decoder,
            captions,
            videos,
            frames_per_call=self.config.sampling.chunk_frames,
            clock=clock,
            to_the_end=to_the_end,
            wanted=wanted,
        )

    def _replaying(self, network: CaptionedNetwork) -> ReplayedNetwork | None:
        """Give what replays a network's passes, the same for all videos, so that their captions share recordings."""
        if not self.recorded:
            return None
        if self._replayed is None or self._replayed.model is not network:
            assert isinstance(network, LongSanaDiT)
            self._replayed = ReplayedNetwork(network, peers=self.peers)
        return self._replayed

    @property
    def recorded(self) -> bool:
        """Tell whether passes and a tiny decoder's calls are replayed as CUDA graphs."""
        return self.config.sampling.cuda_graphs and self.device.type == "cuda"

    def first_of(self, decoder: VideoVAE, prompts: Sequence[Prompt], videos: Videos) -> dict[int, Tensor]:
        """Latents (B, C, 1, h, w), float32, of the pictures that chunks of the prompts' videos begin with, by chunk.

        Pictures that `videos` have take the places for which a prompt names none.
        """
        each = []
        for row, (prompt, outline) in enumerate(zip(prompts, videos.outlines, strict=True)):
            own = {chunk: latents[row : row + 1] for chunk, latents in videos.first.items()}
            for number, path in prompt.pictures.items():
                if (chunk := outline.parts[number].chunk) >= 0:
                    picture = read_picture(path, prompt.height, prompt.width, self.config.sampling.image_fit)
                    own[chunk] = decoder.encode_pictures([picture])
            each.append(own)
        assert all(own.keys() == each[0].keys() for own in each), "videos with pictures at other places are no batch"
        return {chunk: torch.cat([own[chunk] for own in each]) for chunk in each[0]}

    def _method(self, *, picture: bool = False) -> FlowSchedule | Solver | Staggered:
        """Read how videos are sampled; a clip with a picture first takes Euler's steps, as the published task does."""
        scheduler = self.config.scheduler
        shift, steps = scheduler.inference_flow_shift, scheduler.num_inference_steps
        if scheduler.sampling_algo == DISTILLED:
            return FlowSchedule.from_config(scheduler)
        if scheduler.sampling_algo in WHOLE_CLIP:
            return (DPMSolver if scheduler.sampling_algo == DPM and not picture else Euler.shifted)(shift, steps)
        return Staggered(tuple(euler_sigmas(shift, steps).tolist()), scheduler.interval_k)


@torch.no_grad()
def sample(
    network: CaptionedNetwork,
    decoder: VideoVAE,
    captions: Sequence[Caption],
    videos: Videos,
    *,
    frames_per_call: int,
    clock: Clock | None = None,
    to_the_end: bool = False,
    wanted: Callable[[int], bool] = never,
) -> Iterator[Frames]:
    """Frames of a batch of videos, one for each caption, stretch by stretch, each before its chunk is absorbed.

    Those of the stretch that a video begins with come as they are decoded, `vae.latents_per_call` latents at a time
    but for the first two, each by itself: the decoder's groups, so that no bit of them depends on it.

    frames_per_call: latent frames that are decoded at once; see `stretches`.
    clock: is told the time of the parts "denoise", "absorb" and "decode".
    to_the_end: after numbers that are not finite nothing is given, but all passes of the network are made before that
        is raised, since other processes may take part in them.
    wanted: tells of a chunk's index whether the state after it comes with its frames.

    Raises:
        FloatingPointError: latents or decoded frames are not finite.
    """
    clock, left = clock or Clock(videos.device), videos.plan.frames
    decoding, recent = Decoding(decoder, videos.begun), videos.recent()
    chunks = sample_latents(network, captions, videos, recent=recent, clock=clock)
    try:
        for chunk in chunks:
            keep = wanted(chunk.index)
            # Memory grows with what is decoded at once, and the base model's clip is one chunk.
            for latents in stretches(chunk.latents, chunk.start, frames_per_call):
                *opening, end = decoder.grouped(latents, 0) if decoding.start == 0 else [latents]
                for piece in opening:
                    left -= piece.shape[2]
                    with clock.part("decode"):
                        pixels = decoding(piece, f"chunk {chunk.index}", more=True)
                    if pixels.shape[1]:  # a decoder that looks ahead may have none yet
                        yield Frames(chunk.index, latents[:, :, :0], pixels)
                left -= end.shape[2]
                with clock.part("decode"):
                    pixels = decoding(end, f"chunk {chunk.index}", more=left > 0, keep=keep)
                ends = decoding.start == chunk.start + chunk.latents.shape[2]
                later: Later[Moment] | None = None
                if keep and ends and chunk.absorbed is not None:
                    later = Later(partial(_moment, chunk, videos, decoding, recent))
                yield Frames(chunk.index, latents, pixels, later)
                if later is not None:
                    later()  # the next chunk changes what it is made of
                del later  # of the size of the decoder's memory
    except FloatingPointError:
        if to_the_end:
            for _ in chunks:
                pass
        raise


def _moment(chunk: Chunk, videos: Videos, decoding: Decoding, recent: Recent) -> Moment:
    """The moment after a chunk, all of which was decoded and whose state is made now."""
    assert chunk.state is not None
    later = any(chunk.index < index for index in shared_changes(videos.outlines))
    return decoding.moment(chunk.state, recent.copy() if later else Held(), videos.after(chunk.index))


def stretches(latents: Tensor, start: int, size: int) -> Iterator[Tensor]:
    """Cut a chunk (B, C, T, h, w), the video's latents from `start`, into what is decoded at once: at most `size` + 1.

    A longer one is cut where 1 + n * size latents of the video are before: the places do not depend on where it begins.
    """
    stop = start + latents.shape[2]
    cuts = range(1 + size * max(start // size, 1), stop, size) if latents.shape[2] > size + 1 else ()
    edges = [start, *(cut for cut in cuts if cut > start), stop]
    yield from latents.split([b - a for a, b in pairwise(edges)], dim=2)


class Decoding:
    """The decoder's side of a batch of videos, and what a video needs to go on from it.

    begun: what they go on from; see `Videos`.
    start: latents decoded so far. hidden: frames to come that are not shown; None: those that wait in `begun`.
    """

    def __init__(self, decoder: VideoVAE, begun: Moment | None = None, hidden: int | None = None) -> None:
        self.decoder = decoder
        self.start = 0 if begun is None else begun.network.frames
        self._cache = None if begun is None or begun.decoder is None else decoder.own(begun.decoder)
        self._own = False  # whether nobody else holds the cache
        self._latents = None if begun is None else begun.latents
        self._waiting = 0 if begun is None else begun.waiting
        self.hidden = self._waiting if hidden is None else hidden

    def __call__(self, latents: Tensor, name: str, *, more: bool, keep: bool = False) -> Tensor:
        """Decode the next latents (B, C, T, h, w) to pixels (B, F, H, W, 3), uint8, on the host.

        more: whether latents follow. keep: others may, in a video that goes on from here.

        Raises:
            FloatingPointError: see `decode`.
        """
        before, count = self.start, latents.shape[2]
        goes_on = more or (keep and self.decoder.ahead > 0)
        pixels, self._cache = decode(self.decoder, latents, self._cache, name, more=goes_on, consumed=self._own)
        self._own = True
        self.start += count
        self._waiting += self.decoder.geometry.pixel_frames(count, first=not before) - pixels.shape[1]
        self._latents = latest(self._latents, latents)
        if goes_on and not more:
            end, _ = self.decoder.decode_end(self._cache)
            shown = to_host(VideoVAE.to_uint8(end), name, {"decoded frames": end})
            pixels = torch.cat([pixels, shown], dim=1)
        hidden, self.hidden = self.hidden, max(self.hidden - pixels.shape[1], 0)
        return pixels[:, hidden:] if hidden else pixels

    def moment(self, state: CausalState, recent: Held, pictures: Mapping[int, Tensor] | None = None) -> Moment:
        """The moment after what was decoded.

        state, recent: the network's, after the same latents. pictures: (B, C, 1, h, w), to come; see `Moment`.
        """
        assert state.frames == self.start
        self._own = False
        whole = None if self._cache is None else self.decoder.whole(self._cache)
        return Moment(state, whole, self._latents, self._waiting, recent, pictures or {})


def sample_latents(
    network: CaptionedNetwork,
    captions: Sequence[Caption],
    videos: Videos,
    *,
    recent: Recent | None = None,
    clock: Clock | None = None,
    on_step: StepEnd = go_on,
) -> Iterator[Chunk]:
    """Latents of a batch of videos, one for each caption, chunk by chunk.

    recent: holds the last chunks of the distilled model's, as `videos.recent()` does; None: nobody else looks at it.
    on_step: see `StepEnd`; staggered chunks have none.
    """
    clock, method, plan = clock or Clock(videos.device), videos.method, videos.plan
    own: Any = network  # whose passes take peers: the network itself, or one in training
    passes: Network = network if videos.peers is None else partial(own, peers=videos.peers)
    where: dict[str, Any] = {"shape": videos.shape, "rng": videos.noise, "device": videos.device, "clock": clock}
    if isinstance(method, FlowSchedule):
        shown = [shown_in(outline, len(plan), videos.transition_chunks) for outline in videos.outlines]

        @lru_cache(maxsize=1)  # most videos have one prompt
        def text(chosen: tuple[Shown, ...]) -> Text:
            with clock.part("denoise"):
                own = [
                    embedding_of(caption.parts, one, videos.transition)
                    for caption, one in zip(captions, chosen, strict=True)
                ]
                return network.cache_caption(stacked(own, videos.device))

        passes = videos.replayed or passes
        state = None if videos.begun is None else videos.begun.network
        texts, changes = map(text, zip(*shown, strict=True)), shared_changes(videos.outlines)
        where |= {"changes": changes, "recent": recent or videos.recent(), "on_step": on_step}
        where |= {"first": videos.first, "apart": videos.apart}
        return generate(passes, method, texts, plan, state=state, **where)
    assert videos.begun is None, "the many-step samplers keep no state"
    with clock.part("denoise"):
        guided = guided_texts(network, captions, videos)
    if isinstance(method, Staggered):
        assert on_step is go_on and not callable(videos.cfg_scale)
        return sample_chunks(network, guided, plan, **method._asdict(), cfg_scale=videos.cfg_scale, **where)
    channels, *size = videos.shape
    return sample_clip(
        passes,
        guided,
        solver=method,
        cfg_scale=videos.cfg_scale,
        noise=videos.noise.draw(0, 0, (channels, plan.frames, *size), videos.device),
        first=videos.first.get(0),
        clock=clock,
        on_step=on_step,
    )


def guided_texts(network: CaptionedNetwork, captions: Sequence[Caption], videos: Videos) -> list[Text]:
    """The captions' first parts as a batch, and with guidance the negative ones, as the network's passes take them."""
    texts = [stacked([caption.parts[0] for caption in captions], videos.device)]
    if videos.null_caption:
        texts.append(null_embedding(network, len(captions)))
    elif negatives := [caption.negative for caption in captions if caption.negative is not None]:
        texts.append(stacked(negatives, videos.device))
    return [network.cache_caption(text) for text in texts]


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Join pieces (B, F, ...) of the same videos, at least one; one alone is given as it is, since copies take time."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def decode(
    decoder: VideoVAE,
    latents: Tensor,
    cache: DecodeCache | None,
    name: str,
    *,
    more: bool,
    consumed: bool = False,
    finish: Callable[[Tensor], Tensor] = VideoVAE.to_uint8,
) -> tuple[Tensor, DecodeCache]:
    """Decode the next latents (B, C, T, H, W); returns what `finish` makes of their frames, on the host, and the cache.

    cache, more, consumed: see `VideoVAE.decode_stream`. name: of the stretch, in errors. finish: of (B, 3, F, h, w),
    float32, to what has frames second; a group of latents at a time, so that the floats of a stretch are never there
    together.

    Raises:
        FloatingPointError: latents or decoded frames are not finite.
    """
    groups = decoder.grouped(latents, 0 if cache is None else cache.latents)
    finished: list[Tensor] = []
    extremes: list[Tensor] = []
    for number, group in enumerate(groups, 1):
        decoded, cache = decoder.decode_stream(group, cache, more=more or number < len(groups), consumed=consumed)
        consumed = True
        finished.append(finish(decoded))
        if decoded.numel():  # a decoder that looks ahead may have none yet
            extremes += decoded.aminmax()
        del decoded
    assert cache is not None, "no latents to decode"
    seen = torch.stack(extremes) if extremes else latents.new_empty(0)
    return to_host(joined(finished), name, {"latents": latents, "decoded frames": seen}), cache
