"""LoRA weights of diffusers' layers for the same layers here, of which some are one where diffusers has three."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.pipelines.arguments import FLOATS, Numbers, check_finite
from longsana.runtime.arguments import Number
from longsana.runtime.errors import InputError, did_you_mean
from longsana.runtime.foreign import parse_json, reason_of
from longsana.weights.checkpoint_folder import is_checkpoint
from longsana.weights.files import open_weights
from longsana.weights.lora import BASE, Base, Part, linear_layers
from longsana.weights.names import foreign
from longsana.weights.what_is import SUFFIXES, what_is

USUAL = "pytorch_lora_weights.safetensors"
ALPHA = ".alpha"
PEFT = "base_model.model."
SCALE = Number(-1000, 1000)
"""What a LoRA may be multiplied by."""
ALPHAS = Number(-1e6, 1e6)
"""An alpha, which is divided by the rank."""
FACTOR = re.compile(r"(?P<layer>.+?)\.lora[._](?P<factor>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight")
REFUSED = {
    "DoRA's magnitudes have no place here; merge it into the weights with the tool that trained it": (
        r"\.dora_scale$",
        r"\.lora_magnitude_vector",
    ),
    "parts of the text encoder have no place here, which stays as it is; load the transformer's alone: "
    "load_lora_weights({name: x for name, x in tensors.items() if name.startswith('transformer.')})": (
        r"^text_encoder",
        r"^lora_te\d?_",
        r"^te\d?[._]",
    ),
    "the names of kohya's trainer do not tell the layers; convert it to diffusers' names": (
        r"^lora_(unet|transformer)_",
    ),
    "another kind of adapter (LoHa, LoKr, OFT), which cannot be put on here": (
        r"\.hada_",
        r"\.lokr_",
        r"\.b?oft_",
    ),
    "lora_bias has no place here; train without": (r"\.lora_[AB](\.[^.]+)?\.bias$",),
}
"""What has no place here, and what to do; and how it is told."""


class _Low(NamedTuple):
    """A low-rank change of a layer's weight: b @ a, with a (rank, columns) and b (rows, rank)."""

    a: Tensor
    b: Tensor


