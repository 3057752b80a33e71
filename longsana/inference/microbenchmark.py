"""Microbenchmarks: operations against this machine's floor, the network and the decoder against peers."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longsana.chunks import ChunkPlan
from longsana.config import ModelConfig
from longsana.encoders.vae import VideoVAE
from longsana.flow.noise import PromptNoise
from longsana.flow.schedule import FlowSchedule
from longsana.models import attention, dit
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding, TextMemory
from longsana.models.float8 import CAPABILITY, PRODUCTS, in_float8, to_float8
from longsana.models.rope import rotary
from longsana.ops import FUSED, reference
from longsana.ops.dispatch import WITHOUT_GRADIENTS, fused_twin, inductor_options, obstacle
from longsana.sampling.engine import Engine
from longsana.sampling.graphs import RecordedPass
from longsana.sampling.sampler import generate
from longsana.state import CausalState
from longsana.weights.names import diffusers_config

REPEATS = 15
PROFILED = 5
T_STEP = 727.0


class Ceilings(NamedTuple):
    """This machine's ceilings: bytes a second of a copy, read and write; operations a second of a square product."""

    bytes: float
    operations: float


class Loaded(NamedTuple):
    """An engine, and the network and the decoder that its config names."""

    engine: Engine
    model: LongSanaDiT
    vae: VideoVAE


class Sizes(NamedTuple):
    """Shapes and dtypes of what operations see in a chunk.

    dtype: of the network. grid: tokens of a frame, down and across. picture: (T, H, W, C) of the decoder's widest step
    for one latent, and decoder its dtype.
    """

    device: torch.device
    dtype: torch.dtype
    network: ModelConfig
    frames: int
    grid: tuple[int, int]
    picture: tuple[int, int, int, int]
    decoder: torch.dtype


