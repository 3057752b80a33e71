"""Continuations: all that a video needs to go on, as a value and as a file; and what a batch of videos begins from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longsana.chunks import ImageFirst
from longsana.data.prompts import check_words
from longsana.data.story import MOST_CHUNKS, Change
from longsana.encoders.vae import DecodeCache, VideoVAE
from longsana.models.dit import LongSanaDiT
from longsana.models.past import Past
from longsana.runtime.arguments import TEXT, Flag, Is, Number, OneOf, Several, Whole
from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded, whole_file
from longsana.runtime.finite import not_finite
from longsana.runtime.foreign import reason_of, refuse_stand_in
from longsana.sampling.recent import TENSORS, Held, Kept, each_of_state
from longsana.sampling.transition import Way
from longsana.state import CausalState

log = logging.getLogger(__name__)

SCHEMA = 4
"""Version of the files. A file of a later one is refused."""
BEFORE_FIRST_CHUNK = 3
"""Version that files without a first chunk of its own length are still written in, for earlier readers."""
KEPT = 12
"""Last latents of a video, from which the decoder's memory is rebuilt where it was not saved itself."""
SAMPLED = 256
"""Numbers of a tensor, at most, that tell it from another network's."""
WORDS = ("seed", "prompt", "repetition", "chunk", "waiting")
LATER = ("words", "before", "faded", "telling")
"""What files of version 1 do not say."""
SEED, COUNT, SIDE = Whole(-(2**63), 2**64 - 1), Whole(0, 10**9), Whole(1, 2**14)

TINY_MARK = ":"
"""Between the kind of a tiny decoder and its weights' digest, in a fingerprint."""

Memory: TypeAlias = Literal["latents", "full"]
"""What a file holds of the decoder's memory: the last latents alone, or all of it."""
PICTURES = "picture."
"""The beginning of the names of pictures to come, in files."""


NO_PICTURES: Mapping[int, Tensor] = {}
"""The pictures to come of what has none; nothing changes them. No proxy, which could be neither copied nor pickled."""


