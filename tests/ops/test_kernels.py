"""Every fused operation against its plain twin in float64: outputs, final state, and every gradient.

On a CPU the kernels run in Triton's interpreter, on a GPU compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from longsana.ops import reference, temporal

pytest.importorskip("triton")
attention, caption, float8, gated_conv, norms = (
    importlib.import_module(f"longsana.ops.{name}")
    for name in ("attention", "caption", "float8", "gated_conv", "norms")
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = [
    (torch.float32, 2e-5), (torch.bfloat16, 1.2e-2), pytest.param(torch.float16, 2e-3, marks=pytest.mark.slow),
]  # fmt: skip
"""Of the largest value of the float64 result. In the interpreter float16 is as bfloat16, and takes as long."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """float64, and exact in bfloat16: a twin in float64 and a kernel in 16 bits see the same numbers."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.bfloat16().double()


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write is seen."""

    def filled(made: Tensor) -> Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain, **options: filled(plain(*args, **options)))


def compare(
    fast: Callable[..., object],
    plain: Callable[..., object],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """plain sees the inputs in float64, fast in dtype."""
    expected = plain(*inputs)
    given = fast(*(value.to(DEVICE, dtype) for value in inputs))
    expected, given = (value if isinstance(value, tuple) else (value,) for value in (expected, given))
    for wanted, result in zip(expected, given, strict=True):
        assert result.shape == wanted.shape
        error = (result.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, error


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 5, 56), (1, 1, 1, 8), (1, 2, 7, 100)])
def test_norms_and_residuals(shape, dtype, tolerance):
    x, h = 3 * random(*shape, seed=1) + 0.5, random(*shape, seed=2)
    for frames in {1, shape[1]}:
        # As the network has it: parts of one tensor, not contiguous.
        shift, scale, gate = random(shape[0], frames, 3, shape[3], seed=3)[:, :, None].unbind(-2)

        def modulated(x: Tensor, shift: Tensor, scale: Tensor, module=norms) -> Tensor:
            return module.norm_modulate(x, shift, scale, 1e-6)

        compare(modulated, lambda *parts: modulated(*parts, module=reference), (x, shift, scale), dtype, tolerance)
        compare(
            lambda *parts: norms.add_norm_modulate(*parts, 1e-6),
            lambda *parts: reference.add_norm_modulate(*parts, 1e-6),
            (x, h, shift, scale),
            dtype,
            2 * tolerance,  # the sum is rounded, then normalised
        )
        for terms in ((h,), (h, random(*shape, seed=4))):
            compare(norms.gated_residual, reference.gated_residual, (x, gate, *terms), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 5, 56), (1, 1, 8), (3, 100)])
def test_qk_features(shape, dtype, tolerance):
    *rest, width = shape
    inputs = (2 * random(*rest, 3 * width, seed=1), 1 + random(width, seed=2) / 4, 1 + random(width, seed=3) / 4)
    inputs = tuple(value.bfloat16().double() for value in inputs)
    compare(
        lambda *parts: norms.qk_features(*parts, 1e-5), lambda *parts: reference.qk_features(*parts, 1e-5),
        inputs, dtype, tolerance,
    )  # fmt: skip


def compare_gradients(
    name: str, module: ModuleType, inputs: Sequence[Tensor], dtype: torch.dtype, tolerance: float, **settings: object
) -> None:
    """Of all inputs, with random cotangents of all outputs."""
    results = []
    for source, device, kind in ((reference, "cpu", torch.float64), (module, DEVICE, dtype)):
        own = [value.to(device, kind).requires_grad_() for value in inputs]
        outputs = getattr(source, name)(*own, **settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [random(*value.shape, seed=seed).to(value) for seed, value in enumerate(outputs, 10)]
        results.append(torch.autograd.grad(outputs, own, cotangents))
    for wanted, result in zip(*results, strict=True):
        assert result.shape == wanted.shape and result.dtype == dtype
        error = (result.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, error


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(("shape", "programs"), [((2, 3, 5, 20), 1), ((1, 1, 1, 8), 528), ((1, 2, 7, 100), 5)])
def test_gradients_of_norms_and_residuals(shape, dtype, tolerance, programs, monkeypatch):
    monkeypatch.setattr(norms, "PROGRAMS", programs)
    x, h = 3 * random(*shape, seed=1) + 0.5, random(*shape, seed=2)
    for frames in {1, shape[1]}:
        shift, scale, gate = random(shape[0], frames, 3, shape[3], seed=3)[:, :, None].unbind(-2)
        compare_gradients("norm_modulate", norms, (x, shift, scale), dtype, tolerance, eps=1e-6)
        compare_gradients("add_norm_modulate", norms, (x, h, shift, scale), dtype, 2 * tolerance, eps=1e-6)
        for terms in ((h,), (h, random(*shape, seed=4))):
            compare_gradients("gated_residual", norms, (x, gate, *terms), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(("shape", "programs"), [((2, 5, 20), 3), ((1, 1, 8), 528), ((3, 100), 1)])
def test_gradients_of_qk_features(shape, dtype, tolerance, programs, monkeypatch):
    monkeypatch.setattr(norms, "PROGRAMS", programs)
    *rest, width = shape
    inputs = (2 * random(*rest, 3 * width, seed=1), 1 + random(width, seed=2) / 4, 1 + random(width, seed=3) / 4)
    inputs = tuple(value.bfloat16().double() for value in inputs)
    compare_gradients("qk_features", norms, inputs, dtype, 2 * tolerance, eps=1e-5)


ROWS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
"""dtypes of what is made rows of; float16 as for `TOLERANCE`."""


@ROWS
@pytest.mark.parametrize("shape", [(5, 56), (1, 8), (3, 100), (2, 2, 700), (1, 5000)])
def test_quantise_rows(shape, dtype):
    sizes = torch.logspace(-2, 2, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    x = (random(*shape) * sizes).to(dtype)
    check_rows(float8.quantise_rows(x.to(DEVICE)), reference.quantise_rows(x))


def check_rows(given: reference.Float8Rows, wanted: reference.Float8Rows, rounding: float = 0.0) -> None:
    """Hold that numbers are equal or neighbours: those in the middle go either way by the rounding of the scale.

    rounding: of what the wanted rows were made of, relative.
    """
    assert given.rows.dtype == torch.float8_e4m3fn and given.rows.shape == wanted.rows.shape
    torch.testing.assert_close(given.scale.cpu(), wanted.scale, rtol=1e-5 + rounding, atol=0)
    rows, expected = given.rows.cpu().float(), wanted.rows.float()
    assert rows.isfinite().all()
    near = (rows - expected).abs() <= expected.abs() / 8 + 2**-9 + rounding
    # Triton's interpreter loses the carry of numbers that round up to a power of two.
    assert near.all() if DEVICE == "cuda" else near.float().mean() > 0.9


@ROWS
@pytest.mark.parametrize("shape", [(2, 3, 5, 56), (1, 1, 1, 8), (1, 2, 7, 100), (1, 2, 1, 2500)])
def test_rows_of_norms_and_residuals(shape, dtype):
    x, h = ((3 * random(*shape, seed=seed) + 0.5).to(dtype) for seed in (1, 2))
    rounding = 8 * torch.finfo(dtype).eps
    for frames in {1, shape[1]}:
        # As the network has it: parts of one tensor, not contiguous.
        shift, scale, gate = random(shape[0], frames, 3, shape[3], seed=3).to(dtype)[:, :, None].unbind(-2)
        for name, inputs in (
            ("norm_modulate_rows", (x, shift, scale, 1e-6)),
            ("add_norm_modulate_rows", (x, h, shift, scale, 1e-6)),
            ("gated_residual_rows", (x, gate, h)),
        ):
            exact = getattr(reference, name)(*(v.float() if isinstance(v, Tensor) else v for v in inputs))
            given = getattr(float8, name)(*(v.to(DEVICE) if isinstance(v, Tensor) else v for v in inputs))
            if not isinstance(exact, reference.Float8Rows):
                (total, given), (wanted, exact) = given, exact
                assert total.dtype == dtype
                torch.testing.assert_close(total.cpu(), wanted.to(dtype), rtol=rounding, atol=rounding)
            check_rows(given, exact, 1e-4)  # norms of few numbers are sums in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 1, 2)])
@pytest.mark.parametrize(("tokens", "width"), [(6, 24), (1, 100)])
def test_neighbour_rows(tokens, width, lengths, dtype):
    x, tail = random(2, sum(lengths), tokens, width, seed=1).to(dtype), random(2, tokens, width, seed=2).to(dtype)
    for ahead in (None, random(2, tokens, width, seed=3).to(dtype)):
        more = None if ahead is None else ahead.to(DEVICE)
        given = float8.neighbour_rows(x.to(DEVICE), tail.to(DEVICE), lengths=lengths, ahead=more)
        check_rows(given, reference.neighbour_rows(x, tail, lengths=lengths, ahead=ahead))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "window", "decays", "sink"),
    [
        ((5,), 3, 8, -1, False, None),
        ((150,), 2, 28, -1, False, None),
        ((3, 70, 2), 1, 112, -1, False, None),
        ((4, 1, 66), 2, 12, 1, False, None),
        ((2, 2, 2, 2), 1, 20, 2, False, None),
        ((5,), 3, 8, -1, True, None),
        ((3, 66, 2), 2, 12, -1, True, None),
        ((1, 4, 2), 2, 8, 2, True, None),
        ((5,), 2, 8, 2, False, 0),
        ((2, 3, 1), 2, 8, 1, False, 1),
        ((2, 3, 1), 2, 8, -1, True, 2),
        ((1, 2), 1, 112, -1, True, 1),  # in float32 the plain one
    ],
)
def test_linear_attention(lengths, heads, dim, window, decays, sink, dtype, tolerance, monkeypatch):
    """Whatever is kept of the past; gradients of its factors too."""
    monkeypatch.setattr(attention, "PROGRAMS", 4)  # the longest chunks are several tiles of a program
    count = sum(lengths)
    q, k, v = random(2, count, 3, heads, dim).unbind(2)  # v is part of a wider tensor, as in the network
    angle = 3 * random(count, dim // 2, seed=4)
    entries = max(window, 1) + (sink is not None)
    past = [5 * random(2, entries, heads, dim, dim, seed=5), 5 * random(2, entries, heads, dim, seed=6).abs()]
    if decays:
        past.append(torch.rand(len(lengths), heads, generator=torch.Generator().manual_seed(8)).bfloat16().double())

    def attend(module, q: Tensor, k: Tensor, v: Tensor, sums: list[Tensor]) -> tuple[Tensor, ...]:
        rotation = (part.to(sums[0]) for part in (angle.cos(), angle.sin()))
        decay = sums[2] if decays else None
        return module.linear_attention(
            q, k, v, *rotation, *sums[:2], lengths=lengths, window=window, eps=1e-6, decay=decay, sink=sink
        )

    # Parts of one tensor, so that strides are the wide ones in every dtype.
    wide = torch.stack([q.abs(), k.abs(), v], 2).requires_grad_()
    carried = [part.clone().requires_grad_() for part in past]
    results = []
    for module, tensor in ((reference, wide), (attention, wide.detach().to(DEVICE, dtype).requires_grad_())):
        sums = [part.detach().to(tensor.device, reference.accumulation_dtype(tensor.dtype)) for part in carried]
        sums = [part.requires_grad_() for part in sums]
        outputs = attend(module, *tensor.unbind(2), sums)
        cotangents = [random(*value.shape, seed=seed).to(value) for seed, value in enumerate(outputs, 7)]
        results.append([*outputs, *torch.autograd.grad(outputs, [tensor, *sums], cotangents)])
    for wanted, result in zip(*results, strict=True):
        assert result.shape == wanted.shape
        error = (result.cpu().double() - wanted).abs().max() / wanted.abs().max()
        # Sums and their gradients are float32, and not rounded on the way.
        assert error < (min(tolerance, 1e-4) if result.dtype == torch.float32 else tolerance), error


@torch.no_grad()
def test_linear_attention_of_wide_heads_in_float32():
    """Which without gradients is fused, too."""
    q, k, v = random(1, 70, 3, 1, 112).unbind(2)
    angle = 3 * random(70, 56, seed=4)
    inputs = (
        q.abs(), k.abs(), v, angle.cos(), angle.sin(), random(1, 1, 1, 112, 112, seed=5),
        random(1, 1, 1, 112, seed=6).abs(),
    )  # fmt: skip
    settings = {"lengths": (3, 67), "window": -1, "eps": 1e-6}
    results = attention.linear_attention(*(value.float().to(DEVICE) for value in inputs), **settings)
    for wanted, result in zip(reference.linear_attention(*inputs, **settings), results, strict=True):
        assert (result.cpu() - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(
    ("frames", "size", "inner"), [(2, (3, 5), 20), (1, (1, 1), 4), (1, (3, 1), 4), (1, (4, 18), 70)]
)
def test_gated_conv(frames, size, inner, dtype, tolerance):
    inputs = (
        2 * random(frames, size[0] * size[1], 2 * inner, seed=1),
        random(2 * inner, 1, 3, 3, seed=2) / 2,
        random(2 * inner, seed=3) / 2,
    )
    compare(
        lambda *parts: gated_conv.gated_conv(*parts, size), lambda *parts: reference.gated_conv(*parts, size), inputs,
        dtype, tolerance,
    )  # fmt: skip


def test_compiled_code_calls_gated_conv_as_it_is() -> None:
    """The same numbers, which the compiler is told the layout of."""
    inputs = [
        values.to(DEVICE, torch.bfloat16).requires_grad_()
        for values in (random(2, 6, 16, seed=1), random(16, 1, 3, 3, seed=2), random(16, seed=3))
    ]
    # A gradient as the layer before has it: not contiguous, and read again after the operation.
    grad = random(8, 6, 2, seed=4).to(DEVICE, torch.bfloat16).permute(2, 1, 0)

    def through(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *others: 2 * conv(x.mT.contiguous().mT + 1, *others, (2, 3))

    results = []
    compiled = torch.compile(through(gated_conv.gated_conv_as_it_is), backend="aot_eager", fullgraph=True)
    for function in (through(gated_conv.gated_conv), compiled):
        out = function(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad)))
    for wanted, given in zip(*results, strict=True):
        assert torch.equal(wanted, given)
    torch.library.opcheck(gated_conv._opaque, (*inputs, 2, 3), test_utils=["test_schema", "test_faketensor"])
    given = (*(values.detach() for values in inputs), grad, 2, 3)
    torch.library.opcheck(gated_conv._opaque_gradients, given, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize(
    ("frames", "size", "inner"),
    [(2, (3, 5), 20), (1, (1, 1), 4), (1, (3, 1), 4), (1, (1, 5), 4), (3, (2, 4), 30), (1, (2, 6), 70)],
)
def test_gradients_of_gated_conv(frames, size, inner, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(gated_conv, "PROGRAMS", 4)  # programs take several strips, and the last of them fewer
    if inner < 70:  # several strips and blocks of channels; else those that ship
        monkeypatch.setattr(gated_conv, "OF_SUMS", gated_conv.Strip(2, 16, 1))
        monkeypatch.setattr(gated_conv, "OF_INPUTS", gated_conv.Strip(2, 16, 1))
    inputs = (
        2 * random(frames, size[0] * size[1], 2 * inner, seed=1),
        random(2 * inner, 1, 3, 3, seed=2) / 2,
        random(2 * inner, seed=3) / 2,
    )
    # The convolution's gradients are rounded once on the way.
    compare_gradients("gated_conv", gated_conv, inputs, dtype, 2 * tolerance, size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_is_as_near_as_it_says(dtype):
    """Of the gate's value, which taps leave as it is; a gate of 20 is 20 times it."""
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64).to(dtype)
    inner = len(x)
    weight, bias = torch.zeros(2 * inner, 1, 3, 3, dtype=dtype), torch.zeros(2 * inner, dtype=dtype)
    weight[:inner, :, 1, 1], bias[inner:] = 1, 20
    given = torch.cat([x, x])[None, None].to(DEVICE)
    out = gated_conv.gated_conv(given, weight.to(DEVICE), bias.to(DEVICE), (1, 1))[0, 0].cpu().double() / 20
    x = x.double()
    expected = x * x.sigmoid()
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-20  # the interpreter cuts bits off
    own = 2**-12 * x.abs() if dtype == torch.bfloat16 else 0
    assert ((out - expected).abs() <= own + rounding * expected.abs() + 1e-12).all()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 1, 2)])
