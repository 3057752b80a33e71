"""Losses and their gradients against the formulas, in float64."""

from __future__ import annotations

import pytest
import torch

from longsana.flow.losses import dmd_gradient, dmd_loss, flow_loss, guided, trajectory_loss

B, C, T, H, W = 2, 3, 4, 2, 3
NEAR = {"rtol": 1e-12, "atol": 1e-14}


def videos(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, B, C, T, H, W, generator=rng, dtype=torch.float64).to(dtype).unbind())


def gradient_of(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_flow_loss_and_its_gradient():
    velocity, x0, noise = videos(3)
    velocity.requires_grad_()
    loss = flow_loss(velocity, x0, noise)
    error = velocity.detach() - (noise - x0)
    elements = B * C * T * H * W
    torch.testing.assert_close(loss, (error**2).sum() / elements, **NEAR)
    torch.testing.assert_close(gradient_of(loss, velocity), 2 * error / elements, **NEAR)


def test_a_weighted_flow_loss_counts_frames_by_their_weights():
    velocity, x0, noise = videos(3, 1)
    weight = torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    error = (velocity - (noise - x0)) ** 2
    expected = (error * weight[:, None, :, None, None]).sum() / error.numel()
    torch.testing.assert_close(flow_loss(velocity, x0, noise, weight), expected, **NEAR)
    torch.testing.assert_close(flow_loss(velocity, x0, noise, torch.ones_like(weight)), error.mean(), **NEAR)


def test_flow_loss_is_least_for_the_true_velocity():
    x0, noise = videos(2)
    assert flow_loss(noise - x0, x0, noise) == 0
    assert flow_loss(x0 - noise, x0, noise) > 1


@pytest.mark.parametrize(
    ("t", "kept"),
    [
        ([[1000, 960, 727, 889], [889, 727, 960, 727]], [4, 4]),
        ([[0, 0, 727, 889], [960, 0, 0, 0]], [2, 1]),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], [0, 4]),
    ],
)
def test_trajectory_loss_and_its_gradient(t, kept):
    predicted, x0 = videos(2)
    predicted.requires_grad_()
    t = torch.tensor(t)
    loss = trajectory_loss(predicted, x0, t)
    error = torch.zeros_like(x0)
    for b in range(B):
        for f in range(T):
            if t[b, f] != 0:
                error[b, :, f] = predicted.detach()[b, :, f] - x0[b, :, f]
    elements = C * sum(kept) * H * W
    torch.testing.assert_close(loss, (error**2).sum() / elements, **NEAR)
    torch.testing.assert_close(gradient_of(loss, predicted), 2 * error / elements, **NEAR)


