"""The plain operations against formulas that are slower and plainer still."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longsana.ops.reference import FLOAT8_MAX, linear_attention, neighbour_rows, prefix_sums, rotate, temporal_conv

HEADS, DIM, EPS = 3, 8, 1e-6
PLANS = [(5,), (3, 4, 2), (1, 1, 1, 6), (2, 2, 2, 2, 2)]


class Policy(NamedTuple):
    """What chunks see of those before. decays: by a factor of its own for each chunk and head."""

    window: int = -1
    decays: bool = False
    sinks: int = 0

    @property
    def entries(self) -> int:
        return max(self.window, 1) + (self.sinks > 0)

    def factors(self, chunks: int) -> Tensor | None:
        """(n, heads)."""
        return torch.rand(chunks, HEADS, generator=torch.Generator().manual_seed(8)).double() if self.decays else None

    def settings(self, first: int, last: int, chunks: int) -> dict[str, object]:
        """Settings of the operations, for a call with chunks [first, last) of a video of `chunks`."""
        factors = self.factors(chunks)
        sink = max(self.sinks - first, 0) if self.sinks else None
        return {"window": self.window, "decay": None if factors is None else factors[first:last], "sink": sink}

    def weights(self, chunks: int) -> Tensor:
        """(heads, n, n): how much of chunk i chunk c sees, at [head, c, i]."""
        found = torch.zeros(HEADS, chunks, chunks, dtype=torch.float64)
        factors = self.factors(chunks)
        for c in range(chunks):
            for i in range(c + 1):
                if i == c or i < self.sinks:
                    found[:, c, i] = 1
                elif self.window < 0 or c - i <= self.window:
                    found[:, c, i] = 1 if factors is None else factors[i + 1 : c + 1].prod(0)
        return found


WHOLE = Policy()
POLICIES = [
    *(WHOLE, Policy(window=1), Policy(window=2)),
    *(Policy(decays=True), Policy(window=1, decays=True), Policy(window=2, decays=True)),
    *(Policy(window=1, sinks=1), Policy(window=2, sinks=2), Policy(decays=True, sinks=1), Policy(decays=True, sinks=2)),
    Policy(window=2, decays=True, sinks=1),
]


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
    """A weight for every pair of tokens i, j, times sees[head, i, j]."""
    rotated_q, rotated_k = (torch.einsum("nxy,bnhy->bnhx", matrix, part) for part in (q, k))
    weights = torch.einsum("bihx,bjhx->bhij", rotated_q, rotated_k) * sees
    totals = (torch.einsum("bihx,bjhx->bhij", q, k) * sees).sum(-1) + EPS
    return torch.einsum("bhij,bjhx->bihx", weights / totals[..., None], v)


def random_qkv(count: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(2, count, HEADS, DIM, seed=seed) for seed in (1, 2, 3))
    return q.abs(), k.abs(), v


def zero_sums(entries: int = 1) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(2, entries, HEADS, DIM, DIM, dtype=torch.float64),
        torch.zeros(2, entries, HEADS, DIM, dtype=torch.float64),
    )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("lengths", PLANS)
def test_linear_attention_is_weighted_quadratic_attention(lengths, policy):
    """All chunks at once, one after the other, and in two calls."""
    count, chunks = sum(lengths), len(lengths)
    q, k, v = random_qkv(count)
    matrix, chunk = rotations(count), torch.arange(chunks).repeat_interleave(torch.tensor(lengths))
    expected = quadratic_attention(q, k, v, matrix, policy.weights(chunks)[:, chunk][:, :, chunk])

    for cuts in ([chunks], [1] * chunks, [1, chunks - 1], [chunks - 1, 1]):
        kv, k_sum = zero_sums(policy.entries)
        first = 0
        for size in filter(None, cuts):
            last = first + size
            own = (chunk >= first) & (chunk < last)
            out, kv, k_sum = linear_attention(
                *(part[:, own] for part in (q, k, v)),
                *cos_sin(matrix[own]),
                kv,
                k_sum,
                lengths=lengths[first:last],
                eps=EPS,
                **policy.settings(first, last, chunks),
            )
            torch.testing.assert_close(out, expected[:, own], rtol=0, atol=1e-12)
            first = last
        for sums, wanted in zip((kv, k_sum), remembered(k, v, matrix, chunk, policy, chunks), strict=True):
            torch.testing.assert_close(sums, wanted, rtol=0, atol=1e-12)


def remembered(
    k: Tensor, v: Tensor, matrix: Tensor, chunk: Tensor, policy: Policy, chunks: int
) -> tuple[Tensor, Tensor]:
    """kv and k_sum after all chunks, from the weights with which the last chunk sees those before."""
    weights = policy.weights(chunks)[:, -1]
    others = list(range(min(policy.sinks, chunks), chunks))
    entries = [others] if policy.window < 0 else [[i] for i in others[-policy.window :]]
    entries = [[]] * (max(policy.window, 1) - len(entries)) + entries
    if policy.sinks:
        entries.insert(0, list(range(min(policy.sinks, chunks))))
    rotated = torch.einsum("nxy,bnhy->bnhx", matrix, k)
    kv, k_sum = zero_sums(policy.entries)
    for entry, members in enumerate(entries):
        for i in members:
            weight, own = weights[:, i], chunk == i
            kv[:, entry] += weight[:, None, None] * torch.einsum("bnhx,bnhy->bhxy", rotated[:, own], v[:, own])
            k_sum[:, entry] += weight[:, None] * k[:, own].sum(1)
    return kv, k_sum


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_of_linear_attention(policy):
    """Differences give the gradients of all that it reads, the carried sums and the factors too."""
    lengths, (q, k, v) = [2, 1, 2], random_qkv(5)
    settings = policy.settings(0, 3, 3)
    decay = settings.pop("decay")
    past = [randn(*part.shape, seed=seed).abs() for seed, part in enumerate(zero_sums(policy.entries), 5)]
    inputs = [part[:1, :, :1].contiguous() for part in (q, k, v, *past)]
    factors = [] if decay is None else [decay[:, :1].contiguous()]

    def attend(*parts: Tensor) -> tuple[Tensor, ...]:
        q, k, v, kv, k_sum, *decay = parts
        return linear_attention(
            *(q, k, v, *cos_sin(rotations(5)), kv, k_sum),
            **settings,
            lengths=lengths,
            eps=EPS,
            decay=decay[0] if decay else None,
        )

    assert torch.autograd.gradcheck(attend, [part.requires_grad_() for part in (*inputs, *factors)])


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
    kv, k_sum = (part.float() for part in zero_sums())
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


@pytest.mark.parametrize("lengths", PLANS)
def test_rows_of_three_frames_make_the_temporal_convolution_a_product(lengths):
    """Of numbers that float8 has, with the largest in every row, so that all scales are 1."""
    x, tail = ((8 * randn(2, n, 6, 5, seed=n)).round().clamp(-16, 16) for n in (sum(lengths), 1))
    x[..., 0] = FLOAT8_MAX
    weight = randn(5, 5, 3, 1, seed=2)
    rows, scale = neighbour_rows(x, tail[:, 0], lengths=lengths)
    assert rows.shape == (2, sum(lengths), 6, 15) and (scale == 1).all()
    product = rows.double() @ weight[..., 0].permute(2, 1, 0).flatten(0, 1)
    torch.testing.assert_close(product, temporal_conv(x, tail[:, 0], weight, lengths=lengths), rtol=0, atol=1e-11)


def heads(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, HEADS, 4, seed=seed)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_prefix_sums_after_a_past(policy):
    """Carried entries count as chunks before the first; and it may be cut anywhere."""
    past, own = heads(2, policy.entries, seed=1), heads(2, 5)
    seen, state = prefix_sums(past, own, **policy.settings(0, 5, 5))
    weights = policy.weights(5)
    first = past[:, :1] if policy.sinks else torch.zeros_like(past[:, :1])
    recent = past[:, -max(policy.window, 1) :]
    factors = policy.factors(5)
    for c in range(5):
        expected = torch.einsum("bihd,hi->bhd", own, weights[:, c]) + first[:, 0]
        faded = torch.ones(HEADS, 1, dtype=torch.float64) if factors is None else factors[: c + 1].prod(0)[:, None]
        # A chunk that is no sink pushes one entry out of a window.
        pushed = max(c - policy.sinks, 0) if policy.window > 0 else 0
        expected = expected + (recent[:, pushed:] * faded).sum(1)
        torch.testing.assert_close(seen[:, c], expected, rtol=0, atol=1e-12)
    for cut in range(1, 5):
        before, middle = prefix_sums(past, own[:, :cut], **policy.settings(0, cut, 5))
        after, end = prefix_sums(middle, own[:, cut:], **policy.settings(cut, 5, 5))
        torch.testing.assert_close(torch.cat([before, after], dim=1), seen, rtol=0, atol=1e-12)
        torch.testing.assert_close(end, state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("chunks", [1, 50])
def test_prefix_sums_remember_a_copy(policy, chunks):
    """A view would keep every chunk's sums alive for as long as the state lives."""
    own = heads(2, chunks)
    _, state = prefix_sums(heads(2, policy.entries, seed=1), own, **policy.settings(0, chunks, chunks))
    assert state.shape[1] == policy.entries
    assert state.untyped_storage().nbytes() == state.nbytes
    assert state.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()