class Case(NamedTuple):
    """An operation at the size of a chunk.

    operations: multiplications and additions in matrix products. learned: of how many tensors of the inputs, the first
    ones, training takes gradients; None for all. written: which input the operation writes into, if it returns nothing.
    """

    name: str
    inputs: Sequence[Any]
    settings: dict[str, Any]
    operations: int = 0
    unread: int = 0  # bytes of the inputs
    learned: int | None = None
    written: int | None = None

    @property
    def in_float8(self) -> bool:
        """Tell whether rows are written in float8, which Triton has from compute capability 8.9 on."""
        return self.name.endswith("_rows")

    def outputs(self, operation: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run the operation on inputs and return what it returns, or writes."""
        returned = operation(*inputs, **self.settings)
        if self.written is not None:
            returned = inputs[self.written]
        tensors: list[Tensor] = tree_leaves(returned)
        return tuple(tensors)

    def once(self, operation: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Run on copies of the inputs, which it may change."""
        return self.outputs(operation, [part.clone() if isinstance(part, Tensor) else part for part in self.inputs])

    def moved(self, outputs: Sequence[Tensor]) -> int:
        """Bytes, if every tensor is read or written once."""
        written = None if self.written is None else self.inputs[self.written]
        tensors = {id(value): value for value in self.inputs if isinstance(value, Tensor) and value is not written}
        total = sum(value.numel() * value.element_size() for value in (*tensors.values(), *outputs))
        return total - self.unread

    def learning(self, operation: Callable[..., Any]) -> Callable[[], Any]:
        """A forward and a backward pass."""
        inputs = [part.detach() if isinstance(part, Tensor) else part for part in self.inputs]
        tensors = [part for part in inputs if isinstance(part, Tensor)]
        learned = [part.requires_grad_() for part in tensors[: self.learned]]

        def passes() -> None:
            with torch.enable_grad():
                outputs = self.outputs(operation, inputs)
                torch.autograd.grad(outputs, learned, [torch.ones_like(y) for y in outputs])

        return passes


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of one call: the median, after two that warm up."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = 8192 if device.type == "cuda" else 1024
    square = torch.randn(width, width, dtype=torch.float32, device=device).to(dtype)
    copied = seconds(lambda: target.copy_(source), device)
    multiplied = seconds(lambda: square @ square, device)
    return Ceilings(2 * size / copied, 2 * width**3 / multiplied)


@torch.no_grad()
def measure_operations(loaded: Loaded, size: tuple[int, int]) -> dict[str, Any]:
    """Every operation on one chunk of a video of height x width pixels; fused ones where they run.

    ms of the plain twin and of the fused one, with gradients also of forward and backward pass together; the largest
    difference between both relative to the largest value, GB/s and TFLOP/s of the faster, and its share of the floor:
    the time that `ceilings` allow over its own.
    """
    device, dtype = loaded.engine.device, loaded.model.dtype
    limits = ceilings(device, dtype)
    rows: dict[str, Any] = {}
    for case in cases(_sizes(loaded, size)):
        plain = getattr(reference, case.name)
        expected = case.once(plain)
        backends = {"reference": plain}
        row: dict[str, Any] = {}
        if not obstacle() and (not case.in_float8 or torch.cuda.get_device_capability(device) >= CAPABILITY):
            backends["fused"] = fused_twin(case.name, FUSED)
            row["difference"] = max(
                float((a.float() - b.float()).abs().max() / b.float().abs().max())
                for a, b in zip(case.once(backends["fused"]), expected, strict=True)
            )
        row["ms"] = {
            name: 1000 * seconds(partial(call, *case.inputs, **case.settings), device)
            for name, call in backends.items()
        }
        if case.name not in WITHOUT_GRADIENTS:
            row["ms with gradients"] = {
                name: 1000 * seconds(case.learning(call), device) for name, call in backends.items()
            }
        best = min(row["ms"].values()) / 1000
        moved = case.moved(expected)
        floor = max(moved / limits.bytes, case.operations / limits.operations)
        row |= {
            "GB/s": moved / best / 1e9,
            "TFLOP/s": case.operations / best / 1e12,
            "share of the floor": floor / best,
        }
        rows[case.name] = row
    return {"copy, GB/s": limits.bytes / 1e9, "product, TFLOP/s": limits.operations / 1e12, "operations": rows}


def cases(sizes: Sizes) -> Iterator[Case]:
    """Every operation; on the meta device too, where nothing is computed."""
    device, dtype, network, frames, grid, *_ = sizes
    width, inner, dim = _widths(network)
    tokens = math.prod(grid)
    rng = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32, device=device, generator=rng).to(dtype)

    x, h, modulation = random(1, frames, tokens, width), random(1, frames, tokens, width), random(1, 1, 3, width)
    shift, scale, gate = modulation[:, :, None].unbind(-2)
    yield Case("norm_modulate", (x, shift, scale, dit.NORM_EPS), {})
    yield Case("add_norm_modulate", (x, h, shift, scale, dit.NORM_EPS), {})
    yield Case("gated_residual", (x, gate, h, h.clone()), {})
    yield Case("norm_modulate_rows", (x, shift, scale, dit.NORM_EPS), {})
    yield Case("add_norm_modulate_rows", (x, h, shift, scale, dit.NORM_EPS), {})
    yield Case("gated_residual_rows", (x, gate, h), {})
    qkv = random(1, frames * tokens, 3 * width)
    weight = random(width)
    unread = 2 * qkv.numel() // 3 * qkv.element_size()  # v, which is not written either
    yield Case("qk_features", (qkv, weight, weight, attention.NORM_EPS), {}, unread=unread)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in qkv.chunk(3, dim=-1))
    q, k = (part.relu().contiguous() for part in (q, k))
    turn = rotary(dim, 0, (frames, *grid), dtype=torch.float32, device=device)
    heads = width // dim
    past = (
        torch.randn(1, 1, heads, dim, dim, dtype=torch.float32, device=device, generator=rng),
        torch.rand(1, 1, heads, dim, dtype=torch.float32, device=device, generator=rng),
    )
    settings = {"lengths": [frames * tokens], "window": -1, "eps": network.linear_attn_eps}
    yield Case("linear_attention", (q, k, v, *turn, *past), settings, 4 * frames * tokens * width * dim, learned=3)
    del qkv, q, k, v
    q = random(1, frames * tokens, width).unflatten(-1, (-1, dim))
    caption = network.caption_length
    k, v = (random(1, caption, width).unflatten(-1, (-1, dim)).transpose(1, 2) for _ in range(2))
    lengths = torch.full((1,), caption, dtype=torch.int32, device=device)
    yield Case("caption_attention", (q, k, v, lengths), {}, 4 * frames * tokens * width * caption)
    del q, k, v
    wide, filters = random(1, frames, tokens, 2 * inner), random(2 * inner, 1, 3, 3) / 3
    yield Case("gated_conv", (wide, filters, random(2 * inner), grid), {})
    del wide
    yield Case("quantise_rows", (x,), {})
    taps = random(width, width, 3, 1) / (3 * width) ** 0.5
    conv = {"lengths": [frames]}
    yield Case("neighbour_rows", (x, x[:, 0]), conv)
    yield Case("temporal_conv", (x, x[:, 0], taps), conv, 2 * 3 * frames * tokens * width * width)
    # The decoder's widest step, for one latent.
    frames, height, width, channels = sizes.picture
    picture = torch.randn(1, *sizes.picture, dtype=torch.float32, device=device, generator=rng).to(sizes.decoder)
    buffer = picture.new_zeros(1, 2 + frames, height + 2, width + 2, channels)
    gamma = picture.new_ones(channels)
    bias = gamma.clone()
    yield Case("norm_silu_into", (picture, gamma, buffer[:, 2:, 1:-1, 1:-1], bias), {}, written=2)
    yield Case("add_shortcut", (picture, picture.clone(), bias), {})
    yield Case("copy_into", (picture, buffer[:, 2:, 1:-1, 1:-1]), {}, written=1)
    yield Case("relu_into", (picture, picture.clone(), bias, picture.clone()), {}, written=1)