def test_temporal_conv(lengths, dtype, tolerance):
    width = 24
    inputs = (
        random(2, sum(lengths), 6, width, seed=1), random(2, 6, width, seed=2), random(width, width, 3, 1, seed=3) / 4
    )  # fmt: skip
    compare(
        lambda *parts: temporal.temporal_conv(*parts, lengths=lengths),
        lambda *parts: reference.temporal_conv(*parts, lengths=lengths),
        inputs,
        dtype,
        2 * tolerance,  # rounded after every tap
    )
    compare_gradients("temporal_conv", temporal, inputs, dtype, 2 * tolerance, lengths=lengths)
    compare(
        lambda *parts: temporal.temporal_conv(*parts[:3], lengths=lengths, ahead=parts[3]),
        lambda *parts: reference.temporal_conv(*parts[:3], lengths=lengths, ahead=parts[3]),
        (*inputs, random(2, 6, width, seed=4)),
        dtype,
        2 * tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 37, 2, 112, 130), (1, 150, 3, 32, 7), (1, 5, 2, 56, 64)])
def test_caption_attention(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Strided, as the network has them; what lies behind a caption's end is not read, and changes no bit."""
    batch, tokens, heads, dim, length = shape
    q = random(batch, tokens, heads * dim, seed=1).unflatten(-1, (heads, dim))
    k, v = random(batch, length, 2, heads, dim, seed=2).unbind(2)
    lengths = torch.tensor([length - 3, 1][:batch], dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, module: ModuleType = caption) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2).contiguous()
        return module.caption_attention(q, k, v, None if lengths is None else lengths.to(q.device))

    for own in (None, lengths):
        compare(
            lambda *parts, own=own: attend(*parts, own),
            lambda *parts, own=own: attend(*parts, own, module=reference),
            (q, k, v),
            dtype,
            tolerance,
        )
    q, k, v = (part.to(DEVICE, dtype) for part in (q, k, v))
    k[0, length - 3 :] = v[0, length - 3 :] = torch.nan
    given = attend(q, k, v, lengths)
    assert given.isfinite().all()
    short = attend(*(part[:1] for part in (q, k[:, : length - 3], v[:, : length - 3])), None)
    assert torch.equal(given[:1], short)
