"""Weights of the network from and to files: published, of training runs, of diffusers, and our own.

Loading is strict. Whatever is missing, unexpected or misshapen is reported at once, before the model is touched.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.models.past import LEARNED
from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text
from longsana.weights.files import (
    NETWORKS,
    Entry,
    open_checkpoint,
    say_once,
    write_pickle,
    write_safetensors,
)
from longsana.weights.fit import LISTED, kind, listed, misfit
from longsana.weights.names import (
    DECAY_LOGIT,
    NAMINGS,
    OPTIONAL,
    Foreign,
    Naming,
    differences,
    diffusers_config,
    foreign,
)
from longsana.weights.what_is import DIFFUSERS_WEIGHTS, what_is

log = logging.getLogger(__name__)

Layout = Literal["upstream", "trainer", "diffusers", "safetensors"]
LAYOUTS: dict[Layout, Naming] = {
    "upstream": "upstream",
    "trainer": "upstream",
    "diffusers": "diffusers",
    "safetensors": "longsana",
}
# Of image models and of training: the network has no use for them.
IGNORED = ("pos_embed", "logvar_linear.*")


@torch.no_grad()
def load_weights(
    model: LongSanaDiT,
    path: Path | Sequence[Path],
    *,
    key: str = "generator",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give `model`, usually built on the meta device, the tensors of a checkpoint, as `dtype` on `device`.

    path: a file in any layout of `save_checkpoint` (or without the dict around its tensors), an index of shards, or a
        folder with one of them, such as `transformer/` of a diffusers pipeline or the pipeline around it; or shards.
    key: which network of a training checkpoint: generator, generator_ema or critic.

    The host holds the converted tensors and no second copy; the file is mapped, not read. Null tokens and learned
    factors of the past that the file lacks become zeros, with which the factors are `past.START`.

    Raises:
        InputError: the file cannot be read or does not fit the network. The model is as it was.
    """
    expected = model.state_dict()
    loaded = {}
    for name, tensor, mapped in _read(path, key, model.config, expected):
        # A copy always: memory that maps the file would change, or crash us, with it.
        loaded[name] = tensor.to(device, dtype, copy=mapped).contiguous()
    for name, old in expected.items():
        new = loaded.get(name)
        if new is None and name == DECAY_LOGIT:
            log.info("%s: no learned state_decay; it starts from its default", path)
        _assign(model, name, torch.zeros(old.shape, device=device, dtype=dtype) if new is None else new)


def read_weights(path: Path, config: ModelConfig, *, key: str = "generator") -> dict[str, Tensor]:
    """Read what `load_weights` would load, each tensor in its own dtype, and of OPTIONAL ones those that the file has.

    The file is mapped as long as its tensors are used: it must not change.

    Raises:
        InputError: as there; or parts of one tensor differ in dtype.
    """
    with torch.device("meta"):
        expected = LongSanaDiT(config).state_dict()
    return {name: tensor for name, tensor, _ in _read(path, key, config, expected, exact=True)}


def check_fit(path: Path, config: ModelConfig, *, key: str = "generator") -> None:
    """Refuse a checkpoint of which headers tell that it does not fit the network, or is not whole; no tensor is read.

    Of PyTorch's format before 1.6, which has no header, nothing is told.

    Raises:
        InputError: what `load_weights` would raise.
    """
    found = what_is(path)
    if found.headers_tell:
        with torch.device("meta"):
            expected = LongSanaDiT(config).state_dict()
        _sources(open_checkpoint(found.file, key, digests=False), expected, found.file, config)


def save_checkpoint(
    state_dict: dict[str, Tensor],
    path: Path,
    layout: Layout,
    config: ModelConfig,
    *,
    others: Mapping[str, dict[str, Tensor]] | None = None,
    step: int = 0,
    shard_bytes: int = 10_000_000_000,
    causal: bool = False,
    consume: bool = False,
) -> None:
    """Write weights, dtypes kept; no reader ever sees half of them.

    Args:
        state_dict: of `LongSanaDiT(config)`; OPTIONAL tensors may be absent.
        path: a folder for diffusers, else a file.
        layout: upstream: the public `{"state_dict": ...}`; trainer: `{"generator": ..., "step": ...}` with `model.`
            before upstream's names; diffusers: `config.json` and safetensors; safetensors: our own names.
        others: trainer only: the state dicts of `generator_ema` and `critic`.
        step: trainer only.
        shard_bytes: safetensors larger than this become shards and an index beside `path`.
        causal: diffusers only: see `diffusers_config`.
        consume: empty `state_dict` on the way, so that no tensor is held both whole and in the layout's parts; it is
            empty also where writing fails.

    Raises:
        ValueError: the names or shapes are not this network's, or `others` has no place in the layout.
        OSError: a file could not be written; a single file that was there before is untouched.
    """
    naming, path = LAYOUTS[layout], Path(path)
    if others and (layout != "trainer" or not set(others) <= set(NETWORKS[1:])):
        raise ValueError(f"{', '.join(others)}: only the trainer layout holds other networks, {NETWORKS[1:]}")
    renamed = rename(state_dict, naming, config, consume=consume)
    if layout == "upstream":
        write_pickle({"state_dict": renamed}, path)
    elif layout == "trainer":
        networks = {"generator": renamed} | {
            name: rename(other, naming, config) for name, other in (others or {}).items()
        }
        prefixed = {
            network: {f"model.{name}": tensor for name, tensor in tensors.items()}
            for network, tensors in networks.items()
        }
        write_pickle({**prefixed, "step": step}, path)
    elif layout == "safetensors":
        write_safetensors(renamed, path, shard_bytes)
    else:
        write_safetensors(renamed, path / DIFFUSERS_WEIGHTS, shard_bytes)
        atomic_write_text(path / "config.json", json.dumps(diffusers_config(config, causal=causal), indent=2) + "\n")


