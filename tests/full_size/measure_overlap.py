"""How many latents to decode for the frame that leads a later window of LongSANA, in numbers.

python tests/full_size/measure_overlap.py --vae asset/shapes/vae --size 96x160           # the small VAE, on a CPU
python tests/full_size/measure_overlap.py --vae hf://Efficient-Large-Model/SANA-Video_2B_480p/vae/Wan2.1_VAE.pth

For each k: decode the last k of 41 latents from a cold cache, encode the last picture, and compare its latent with that
of all 41; against carrying the decoder's cache from stretch to stretch, which is exact.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch

from longsana.config import VAEConfig
from longsana.encoders.vae import WanVAE


def seconds(device: torch.device, call: object, repeat: int = 3) -> float:
    times = []
    for _ in range(repeat):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeat // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, help="a VAE; a folder without weights gets random ones")
    parser.add_argument("--size", default="480x832", help="of the picture, height x width")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = options.vae if options.vae.startswith("hf://") else f"seeded:{options.vae}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = WanVAE.load(VAEConfig(vae_pretrained=source), device, dtype)
    height, width = map(int, options.size.split("x"))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 16, 41, height // 8, width // 8)
    noise = torch.randn(shape, generator=generator)
    # Neighbouring latents are alike, as in a video.
    latents = torch.stack([noise[:, :, max(0, i - 5) : i + 1].mean(2) * 2 for i in range(41)], dim=2).to(device)
    _, cache = vae.decode_stream(latents[:, :, :21])

    def carried() -> torch.Tensor:
        return vae.overlap_latent(latents[:, :, 21:], cache)[0]

    exact = carried()
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {dtype}, {options.size}, {options.vae}")
    print("latents decoded | relative error of the lead latent | seconds")
    print(f"20, cache carried ({cache.nbytes / 2**20:.0f} MiB) | 0 | {seconds(device, carried):.3f}")
    for count in (1, 2, 3, 4, 5, 6, 8, 12, 21):
        lead = vae.overlap_latent(latents[:, :, -count:])[0]
        error = ((lead - exact).norm() / exact.norm()).item()
        print(f"{count} | {error:.2e} | {seconds(device, lambda: vae.overlap_latent(latents[:, :, -count:])):.3f}")  # noqa: B023


if __name__ == "__main__":
    main()