class Work(NamedTuple):
    """One chunk for the network and the decoder, both with a past, of random numbers.

    x: (1, C, T, h, w). text: without padding; read: by the network. forward, decode: one pass each.
    """

    x: Tensor
    t: Tensor
    text: TextEmbedding
    read: TextMemory
    state: CausalState
    forward: Callable[[], Any]
    decode: Callable[[], Any]


def _work(loaded: Loaded, size: tuple[int, int]) -> Work:
    config, device, model, vae = loaded.engine.config, loaded.engine.device, loaded.model, loaded.vae
    frames = config.sampling.chunk_frames
    height, width = loaded.engine.geometry.latent_size(*size)
    rng = torch.Generator(device).manual_seed(0)
    x = torch.randn(
        1, config.model.in_channels, frames, height, width, dtype=torch.float32, device=device, generator=rng
    ).to(model.dtype)
    length, channels = config.model.caption_length, config.model.caption_channels
    tokens = torch.randn(1, length, channels, dtype=torch.float32, device=device, generator=rng).to(model.dtype)
    text = TextEmbedding(tokens, torch.ones(1, length, dtype=torch.bool, device=device))
    read, t = model.cache_caption(text), torch.full((1,), T_STEP, dtype=torch.float32, device=device)
    _, state = model(x, t, read)
    _, cache = vae.decode_stream(x[:, :, :1].expand(-1, -1, 1 + vae.ahead, -1, -1), more=True)
    forward = partial(model, x, t, read, state=state, peers=loaded.engine.peers)
    decode = partial(vae.decode_stream, x, cache, more=True)
    return Work(x, t, text, read, state, forward, decode)