class Telling(NamedTuple):
    """The settings by which a prompt becomes captions and changes of the past, chunk by chunk.

    chunk_frames: latent frames of a chunk. fps: pictures a second, by which the lengths of parts are counted.
    prompt_change: of the past, where a prompt does not say it itself. transition_chunks, transition: between captions.
    image_first: how a picture begins a chunk; see `SamplingConfig`.
    first_chunk_frames: latent frames of the video's first chunk; 0: what remains went to it. See `ChunkPlan.split`.
    """

    chunk_frames: int
    fps: float
    prompt_change: str = "keep"
    transition_chunks: int = 0
    transition: Way = "linear"
    image_first: ImageFirst = "pin"
    first_chunk_frames: int = 0

    def settled(self, name: str) -> Telling:
        """Look at the values; InputError, which begins with `name`, for one that cannot be."""
        try:
            Change.parse(TEXT.settle("prompt_change", self.prompt_change))
            return Telling(
                Whole(1, 10**6).settle("chunk_frames", self.chunk_frames),
                Number(above=0, most=1000).settle("fps", self.fps),
                self.prompt_change,
                Whole(0, 1000).settle("transition_chunks", self.transition_chunks),
                cast(Way, OneOf(get_args(Way)).settle("transition", self.transition)),
                cast(ImageFirst, OneOf(get_args(ImageFirst)).settle("image_first", self.image_first)),
                Whole(0, 10**6).settle("first_chunk_frames", self.first_chunk_frames),
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


class Moment(NamedTuple):
    """The memory of a batch of videos after one of their chunks.

    decoder: None where nothing was decoded, or its memory is to be rebuilt from the latents.
    latents: (B, C, T, h, w), float32, the last ones, at most `KEPT`; None where they are not known.
    waiting: pixel frames of these latents that a decoder that looks ahead has not given. They are not shown after it:
        a video that goes on begins with the frames of its own latents.
    recent: the last chunks, as far as changes of the past reach back; see `Recent`.
    pictures: (B, C, 1, h, w), float32, of those to come, by the chunk that each begins, the next one being 0.
    """

    network: CausalState
    decoder: DecodeCache | None
    latents: Tensor | None
    waiting: int = 0
    recent: Held = Held()
    pictures: Mapping[int, Tensor] = NO_PICTURES

    def each(self, change: Callable[[Tensor, int], Tensor]) -> Moment:
        """Change every tensor, of any shape; `change` is told which of its dimensions is the batch."""
        return Moment(
            each_of_state(self.network, change),
            self.decoder
            and self.decoder._replace(features=tuple(change(feature, 0) for feature in self.decoder.features)),
            None if self.latents is None else change(self.latents, 0),
            self.waiting,
            self.recent.each(change),
            {chunk: change(latents, 0) for chunk, latents in self.pictures.items()},
        )

    def of(self, index: int) -> Moment:
        """The memory of one video of the batch."""
        return self.each(lambda tensor, batch: tensor.narrow(batch, index, 1))

    def to(self, device: torch.device) -> Moment:
        """The moment on a device."""
        return self.each(lambda tensor, batch: tensor.to(device))

    def copies(self, count: int) -> Moment:
        """The memory of so many videos that all go on from this one."""
        return self if count == 1 else self.each(lambda tensor, batch: tensor.repeat_interleave(count, dim=batch))


class Continuation(NamedTuple):
    """The state of a video: all that it needs to go on, of a size that does not depend on its length.

    network: what the network remembers.
    decoder: what the decoder remembers; None after latents that were not decoded, and where it was not saved.
    seed, prompt, repetition: of the video's noise and, the prompt, of its last chunk's caption.
    size: height and width in pixels.
    latents, waiting: see `Moment`.
    chunk: chunks sampled so far under this plan, and after it.
    plan: latent frames of each chunk that the video was to have; empty where nobody planned.
    marks: fingerprints of the network and the VAE; see `mark_of`. Empty where nobody looked.
    past: the memory of the past that its sums were made with; None in a file, where `marks` say it.
    recent: see `Moment`.
    words: of a stream whose prompts come one by one, the last chunk's caption; "" where `prompt` says it.
    before, faded: of such a stream, the caption that was before the last change while it becomes the new one, and
        chunks since that change; "" and 0 where none does.
    telling: what the parts of the prompt were placed with; None where nobody said.
    pictures: latents (1, C, 1, h, w) of those that later parts of the prompt begin with, by the number of the part.
    """

    network: CausalState
    decoder: DecodeCache | None
    seed: int
    prompt: str
    size: tuple[int, int]
    latents: Tensor | None = None
    repetition: int = 0
    chunk: int = 0
    plan: tuple[int, ...] = ()
    waiting: int = 0
    marks: tuple[str, str] = ("", "")
    past: Past | None = None
    recent: Held = Held()
    words: str = ""
    before: str = ""
    faded: int = 0
    telling: Telling | None = None
    pictures: Mapping[int, Tensor] = NO_PICTURES

    @property
    def moment(self) -> Moment:
        """The memory without the pictures to come, whose places the prompt says."""
        return Moment(self.network, self.decoder, self.latents, self.waiting, self.recent)

    def settled(self, name: str = "state") -> Continuation:
        """Look at the values of a state; it comes back with whole numbers where they were whole floats.

        Raises:
            InputError: one is another; the message begins with `name`.
        """
        network, decoder, latents = self.network, self.decoder, self.latents
        if not isinstance(network, CausalState):
            raise InputError(f"{name}: its network is a {type(network).__name__}; must be a CausalState")
        network = network.settled(name)
        if decoder is not None:
            if not isinstance(decoder, DecodeCache) or not isinstance(decoder.features, tuple) or not decoder.features:
                raise InputError(f"{name}: its decoder is a {type(decoder).__name__}; must be a DecodeCache, or None")
            _check_numbers(name, {f"decoder {number}": part for number, part in enumerate(decoder.features)})
            ended = Flag().settle(f"{name}: end of its decoder", decoder.ended)
            decoder = decoder._replace(latents=COUNT.settle(f"{name}: latents of its decoder", decoder.latents))
            decoder = decoder._replace(ended=ended)
        if latents is not None:
            _check_numbers(name, {"latents": latents})
            if latents.dim() != 5 or not 1 <= latents.shape[2] <= KEPT:
                raise InputError(
                    f"{name}: its latents have shape {list(latents.shape)}; at most {KEPT} frames are kept"
                )
        seed = SEED.settle(f"{name}: its seed", self.seed)
        check_words(TEXT.settle(f"{name}: its prompt", self.prompt), f"{name}: its prompt")
        height, width = Several(SIDE, 2).settle(f"{name}: its size", self.size)
        plan = tuple(Several(Whole(1, 10**6)).settle(f"{name}: its plan", self.plan)) if self.plan else ()
        counts: dict[str, Any] = {
            part: COUNT.settle(f"{name}: its {part}", getattr(self, part))
            for part in ("repetition", "chunk", "waiting", "faded")
        }
        for what, words in (("words", self.words), ("caption before", self.before)):
            check_words(TEXT.settle(f"{name}: its {what}", words), f"{name}: its {what}")
        if counts["faded"] and not self.before:
            raise InputError(f"{name}: {counts['faded']} chunks of a transition from no caption")
        if latents is not None and latents.shape[2] > network.frames:
            raise InputError(f"{name}: {latents.shape[2]} last latents of a video of {network.frames}")
        telling = None if self.telling is None else Telling(*self.telling).settled(name)
        recent = self._settled_recent(name)
        self._check_pictures(name)
        settled = self._replace(network=network, decoder=decoder, latents=latents, recent=recent)
        return settled._replace(seed=seed, size=(height, width), plan=plan, telling=telling, **counts)

    def _check_pictures(self, name: str) -> None:
        if not isinstance(self.pictures, Mapping):
            raise InputError(f"{name}: its pictures are a {type(self.pictures).__name__}; must be a mapping")
        for part, latents in self.pictures.items():
            place = f"{name}: picture of part {COUNT.settle(f'{name}: part of a picture', part)}"
            _check_numbers(place, {"latents": latents})
            known = None if self.latents is None else [1, self.latents.shape[1], 1, *self.latents.shape[3:]]
            if latents.dim() != 5 or list(latents.shape) != (known or list(latents.shape)):
                raise InputError(f"{place}: its latents have shape {list(latents.shape)}")

    def _settled_recent(self, name: str) -> Held:
        if not isinstance(self.recent, Held) or not isinstance(self.recent.chunks, tuple):
            raise InputError(f"{name}: its last chunks are a {type(self.recent).__name__}; must be a Held")
        reach = Whole(0, MOST_CHUNKS).settle(f"{name}: reach of its last chunks", self.recent.reach)
        if len(self.recent.chunks) > reach:
            raise InputError(f"{name}: holds {len(self.recent.chunks)} last chunks, where changes reach back {reach}")
        chunks, like = [], self.network.tail.shape
        for number, kept in enumerate(self.recent.chunks):
            place = f"{name}: last chunk {number}"
            _check_numbers(place, {"latents": kept.latents})
            start, before = COUNT.settle(f"{place}: its start", kept.start), kept.before
            if before is not None:
                before = before.settled(place)
                if before.tail.shape != like or before.kv.shape != self.network.kv.shape:
                    raise InputError(f"{place}: the state before it has other shapes than the one after it")
            batch, channels, frames, *size = kept.latents.shape if kept.latents.dim() == 5 else (0,) * 5
            known = None if self.latents is None else [self.latents.shape[1], *self.latents.shape[3:]]
            if batch != like[1] or not frames or known not in (None, [channels, *size]):
                raise InputError(f"{place}: its latents have shape {list(kept.latents.shape)}")
            if start + frames > self.network.frames:
                raise InputError(f"{place}: ends at latent {start + frames} of a video of {self.network.frames}")
            alone = Whole(0, 1).settle(f"{place}: latents by themselves", kept.alone)
            if alone >= frames:
                raise InputError(f"{place}: {alone} latents by themselves of a chunk of {frames}")
            chunks.append(Kept(kept.latents, start, before, alone))
        return Held(reach, tuple(chunks))

    def save(self, path: str | Path, memory: Memory = "full") -> None:
        """Write a file that is whole or not there: tensors as safetensors, and all else as one JSON text in its header.

        path: `~` is the home folder. memory: see there; full keeps what there is.

        Raises:
            InputError: no file can have this path, or the state is none that `load` takes, or it has no latents that
                the decoder's memory could be rebuilt from.
            OSError: it could not be written; `path` is as it was.
        """
        target = _path(path)
        if target.is_dir():
            raise InputError(f"{path or repr(path)}: a folder; name a file in it")
        if not target.parent.is_dir():
            raise InputError(f"{path}: no such folder as {target.parent}; make it first")
        state = self.settled()
        if memory == "latents":
            if state.latents is None and state.decoder is not None:
                raise InputError("state: has no latents to rebuild the decoder's memory from; save it in full")
            state = state._replace(decoder=None)
        tensors = {name: part.detach().cpu().contiguous() for name, part in _tensors(state).items()}
        record = _numbers(state)
        record["sha256"] = _digest(tensors, record)
        try:
            with whole_file(target) as partial:
                save_file(tensors, partial, metadata={"longsana": json.dumps(record, ensure_ascii=False)})
        except OSError as error:  # by the name that was given, not that of the partial file
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Continuation:
        """A state that was saved. `~` is the home folder.

        Raises:
            InputError: the file is none, damaged, or of a later version; or there is no such device.
        """
        device = _device(device)
        file = _path(path)
        try:
            with file.open("rb") as stream:
                head = stream.read(24)
        except OSError as error:
            raise InputError(f"{path or repr(path)}: cannot be read ({reason_of(error)})") from error
        refuse_stand_in(file, head)
        if head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
            raise InputError(f"{path}: a PyTorch file, or another pickle, which is not opened; states are safetensors")
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
                record = json.loads(opened.metadata()["longsana"])
            if record["schema"] > SCHEMA:
                raise InputError(
                    f"{path}: a state of version {record['schema']}, this LongSANA reads versions up to {SCHEMA}; "
                    "use the LongSANA that saved it, or a later one"
                )
            said = record.pop("sha256")
            # Those of version 1 say it of the tensors alone.
            if said != _digest(tensors, record if record["schema"] > 1 else None):
                raise ValueError("its numbers or words are not those that were saved")
            state = _restored({name: part.to(device) for name, part in tensors.items()}, record)
        except InputError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a saved state of a video, or damaged ({reason_of(error)})") from error
        return state.settled(str(path))

    def fitted(self, network: str, vae: str, name: str) -> Continuation:
        """The state for a network and a VAE with these fingerprints; empty ones fit all.

        Where a tiny decoder was or is in the VAE's place, the latents go on and the decoder's memory does not: it is to
        be rebuilt from them.

        Raises:
            InputError: it is of another network or VAE, or of another decoder and has no latents; `name` is said first.
        """
        own = {"network": (self.marks[0], network), "VAE": (self.marks[1], vae)}
        if self.marks[1] and vae and self.marks[1] != vae and TINY_MARK in self.marks[1] + vae:
            del own["VAE"]
        for part, (given, needed) in own.items():
            if given and needed and given != needed:
                raise InputError(
                    f"{name}: of another {part} (fingerprint {given[:12]}) than this one ({needed[:12]}); go on with "
                    "the weights and settings that made it"
                )
        if "VAE" in own or self.decoder is None:
            return self
        if self.latents is None:
            raise InputError(
                f"{name}: of the decoder {_decoder_of(self.marks[1])}, this one is {_decoder_of(vae)}, and there are "
                "no latents to rebuild its memory from; go on with the decoder that made it"
            )
        log.info(
            "%s: of the decoder %s, this one is %s: its memory is rebuilt from the last %d latents",
            *(name, _decoder_of(self.marks[1]), _decoder_of(vae), self.latents.shape[2]),
        )
        return self._replace(decoder=None)


def latest(before: Tensor | None, latents: Tensor) -> Tensor:
    """The last latents of a video, at most `KEPT`, of those before and the next (B, C, T, h, w): the caller's own."""
    joined = latents if before is None else torch.cat([before, latents], dim=2)
    return joined[:, :, -KEPT:].clone()


def mark_of(network: LongSanaDiT) -> str:
    """Fingerprint a network: the settings that decide what a state means, and its weights.

    Weights count rounded to bfloat16, up to `SAMPLED` numbers of each tensor: a network that was trained on, or into
    which a LoRA was fused, is another one; one that was loaded in another dtype is not, and its states say theirs.
    """
    config = network.config
    settings = [
        dataclasses.astuple(config.architecture()),
        dataclasses.astuple(network.past),
        [config.linear_head_dim, config.linear_attn_eps, config.cross_norm_eps],
    ]
    # Files without the null caption, which LongSANA is not sampled with, make no other network.
    weights = {name: part for name, part in network.state_dict().items() if name != "text_embed.null_tokens"}
    return _mark(weights, settings)


def vae_mark_of(vae: VideoVAE) -> str:
    """Fingerprint a VAE by its weights; see `mark_of`. Of a tiny decoder its kind and its own weights."""
    name, weights = vae.identity()
    return f"{name}{TINY_MARK}{_mark(weights, name)}" if vae.tiny else _mark(weights, name)


def _decoder_of(mark: str) -> str:
    """Tell in words which decoder a fingerprint is of."""
    kind, between, digest = mark.rpartition(TINY_MARK)
    return f"{kind} ({digest[:12]})" if between else f"full ({digest[:12]})"


def restored(moment: Moment, vae: VideoVAE) -> Moment:
    """The moment with the memory of a decoder, rebuilt from the last latents where it is missing.

    After a video of at most `KEPT` latents nothing is missing from it; after a longer one frames differ a little, for
    as long as the decoder would remember more (docs/usage.md says how much).

    Raises:
        InputError: there are no latents, or those of another decoder.
    """
    if moment.decoder is not None:
        if any(part.dtype != vae.dtype for part in moment.decoder.features):
            given = moment.decoder.features[0].dtype
            raise InputError(f"state: of a VAE in {given}, this one is in {vae.dtype}")
        return moment
    if moment.latents is None:
        raise InputError("state: of latents that were not decoded, and without the last of them")
    if moment.latents.shape[1] != vae.geometry.channels:
        raise InputError(
            f"state: its latents have {moment.latents.shape[1]} channels, this VAE's {vae.geometry.channels}"
        )
    frames, cache = vae.decode_stream(moment.latents, more=True)
    waiting = vae.geometry.pixel_frames(moment.latents.shape[2]) - frames.shape[2]
    return moment._replace(decoder=cache._replace(latents=moment.network.frames), waiting=waiting)


def _mark(tensors: Mapping[str, Any], settings: Any) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    names = sorted(name for name, part in tensors.items() if isinstance(part, Tensor) and part.is_floating_point())
    for name in names:
        values = tensors[name].detach().flatten()
        values = values[:: -(-values.numel() // SAMPLED) or 1].to(torch.bfloat16)
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(state: Continuation) -> dict[str, Tensor]:
    found = {f"network.{name}": getattr(state.network, name) for name in TENSORS}
    if state.latents is not None:
        found["latents"] = state.latents
    if state.decoder is not None:
        found |= {f"decoder.{number}": part for number, part in enumerate(state.decoder.features)}
    found |= {f"{PICTURES}{part}": latents for part, latents in state.pictures.items()}
    return found | state.recent.tensors()


def _numbers(state: Continuation) -> dict[str, Any]:
    """Numbers and words of a state, as JSON has them: all but its tensors."""
    decoder, telling = state.decoder, state.telling
    own_first = telling is not None and telling.first_chunk_frames > 0
    return {
        "schema": SCHEMA if own_first else BEFORE_FIRST_CHUNK,
        "frames": state.network.frames,
        "sinks": state.network.sinks,
        "decoder": None if decoder is None else [len(decoder.features), decoder.latents, decoder.ended],
        **{name: getattr(state, name) for name in (*WORDS, *LATER)},
        "telling": telling if own_first else telling and telling[: Telling._fields.index("first_chunk_frames")],
        **{name: list(getattr(state, name)) for name in ("size", "plan", "marks")},
    }


def _restored(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Continuation:
    network = CausalState(
        **{name: tensors[f"network.{name}"] for name in TENSORS},
        frames=record["frames"],
        sinks=record["sinks"],
    )
    decoder = None
    if record["decoder"] is not None:
        count, latents, ended = record["decoder"]
        decoder = DecodeCache(tuple(tensors[f"decoder.{number}"] for number in range(count)), latents, ended)
    height, width = record["size"]
    network_mark, vae_mark = record["marks"]
    return Continuation(
        network,
        decoder,
        size=(height, width),
        latents=tensors.get("latents"),
        plan=tuple(record["plan"]),
        marks=(str(network_mark), str(vae_mark)),
        recent=Held.named(tensors),
        pictures={int(name[len(PICTURES) :]): part for name, part in tensors.items() if name.startswith(PICTURES)},
        **{name: record[name] for name in LATER if name in record},
        **{name: record[name] for name in WORDS},
    )


def _digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None) -> str:
    """SHA-256 of tensors, of any shape, and all else: safetensors notices a file that was cut, but no change in it."""
    digest = hashlib.sha256() if record is None else hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_numbers(name: str, tensors: Mapping[str, Any]) -> None:
    for part, tensor in tensors.items():
        Is(Tensor, "a tensor").settle(f"{name}: {part}", tensor)
        if tensor.is_meta or tensor.layout != torch.strided:
            raise InputError(f"{name}: {part}: a tensor without numbers in it; give a plain one")
    if found := not_finite(tensors):
        raise InputError(f"{name}: holds numbers that are not finite ({found[0]})")


def _path(path: str | Path) -> Path:
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise InputError(f"path={path!r:.60}: must be a path")
    return expanded(path)


def _device(device: torch.device | str) -> torch.device:
    """A device on which there is room for numbers; InputError for others."""
    try:
        found = torch.empty(0, dtype=torch.float32, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(f"device={device!s:.60}: not to be had on this machine ({reason_of(error)})") from error
    if found.type == "meta":
        raise InputError("device=meta: holds no numbers; name a real one, such as cpu")
    return found
