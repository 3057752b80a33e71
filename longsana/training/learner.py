"""A network that is trained, with its optimizer and its running average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longsana.models.dit import LongSanaDiT
from longsana.runtime.gpu import has_bfloat16
from longsana.training.config import AdamWConfig, TrainingConfig
from longsana.training.muon import BatchedMuon


class Learner:
    """A network, AdamW over all weights that learn or all but those of Muon, and a moving average of them.

    every: iterations from one of its updates to the next; it learns in iterations 0, every, 2 every, ...
    ema_weight: share of the old average that an update keeps; 0 keeps no average.
    ema_start: iterations before which the average is just the weights.
    ema_relative_width: None, or the width of an average by a power of the update's number; see `power`.

    Weights, gradients, moments and average are shards of equal shape under FSDP2; nothing here gathers them.
    """

    def __init__(
        self,
        name: str,
        model: LongSanaDiT,
        settings: AdamWConfig,
        *,
        every: int = 1,
        ema_weight: float = 0.0,
        ema_start: int = 0,
        ema_relative_width: float | None = None,
    ) -> None:
        self.name, self.model, self.settings, self.every = name, model, settings, every
        everything = dict(model.named_parameters())
        self.weights = {name: weight for name, weight in everything.items() if weight.requires_grad}
        # Where all else is frozen, a LoRA learns; a checkpoint of it holds nothing of what the base has.
        self._buffers = dict(model.named_buffers()) if len(self.weights) == len(everything) else {}
        matrices = [weight for name, weight in self.weights.items() if learns_by_muon(settings, name, weight)]
        others = [weight for name, weight in self.weights.items() if not learns_by_muon(settings, name, weight)]
        # Of each optimizer, its rate before warm-up and decay.
        self.optimizers: dict[torch.optim.Optimizer, float] = {_adamw(others, settings): settings.lr}
        if settings.muon_lr is not None:
            muon = BatchedMuon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay)
            self.optimizers[muon] = settings.muon_lr
        self._ema_weight, self._ema_start = ema_weight, ema_start
        self._ema_power = None if ema_relative_width is None else power(ema_relative_width)
        self.average: dict[str, Tensor] = {}
        if ema_weight > 0:
            self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def learns_in(self, step: int) -> bool:
        return step % self.every == 0

    def without_gradient(self) -> list[str]:
        """Name the weights that the backward passes since the last update have given none."""
        return [name for name, weight in self.weights.items() if weight.grad is None]

    def update(self, step: int) -> Tensor:
        """Clip the gradients, step, and update the average; returns their norm before clipping, a scalar on the host.

        A norm that is not finite changes nothing. The gradients are gone either way.
        """
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        if norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(self.weights.values(), self.settings.max_grad_norm, norm)
            for optimizer, lr in self.optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = lr * self.pace(step)
                optimizer.step()
            self._average(step)
        self._forget_gradients()
        return norm

    def skip(self) -> Tensor:
        """Throw the gradients away; returns the norm that says so, a scalar NaN."""
        self._forget_gradients()
        return torch.tensor(float("nan"), dtype=torch.float32, device="cpu")

    def pace(self, step: int) -> float:
        """The factor of learning rates: 1 after a linear warm-up, in the end 1 / sqrt(update / decay_after).

        Counted in this learner's own updates.
        """
        update, settings = step // self.every + 1, self.settings
        warm = min(1.0, update / max(settings.num_warmup_steps, 1))
        return warm / max(1.0, update / (settings.decay_after or update)) ** 0.5

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if not self.average:
            return
        share = 1.0 if step < self._ema_start else 1 - self._kept(step)
        # Local shards: DTensor would check the placements of every one.
        torch._foreach_lerp_(
            [_local(value) for value in self.average.values()],
            [_local(self.weights[name].detach()) for name in self.average],
            share,
        )

    def _kept(self, step: int) -> float:
        """The share of the old average that this update keeps."""
        if self._ema_power is None:
            return self._ema_weight
        # Updates until this one, from the last before the start on: a weight of update n then counts as n^power.
        updates = step // self.every - -(-self._ema_start // self.every) + 2
        return (1 - 1 / updates) ** (self._ema_power + 1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network computes with the average inside the block."""
        assert self.average, "this learner keeps no average"
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        try:
            self._set(self.average)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # forward passes without gradients may have left whole weights, of the old values

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather all that a checkpoint needs of this learner, as live tensors by group, with the network's buffers."""
        optimizer = {
            f"{name}.{part}": value
            for name, weight in self.weights.items()
            for owner in self.optimizers
            for part, value in owner.state.get(weight, {}).items()
        }
        buffers = self._buffers
        groups: dict[str, dict[str, Tensor]] = {
            self.name: {name: weight.detach() for name, weight in self.weights.items()} | buffers,
            f"optimizer.{self.name}": optimizer,
        }
        if self.average:
            groups[f"{self.name}_ema"] = self.average | buffers
        return groups


def learns_by_muon(settings: AdamWConfig, name: str, weight: Tensor) -> bool:
    """Tell whether a weight is of those that Muon steps: matrices of linear layers within blocks, (out, in).

    Not: what leads into the blocks and out of them, convolutions, biases, norms and modulations.
    """
    matrix = name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2
    return settings.muon_lr is not None and matrix


def power(relative_width: float) -> float:
    """The g of an average in which update n counts as n^g, as in edm2 (Karras et al. 2024), from its width.

    relative_width: standard deviation of the updates' numbers under these counts, as a share of their number so far,
    sqrt(g + 1) / ((g + 2) sqrt(g + 3)).
    """
    squared = relative_width**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


def _adamw(weights: list[nn.Parameter], settings: AdamWConfig) -> torch.optim.Optimizer:
    # Fused: one kernel for all weights on a GPU.
    fused = weights[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(
        weights,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
    # Made now rather than in the first step: a checkpoint is then written from, and read into, live tensors.
    for weight in weights:
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype in which networks that learn compute; their weights are float32."""
    return torch.bfloat16 if config.train.mixed_precision and has_bfloat16() else torch.float32


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
