"""Time of tiny decoders on a GPU in bfloat16, random weights: plain, fast, replayed, compiled; and of their pieces.

    python tests/full_size/measure_tiny.py --out tiny.json

480p is taew2_1 with latents of 60x104, 720p is taeltx_2 with latents of 22x40. ms are for one frame of a later group of
latents. `pieces` compares ways to compute the same thing, each at the sizes that it has in the decoder. On a machine
without a GPU `--small` runs all but replays, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from longsana.encoders import tiny_decoder
from longsana.encoders.convolution import enlarged, enlarging
from longsana.encoders.tiny_layouts import TINY
from longsana.encoders.tiny_network import TinyNetwork, load_tiny
from longsana.inference.benchmark import machine
from longsana.inference.microbenchmark import seconds
from longsana.ops import backend, relu_into
from longsana.ops.dispatch import inductor_options
from longsana.runtime.graphs import Recording

SIZES = {"480p": ("taew2_1", (60, 104)), "720p": ("taeltx_2", (22, 40))}
SMALL = (2, 4)
GROUPS = (1, 2, 5, 10)


def network_of(name: str, device: torch.device, dtype: torch.dtype) -> TinyNetwork:
    network = load_tiny(TINY[name], "seeded:0", device, dtype)
    tiny_decoder.prepare(network)
    return network


def decoders(network: TinyNetwork, latents: Tensor, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Ways to decode a later group of latents, by name."""
    device = latents.device
    _, memory = network.decode(latents[:, :, :1])
    _, features = tiny_decoder.decode(network, latents[:, :, :1], None)
    fast = partial(tiny_decoder.decode, network)
    ways: dict[str, Callable[[], Any]] = {
        "plain": partial(network.decode, latents, memory),
        "fast": partial(fast, latents, features),
    }
    if device.type == "cuda":

        def run(latents: Tensor, *features: Tensor) -> list[Tensor]:
            frames, after = fast(latents, features)
            return [frames, *after]

        inputs = [latents, *features]
        recording = Recording(run, inputs, warm_up=run)
        ways["fast, replayed"] = partial(recording.replay, inputs)
        ways["fast, replayed, without copies"] = recording._graph.replay
    if compiled:
        options = inductor_options()
        ways["plain, compiled"] = partial(torch.compile(network.decode, options=options), latents, memory)
        ways["fast, compiled"] = partial(torch.compile(fast, options=options), latents, features)
    return ways


def measure_decoder(name: str, size: tuple[int, int], device: torch.device, compile_group: int) -> dict[str, Any]:
    """ms a frame by way and latents a group; and what bfloat16 costs in PSNR."""
    kind, rows = TINY[name], {}
    rng = torch.Generator(device).manual_seed(0)
    network = network_of(name, device, torch.bfloat16)
    for group in GROUPS:
        latents = torch.randn(1, kind.channels, group, *size, device=device, generator=rng).bfloat16()
        for way, call in decoders(network, latents, group == compile_group).items():
            ms = 1000 * seconds(call, device) / (group * kind.stride)
            rows.setdefault(way, {})[group] = ms
            print(f"{name}: {way}, {group} latents: {ms:.3f} ms a frame", flush=True)
    exact, _ = network_of(name, device, torch.float32).decode(latents[:, :, :2].float())
    exact = (2 * exact[:, :, kind.stride - 1 :] - 1).clamp(-1, 1)
    plain, _ = network.decode(latents[:, :, :2])
    fast, _ = tiny_decoder.decode(network, latents[:, :, :2], None)
    psnr = {
        way: float(10 * torch.log10(4 / (frames.clamp(-1, 1).float() - exact).square().mean()))
        for way, frames in (("plain", 2 * plain[:, :, kind.stride - 1 :].float() - 1), ("fast", fast))
    }
    return {"ms a frame": rows, "PSNR of bfloat16 to float32, dB": psnr}


