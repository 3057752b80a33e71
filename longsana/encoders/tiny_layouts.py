"""Tiny decoders: their kinds, the tensors that each has, and their files looked at before anything is loaded.

Neither diffusers nor PyTorch's kernels are needed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from longsana.config import VAEConfig
from longsana.encoders.headers import vae_folder
from longsana.encoders.layouts import Shape
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import read_json
from longsana.runtime.hub import SCHEME, SEEDED, found_here, locate, names_a_file
from longsana.weights.files import Entry, open_weights
from longsana.weights.fit import kind as told_shape
from longsana.weights.fit import misfit
from longsana.weights.what_is import what_is

FULL: Final = "full"
"""The `vae.decoder` that is the VAE's own."""
SHAPES: Final = "tae_shapes"
"""The `vae.decoder` of the small world's own VAE, which is trained there."""
LATENTS = "latents"
"""The name that the `latents_key` of what a decoder was trained on has in the metadata of its file."""
MEAN, DEVIATION = "latents_mean", "latents_std"
WAN_LATENTS: Final = "3b36f1d3286ce7c18c7a6711af066d9ac5144a407f7c451f1a4bbd1556709316"
"""The `latents_key` of the published Wan 2.1 VAE, which a VAE has whose files do not say another mean."""
ENDS = ("decoder.1.weight", "decoder.22.weight")
"""A decoder's first and last convolution, whose shapes tell kinds apart."""
BLOCKS = 3
"""Memory blocks of a level."""
PARAMETERS = ("conv.0", "conv.2", "conv.4")
"""The three convolutions of a memory block."""


@dataclass(frozen=True)
class TinyKind:
    """A kind of tiny encoder and decoder, as its files are laid out.

    vae_type: the VAE whose latents it takes. channels: of these latents. patch: pixels of a side that the last
    convolution gives at once. pools: frames that the encoder folds into one at each of its levels. grows: frames that
    the decoder makes of one at each. raw: it takes latents before they are normalised, z * std + mean.
    widths: channels of the decoder's levels. width: of the encoder's.
    encodes: its files hold an encoder, too.
    """

    name: str
    vae_type: str
    channels: int
    patch: int
    pools: tuple[int, int, int]
    grows: tuple[int, int, int]
    raw: bool = False
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    width: int = 64
    encodes: bool = True

    @property
    def stride(self) -> int:
        """Frames of a latent."""
        return prod(self.grows)


TINY = {
    kind.name: kind
    for kind in (
        TinyKind("taew2_1", "WanVAE", 16, 1, (2, 2, 1), (1, 2, 2)),
        TinyKind("lighttaew2_1", "WanVAE", 16, 1, (2, 2, 1), (1, 2, 2), raw=True),
        TinyKind("taeltx_2", "LTX2VAE_diffusers", 128, 4, (2, 2, 2), (2, 2, 2)),
        TinyKind(SHAPES, "WanVAE", 16, 1, (2, 2, 1), (1, 2, 2), widths=(64, 48, 32, 16), encodes=False),
    )
}
"""By the `vae.decoder` that asks for it. The first two differ in nothing that their files hold; the last is the
small world's, whose VAE encodes quickly itself."""
BESIDE = frozenset(f"{name}.safetensors" for name in TINY)
"""Files of tiny decoders in the folder of a VAE, of which they are no part."""


def tiny_tensors(kind: TinyKind) -> dict[str, Shape]:
    """Names and shapes of all tensors of a file of this kind."""
    return {**dict(_encoder(kind) if kind.encodes else ()), **dict(_decoder(kind))}


def check_decoder(config: VAEConfig) -> None:
    """Refuse settings of a tiny decoder that do not belong together.

    Raises:
        InputError: the first that does not, and what would be right.
    """
    name = config.decoder
    if name == FULL:
        source = config.decoder_pretrained
        if source is not None:
            raise InputError(
                f"vae.decoder_pretrained={source}: with vae.decoder=full nothing would be decoded with it; say which "
                f"kind it is: vae.decoder={' or '.join(fitting(config.vae_type))}"
            )
        if config.encoder != FULL:
            raise InputError(
                f"vae.encoder={config.encoder}: with vae.decoder=full there is no tiny encoder; use vae.encoder=full"
            )
        return
    kind = TINY[name]
    if kind.vae_type != config.vae_type:
        raise InputError(
            f"vae.decoder={name}: it decodes latents of {kind.vae_type}, and vae.vae_type is {config.vae_type}; use "
            f"{' or '.join(fitting(config.vae_type))}, or full"
        )
    if config.encoder != FULL:
        check_encodes(kind, f"vae.encoder={config.encoder}", "use vae.encoder=full")
    seed_of_tiny(source_of(config))


