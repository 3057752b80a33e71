"""The look at numbers before they become pictures."""

from __future__ import annotations

import math

import pytest
import torch

from longsana.runtime.finite import not_finite, require_finite, to_host

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_number_among_many_is_seen(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    for shape in ((1,), (3, 5), (2, 3, 4, 17, 33), (100_003,)):
        for bad in BAD:
            numbers = torch.randn(shape, generator=rng).to(dtype)
            assert not_finite({"numbers": numbers}) == []
            at = int(torch.randint(numbers.numel(), (), generator=rng))
            numbers.view(-1)[at] = bad
            assert not_finite({"numbers": numbers}) == ["numbers"], (shape, bad, at)
            assert not_finite({"numbers": numbers.transpose(0, -1)}) == ["numbers"]


def test_the_first_is_named_and_nothing_is_finite() -> None:
    good, none, bad = torch.ones(2), torch.empty(0, 3), torch.tensor([1.0, math.nan])
    require_finite("chunk 3", {"latents": good, "frames": none})
    require_finite("chunk 3", {})
    with pytest.raises(FloatingPointError, match=r"^chunk 3: frames are not finite; check weights and dtype$"):
        require_finite("chunk 3", {"latents": good, "frames": bad, "more": bad})


def test_pictures_pass_as_they_are_or_not_at_all() -> None:
    pictures = torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3)
    assert torch.equal(to_host(pictures, "chunk 0", {"latents": torch.ones(2)}), pictures)
    with pytest.raises(FloatingPointError, match="chunk 0: latents are not finite"):
        to_host(pictures, "chunk 0", {"latents": torch.tensor([-math.inf])})


@pytest.mark.gpu
def test_on_a_gpu_it_is_one_copy_more() -> None:
    pictures = torch.arange(12, dtype=torch.uint8, device="cuda").view(1, 2, 2, 3)
    frames = torch.randn(1, 3, 41, 480, 832, device="cuda", dtype=torch.bfloat16)
    host = to_host(pictures, "chunk 0", {"frames": frames})
    assert host.device.type == "cpu" and host.is_pinned() and torch.equal(host, pictures.cpu())
    for bad in BAD:
        frames[0, 2, 40, 479, 831] = bad
        with pytest.raises(FloatingPointError, match="chunk 0: frames are not finite"):
            to_host(pictures, "chunk 0", {"frames": frames})