def test_a_step_of_inference_is_one_addition():
    """To the bit, in float32: the published past, and one that decays by factors of 1."""
    past, own = heads(2, 1, seed=1).float(), heads(2, 1).float()
    for decay in (None, torch.ones(1, HEADS)):
        for total in prefix_sums(past, own, -1, decay):
            assert torch.equal(total, past + own)


@pytest.mark.parametrize(("decay", "operation"), [(None, "aten.add.Tensor"), (0.9, "aten.addcmul.default")])
def test_a_step_of_inference_is_one_launch(decay, operation):
    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    past, own = heads(2, 1, seed=1), heads(2, 1)
    factors = None if decay is None else torch.full((1, HEADS), decay, dtype=torch.float64)
    with Noted():
        prefix_sums(past, own, -1, factors)
    assert [name for name in names if "view" not in name] == [operation]


def test_a_factor_of_zero_leaves_the_chunk_itself():
    past, own, nothing = heads(2, 1, seed=1), heads(2, 3), torch.zeros(3, HEADS, dtype=torch.float64)
    seen, state = prefix_sums(past, own, -1, nothing)
    assert torch.equal(seen, own)
    assert torch.equal(state, own[:, -1:])


def test_rotate_turns_pairs():
    x, matrix = randn(2, 5, HEADS, DIM), rotations(5)
    cos, sin = cos_sin(matrix)
    torch.testing.assert_close(rotate(x, cos, sin), torch.einsum("nxy,bnhy->bnhx", matrix, x), rtol=0, atol=1e-12)
    assert torch.equal(rotate(x, torch.ones_like(cos), torch.zeros_like(sin)), x)
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_chunk_in_two_shares_is_the_chunk(cut):
    """What one share lacks is given it: the sums of the other, and the frame beside it on either side."""
    x, tail, weight = randn(2, 5, 6, 5), randn(2, 6, 5, seed=1), randn(5, 5, 3, 1, seed=2)
    whole = temporal_conv(x, tail, weight, lengths=[5])
    before, after = x[:, :cut], x[:, cut:]
    parts = (
        temporal_conv(before, tail, weight, lengths=[cut], ahead=after[:, 0]),
        temporal_conv(after, before[:, -1], weight, lengths=[5 - cut]),
    )
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    rows = neighbour_rows(x, tail, lengths=[5])
    first = neighbour_rows(before, tail, lengths=[cut], ahead=after[:, 0])
    assert torch.equal(first.rows.float(), rows.rows[:, :cut].float()) and torch.equal(first.scale, rows.scale[:, :cut])
