"""Fill a hub cache with random weights in the published layouts, so that the published command runs without a hub.

    python tests/full_size/hub_cache.py /tmp/hub            # 2B: about 15 GB and a minute on a GPU machine
    python tests/full_size/hub_cache.py /tmp/hub --size 720 # what the configs of 720p read: 12 GB
    HF_HUB_CACHE=/tmp/hub HF_HUB_OFFLINE=1 accelerate launch ...

The names, key names, shapes and dtypes are those of the published files; the numbers are random and the tokenizer is
the small one of the shapes world, so the videos show noise at the true cost.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from longsana.runtime.process import share_cores

    share_cores()  # before torch is imported

import torch
from torch import Tensor, nn

from longsana.config import ModelConfig
from longsana.encoders.vae_files import to_original_layout
from longsana.models.dit import LongSanaDiT
from longsana.weights.network import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
OWNER = "Efficient-Large-Model"
REVISION = "0" * 40


def snapshot(cache: Path, repo: str, owner: str = OWNER) -> Path:
    """The folder that the hub's client takes for the newest revision of `owner/repo`."""
    folder = cache / f"models--{owner}--{repo}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    path = folder / "snapshots" / REVISION
    path.mkdir(parents=True, exist_ok=True)
    return path


@torch.no_grad()
def randomise(module: nn.Module, rng: torch.Generator) -> None:
    """Weights of every kind non-zero, and activations of ordinary size."""
    for name, weight in module.named_parameters():
        if name.endswith(("norm.weight", "gamma")):
            weight.fill_(1.0)
        else:
            fan_in = weight[0].numel() if weight.dim() > 1 else 400
            weight.normal_(0.0, 0.5 / math.sqrt(fan_in), generator=rng)


def write_network(path: Path, config: ModelConfig, device: str, seed: int, *, base: bool) -> None:
    """base: has a null caption, which flow matching puts in the place of some; a distilled network has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LongSanaDiT(config)
    model.to_empty(device=device)
    randomise(model, torch.Generator(device).manual_seed(seed))
    if not base:
        model.text_embed.null_tokens.zero_()
    weights: dict[str, Tensor] = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_checkpoint(weights, path, layout="upstream", config=config)


def write_vae(path: Path, device: str) -> None:
    from diffusers import AutoencoderKLWan

    path.parent.mkdir(parents=True, exist_ok=True)
    model = AutoencoderKLWan().to(device)
    randomise(model, torch.Generator(device).manual_seed(1))
    torch.save({name: tensor.cpu() for name, tensor in to_original_layout(model.state_dict()).items()}, path)


def write_ltx2_vae(folder: Path, device: str) -> None:
    from diffusers import AutoencoderKLLTX2Video

    with torch.device(device):
        model = AutoencoderKLLTX2Video().to(torch.bfloat16)
    randomise(model, torch.Generator(device).manual_seed(1))
    model.save_pretrained(folder)


def write_text_encoder(folder: Path, device: str) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
    )
    torch.manual_seed(2)
    with torch.device(device):
        model = Gemma2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "asset" / "shapes" / "text_encoder" / name, folder / name)


def link_for_training(cache: Path) -> None:
    """The starting points of the later stages, whose weights are random anyway: one file under each of their names.

    Published ones are trainer files; what a file is, is seen from its content.
    """
    (source,) = cache.glob("models--*LongLive/snapshots/*/checkpoints/*.pth")
    for repo in ("LongSANA_2B_480p_ode", "LongSANA_2B_480p_self_forcing"):
        target = snapshot(cache, repo) / "checkpoints" / f"{repo}.pt"
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(source)


def build_720p(cache: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(model="SanaMSVideo_2000M_P1_D20", in_channels=128)
    checkpoint = snapshot(cache, "SANA-Video_2B_720p") / "checkpoints" / "SANA_Video_2B_720p.pth"
    write_network(checkpoint, config, device, seed=4, base=True)
    write_ltx2_vae(snapshot(cache, "LTX-2", "Lightricks") / "vae", device)
    write_text_encoder(snapshot(cache, "gemma-2-2b-it"), device)


def build(cache: Path, *, base: bool = True) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distilled = snapshot(cache, "SANA-Video_2B_480p_LongLive") / "checkpoints" / "SANA_Video_2B_480p_LongLive.pth"
    write_network(distilled, ModelConfig(), device, seed=0, base=False)
    repo = snapshot(cache, "SANA-Video_2B_480p")
    if base:
        write_network(repo / "checkpoints" / "SANA_Video_2B_480p.pth", ModelConfig(), device, seed=3, base=True)
    write_vae(repo / "vae" / "Wan2.1_VAE.pth", device)
    write_text_encoder(snapshot(cache, "gemma-2-2b-it"), device)
    link_for_training(cache)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder to fill; use it as HF_HUB_CACHE")
    parser.add_argument("--no_base", action="store_true", help="leave the bidirectional base model out")
    parser.add_argument("--size", type=int, choices=(480, 720), default=480)
    options = parser.parse_args()
    if options.size == 720:
        build_720p(options.cache)
    else:
        build(options.cache, base=not options.no_base)
