"""LoRA weights of diffusers' layers for the same layers here, of which some are one where diffusers has three."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longsana.models.dit import LongSanaDiT
from longsana.models.naming import foreign
from longsana.runtime.errors import InputError, did_you_mean


class _Part(NamedTuple):
    """A layer of diffusers: rows of the weight of one of ours."""

    rows: int
    columns: int


class _Low(NamedTuple):
    """A low-rank change of a layer's weight: b @ a, with a (rank, columns) and b (rows, rank)."""

    a: Tensor
    b: Tensor


def fused_adapter(
    state_dict: Mapping[str, Tensor], network: LongSanaDiT, *, prefix: str | None, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same change of our layers, and its settings for peft.

    Of layers that are one here, the factors are stacked: a = [a_q; a_k; a_v] and b = diag(b_q, b_k, b_v), whose
    product is the three products. alpha / rank is put into b, so alpha is the rank.

    Args:
        state_dict: `{prefix}.{layer of diffusers}.lora_A.weight` and `.lora_B.weight`.
        metadata: peft's settings as saved beside them; None means alpha = rank.

    Raises:
        InputError: a name, shape or setting has no place here.
    """
    settings = _settings(metadata or {}, prefix)
    changes = _changes(state_dict, prefix)
    fused: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    # peft's names of our layers in a model that holds the network as `network`.
    for name, parts in _layers(network).items():
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
    if changes:
        known = [layer for parts in _layers(network).values() for layer in parts]
        first = next(iter(changes))
        raise InputError(
            f"LoRA: {len(changes)} layers that none can be put on here: {', '.join(list(changes)[:3])}"
            f"{did_you_mean(first, known)}; known are the linear layers of the transformer, as diffusers calls them"
        )
    if not ranks:
        raise InputError(f"LoRA: no weights of the transformer in it (names that begin with '{prefix}.')")
    rank = next(iter(ranks.values()))
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": list(ranks),
    }
    return fused, config


def _layers(network: LongSanaDiT) -> dict[str, dict[str, _Part]]:
    """Linear layers by name, and the layers of diffusers that each is made of, in order."""
    found = {}
    for name, module in network.named_modules():
        # Wrapped by peft where another LoRA is loaded already.
        if "lora_" in name or not isinstance(module, nn.Linear):
            continue
        name = name.removesuffix(".base_layer")
        parts = foreign(f"{name}.weight", tuple(module.weight.shape), "diffusers")
        found[name] = {part.name.removesuffix(".weight"): _Part(*part.shape[:2]) for part in parts}
    return found


def _changes(state_dict: Mapping[str, Tensor], prefix: str | None) -> dict[str, dict[str, Tensor]]:
    """Factors "A" and "B" by the name of their layer."""
    changes: dict[str, dict[str, Tensor]] = {}
    start = f"{prefix}." if prefix else ""
    for key, tensor in state_dict.items():
        if not key.startswith(start):
            continue
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key.removeprefix(start))
        if match is None:
            raise InputError(f"LoRA: {key}: expected names that end in .lora_A.weight or .lora_B.weight")
        changes.setdefault(match[1], {})[match[2]] = tensor
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
    return _Settings(own.get("lora_alpha"), own.get("alpha_pattern") or {}, bool(own.get("use_rslora")))


def _fitting(layer: str, change: Mapping[str, Tensor] | None, part: _Part, settings: _Settings) -> _Low:
    if change is None:
        return _Low(torch.empty(0, part.columns), torch.empty(part.rows, 0))
    if change.keys() != {"A", "B"}:
        raise InputError(f"LoRA: {layer} has lora_{next(iter(change))} alone; it takes both factors")
    a, b = (change[factor].flatten(1) for factor in "AB")  # 1x1 convolutions there are linear layers here
    if a.shape[1] != part.columns or b.shape[0] != part.rows or len(a) != b.shape[1]:
        raise InputError(
            f"LoRA: {layer}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not change a weight of "
            f"{list(part)}; it is for another network"
        )
    return _Low(a, settings.scale(layer, len(a)) * b)