def source_of(config: VAEConfig) -> str:
    """Tell where a tiny decoder's weights lie: `vae.decoder_pretrained`, or a file beside the VAE's own.

    It is looked for on this machine alone: nothing is fetched for that.

    Raises:
        InputError: it is not said, and none is there, or no VAE.
    """
    if config.decoder_pretrained is not None:
        return config.decoder_pretrained
    uri, name = config.vae_pretrained, f"{config.decoder}.safetensors"
    if not uri.startswith((SCHEME, SEEDED)):
        beside = vae_folder(locate(uri, "vae.vae_pretrained")) / name
        if beside.is_file():
            return str(beside)
    raise InputError(
        f"vae.decoder={config.decoder}: vae.decoder_pretrained must say where its file lies: a path, "
        f"hf://owner/repo/file, or seeded:N for random weights; vae.vae_pretrained={uri} is no folder on this machine "
        f"with a {name}. vae.decoder=full does without one"
    )


def check_encodes(kind: TinyKind, setting: str, remedy: str) -> None:
    """Refuse `setting`, which asks for the encoder of a kind that has none.

    Raises:
        InputError: it has none.
    """
    if not kind.encodes:
        raise InputError(f"{setting}: a {kind.name} has no encoder of its own; {remedy}")


def fitting(vae_type: str) -> list[str]:
    """The names of the tiny decoders for a VAE's latents."""
    return [kind.name for kind in TINY.values() if kind.vae_type == vae_type]


def seed_of_tiny(source: str) -> int | None:
    """The N of seeded:N, or None for a file.

    Raises:
        InputError: N is no whole number.
    """
    if not source.startswith(SEEDED):
        return None
    try:
        return int(source.removeprefix(SEEDED))
    except ValueError as error:
        raise InputError(
            f"vae.decoder_pretrained={source}: must be seeded:N with a whole number N, or name a file"
        ) from error


def open_tiny(kind: TinyKind, source: str, path: Path, *, headers_only: bool = False) -> dict[str, Entry]:
    """Open a file of a tiny decoder at `path`, which `source` names; its tensors by name, none of them read.

    headers_only: a file whose headers do not tell its tensors (PyTorch's format before 1.6) is left alone: no tensors.

    Raises:
        InputError: it is damaged, or its tensors are not exactly those of this kind.
    """
    if path.is_dir():
        raise InputError(f"{source}: a folder; vae.decoder_pretrained names the file of a {kind.name} itself")
    found = what_is(path)
    if headers_only and not found.headers_tell:
        return {}
    entries = open_weights(found.file)
    needed = {name: told_shape(shape) for name, shape in tiny_tensors(kind).items()}
    shapes = {name: told_shape(entry.shape) for name, entry in entries.items()}
    if told := misfit(shapes, needed):
        if all(shapes.get(name) == needed[name] for name in ENDS):
            raise InputError(f"{source}: not a {kind.name} as it is published: {told}; vae.decoder needs a whole one")
        others = [name for name in (*fitting(kind.vae_type), FULL) if name != kind.name]
        raise InputError(
            f"{source}: not a file of a {kind.name}{_likeness(entries)}; give one that is, or set vae.decoder to "
            f"{' or '.join(others)} ({told})"
        )
    return entries


def check_tiny(config: VAEConfig, path: Path) -> None:
    """Refuse a file that is not of the kind that `config.decoder` says, or says that it decodes latents of another VAE
    than `config.vae_pretrained`. path: where it lies.

    Raises:
        InputError: what is wrong.
    """
    open_tiny(TINY[config.decoder], source_of(config), path, headers_only=True)
    check_own_latents(config, latents_of(path))


def check_own_latents(config: VAEConfig, own: str | None) -> None:
    """Refuse a decoder of the latents `own`, see `latents_of`, beside `config.vae_pretrained` if that has others.

    Raises:
        InputError: it has others.
    """
    check_latents(
        own,
        _latents_of_vae(config),
        f"vae.decoder_pretrained={source_of(config)}",
        f"vae.vae_pretrained={config.vae_pretrained}",
        "vae.decoder=full",
    )