def pieces(channels: int, size: tuple[int, int], frames: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Ways to compute what a decoder has between its first and last convolution, at one of its levels."""
    rng = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=rng).bfloat16()

    last = {"memory_format": torch.channels_last}
    buffer = random(1, 1 + frames, *size, channels)
    x, past = buffer[:, 1:], buffer[:, :-1]
    images, before = (part[0].permute(0, 3, 1, 2) for part in (x, past))
    here, there = (random(channels, channels, 3, 3).contiguous(**last) for _ in range(2))
    joint = torch.stack([there, here], dim=2).contiguous(memory_format=torch.channels_last_3d)
    wide = torch.cat([here, there], dim=1).contiguous(**last)
    both = torch.cat([here, there], dim=0).contiguous(**last)
    bias = random(channels)
    h = x.clone()
    grown = random(2 * channels, channels, 3, 3).contiguous(**last)
    spread = enlarging(grown)
    layer = torch.nn.Module()
    layer.register_buffer("enlarging", spread)
    ways: dict[str, Callable[[], Any]] = {
        "first convolution: over time, of the buffer": lambda: F.conv3d(
            buffer.permute(0, 4, 1, 2, 3), joint, padding=(0, 1, 1)
        ),
        "first convolution: two, summed": lambda: F.conv2d(images, here, padding=1).add_(
            F.conv2d(before, there, padding=1)
        ),
        "first convolution: two": lambda: (F.conv2d(images, here, padding=1), F.conv2d(before, there, padding=1)),
        "first convolution: one of twice the outputs": lambda: F.conv2d(images, both, padding=1),
        "first convolution: joined": lambda: F.conv2d(torch.cat([images, before], dim=1), wide, padding=1),
        "other convolution": lambda: F.conv2d(images, here, padding=1),
        "other convolution, with its bias": lambda: F.conv2d(images, here, bias, padding=1),
        "bias and ReLU: relu_into": lambda: relu_into(h, h, bias),
        "bias and ReLU: PyTorch": lambda: (h + bias).relu_(),
        "bias, shortcut and ReLU: relu_into": lambda: relu_into(h, h, bias, x),
        "bias, shortcut and ReLU: PyTorch": lambda: (h + bias + x).relu_(),
        "enlarged, two frames of one: transposed": lambda: enlarged(layer, x[0], bias=False),
        "enlarged, two frames of one: enlarged first": lambda: F.conv2d(
            F.interpolate(images, scale_factor=2.0), grown, padding=1
        ),
    }
    if device.type == "cuda":
        ways["convolution, bias and ReLU: cuDNN's own"] = lambda: torch.cudnn_convolution_relu(
            images, here, bias, (1, 1), (1, 1), (1, 1), 1
        )
        ways["convolution, bias, shortcut and ReLU: cuDNN's own"] = lambda: torch.cudnn_convolution_add_relu(
            images, here, images, 1.0, bias, (1, 1), (1, 1), (1, 1), 1
        )
    for colours in (3, 4, 8, 16, 48):
        weight = random(colours, channels, 3, 3).contiguous(**last)
        ways[f"last convolution, to {colours}"] = partial(F.conv2d, images, weight, padding=1)
    return ways


def measure_pieces(name: str, size: tuple[int, int], device: torch.device, group: int) -> dict[str, dict[str, float]]:
    """ms of each way, by level and for all frames that `group` latents have there; a way that fails says why."""
    kind, report, frames = TINY[name], {}, group
    for level in range(4):
        channels, sides = kind.widths[level], (size[0] << level, size[1] << level)
        rows: dict[str, Any] = {}
        for way, call in pieces(channels, sides, frames, device).items():
            if ("last" in way) != (level == 3):
                continue
            try:
                rows[way] = 1000 * seconds(call, device)
            except RuntimeError as error:
                rows[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        report[f"{frames} frames of {sides[0]}x{sides[1]}x{channels}"] = rows
        frames *= kind.grows[level] if level < 3 else 1
    return report


def measure_kernels(name: str, size: tuple[int, int], device: torch.device, group: int) -> dict[str, float]:
    """ms of each kernel in decoding one group, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    network = network_of(name, device, torch.bfloat16)
    latents = torch.randn(1, TINY[name].channels, group, *size, device=device).bfloat16()
    _, features = tiny_decoder.decode(network, latents, None)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            tiny_decoder.decode(network, latents, features)
        torch.cuda.synchronize()
    spent = {event.key[:120]: event.self_device_time_total / 5000 for event in seen.key_averages()}
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:25])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/tiny.json"), help="(default: %(default)s)")
    parser.add_argument("--only", choices=list(SIZES), help="one of the sizes (default: both)")
    parser.add_argument("--group", type=int, default=10, help="latents for torch.compile and pieces (default: 10)")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--small", action="store_true", help="small pictures, to see that it works")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = False  # as the batch command has it
    report: dict[str, Any] = {"machine": machine(device), "torch": torch.__version__}
    report["backend"] = backend() if device.type == "cuda" else "reference"
    with torch.no_grad():
        for title, (name, own) in SIZES.items():
            if options.only not in (None, title):
                continue
            size = SMALL if options.small else own
            compile_group = 0 if options.no_compile else options.group
            rows = {"decoder": name, "latents": list(size), **measure_decoder(name, size, device, compile_group)}
            rows["pieces, ms"] = measure_pieces(name, size, device, options.group)
            if device.type == "cuda":
                rows["kernels, ms"] = measure_kernels(name, size, device, options.group)
            report[title] = rows
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