def _read(
    path: Path | Sequence[Path],
    key: str,
    config: ModelConfig,
    expected: Mapping[str, Tensor],
    *,
    exact: bool = False,
) -> Iterator[tuple[str, Tensor, bool]]:
    """Names and tensors of a checkpoint, and whether a tensor may be a view of the file.

    exact: refuse what would change when parts are joined.
    """
    file = what_is(path).file if isinstance(path, Path) else path[0]
    entries = open_checkpoint(file if isinstance(path, Path) else path, key)
    sources = _sources(entries, expected, file, config)
    for name, parts in sources.items():
        # Popped, so that a file that could not be mapped is freed as it is used up.
        tensors = [entries.pop(part.name).read() for part in parts]
        if exact and len({tensor.dtype for tensor in tensors}) > 1:
            raise InputError(
                f"{file}: {' and '.join(part.name for part in parts)} differ in dtype, and belong together"
            )
        if tensors:
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            yield name, whole.reshape(expected[name].shape), len(tensors) == 1


def _sources(
    entries: dict[str, Entry], expected: Mapping[str, Tensor], file: Path, config: ModelConfig
) -> dict[str, list[Foreign]]:
    """Match entries as `_match` does; what the network has no use for is taken out of them."""
    for name in sorted(entries):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED):
            say_once(f"{file}: {name} is not used")
            del entries[name]
    return _match(entries, {name: tuple(tensor.shape) for name, tensor in expected.items()}, file, config)


def _match(
    entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], file: Path, config: ModelConfig
) -> dict[str, list[Foreign]]:
    """Find for each tensor of ours the entries that make it up; none for OPTIONAL ones that the file lacks."""
    tables = {naming: {name: foreign(name, shape, naming) for name, shape in shapes.items()} for naming in NAMINGS}
    needs = {naming: {part.name: part for parts in tables[naming].values() for part in parts} for naming in NAMINGS}
    naming = max(NAMINGS, key=lambda naming: len(needs[naming].keys() & entries.keys()))
    table, needed = tables[naming], needs[naming]
    if not needed.keys() & entries.keys():
        if any(".lora_" in name for name in entries):
            raise InputError(
                f"{file}: a LoRA, which is no network by itself; longsana convert ... --fuse {file} adds it to the "
                "weights that it was trained on"
            )
        raise InputError(
            f"{file}: not a LongSANA or SANA-Video network: none of its {len(entries)} tensors "
            f"({', '.join(list(entries)[:3])}, ...) has a known name"
        )
    if DECAY_LOGIT in entries and DECAY_LOGIT not in shapes:
        raise InputError(
            f"{file}: was trained with learned factors of its past ({DECAY_LOGIT}), and state_decay is "
            f"{config.state_decay}; set it to {LEARNED}"
        )
    optional = {part.name for name in OPTIONAL if name in table for part in table[name]}
    found = {name: entry.kind for name, entry in entries.items()}
    settings = differences(what_is(file).config, config) if naming == "diffusers" else []
    problems = [
        _other_depth(entries, config),
        misfit(found, {name: kind(part.shape) for name, part in needed.items()}, optional),
        listed("different in config.json", settings) if settings else "",
    ]
    if any(problems):
        raise InputError(f"{file}: does not fit {config.model} ({naming} names): {'; '.join(filter(None, problems))}")
    return {name: [part for part in parts if part.name in entries] for name, parts in table.items()}


def _other_depth(names: Iterable[str], config: ModelConfig) -> str:
    """Say that these names are of more or fewer blocks than the network has; nothing ("") if they are not."""
    numbers = [int(block[1]) for name in names if (block := re.match(r"(?:transformer_)?blocks\.(\d+)\.", name))]
    own, depth = max(numbers, default=-1) + 1, config.architecture().depth
    if own in (0, depth):
        return ""
    return f"{own} blocks, and not {depth} (beside its load_from, depth: {own} takes them)"


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    setattr(module, leaf, new)


def rename(
    state_dict: dict[str, Tensor], naming: Naming, config: ModelConfig, *, consume: bool = False
) -> dict[str, Tensor]:
    """Our tensors under another naming, on the host, each the only one in its storage.

    consume: empty `state_dict` on the way.

    Raises:
        ValueError: the names or shapes are not those of `LongSanaDiT(config)`.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LongSanaDiT(config).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    wrong = sorted(name for name, _ in shapes.items() ^ given.items() if name in given or name not in OPTIONAL)
    if wrong:
        raise ValueError(f"not the weights of {config.model}: {', '.join(dict.fromkeys(wrong[:LISTED]))}")
    renamed = {}
    for name in given:
        tensor = state_dict.pop(name) if consume else state_dict[name]
        parts = foreign(name, shapes[name], naming)
        if not parts:
            log.info("%s is not kept under %s names", name, naming)
            continue
        for part, piece in zip(parts, tensor.detach().cpu().chunk(len(parts)), strict=True):
            renamed[part.name] = _own(piece).view(part.shape)
    return renamed


def _own(tensor: Tensor) -> Tensor:
    """The tensor as all of its storage: files keep whole storages, or refuse shared ones."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