def test_trajectory_loss_of_clean_frames_alone_is_zero_with_a_graph():
    predicted, x0 = videos(2)
    predicted.requires_grad_()
    loss = trajectory_loss(predicted, x0, torch.zeros(B, T))
    assert loss == 0
    assert torch.equal(gradient_of(loss, predicted), torch.zeros_like(x0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clean_frames_do_not_count_whatever_is_in_them(bad):
    first, second = videos(2)
    spoiled = first.clone()
    spoiled[:, :, [0, 3]] = bad
    spoiled.requires_grad_()
    t = torch.tensor([0, 727, 960, 0]).expand(B, T)
    loss = trajectory_loss(spoiled, second, t)
    assert torch.equal(loss, trajectory_loss(first, second, t))
    assert torch.equal(gradient_of(loss, spoiled)[:, :, [0, 3]], torch.zeros(B, C, 2, H, W).double())


def test_dmd_gradient_is_its_formula():
    x, fake, real = videos(3)
    gradient = dmd_gradient(x, fake, real)
    for b in range(B):
        scale = sum(abs(float(d)) for d in (x[b] - real[b]).flatten()) / (C * T * H * W)
        torch.testing.assert_close(gradient[b], (fake[b] - real[b]) / scale, **NEAR)


def test_dmd_gradient_of_a_sample_does_not_depend_on_the_others():
    x, fake, real = videos(3)
    x[1] *= 100
    alone = torch.cat([dmd_gradient(x[b : b + 1], fake[b : b + 1], real[b : b + 1]) for b in range(B)])
    assert torch.equal(dmd_gradient(x, fake, real), alone)


def test_dmd_gradient_keeps_no_graph():
    x, fake, real = (video.requires_grad_() for video in videos(3))
    assert not dmd_gradient(x, fake, real).requires_grad


def test_dmd_gradient_shows_what_is_not_finite():
    x, fake, real = videos(3)
    fake[1, 0, 0, 0, 0] = float("nan")
    assert dmd_gradient(x, fake, real)[1].isnan().sum() == 1
    assert dmd_gradient(x, fake, real)[0].isfinite().all()


def test_derivative_of_the_dmd_loss_is_the_gradient():
    x, gradient = videos(2)
    x.requires_grad_()
    gradient.requires_grad_()
    loss = dmd_loss(x, gradient)
    expected = gradient.detach() / (B * C * T * H * W)
    torch.testing.assert_close(loss, 0.5 * (expected * gradient).sum(), **NEAR)
    by_x, by_gradient = torch.autograd.grad(loss, [x, gradient], allow_unused=True)
    torch.testing.assert_close(by_x, expected, **NEAR)
    assert by_gradient is None


def test_a_small_dmd_gradient_survives_float32():
    """x - (x - g) in float32 would round g to a multiple of 6e-5 here."""
    x, gradient = videos(2, dtype=torch.float32)
    x, gradient = (1000 + x.abs()).requires_grad_(), 1e-4 * gradient
    torch.testing.assert_close(gradient_of(dmd_loss(x, gradient), x), gradient / x.numel(), rtol=1e-6, atol=0)


def test_dmd_of_a_linear_student_is_an_outer_product():
    """x = W z by channels, with linear scores: the gradient on W is the sum of (fake - real) / scale times z^T."""
    z, fake_noise, real_noise = videos(3)
    rng = torch.Generator().manual_seed(1)
    weight, fake_weight, real_weight = torch.randn(3, C, C, generator=rng, dtype=torch.float64).unbind()
    weight.requires_grad_()
    fake_weight.requires_grad_()

    def linear(w: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        return torch.einsum("dc,bcthw->bdthw", w, video)

    x = linear(weight, z)
    fake, real = linear(fake_weight, x + fake_noise), linear(real_weight, x + real_noise)
    loss = dmd_loss(x, dmd_gradient(x, fake, real))
    by_student, by_critic = torch.autograd.grad(loss, [weight, fake_weight], allow_unused=True)

    expected = torch.zeros(C, C, dtype=torch.float64)
    for b in range(B):
        scale = (x[b] - real[b]).abs().mean()
        for f in range(T):
            direction = ((fake[b, :, f] - real[b, :, f]) / scale).flatten(1)
            expected += direction @ z[b, :, f].flatten(1).T / (B * C * T * H * W)
    torch.testing.assert_close(by_student, expected.detach(), **NEAR)
    assert by_critic is None, "the critic learns by its own loss alone"


def test_a_step_moves_from_the_fake_prediction_towards_the_real_one():
    x, fake, real = videos(3)
    x.requires_grad_()
    step = -gradient_of(dmd_loss(x, dmd_gradient(x, fake, real)), x)
    for b in range(B):
        away, towards = (fake - real)[b].flatten(), (real - fake)[b].flatten()
        assert torch.nn.functional.cosine_similarity(step[b].flatten(), towards, dim=0) > 0.999999
        assert step[b].flatten() @ away < 0


def test_dmd_settles_where_the_real_score_wants_it():
    """Scores of Gaussians seen clean, real around 2 and fake around the student itself: the student goes to 2."""
    x = videos(1)[0].requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.02 * x.numel())
    for _ in range(400):
        mean = x.detach().mean(dim=(1, 2, 3, 4), keepdim=True)
        fake, real = 0.5 * (x.detach() + mean), 0.5 * (x.detach() + 2)
        optimizer.zero_grad()
        dmd_loss(x, dmd_gradient(x, fake, real)).backward()
        optimizer.step()
    torch.testing.assert_close(x.mean(dim=(1, 2, 3, 4)), torch.full((B,), 2.0).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guided(scale):
    cond, uncond = videos(2)
    usual = uncond + (scale + 1) * (cond - uncond)
    torch.testing.assert_close(guided(cond, uncond, scale), usual, **NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    low = videos(3, dtype=dtype)
    first, second, third = (video.float() for video in low)
    t = torch.full((B, T), 727)
    pairs = [
        (flow_loss(*low), flow_loss(first, second, third)),
        (trajectory_loss(low[0], low[1], t), trajectory_loss(first, second, t)),
        (dmd_gradient(*low), dmd_gradient(first, second, third)),
        (dmd_loss(low[0], low[1]), dmd_loss(first, second)),
        (guided(low[0], low[1], 3.0), guided(first, second, 3.0)),
    ]
    for ours, expected in pairs:
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_shapes_that_would_broadcast_are_refused():
    x, y, z = videos(3)
    for call in (
        lambda: flow_loss(x, y[:1], z),
        lambda: trajectory_loss(x, y[:, :1], torch.ones(B, T)),
        lambda: trajectory_loss(x, y, torch.ones(B)),
        lambda: dmd_gradient(x, y, z[:, :, :1]),
        lambda: dmd_loss(x, y[:1]),
    ):
        with pytest.raises(AssertionError):
            call()
