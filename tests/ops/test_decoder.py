"""What lies between a decoder's convolutions: twins against formulas, kernels against twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longsana.ops.reference import add_shortcut, copy_into, norm_silu_into, relu_into

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 1, 1, 1, 12),
    (2, 3, 4, 5, 12),
    (1, 2, 3, 7, 96),
    (1, 1, 5, 2, 384),
    (2, 1, 3, 3, 1),
    (1, 2, 9, 5, 130),
    (1, 1, 1, 3, 5000),  # one pixel is more than a program's usual block
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int) -> Tensor:
    """Of any length between 1e-2 and 1e2, and one that is zero."""
    x = draw(*shape) * 10 ** draw(*shape[:4], 1, seed=1).clamp(-2, 2)
    x[0, 0, -1, -1] = 0
    return x


def room(x: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN with two more frames and a border of one pixel, and the view of it that is to be written."""
    batch, frames, height, width, channels = x.shape
    buffer = x.new_full((batch, 2 + frames, height + 2, width + 2, channels), float("nan"))
    return buffer, buffer[:, 2:, 1:-1, 1:-1]


def test_the_twin_is_the_formula_of_the_ltx_2_decoder() -> None:
    """Its RMSNorm (diffusers' PerChannelRMSNorm) has no weight, and an epsilon."""
    x = pixels(2, 1, 2, 3, 5).double()
    out = torch.empty_like(x)
    norm_silu_into(x, None, out, eps=1e-2)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(out, y * y.sigmoid())


def test_the_twin_is_the_formula() -> None:
    x, gamma = pixels(2, 1, 2, 3, 5).double(), draw(5, seed=2).double()
    out = torch.empty_like(x)
    norm_silu_into(x - 0.5, gamma, out, torch.full_like(gamma, 0.5))
    for pixel, given in zip(x.view(-1, 5), out.view(-1, 5), strict=True):
        y = pixel / max(sum(float(value) ** 2 for value in pixel) ** 0.5, 1e-12) * 5**0.5 * gamma
        torch.testing.assert_close(given, y / (1 + (-y).exp()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_writes_its_view_alone(dtype: torch.dtype) -> None:
    x, gamma = pixels(2, 2, 3, 4, 6).to(dtype), draw(6, seed=2).to(dtype)
    buffer, view = room(x)
    norm_silu_into(x, gamma, view)
    assert view.isfinite().all()
    assert buffer.isfinite().sum() == view.numel()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_twin(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    fused = pytest.importorskip("longsana.ops.decoder").norm_silu_into
    x, gamma, given = (
        values.to(DEVICE, dtype) for values in (pixels(*shape), *(draw(shape[-1], seed=i) for i in (2, 3)))
    )
    for gain, bias, eps in ((gamma, None, 0.0), (gamma, given, 0.0), (None, given, 1e-2)):
        expected = torch.empty(shape, dtype=torch.float64, device=DEVICE)
        wide = [None if values is None else values.double() for values in (gain, bias)]
        norm_silu_into(x.double(), wide[0], expected, wide[1], eps)
        buffer, view = room(x)
        fused(x, gain, view, bias, eps)
        torch.testing.assert_close(view.double(), expected, atol=1e-5, rtol=tolerance)
        assert buffer.isfinite().sum() == view.numel()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shortcut_is_added_in_place(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """By the twin and by the kernel, which writes nothing beyond."""
    fused = pytest.importorskip("longsana.ops.decoder").add_shortcut
    values = (draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2))
    x, shortcut, bias = (value.to(DEVICE, dtype) for value in values)
    for add in (add_shortcut, fused):
        for more in (None, bias):
            room = x.new_full((x.numel() + 9,), float("nan"))
            inside = room[: x.numel()].view_as(x).copy_(x)
            assert add(inside, shortcut, more) is inside
            expected = x.double() + shortcut.double() + (0 if more is None else more.double())
            torch.testing.assert_close(inside.double(), expected, atol=1e-6, rtol=tolerance)
            assert room.isfinite().sum() == x.numel()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_below_zero_becomes_zero(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """By the twin and by the kernel: into a view with other strides, or in place; a NaN stays one."""
    fused = pytest.importorskip("longsana.ops.decoder").relu_into
    batch, frames, height, width, channels = shape
    values = (draw(batch, height, width, frames, channels), draw(*shape, seed=1), draw(channels, seed=2))
    x, shortcut, bias = (value.to(DEVICE, dtype) for value in values)
    x = x.permute(0, 3, 1, 2, 4)  # as what was made of several frames' channels
    _, beside = room(shortcut)
    beside.copy_(shortcut)
    for relu in (relu_into, fused):
        for added, more in ((None, None), (bias, None), (None, beside), (bias, beside)):
            terms = [x.double(), *(term.double() for term in (added, more) if term is not None)]
            expected = sum(terms[1:], terms[0]).clamp(min=0)
            buffer, view = room(x)
            relu(x, view, added, more)
            torch.testing.assert_close(view.double(), expected, atol=1e-6, rtol=tolerance)
            assert buffer.isfinite().sum() == view.numel()
            inside = x.clone()
            relu(inside, inside, added, more)
            assert torch.equal(inside, view)
        broken = torch.full_like(x, float("nan"))
        relu(broken, broken, bias)
        assert broken.isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_copies(shape: tuple[int, ...]) -> None:
    """Of views as the decoder has them: of other frames' channels beside one's own, into a buffer with a border."""
    fused = pytest.importorskip("longsana.ops.decoder").copy_into
    batch, frames, height, width, channels = shape
    x = draw(batch, height, width, frames, channels).to(DEVICE, torch.bfloat16).permute(0, 3, 1, 2, 4)
    for copy in (copy_into, fused):
        buffer, view = room(x)
        copy(x, view)
        assert torch.equal(view, x)
        assert buffer.isfinite().sum() == view.numel()


def test_the_kernel_reaches_beyond_32_bits() -> None:
    fused = pytest.importorskip("longsana.ops.decoder").norm_silu_into
    x, gamma = pixels(2, 1, 2, 2, 16).to(DEVICE, torch.bfloat16), torch.ones(16, device=DEVICE, dtype=torch.bfloat16)
    buffer = torch.empty(2**31 + 64, device=DEVICE, dtype=torch.bfloat16)  # on a CPU, pages that nobody touches
    view = buffer.as_strided(x.shape, (2**31, 64, 32, 16, 1))
    fused(x, gamma, view)
    expected = torch.empty_like(x)
    norm_silu_into(x, gamma, expected)
    torch.testing.assert_close(view.clone(), expected, atol=1e-6, rtol=8e-3)
    copied = torch.empty_like(x)
    pytest.importorskip("longsana.ops.decoder").copy_into(view, copied)  # from there, and back
    view.zero_()
    pytest.importorskip("longsana.ops.decoder").copy_into(copied, view)
    assert torch.equal(view, copied) and torch.equal(copied, view.clone()) and copied.any()