@torch.no_grad()
def measure_passes(loaded: Loaded, size: tuple[int, int]) -> dict[str, float]:
    """ms of one pass over a chunk with a past, on a GPU also as the CUDA graph that it is replayed as; and of decoding
    a chunk, for each frame. Where memory is held, it has no room for the graph. Of processes that make a video together
    also a pass of one alone, and of all that they give each other in one."""
    sampling, peers = loaded.engine.config.sampling, loaded.engine.peers
    held = sampling.memory is not None or sampling.offload != "none"
    device, work = loaded.engine.device, _work(loaded, size)
    passes = {"forward": 1000 * seconds(work.forward, device)}
    if device.type == "cuda" and not held:
        recording = RecordedPass(loaded.model, work.x, work.t, work.read, work.state, peers=peers)
        passes["forward, replayed"] = 1000 * seconds(partial(recording.replay, work.x, work.t, work.state), device)
    if peers is not None:
        alone = partial(loaded.model, work.x, work.t, work.read, state=work.state)
        passes["forward of one process"] = 1000 * seconds(alone, device)
        if device.type == "cuda" and not held:
            recording = RecordedPass(loaded.model, work.x, work.t, work.read, work.state)
            replay = partial(recording.replay, work.x, work.t, work.state)
            passes["forward of one process, replayed"] = 1000 * seconds(replay, device)
        (kv, *_), (k_sum, *_), (tail, *_) = work.state[:3]
        depth, edges = len(loaded.model.blocks), torch.stack([tail, tail], dim=1)
        passes["sums in a forward"] = depth * 1000 * seconds(partial(peers.total, [kv, k_sum]), device)
        passes["neighbours in a forward"] = depth * 1000 * seconds(partial(peers.edges, edges), device)
    frames = loaded.engine.geometry.pixel_frames(work.x.shape[2], first=False)
    return passes | {"decode a frame": 1000 * seconds(work.decode, device) / frames}


@torch.no_grad()
def measure_float8(loaded: Loaded, size: tuple[int, int]) -> dict[str, float]:
    """Measure what `model.float8` does to the network, not compiled, which is left in float8.

    Relative errors of products, each given what it gets in a pass: the largest of all blocks. Of the latents of three
    chunks, each after those before it. And ms of a pass.

    Raises:
        ValueError: this network or device cannot.
    """
    model, work = loaded.model, _work(loaded, size)
    schedule = FlowSchedule.from_config(loaded.engine.config.scheduler)
    shape = (work.x.shape[1], *work.x.shape[3:])

    def latents() -> list[Tensor]:
        noise = PromptNoise(0, [("", 0)])
        plan = ChunkPlan((work.x.shape[2],) * 3)
        chunks = generate(model, schedule, [work.read] * 3, plan, shape=shape, rng=noise, device=loaded.engine.device)
        return [chunk.latents for chunk in chunks]

    report: dict[str, float] = {}

    def compare(name: str, module: nn.Module, inputs: tuple[Any, ...], exact: Tensor) -> None:
        key = f"error of {name}"
        report[key] = max(report.get(key, 0.0), relative_error(in_float8(module)(*inputs), exact))

    hooks = [
        block.get_submodule(name).register_forward_hook(partial(compare, name))
        for block in model.blocks
        for name in PRODUCTS
    ]
    work.forward()
    for hook in hooks:
        hook.remove()
    assert len(report) == len(PRODUCTS), report
    before, plain = latents(), 1000 * seconds(work.forward, loaded.engine.device)
    to_float8(model)
    for index, (exact, given) in enumerate(zip(before, latents(), strict=True), start=1):
        report[f"error of latents, chunk {index}"] = relative_error(given, exact)
    return report | {"forward before, ms": plain, "forward, ms": 1000 * seconds(work.forward, loaded.engine.device)}


def relative_error(given: Tensor, exact: Tensor) -> float:
    """|given - exact| / |exact|, Euclidean norms of tensors of one shape."""
    return float((given.float() - exact.float()).norm() / exact.float().norm())