def fused_adapter(
    state_dict: Mapping[str, Tensor], network: LongSanaDiT, *, prefix: str | None, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Translate the change to our layers' names, and its settings to peft's.

    Of layers that are one here, the factors are stacked: a = [a_q; a_k; a_v] and b = diag(b_q, b_k, b_v), whose
    product is the three products. alpha / rank is put into b, so alpha is the rank.

    Args:
        state_dict: see `plain_lora`.
        metadata: peft's settings as saved beside them, and BASE; None means alpha = rank.

    Raises:
        InputError: a name, shape or setting has no place here, or it is for another network.
    """
    if metadata and BASE in metadata:
        Base.read(metadata[BASE], "LoRA").check(network.config)
    settings = _settings(metadata or {}, prefix)
    changes = _changes(plain_lora(state_dict, prefix, metadata), prefix)
    fused: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    # peft's names of our layers in a model that holds the network as `network`.
    for name, parts in linear_layers(network).items():
        given = {layer: changes.pop(layer) for layer in parts if layer in changes}
        if not given:
            continue
        low = [_fitting(layer, given.get(layer), part, settings) for layer, part in parts.items()]
        # A layer without a change has rank 0.
        like = next(iter(given.values()))["A"]
        a = torch.cat([change.a.to(like) for change in low])
        b = torch.block_diag(*(change.b.to(like) for change in low))
        fused |= {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}
        ranks[f"network.{name}"] = len(a)
    # With alpha in it, and as the network's dtype has it.
    dtype = next(network.parameters()).dtype
    check_finite("LoRA", {name: tensor.to(dtype) for name, tensor in fused.items()})
    if changes:
        known = [layer for parts in linear_layers(network).values() for layer in parts]
        first = next(iter(changes))
        raise InputError(
            f"LoRA: {len(changes)} layers that none can be put on here: {', '.join(list(changes)[:3])}"
            f"{did_you_mean(first, known)}; known are the linear layers of the transformer, as diffusers calls them"
        )
    rank = next(iter(ranks.values()))
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": list(ranks),
    }
    return fused, config


def plain_factors(network: LongSanaDiT, adapter: str) -> dict[str, Tensor]:
    """Factors of an adapter by the names of diffusers' layers, (rank, columns) and (rows, rank), alpha being the rank.

    It undoes `fused_adapter`: of a layer that is several there each gets its rows of b, and those of a that they use.
    """
    found: dict[str, Tensor] = {}
    for name in linear_layers(network):
        module: Any = network.get_submodule(name)
        if adapter not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        rank = module.r[adapter]
        b = b * (module.lora_alpha[adapter] / (rank**0.5 if module.use_rslora[adapter] else rank))
        pieces = foreign(f"{name}.weight", (len(b), a.shape[1]), "diffusers")
        for piece, own in zip(pieces, b.split([piece.shape[0] for piece in pieces]), strict=True):
            used = own.ne(0).any(dim=0)
            if not used.any():
                continue
            layer, pixel = piece.name.removesuffix(".weight"), (1,) * (len(piece.shape) - 2)
            own, other = own[:, used], a[used]
            found[f"{layer}.lora_A.weight"] = other.reshape(*other.shape, *pixel).contiguous()
            found[f"{layer}.lora_B.weight"] = own.reshape(*own.shape, *pixel).contiguous()
    return found


def plain_lora(
    state_dict: Mapping[str, Tensor], prefix: str | None, metadata: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Factors alone, as `{prefix}.{layer of diffusers}.lora_A.weight` and `.lora_B.weight`; nothing is dropped.

    state_dict: also with the name of one adapter in its names (`.lora_A.default_0.weight`), with peft's or an older
        diffusers' names of them, and with alphas (`.alpha`), of which alpha / rank is put into lora_B.
    metadata: see `fused_adapter`.

    Raises:
        InputError: it holds what has no place here: DoRA's magnitudes, parts of the text encoder, biases, other kinds
            of adapters, several of them, and what are no factors.
    """
    if not state_dict or not all(isinstance(key, str) for key in state_dict):
        raise InputError("LoRA: must hold tensors by their names, and at least one")
    start = f"{prefix}." if prefix else ""
    if state_dict and all(key.startswith(PEFT) for key in state_dict):
        state_dict = {start + key.removeprefix(PEFT): tensor for key, tensor in state_dict.items()}
    for what, marks in REFUSED.items():
        if found := [key for key in state_dict if any(re.search(mark, key) for mark in marks)]:
            raise InputError(f"LoRA: {what} ({len(found)} tensors, such as {found[0]})")
    others = [key for key in state_dict if not key.startswith(start)]
    if len(others) == len(state_dict):
        there = f"; there is {others[0]}" if others else ""
        raise InputError(f"LoRA: no weights of the transformer in it (names that begin with '{start}'){there}")
    if others:
        raise InputError(
            f"LoRA: {len(others)} tensors are not the transformer's, such as {others[0]}; leave out what does not "
            f"begin with '{start}'"
        )
    settings = _settings(metadata or {}, prefix)
    if (settings.alpha is not None or settings.alphas) and any(key.endswith(ALPHA) for key in state_dict):
        raise InputError("LoRA: alphas both as tensors (.alpha) and in its metadata (lora_alpha); keep one of them")
    factors = _factors(state_dict)
    for key, alpha in state_dict.items():
        if key.endswith(ALPHA):
            _scale(factors, key.removesuffix(ALPHA), alpha)
    return factors


def _factors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors of one adapter, `{layer}.lora_A.weight` and `.lora_B.weight`, without alphas."""
    factors: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for key, tensor in state_dict.items():
        if key.endswith(ALPHA):
            continue
        match = FACTOR.fullmatch(key)
        if match is None:
            raise InputError(f"LoRA: {key}: expected names that end in .lora_A.weight or .lora_B.weight")
        adapters.add(match["adapter"] or "")
        letter = {"down": "A", "up": "B"}.get(match["factor"], match["factor"])
        factors[f"{match['layer']}.lora_{letter}.weight"] = tensor
    if len(adapters) > 1:
        names = ", ".join(sorted(adapter or "(none)" for adapter in adapters))
        raise InputError(f"LoRA: several adapters in one file ({names}); save and load each by itself")
    for key, tensor in state_dict.items():
        if not key.endswith(ALPHA):
            _check_factor(key, tensor)
    return factors


def _scale(factors: dict[str, Tensor], layer: str, alpha: Any) -> None:
    """Put alpha / rank of a layer into its lora_B."""
    a, b = (factors.get(f"{layer}.lora_{letter}.weight") for letter in "AB")
    if a is None or b is None:
        raise InputError(
            f"LoRA: {layer}{ALPHA}: expected names that end in .lora_A.weight and .lora_B.weight beside it"
        )
    if isinstance(alpha, Tensor) and (alpha.is_meta or alpha.numel() != 1 or not alpha.isfinite().all()):
        raise InputError(f"LoRA: {layer}{ALPHA}: must be one finite number")
    value = ALPHAS.settle(f"LoRA: {layer}{ALPHA}", alpha.item() if isinstance(alpha, Tensor) else alpha)
    factors[f"{layer}.lora_B.weight"] = b * (value / len(a))


def _check_factor(key: str, tensor: Any) -> None:
    """Refuse what is no matrix of finite floating-point numbers, or a 1x1 convolution's."""
    tensor = Numbers().settle(f"LoRA: {key}", tensor)
    if tensor.dtype not in FLOATS:
        raise InputError(f"LoRA: {key} has dtype {tensor.dtype}: must be floating-point numbers of 16 to 64 bits")
    if tensor.dim() < 2 or not tensor.numel():
        raise InputError(f"LoRA: {key} has shape {list(tensor.shape)}: must be a matrix")
    check_finite("LoRA", {key: tensor})


def read_lora(
    path: Path, weight_name: str | None = None, remedy: str = "name it as weight_name"
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, or of the one in a folder, and what is saved with them: peft's settings, and BASE.

    remedy: what to do where a folder has several.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    file = _lora_file(path, weight_name, remedy)
    entries = open_weights(file)
    return {name: entry.read().clone() for name, entry in entries.items()}, _metadata(file)


def read_base(path: Path, remedy: str) -> Base | None:
    """The network that a LoRA is for, as its file says; None where it does not. See `read_lora`."""
    file = _lora_file(path, None, remedy)
    open_weights(file)  # says what is wrong with it
    metadata = _metadata(file) or {}
    return Base.read(metadata[BASE], str(file)) if BASE in metadata else None


def _lora_file(path: Path, weight_name: str | None, remedy: str) -> Path:
    file = path / weight_name if weight_name is not None else path
    if is_checkpoint(file):
        raise InputError(f"{file}: a checkpoint of training; longsana convert ... --to lora writes what this reads")
    if file.is_dir():
        usual = file / USUAL
        file = usual if usual.is_file() else what_is(file, remedy).file
    return file


_FETCHING = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def fetch_lora(repository: str, weight_name: str | None = None, **options: Any) -> Path:
    """The file of a LoRA on the hub, or in the hub's cache.

    weight_name: the file; the usual one, or the only one that there is. options: of diffusers' `load_lora_weights`.

    Raises:
        InputError: there is none, or several, or the hub did not give it.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    wanted = {name: options[name] for name in _FETCHING if options.get(name) is not None}
    try:
        try:
            return Path(hf_hub_download(repository, weight_name or USUAL, **wanted))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            if weight_name is not None:
                raise
        names = HfApi(token=options.get("token")).list_repo_files(repository, revision=options.get("revision"))
        start = f"{options['subfolder']}/" if options.get("subfolder") else ""
        found = [
            name.removeprefix(start)
            for name in names
            if name.startswith(start) and "/" not in name.removeprefix(start) and name.endswith(SUFFIXES)
        ]
        if len(found) == 1:
            return Path(hf_hub_download(repository, found[0], **wanted))
    except Exception as error:  # the transport's own classes differ between versions of the client
        raise InputError(
            f"LoRA: {repository}: {weight_name or USUAL} could not be fetched ({type(error).__name__}: "
            f"{reason_of(error)}); name the file as weight_name, or give a local path"
        ) from error
    several = f"several weights files ({', '.join(found[:5])})" if found else "no weights"
    raise InputError(f"LoRA: {repository}: {several} there; name the file as weight_name")


SETTINGS = "lora_adapter_metadata"
"""The word in a file's header that has peft's settings."""


def _metadata(file: Path) -> dict[str, Any] | None:
    try:
        with safe_open(file, framework="pt") as opened:
            words = opened.metadata() or {}
    except SafetensorError:
        return None  # a pickle, which has no place for them
    found = {word: _mapping(words[word], f"{file}: its {word}") for word in (SETTINGS, BASE) if word in words}
    base = {BASE: found[BASE]} if BASE in found else {}
    return {**found.get(SETTINGS, {}), **base} if found else None


def _mapping(text: str, what: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise InputError(f"{what} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{what} is a {type(values).__name__}; expected names and values")
    return values


def _changes(factors: Mapping[str, Tensor], prefix: str | None) -> dict[str, dict[str, Tensor]]:
    """Factors "A" and "B" by the name of their layer."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in factors.items():
        layer, _, factor = key.removeprefix(f"{prefix}." if prefix else "").removesuffix(".weight").rpartition(".lora_")
        changes.setdefault(layer, {})[factor] = tensor
    return changes


class _Settings(NamedTuple):
    alpha: float | None
    alphas: dict[str, float]
    root: bool

    def scale(self, layer: str, rank: int) -> float:
        alpha = next(
            (value for key, value in self.alphas.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), self.alpha
        )
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def _settings(metadata: Mapping[str, Any], prefix: str | None) -> _Settings:
    own = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}
    if own.get("use_dora") or own.get("lora_bias"):
        raise InputError("LoRA: use_dora and lora_bias have no place here")
    alpha, patterns = own.get("lora_alpha"), own.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise InputError(
            f"LoRA: alpha_pattern in its metadata is a {type(patterns).__name__}; expected names and values"
        )
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(f"LoRA: alpha_pattern in its metadata: {key} is no pattern ({error})") from error
    return _Settings(
        None if alpha is None else ALPHAS.settle("LoRA: lora_alpha", alpha),
        {key: ALPHAS.settle(f"LoRA: alpha_pattern, {key}", value) for key, value in patterns.items()},
        bool(own.get("use_rslora")),
    )


def settled_scales(name: str, scales: Any) -> Any:
    """The scales of adapters, as `set_adapters` takes them: a number, None, or lists and dicts of these.

    Raises:
        InputError: one is no number, not finite or too large.
    """
    if isinstance(scales, Mapping):
        return {key: settled_scales(f"{name}[{key!r}]", scale) for key, scale in scales.items()}
    if isinstance(scales, list | tuple):
        return [settled_scales(f"{name}[{index}]", scale) for index, scale in enumerate(scales)]
    return None if scales is None else SCALE.settle(name, scales)


def _fitting(layer: str, change: Mapping[str, Tensor] | None, part: Part, settings: _Settings) -> _Low:
    if change is None:
        return _Low(torch.empty(0, part.columns), torch.empty(part.rows, 0))
    if change.keys() != {"A", "B"}:
        raise InputError(f"LoRA: {layer} has lora_{next(iter(change))} alone; it takes both factors")
    a, b = (change[factor].flatten(1) for factor in "AB")  # 1x1 convolutions there are linear layers here
    if a.shape[1] != part.columns or b.shape[0] != part.rows or len(a) != b.shape[1]:
        raise InputError(
            f"LoRA: {layer}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not change a weight of "
            f"{[part.rows, part.columns]}; it is for another network"
        )
    return _Low(a, settings.scale(layer, len(a)) * b)
