"""A network that is trained, with its optimizer and its running average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longsana.models.dit import LongSanaDiT
from longsana.training.config import AdamWConfig, TrainingConfig


class Learner:
    """A network, AdamW over all of its weights, and an exponential moving average of them.

    every: iterations from one of its updates to the next; it learns in iterations 0, every, 2 every, ...
    ema_weight: share of the old average that an update keeps; 0 keeps no average.
    ema_start: iterations before which the average is just the weights.

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
    ) -> None:
        self.name, self.model, self.settings, self.every = name, model, settings, every
        self.weights = dict(model.named_parameters())
        # Fused: one kernel for all weights on a GPU.
        fused = next(iter(self.weights.values())).device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        # Made now rather than in the first step: a checkpoint is then written from, and read into, live tensors.
        for weight in self.weights.values():
            self.optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._ema_weight, self._ema_start = ema_weight, ema_start
        self.average: dict[str, Tensor] = {}
        if ema_weight > 0:
            self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def learns_in(self, step: int) -> bool:
        return step % self.every == 0

    def update(self, step: int) -> Tensor:
        """Clip the gradients, step, and update the average; returns their norm before clipping, a scalar on the host.

        A norm that is not finite changes nothing. The gradients are gone either way.
        """
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        if norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(self.weights.values(), self.settings.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step)
            self.optimizer.step()
            self._average(step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def skip(self) -> Tensor:
        """Throw the gradients away; returns the norm that says so, a scalar NaN."""
        self.optimizer.zero_grad(set_to_none=True)
        return torch.tensor(float("nan"), dtype=torch.float32, device="cpu")

    def lr(self, step: int) -> float:
        """A constant after a linear warm-up; counted in this learner's own updates."""
        return self.settings.lr * min(1.0, (step // self.every + 1) / max(self.settings.num_warmup_steps, 1))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if not self.average:
            return
        share = 1.0 if step < self._ema_start else 1 - self._ema_weight
        # Local shards: DTensor would check the placements of every one.
        torch._foreach_lerp_(
            [_local(value) for value in self.average.values()],
            [_local(self.weights[name].detach()) for name in self.average],
            share,
        )

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
            for part, value in self.optimizer.state[weight].items()
        }
        buffers = dict(self.model.named_buffers())
        groups: dict[str, dict[str, Tensor]] = {
            self.name: {name: weight.detach() for name, weight in self.weights.items()} | buffers,
            f"optimizer.{self.name}": optimizer,
        }
        if self.average:
            groups[f"{self.name}_ema"] = self.average | buffers
        return groups


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    """The dtype in which networks that learn compute; their weights are float32."""
    return torch.bfloat16 if config.train.mixed_precision else torch.float32


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
