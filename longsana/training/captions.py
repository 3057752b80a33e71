"""Prompts to embeddings for training: each text is encoded once, and the encoder is where the config wants it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from longsana.config import InferenceConfig
from longsana.encoders.text import (
    CompactEmbedding,
    GemmaTextEncoder,
    compact,
    instruction_text,
    negative_text,
    text_sha256,
    with_motion,
)
from longsana.flow.noise import to_device
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.distributed import World
from longsana.runtime.files import check_writable, write_exclusive
from longsana.runtime.hub import digests_of
from longsana.sampling.captions import stacked, text_encoder
from longsana.sampling.checks import source_digest
from longsana.weights.build import resolve_dtype

log = logging.getLogger(__name__)

Mode = Literal["keep", "offload", "free"]
_FORMAT = 2  # of the files; part of their identity


class Captions:
    """Embeddings of training prompts, the same to the bit in each mode.

    mode: where the text encoder is.
        keep: on the device. offload: on the host, and on the device while it encodes. Both remember embeddings on
        the host, up to `cache_bytes`.
        free: on the device until `prepare` has encoded every prompt into files of `folder`, then nowhere.
    together: captions encoded at a time, always so many: an embedding does not depend on which they are. More than one
        are encoded before training in each mode.
    prompts_per_file: of free.

    A file in `folder` is named after what it is of (texts, encoder and settings), so that runs may share the folder,
    and after its content's SHA-256, so that one which has changed is made again.

    Raises:
        InputError: the text encoder cannot be loaded.
    """

    def __init__(
        self,
        config: InferenceConfig,
        device: torch.device | str,
        world: World,
        mode: Mode,
        folder: Path,
        *,
        together: int = 1,
        cache_bytes: int = 4 << 30,
        prompts_per_file: int = 256,
    ) -> None:
        self._device = torch.device(device)
        self._sampling = config.sampling
        learned = config.sampling.null_caption == "learned"  # nobody will ask for a text then
        self._negative = _Text("" if learned else negative_text(config.sampling.negative_prompt), instruction=False)
        self._source: _Source
        if mode == "free":
            self._source = _Files(config, self._device, world, folder, prompts_per_file, together)
        else:
            self._source = _Encoder(
                config, self._device, home="cpu" if mode == "offload" else device, cached=cache_bytes, together=together
            )

    def prepare(self, prompts: Sequence[str]) -> None:
        """Take, before training and on all processes, every prompt that `embed` will be asked for.

        free encodes those that have no file yet, each process its share, and needs disk space: 4.6 kB a token with
        Gemma 2 2B in bfloat16, at most 1.4 MB a prompt. A run that is killed here goes on where it was.
        """
        self._source.prepare(self._negative, [self._text(prompt) for prompt in prompts])

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """tokens (B, L, C) in the encoder's dtype and mask (B, L), on the device; zeros where the mask is False."""
        return self._batch([self._text(prompt) for prompt in prompts])

    def negative(self) -> TextEmbedding:
        """sampling.negative_prompt, encoded without the instruction: tokens (1, L, C) and mask (1, L)."""
        return self._batch([self._negative])

    def _text(self, prompt: str) -> _Text:
        sampling = self._sampling
        return _Text(with_motion(prompt, sampling.motion_score, high=sampling.high_motion), instruction=True)

    def _batch(self, texts: Sequence[_Text]) -> TextEmbedding:
        # On the host: filling a mask on the GPU would wait for it, once a caption.
        return TextEmbedding(*(to_device(part, self._device) for part in stacked(self._source.fetch(texts), "cpu")))


class _Text(NamedTuple):
    """An input of the encoder."""

    text: str
    instruction: bool


class _Source(Protocol):
    """A source of embeddings, on the host, one caption each."""

    def prepare(self, negative: _Text, texts: Sequence[_Text]) -> None: ...

    def fetch(self, texts: Sequence[_Text]) -> list[CompactEmbedding]: ...


class _Encoder:
    """The encoder itself, at `home` while it has nothing to do, and the embeddings that were wanted last."""

    def __init__(
        self, config: InferenceConfig, device: torch.device, *, home: torch.device | str, cached: int, together: int
    ) -> None:
        self._open = ExitStack()  # of the encoder, for as long as this lives
        self._encoder = self._open.enter_context(text_encoder(config, device))
        self._device, self._home = device, torch.device(home)
        self._move(self._home)
        self._cache: OrderedDict[_Text, CompactEmbedding] = OrderedDict()
        self._bytes, self._most, self._together = 0, cached, together

    def prepare(self, negative: _Text, texts: Sequence[_Text]) -> None:
        if self._together > 1:  # else each is encoded when it is wanted
            self.fetch(texts)

    def fetch(self, texts: Sequence[_Text]) -> list[CompactEmbedding]:
        found = {text: self._cache[text] for text in texts if text in self._cache}
        if missing := [text for text in dict.fromkeys(texts) if text not in found]:
            with self._at_work() as encoder:
                found |= dict(zip(missing, _encode(encoder, missing, self._together), strict=True))
        for text, embedding in found.items():
            self._remember(text, embedding)
        return [found[text] for text in texts]

    @contextmanager
    def _at_work(self) -> Iterator[GemmaTextEncoder]:
        self._move(self._device)
        try:
            yield self._encoder
        finally:
            self._move(self._home)

    def _move(self, device: torch.device) -> None:
        model: Any = self._encoder.model  # transformers' stubs hide torch's signature
        model.to(device)

    def _remember(self, text: _Text, embedding: CompactEmbedding) -> None:
        if text not in self._cache:
            self._bytes += _nbytes(embedding)
        self._cache[text] = embedding
        self._cache.move_to_end(text)
        while self._bytes > self._most:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= _nbytes(oldest)


