"""Losses of training: flow matching, ODE regression, consistency and distribution matching (method.md 7.4 to 7.6).

Videos are (B, C, T, H, W) in any dtype, without the frames that do not count. All is computed in float32 or finer: the
published code forms scores and gradient of distribution matching in bfloat16 (method.md 7.9).
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Scalar: the mean of weight (velocity - (noise - x0))^2; each (B, C, T, H, W), weight (B, T), None: 1."""
    assert velocity.shape == x0.shape == noise.shape, (velocity.shape, x0.shape, noise.shape)
    error = (_wide(velocity) - (_wide(noise) - _wide(x0))).square()
    return error.mean() if weight is None else (weight.to(error.dtype) * error.mean((1, 3, 4))).mean()


def trajectory_loss(x0_predicted: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Scalar: the mean of (x0_predicted - x0)^2 over the frames whose timestep is not 0; t: (B, T).

    0, with a graph to x0_predicted, when there is no such frame: every rank must take part in the backward pass.
    """
    assert x0_predicted.shape == x0.shape and t.shape == (x0.shape[0], x0.shape[2]), (x0_predicted.shape, t.shape)
    # Without asking how many frames there are, which would wait for the GPU.
    counts = (t != 0)[:, None, :, None, None]
    error = torch.where(counts, _wide(x0_predicted) - _wide(x0), 0)
    return error.square().sum() / counts.expand_as(error).sum().clamp(min=1)


def consistency_loss(x0_predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """Scalar: sqrt(|x0_predicted - target|^2 + c^2) - c, over the frames of a clip whose timestep is not 0; t: (B, T).

    The mean over clips, per root of the numbers in a frame, with c = 0.00054 times the root of the clip's numbers: the
    pseudo-Huber metric of Song and Dhariwal (2023), which counts a clip that is far off less than a square would. A
    clip without such a frame counts as 0, with a graph to x0_predicted: every rank takes part in the backward pass.
    """
    assert x0_predicted.shape == target.shape and t.shape == (target.shape[0], target.shape[2]), target.shape
    counts = (t != 0)[:, None, :, None, None]
    error = torch.where(counts, _wide(x0_predicted) - _wide(target), 0).flatten(1)
    c, numbers = 0.00054 * error.shape[1] ** 0.5, error.shape[1] / t.shape[1]
    return ((error.square().sum(1) + c * c).sqrt() - c).mean() / numbers**0.5


@torch.no_grad()
def dmd_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(B, C, T, H, W): (fake - real) / mean|x - real|, the mean over all but the batch; no graph.

    x: the student's video; fake, real: predictions of it, by critic and teacher, from one noisy version of x. What is
    not finite stays so: the loop skips and counts such steps, where the published code makes a NaN 0.
    """
    assert x.shape == fake.shape == real.shape, (x.shape, fake.shape, real.shape)
    x, fake, real = _wide(x), _wide(fake), _wide(real)
    return (fake - real) / (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Scalar: half the mean of (x - constant(x - gradient))^2; both (B, C, T, H, W).

    Its derivative by x is gradient / (number of elements).
    """
    assert x.shape == gradient.shape, (x.shape, gradient.shape)
    # In float64, where x - (x - gradient) is the gradient and not what rounding left of it.
    target = (x.double() - gradient.double()).detach()
    loss = 0.5 * (x.double() - target).square().mean()
    return loss.to(_wide(x).dtype)


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guide (B, C, T, H, W) by cond + scale (cond - uncond): classifier-free guidance of the usual weight scale + 1."""
    return _wide(cond) + scale * (_wide(cond) - _wide(uncond))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