@torch.no_grad()
def measure_profile(loaded: Loaded, size: tuple[int, int]) -> dict[str, Any]:
    """Profile a chunk: ms of each kernel (on a CPU, of each operation) in a forward and in a decode.

    Longest first, all calls of a name together, and the mean of some passes: in the first after a pause a GPU's clock
    is higher. "idle": how much longer the same takes when it is not profiled than all of a GPU's kernels together, 0 if
    it does not.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda, work = loaded.engine.device.type == "cuda", _work(loaded, size)
    passes = PROFILED if cuda else 1
    report = {}
    for name, call in (("forward", work.forward), ("decode", work.decode)):
        wall = seconds(call, loaded.engine.device, 3)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            for _ in range(passes):
                call()
            if cuda:
                torch.cuda.synchronize()
        spent = {
            event.key: {
                "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / passes,
                "calls": event.count // passes,
            }
            for event in profiler.key_averages()
            if not cuda or event.self_device_time_total > 0  # the host's calls are listed too
        }
        if cuda:
            spent["idle"] = {"ms": max(0.0, 1000 * wall - sum(row["ms"] for row in spent.values())), "calls": 1}
        report[name] = dict(sorted(spent.items(), key=lambda item: -item[1]["ms"]))
    return report


@torch.no_grad()
def measure_peers(loaded: Loaded, size: tuple[int, int]) -> dict[str, Any]:
    """ms of one denoising pass over one chunk, and of decoding it, here and in diffusers, random weights each.

    diffusers' network sees one chunk without a past: it has none. Here the caption's keys and values are not part of a
    pass.
    """
    from diffusers import SanaVideoTransformer3DModel

    config, device, model = loaded.engine.config, loaded.engine.device, loaded.model
    work = _work(loaded, size)
    x, t, (tokens, mask) = work.x, work.t, work.text
    frames = x.shape[2]
    forward = {"ours, caption read before": seconds(work.forward, device)}

    settings = {name: value for name, value in diffusers_config(config.model).items() if not name.startswith("_")}
    with torch.device(device):
        peer: Any = SanaVideoTransformer3DModel(**settings)
    peer = peer.to(model.dtype).eval()
    run = partial(peer, x, tokens, t, encoder_attention_mask=mask.to(model.dtype), return_dict=False)
    forward["diffusers, eager"] = seconds(run, device)
    for block in peer.transformer_blocks:
        block.compile()
    forward["diffusers, each block compiled"] = seconds(run, device)
    del peer, run

    vae = loaded.vae
    later, whole = (vae.geometry.pixel_frames(frames, first=first) for first in (False, True))
    decoder = {"ours": seconds(work.decode, device, 5) / later}
    for dtype in (torch.float32, torch.bfloat16):
        peer = copy.deepcopy(vae.model).to(dtype)
        for weight in peer.parameters():
            weight.data = weight.data.contiguous()  # its own layout, not ours
        theirs = partial(peer.decode, x.to(dtype))
        decoder[f"diffusers, {str(dtype).removeprefix('torch.')}"] = seconds(theirs, device, 3) / whole
    return {
        "forward, ms": {name: 1000 * value for name, value in forward.items()},
        "decoder, ms a frame": {name: 1000 * value for name, value in decoder.items()},
    }


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """torch.compile, each by itself: all are alike, and one compilation serves them."""
    for block in blocks:
        block.compile(options=inductor_options())


def _widths(network: ModelConfig) -> tuple[int, int, int]:
    """Widths of the residual stream, of half the feed-forward, and of a head."""
    width = network.architecture().hidden_size
    return width, int(network.mlp_ratio * width), network.linear_head_dim


def _sizes(loaded: Loaded, size: tuple[int, int]) -> Sizes:
    """Sizes in a video of height x width pixels."""
    engine, vae = loaded.engine, loaded.vae
    _, down, across = loaded.model.patch_size
    height, width = engine.geometry.latent_size(*size)
    channels, side = vae.widest
    picture = (engine.geometry.time_stride, size[0] // side, size[1] // side, channels)
    grid, frames = (height // down, width // across), engine.config.sampling.chunk_frames
    return Sizes(engine.device, loaded.model.dtype, engine.config.model, frames, grid, picture, vae.dtype)