class _Files:
    """Embeddings in files, some hundred captions each: one CompactEmbedding, with the texts' order in its name.

    Nothing is kept in memory but which text is where.
    """

    def __init__(
        self, config: InferenceConfig, device: torch.device, world: World, folder: Path, per_file: int, together: int
    ) -> None:
        self._config, self._device, self._world = config, device, world
        self._folder, self._per_file, self._together = folder, per_file, together
        self._places: dict[_Text, tuple[Path, int]] = {}

    def prepare(self, negative: _Text, texts: Sequence[_Text]) -> None:
        distinct = list(dict.fromkeys(texts))
        # The negative prompt has its own file: another one leaves the others as they are.
        groups = [[negative], *(distinct[i : i + self._per_file] for i in range(0, len(distinct), self._per_file))]
        identity, found = "", list[Path | None]()
        if self._world.is_main:
            check_writable(self._folder, "--logdir")
            identity = _identity(self._config, self._device, self._together)
        identity = self._world.broadcast(identity)
        keys = [_key(identity, group) for group in groups]
        if self._world.is_main:
            found = _whole_files(self._folder, keys)
            log.info("captions: %d of %d files to encode in %s", found.count(None), len(found), self._folder)
        # Decided once: a peer may finish a file before this process looks.
        found = self._world.broadcast(found)
        missing = [number for number, path in enumerate(found) if path is None]
        made: dict[int, Path] = {}
        if mine := missing[self._world.rank :: self._world.size]:
            with text_encoder(self._config, self._device) as encoder:
                bar = tqdm(mine, desc="captions", unit="file", disable=None if self._world.is_main else True)
                for number in bar:
                    embeddings = _encode(encoder, groups[number], self._together)
                    made[number] = _write(self._folder, keys[number], embeddings)
        for part in self._world.gather(made):  # and until every file is there
            for number, fresh in part.items():
                found[number] = fresh
        for path, group in zip(found, groups, strict=True):
            assert path is not None
            self._places |= {text: (path, row) for row, text in enumerate(group)}

    def fetch(self, texts: Sequence[_Text]) -> list[CompactEmbedding]:
        return [self._read(*self._places[text]) for text in texts]

    def _read(self, path: Path, row: int) -> CompactEmbedding:
        with safe_open(path, framework="pt") as file:
            mask = file.get_tensor("mask")
            start, length = mask[:row].sum().item(), mask[row].sum().item()
            return CompactEmbedding(file.get_slice("tokens")[start : start + length], mask[row : row + 1])


def _encode(encoder: GemmaTextEncoder, texts: Sequence[_Text], together: int) -> list[CompactEmbedding]:
    """Embeddings in the order of the texts, `together` at a time; the last ones with copies of themselves."""
    found: dict[_Text, CompactEmbedding] = {}
    for instruction in (True, False):
        same = [text for text in texts if text.instruction is instruction]
        for group in (same[i : i + together] for i in range(0, len(same), together)):
            padded = [text.text for text in group] + [group[-1].text] * (together - len(group))
            tokens, mask = (part.cpu() for part in encoder.encode_together(padded, instruction=instruction))
            found |= {
                text: compact(TextEmbedding(tokens[row : row + 1], mask[row : row + 1]))
                for row, text in enumerate(group)
            }
    return [found[text] for text in texts]


def _nbytes(embedding: CompactEmbedding) -> int:
    return sum(part.untyped_storage().nbytes() for part in embedding)


def _identity(config: InferenceConfig, device: torch.device, together: int) -> str:
    """Digest of all that decides an embedding except its text."""
    deciding = (
        _FORMAT,
        source_digest(config, "text_encoder"),
        text_sha256(instruction_text(config.text_encoder.chi_prompt)),
        config.text_encoder.softcap,
        str(resolve_dtype(config.text_encoder.dtype, device)),
        config.model.caption_length,
        *((together,) if together > 1 else ()),
    )
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()


def _key(identity: str, texts: Sequence[_Text]) -> str:
    """Return the beginning of the name of a file that holds these texts' embeddings."""
    return hashlib.sha256(json.dumps([identity, *texts]).encode()).hexdigest()


def _file_name(key: str, content_sha256: str) -> str:
    return f"{key}-{content_sha256}.safetensors"


def _write(folder: Path, key: str, embeddings: Sequence[CompactEmbedding]) -> Path:
    """The file, which appears whole, synced to disk, or not at all."""
    together = CompactEmbedding(*(torch.cat(parts) for parts in zip(*embeddings, strict=True)))
    content = save(together._asdict())
    path = folder / _file_name(key, hashlib.sha256(content).hexdigest())
    write_exclusive(path, content)
    return path


def _whole_files(folder: Path, keys: Sequence[str]) -> list[Path | None]:
    """Find for each key a file whose content is what its name says, or None; a changed one is removed, and said."""
    there: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[!.]*-*.safetensors")):
        there.setdefault(path.name.partition("-")[0], []).append(path)
    candidates = [path for key in keys for path in there.get(key, [])]
    if candidates:
        size = sum(path.stat().st_size for path in candidates) / 1e9
        log.info(
            "captions: comparing %d files (%.1f GB) with their digests; those that are new or changed are read",
            len(candidates),
            size,
        )
    whole: dict[str, Path] = {}
    for path, digest in zip(candidates, digests_of(candidates), strict=True):
        key = path.name.partition("-")[0]
        if path.name == _file_name(key, digest):
            whole.setdefault(key, path)
        else:
            log.warning("%s: damaged: it has changed since it was written (SHA-256); it is encoded again", path)
            path.unlink()
    return [whole.get(key) for key in keys]
