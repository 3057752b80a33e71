"""Muon (Jordan et al. 2024) for networks of many small matrices: as few launches for all as for one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ADAMW_RMS = 0.2
"""Root mean square of AdamW's usual step, per rate, which Muon's have too (Liu et al. 2025, arXiv 2502.16982)."""

TOGETHER = 1 << 24
"""Numbers in matrices that step together, at most: large ones need no company, and take memory meanwhile."""


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with steps as large as AdamW's of the same rate; matrices of one shape step together.

    The slow twin is the class that it derives from with `adjust_lr_fn="match_rms_adamw"`, which launches some twenty
    kernels for each matrix.
    """

    def __init__(self, weights: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(weights, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        # Made now rather than in the first step: a checkpoint is then written from, and read into, live tensors.
        for weight in weights:
            self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step all weights that have a gradient. closure: must be None."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                most = max(1, TOGETHER // shape.numel())
                for first in range(0, len(weights), most):
                    self._step(weights[first : first + most], group)

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        moments = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        towards = torch.stack(torch._foreach_lerp(gradients, moments, group["momentum"]))  # Nesterov's
        steps = orthogonalised(towards, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(weights[0].dtype)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * ADAMW_RMS * max(weights[0].shape) ** 0.5
        torch._foreach_add_(weights, list(steps.unbind()), alpha=-rate)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices (N, A, B) near 1 by Newton and Schulz's iteration, in bfloat16.

    coefficients: a, b, c of X <- a X + (b X X' + c (X X')^2) X.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
