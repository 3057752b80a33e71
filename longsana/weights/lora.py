"""Layers that a LoRA changes, as diffusers calls them, of which several may be one layer here; and trained factors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.runtime.errors import InputError, did_you_mean
from longsana.weights.files import NETWORKS
from longsana.weights.names import INFORMATIVE, PAST, diffusers_config, foreign

BASE = "longsana_base"
"""The word in a LoRA file's header that says what network it is for; others' readers pass over it."""


class Part(NamedTuple):
    """A layer of diffusers: rows of the weight of one of ours.

    shape: of its weight there, where a linear layer may be a 1x1 convolution.
    """

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]


class Base(NamedTuple):
    """The network that a LoRA was trained on.

    network: its sizes, as a diffusers `config.json` has them. key: which network of a training checkpoint it is, and
    sha256: of its weights; None where that is not known.
    """

    network: dict[str, Any]
    key: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, config: ModelConfig, *, key: str | None = None, sha256: str | None = None) -> Base:
        sizes = diffusers_config(config)
        return cls({name: size for name, size in sizes.items() if name not in (*INFORMATIVE, *PAST)}, key, sha256)

    @classmethod
    def read(cls, values: Any, where: str) -> Base:
        """Read what `text` wrote, parsed.

        Raises:
            InputError: it is something else.
        """
        known = isinstance(values, Mapping) and isinstance(values.get("network"), Mapping)
        if not known or values.get("key") not in (None, *NETWORKS) or not isinstance(values.get("sha256"), str | None):
            raise InputError(f"{where}: its {BASE} does not say what network it is for; write the file again")
        return cls(dict(values["network"]), values.get("key"), values.get("sha256"))

    def text(self) -> str:
        """Return the value as a header has it."""
        return json.dumps({name: value for name, value in self._asdict().items() if value is not None})

    def check(self, config: ModelConfig) -> None:
        """Refuse another network than the one that the LoRA is for.

        Raises:
            InputError: its sizes are others.
        """
        here = Base.of(config).network
        both = [(name, size, here[name]) for name, size in self.network.items() if name in here]
        if wrong := [f"{name} {size} (here: {own})" for name, size, own in both if size != own]:
            raise InputError(f"LoRA: it is for another network, of {', '.join(wrong)}; put it on that one")


def linear_layers(network: LongSanaDiT) -> dict[str, dict[str, Part]]:
    """Linear layers by name, and the layers of diffusers that each is made of, in order."""
    found = {}
    for name, module in network.named_modules():
        # Wrapped by peft where a LoRA is on already.
        if "lora_" in name or not isinstance(module, nn.Linear):
            continue
        name = name.removesuffix(".base_layer")
        parts = foreign(f"{name}.weight", tuple(module.weight.shape), "diffusers")
        found[name] = {part.name.removesuffix(".weight"): Part(part.shape) for part in parts}
    return found


def targeted(network: LongSanaDiT, targets: Sequence[str], setting: str) -> dict[str, dict[str, Part]]:
    """Those of `linear_layers` of which some part is meant, with the parts that are, in order.

    targets: layers of diffusers, or the ends of their names from a dot on. setting: what the user calls them.

    Raises:
        InputError: a target means no linear layer.
    """
    layers = linear_layers(network)
    known = [layer for parts in layers.values() for layer in parts]
    short = list(dict.fromkeys(_short(layer) for layer in known))
    for target in targets:
        if any(_meant(layer, target) for layer in known):
            continue
        others = {
            part.name.removesuffix(leaf)
            for name, tensor in network.state_dict().items()
            for part in foreign(name.replace(".base_layer.", "."), tuple(tensor.shape), "diffusers")
            for leaf in (".weight", ".bias")
        }
        if _any_meant(others, target):
            what = "is no linear layer, and a LoRA changes those alone"
        elif within := [layer for layer in known if f".{target}." in f".{layer}"]:
            what = f"is no layer and has some, such as {within[0]}"
        else:
            what = f"means no layer{did_you_mean(target, [*short, *known])}"
        raise InputError(f"{setting}: '{target}' {what}; there are {', '.join(short)}, as diffusers calls them")
    chosen = {
        name: {layer: part for layer, part in parts.items() if any(_meant(layer, target) for target in targets)}
        for name, parts in layers.items()
    }
    return {name: parts for name, parts in chosen.items() if parts}


def _short(layer: str) -> str:
    """The end of a layer's name that says which it is: `to_q`, `to_out.0`."""
    words = layer.split(".")
    return ".".join(words[-2:] if words[-1].isdecimal() else words[-1:])


def _meant(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _any_meant(layers: set[str], target: str) -> bool:
    return any(_meant(layer, target) for layer in layers)


# Factors as training keeps them: of a layer here with n targeted parts, lora_A (n * rank, columns) holds those of its
# parts one under another, and lora_B (rows of the targeted parts, rank) too. So each part has a rank of its own.
A, B = "lora_A", "lora_B"


def plain_trained(
    factors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Part]], scale: float
) -> dict[str, Tensor]:
    """Factors by the names of diffusers' layers, `{layer}.lora_A.weight` (rank, columns) and `.lora_B.weight` (rows,
    rank), with the pixel of a 1x1 convolution where the layer is one; alpha is then the rank.

    Args:
        factors: `{layer of ours}.lora_A.weight` and `.lora_B.weight`, as training keeps them.
        layers: of `targeted`.
        scale: alpha / rank, which is put into lora_B.
    """
    found: dict[str, Tensor] = {}
    for name, parts in layers.items():
        above, below = (factors[f"{name}.{factor}.weight"].detach() for factor in (A, B))
        for (layer, part), a, b in zip(
            parts.items(), above.chunk(len(parts)), below.split([part.rows for part in parts.values()]), strict=True
        ):
            pixel = (1,) * (len(part.shape) - 2)
            found[f"{layer}.{A}.weight"] = a.reshape(*a.shape, *pixel).contiguous()
            found[f"{layer}.{B}.weight"] = (scale * b).reshape(*b.shape, *pixel).contiguous()
    return found


@torch.no_grad()
def fuse(weights: dict[str, Tensor], fused: Mapping[str, Tensor], what: str, dtype: torch.dtype | None = None) -> None:
    """Add a LoRA's change to weights in place, in float32 or finer.

    Args:
        weights: by our names, (rows, columns) where they are changed.
        fused: `{layer of ours}.lora_A.weight` (r, columns) and `.lora_B.weight` (rows, r), whose product is the change.
        what: what the user calls the LoRA.
        dtype: of the sums; None keeps each weight's.

    Raises:
        InputError: a sum is not finite in its weight's dtype.
    """
    for key, a in fused.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        if factor == A:
            change = fused[f"{name}.{B}.weight"].double() @ a.double()
            weight = weights[f"{name}.weight"]
            changed = (weight.double() + change).to(dtype or weight.dtype)
            if not changed.isfinite().all():
                raise InputError(f"{what}: {name}.weight would not be finite in {str(changed.dtype)[6:]} with it")
            weights[f"{name}.weight"] = changed
