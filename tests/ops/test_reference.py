"""The plain operations against formulas that are slower and plainer still."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longsana.ops.reference import linear_attention, prefix_sums, rotate, temporal_conv

HEADS, DIM, EPS = 3, 8, 1e-6
PLANS = [(5,), (3, 4, 2), (1, 1, 1, 6), (2, 2, 2, 2, 2)]
WINDOWS = [-1, 1, 2]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotations(count: int) -> Tensor:
    """(N, d, d): the rotation of each token as a matrix."""
    angles = 3 * randn(count, DIM // 2, seed=7)
    matrix = torch.zeros(count, DIM, DIM, dtype=torch.float64)
    for i in range(DIM // 2):
        matrix[:, 2 * i, 2 * i] = matrix[:, 2 * i + 1, 2 * i + 1] = angles[:, i].cos()
        matrix[:, 2 * i + 1, 2 * i] = angles[:, i].sin()
        matrix[:, 2 * i, 2 * i + 1] = -angles[:, i].sin()
    return matrix


def cos_sin(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix[:, 0::2, 0::2].diagonal(dim1=1, dim2=2), matrix[:, 1::2, 0::2].diagonal(dim1=1, dim2=2)


def quadratic_attention(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, sees: Tensor) -> Tensor:
    """A weight for every pair of tokens i, j with sees[i, j]."""
    rotated_q, rotated_k = (torch.einsum("nxy,bnhy->bnhx", matrix, part) for part in (q, k))
    weights = torch.einsum("bihx,bjhx->bhij", rotated_q, rotated_k) * sees
    totals = (torch.einsum("bihx,bjhx->bhij", q, k) * sees).sum(-1) + EPS
    return torch.einsum("bhij,bjhx->bihx", weights / totals[..., None], v)


def random_qkv(count: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(2, count, HEADS, DIM, seed=seed) for seed in (1, 2, 3))
    return q.abs(), k.abs(), v


def zero_sums(window: int) -> tuple[Tensor, Tensor]:
    entries = max(window, 1)
    return (
        torch.zeros(2, entries, HEADS, DIM, DIM, dtype=torch.float64),
        torch.zeros(2, entries, HEADS, DIM, dtype=torch.float64),
    )


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", PLANS)
def test_linear_attention_is_masked_quadratic_attention(lengths, window):
    q, k, v = random_qkv(sum(lengths))
    matrix, chunk = rotations(sum(lengths)), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = chunk[:, None] - chunk[None]  # how many chunks back j lies
    sees = (distance >= 0) & ((distance <= window) if window > 0 else True)
    expected = quadratic_attention(q, k, v, matrix, sees)

    out, _, _ = linear_attention(q, k, v, *cos_sin(matrix), *zero_sums(window), lengths=lengths, window=window, eps=EPS)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)

    kv, k_sum = zero_sums(window)
    for own in torch.arange(len(chunk)).split(list(lengths)):
        out, kv, k_sum = linear_attention(
            q[:, own],
            k[:, own],
            v[:, own],
            *cos_sin(matrix[own]),
            kv,
            k_sum,
            lengths=[len(own)],
            window=window,
            eps=EPS,
        )
        torch.testing.assert_close(out, expected[:, own], rtol=0, atol=1e-12)
    last = [chunk == len(lengths) - entry for entry in range(max(window, 1), 0, -1)] if window > 0 else [chunk >= 0]
    rotated = torch.einsum("nxy,bnhy->bnhx", matrix, k)
    for entry, tokens in enumerate(last):
        state = torch.einsum("bnhx,bnhy->bhxy", rotated[:, tokens], v[:, tokens])
        torch.testing.assert_close(kv[:, entry], state, rtol=0, atol=1e-12)
        torch.testing.assert_close(k_sum[:, entry], k[:, tokens].sum(1), rtol=0, atol=1e-12)


def test_a_window_sees_carried_entries_of_its_own_width():
    """A first chunk after a state of two entries sees both; a second one sees the younger of them."""
    q, k, v = random_qkv(4)
    kv, k_sum = randn(2, 2, HEADS, DIM, DIM, seed=5), randn(2, 2, HEADS, DIM, seed=6).abs()
    cos, sin = cos_sin(rotations(4))

    def run(kv: Tensor, k_sum: Tensor) -> Tensor:
        return linear_attention(q, k, v, cos, sin, kv, k_sum, lengths=[2, 2], window=2, eps=EPS)[0]

    out, older, younger = run(kv, k_sum), k_sum.clone(), k_sum.clone()
    older[:, 0] += 1
    younger[:, 1] += 1
    changed = (run(kv, older) - out).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [True, True, False, False]
    assert ((run(kv, younger) - out).abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_tokens_are_float32(dtype):
    """4,000 calls: a running sum in bfloat16 would stop growing at about 256 times its increment."""
    q, k, v = (part.to(dtype) for part in random_qkv(4))
    cos, sin = (part.float() for part in cos_sin(rotations(4)))
    kv, k_sum = (part.float() for part in zero_sums(-1))
    for _ in range(4000):
        out, kv, k_sum = linear_attention(q, k, v, cos, sin, kv, k_sum, lengths=[4], window=-1, eps=EPS)
    assert out.dtype == dtype
    assert kv.dtype == k_sum.dtype == torch.float32
    torch.testing.assert_close(k_sum[:, 0].double(), 4000 * k.double().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("lengths", PLANS)
def test_temporal_conv_is_a_padded_convolution_for_each_chunk(lengths, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, tail, weight = randn(2, sum(lengths), 6, 5), randn(2, 6, 5, seed=1), randn(5, 5, 3, 1, seed=2)
    out, left = temporal_conv(x, tail, weight, lengths=lengths), tail
    for own in torch.arange(sum(lengths)).split(list(lengths)):
        frames = torch.cat([left[:, None], x[:, own]], dim=1).permute(0, 3, 1, 2)
        expected = F.conv2d(frames, weight, padding=(1, 0)).permute(0, 2, 3, 1)[:, 1:]
        torch.testing.assert_close(out[:, own], expected, rtol=0, atol=1e-12)
        left = x[:, own[-1]]


def test_temporal_conv_of_one_chunk_after_nothing_is_same_padded():
    x, weight = randn(2, 7, 6, 5), randn(5, 5, 3, 1, seed=2)
    out = temporal_conv(x, torch.zeros(2, 6, 5, dtype=torch.float64), weight, lengths=[7])
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=(1, 0)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_prefix_sums(window):
    past, own = randn(2, max(window, 1), 3, seed=1), randn(2, 5, 3)
    seen, state = prefix_sums(past, own, window)
    everything = [*past.unbind(1), *own.unbind(1)]
    for c in range(5):
        last = past.shape[1] + c
        terms = everything[: last + 1] if window < 0 else everything[last - window : last + 1]
        torch.testing.assert_close(seen[:, c], sum(terms), rtol=0, atol=1e-12)
    kept = [sum(everything)] if window < 0 else everything[-window:]
    torch.testing.assert_close(state, torch.stack(kept, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cut", range(1, 5))
def test_prefix_sums_may_be_cut_anywhere(window, cut):
    past, own = randn(2, max(window, 1), 3, seed=1), randn(2, 5, 3)
    seen, state = prefix_sums(past, own, window)
    first, middle = prefix_sums(past, own[:, :cut], window)
    second, end = prefix_sums(middle, own[:, cut:], window)
    torch.testing.assert_close(torch.cat([first, second], dim=1), seen, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_prefix_sums_remember_a_copy(window):
    """A view would keep every chunk's sums alive for as long as the state lives."""
    _, state = prefix_sums(randn(2, max(window, 1), 3, seed=1), randn(2, 50, 3), window)
    assert state.untyped_storage().nbytes() == state.nbytes


def test_rotate_turns_pairs():
    x, matrix = randn(2, 5, HEADS, DIM), rotations(5)
    cos, sin = cos_sin(matrix)
    torch.testing.assert_close(rotate(x, cos, sin), torch.einsum("nxy,bnhy->bnhx", matrix, x), rtol=0, atol=1e-12)
    assert torch.equal(rotate(x, torch.ones_like(cos), torch.zeros_like(sin)), x)
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x, rtol=0, atol=1e-12)
