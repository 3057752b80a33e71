"""Closeness of pictures: formulas evaluated directly, and the laws that both figures keep."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longsana.encoders.closeness import BYTE, C1, C2, Closeness, luma, psnr, ssim
from longsana.shapes.scenes import draw_scene, render, to_bytes

each = pytest.mark.parametrize("figure", [psnr, ssim])
Figure = Callable[[Tensor, Tensor], Tensor]


def drawn() -> Tensor:
    """Two pictures of two scenes, (2, 2, 96, 160, 3)."""
    return to_bytes(render([draw_scene(7, index) for index in range(2)], range(0, 40, 20)))


def spoilt(pictures: Tensor, size: float) -> Tensor:
    """Pictures with the same noise, however large."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + size * noise).round().clamp(0, BYTE).to(torch.uint8)


def direct(picture: Tensor, other: Tensor) -> float:
    """SSIM window by window in float64, variances as means of squared deviations."""
    x, y = (luma(one).double() for one in (picture, other))
    bell = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    weight = bell[:, None] * bell / bell.sum() ** 2
    found = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (one[row : row + 11, column : column + 11] for one in (x, y))
            mean_a, mean_b = ((weight * one).sum() for one in (a, b))
            var_a, var_b = ((weight * (one - mean) ** 2).sum() for one, mean in ((a, mean_a), (b, mean_b)))
            both = (weight * (a - mean_a) * (b - mean_b)).sum()
            bright = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
            found.append(bright * (2 * both + C2) / (var_a + var_b + C2))
    return float(torch.stack(found).mean())


@each
def test_equal_pictures_are_as_close_as_can_be(figure: Figure) -> None:
    assert (figure(drawn(), drawn()) == (1 if figure is ssim else math.inf)).all()


@each
def test_closeness_is_mutual_and_picture_by_picture(figure: Figure) -> None:
    pictures, others = drawn(), spoilt(drawn(), 20)
    found = figure(pictures, others)
    assert found.shape == (2, 2)
    assert torch.equal(found, figure(others, pictures))
    assert torch.equal(found[1, 0], figure(pictures[1, 0][None], others[1, 0][None])[0])


@each
def test_noise_takes_pictures_apart(figure: Figure) -> None:
    found = torch.stack([figure(drawn(), spoilt(drawn(), size)) for size in (1, 2, 4, 8, 16, 32, 64)])
    assert (found.diff(dim=0) < 0).all()


@each
def test_mirrored_and_turned_pairs_are_as_close(figure: Figure) -> None:
    pictures, others = drawn(), spoilt(drawn(), 12)
    for same in (lambda one: one.flip(2), lambda one: one.flip(3), lambda one: one.transpose(2, 3)):
        torch.testing.assert_close(figure(same(pictures), same(others)), figure(pictures, others), rtol=1e-6, atol=1e-6)


def test_psnr_is_that_of_the_difference_alone() -> None:
    flat = torch.full((3, 12, 14, 3), 100, dtype=torch.uint8)
    expected = torch.tensor([20 * math.log10(BYTE / off) for off in (1, 10, 100)])
    torch.testing.assert_close(
        psnr(flat, flat + torch.tensor([1, 10, 100], dtype=torch.uint8).view(3, 1, 1, 1)), expected
    )
    pictures, others = drawn(), spoilt(drawn(), 12)
    torch.testing.assert_close(psnr(BYTE - pictures, BYTE - others), psnr(pictures, others))


def test_psnr_over_all_pixels_is_that_of_one_picture_of_them() -> None:
    pictures, others = drawn(), spoilt(drawn(), 12)
    closeness = Closeness()
    for one, other in zip(pictures, others, strict=True):
        closeness.add(one.double() / 127.5 - 1, other.double() / 127.5 - 1)
    whole = psnr(*(part.flatten(0, 2)[None] for part in (pictures, others)))
    assert closeness.decibels == pytest.approx(float(whole), abs=1e-4)


@pytest.mark.parametrize("size", [0, 3, 30, 200])
def test_ssim_is_its_formula_in_every_window(size: float) -> None:
    pictures = drawn()[0, :1, 30:43, 70:84]
    others = spoilt(pictures, size)
    assert float(ssim(pictures, others)) == pytest.approx(direct(pictures[0], others[0]), abs=1e-6)


def test_ssim_of_plain_pictures_compares_their_brightness() -> None:
    x, y = (torch.full((1, 11, 11, 3), value, dtype=torch.uint8) for value in (50, 200))
    assert float(ssim(x, y)) == pytest.approx((2 * 50 * 200 + C1) / (50**2 + 200**2 + C1), abs=1e-6)


def test_ssim_is_negative_where_one_picture_is_the_others_negative() -> None:
    noise = spoilt(torch.full((1, 20, 20, 3), 128, dtype=torch.uint8), 30)
    assert -1 <= float(ssim(noise, BYTE - noise)) < -0.5


@pytest.mark.parametrize("shape", [(1, 10, 20, 3), (2, 20, 20, 3)])
def test_what_has_no_ssim_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one shape, and 11 pixels wide"):
        ssim(torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, *shape[1:], dtype=torch.uint8))