def _latents_of_vae(config: VAEConfig) -> str | None:
    """The `latents_key` of the VAE that a config names; None: nothing that is here says it, and nothing is fetched."""
    uri = config.vae_pretrained
    if config.vae_type != "WanVAE" or uri.startswith(SEEDED):
        return None
    if uri.startswith(SCHEME):
        return WAN_LATENTS if names_a_file(uri) else None  # Wan's original file comes without a config
    if (path := found_here(uri)) is None:
        return None
    if not path.is_dir():
        return WAN_LATENTS
    told = vae_folder(path) / "config.json"
    return latents_told(read_json(told), otherwise=WAN_LATENTS) if told.is_file() else None


def latents_told(config: Any, otherwise: str | None = None) -> str | None:
    """The `latents_key` of a VAE's config; `otherwise` where it tells neither mean nor deviation; None: it is none."""
    try:
        if all(config.get(name) is None for name in (MEAN, DEVIATION)):
            return otherwise
        return latents_key(config)
    except (AttributeError, KeyError, TypeError, ValueError):  # what reads the VAE says what is wrong
        return None


def check_latents(own: str | None, needed: str | None, decoder: str, vae: str, otherwise: str) -> None:
    """Refuse a decoder of other latents than a VAE's, where both are known.

    own, needed: `latents_key` of its latents, and of the VAE's; None: unknown. decoder, vae: who they are, to the
    reader; otherwise: what decodes them in any case.

    Raises:
        InputError: its latents are others.
    """
    if None not in (own, needed) and own != needed:
        raise InputError(f"{decoder}: was trained on latents of another VAE than {vae}; give its own, or {otherwise}")


def latents_key(config: Mapping[str, Any]) -> str:
    """Digest the mean and the deviation in a trained VAE's config, which tell its latents from those of others."""
    figures = [[float(figure) for figure in config[name]] for name in (MEAN, DEVIATION)]
    return hashlib.sha256(json.dumps(figures).encode()).hexdigest()


def latents_of(path: Path) -> str | None:
    """The `latents_key` that a decoder's file gives of the latents that it was trained on; None: it does not say."""
    found = what_is(path)
    if found.kind != "safetensors":
        return None
    with safe_open(found.file, framework="pt") as file:
        return (file.metadata() or {}).get(LATENTS)


def _likeness(entries: Mapping[str, Entry]) -> str:
    """Tell in a few words what a file decodes, where its first and last convolution say it."""
    first, last = (entries[name].shape if name in entries else () for name in ENDS)
    if len(first) != 4 or len(last) != 4:
        return ""
    patch = isqrt(last[0] // 3)
    return f": its decoder takes {first[1]} channels at a width of {first[0]}, and gives patches of {patch}x{patch}"


def _encoder(kind: TinyKind) -> Iterator[tuple[str, Shape]]:
    width = kind.width
    yield from _convolution("encoder.0", 3 * kind.patch**2, width)
    for level, frames in enumerate(kind.pools):
        place = 2 + 5 * level
        yield f"encoder.{place}.conv.weight", (width, width * frames, 1, 1)
        yield f"encoder.{place + 1}.weight", (width, width, 3, 3)
        yield from _blocks("encoder", place + 2, width)
    yield from _convolution("encoder.17", width, kind.channels)


def _decoder(kind: TinyKind) -> Iterator[tuple[str, Shape]]:
    yield from _convolution("decoder.1", kind.channels, kind.widths[0])
    for level, frames in enumerate(kind.grows):
        width, out, place = kind.widths[level], kind.widths[level + 1], 3 + 6 * level
        yield from _blocks("decoder", place, width)
        yield f"decoder.{place + 4}.conv.weight", (width * frames, width, 1, 1)
        yield f"decoder.{place + 5}.weight", (out, width, 3, 3)
    yield from _convolution("decoder.22", kind.widths[-1], 3 * kind.patch**2)


def _blocks(half: str, first: int, width: int) -> Iterator[tuple[str, Shape]]:
    for number in range(first, first + BLOCKS):
        for index, name in enumerate(PARAMETERS):
            yield from _convolution(f"{half}.{number}.{name}", 2 * width if index == 0 else width, width)


def _convolution(name: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, width, 3, 3)
    yield f"{name}.bias", (out,)
