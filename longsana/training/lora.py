"""A LoRA on a network that trains: low-rank factors learn, by peft, and the weights stay as they are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longsana.config import ModelConfig
from longsana.flow.noise import keyed_generator
from longsana.models.dit import LongSanaDiT
from longsana.runtime.errors import InputError
from longsana.training.config import LoraConfig
from longsana.weights.build import empty_model
from longsana.weights.lora import linear_layers, targeted

ADAPTER = "trained"
TARGETS = "train.lora.targets"


class StackedUp(nn.Module):
    """lora_B of a layer here of which some parts are targeted: each has factors of its own, of the same rank.

    weight: (rows of the targeted parts, rank), theirs one under another. rows: of each part of the layer, and whether
    it is targeted.
    """

    def __init__(self, rows: list[tuple[int, bool]], rank: int, device: torch.device) -> None:
        super().__init__()
        self.rows, self.rank = rows, rank
        chosen = sum(count for count, targeted in rows if targeted)
        self.weight = nn.Parameter(torch.zeros(chosen, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., targeted parts * rank), what lora_A gives; returns (..., rows of the layer), 0 in other parts."""
        low = iter(x.split(self.rank, dim=-1))
        weights = iter(self.weight.split([count for count, targeted in self.rows if targeted]))
        parts = [
            F.linear(next(low), next(weights)) if targeted else x.new_zeros(*x.shape[:-1], count)
            for count, targeted in self.rows
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def check_peft() -> None:
    """
    Raises:
        InputError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise InputError("train.lora.rank: LoRA needs peft: pip install -e '.[lora]'")


def put_on(model: LongSanaDiT, settings: LoraConfig, *key: int | str) -> LongSanaDiT:
    """Put factors on the targeted layers of a network, in place; they alone learn, in float32, and change nothing yet.

    key: what lora_A is a function of, with the layer's name; on any device, or without memory on the meta device.

    Raises:
        InputError: a target means no linear layer.
    """
    import peft  # brings transformers, which takes seconds

    assert settings.rank is not None
    layers, parts = targeted(model, settings.targets, TARGETS), linear_layers(model)
    ranks = {name: settings.rank * len(chosen) for name, chosen in layers.items()}
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=settings.rank,
            rank_pattern=ranks,
            alpha_pattern={name: rank * settings.scale for name, rank in ranks.items()},
            target_modules=list(ranks),
        ),
        model,
        ADAPTER,
    )
    model.requires_grad_(False)
    for name, chosen in layers.items():
        layer: Any = model.get_submodule(name)
        weight = layer.base_layer.weight
        a = nn.Linear(weight.shape[1], ranks[name], bias=False, dtype=torch.float32, device=weight.device)
        with torch.no_grad():
            bound = weight.shape[1] ** -0.5  # as peft fills it
            values = torch.empty(a.weight.shape, dtype=torch.float32, device="cpu")
            a.weight.copy_(values.uniform_(-bound, bound, generator=keyed_generator(*key, name)))
        rows = [(part.rows, layer_there in chosen) for layer_there, part in parts[name].items()]
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = a, StackedUp(rows, settings.rank, weight.device)
    return model


def base_of(settings: ModelConfig, dtype: torch.dtype) -> tuple[Any, ...]:
    """Name all that decides frozen weights: networks of which it is equal share them."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in empty_model(settings).state_dict().items())
    return settings.load_from, settings.checkpoint_key, dtype, shapes


def plain_name(name: str) -> str:
    """Name a factor as files do, `{layer}.lora_A.weight`, from its name as a parameter."""
    return name.replace(f".{ADAPTER}.", ".")
