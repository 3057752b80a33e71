"""Loading weights takes no second copy of them on the host: mapped files are no memory of the process's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import Gemma2Config, Gemma2Model

from longsana.config import ModelConfig
from longsana.encoders.vae_files import to_original_layout
from longsana.weights.network import Layout, save_checkpoint
from tests.commands.test_convert import TINY
from tests.weights.checkpoints import weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
LARGEST = 1.3
"""Of the checkpoint, what lies on the host at most, where what is loaded lies there too."""

CHILD = """
import json, sys, threading
from pathlib import Path
import torch
from longsana.config import ModelConfig, TextEncoderConfig, VAEConfig
from longsana.encoders.loading import load_vae
from longsana.encoders.text import _load_model, _read_config
from longsana.weights.build import build_model
import diffusers, transformers.models.gemma2.modeling_gemma2

kind, source, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
cpu, ended, peak = torch.device("cpu"), threading.Event(), 0

def own():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, own())

before = own()
watcher = threading.Thread(target=watch)
watcher.start()
if kind == "network":
    settings["patch_size"] = tuple(settings["patch_size"])
    loaded = build_model(ModelConfig(load_from=source, **settings), device=cpu, dtype=torch.float32)
elif kind == "vae":
    loaded = load_vae(VAEConfig(vae_pretrained=source), cpu, torch.float32).model
else:
    loaded = _load_model(Path(source), _read_config(Path(source)), cpu, torch.float32)
ended.set()
watcher.join()
size = sum(part.nbytes for part in loaded.parameters())
print(json.dumps({"peak": max(peak, own()) - before, "size": size}))
"""


def loaded(kind: str, source: Path, settings: dict[str, object] | None = None) -> float:
    """The most that a process has of its own while it loads, in sizes of what it loads."""
    command = [sys.executable, "-c", CHILD, kind, str(source), json.dumps(settings or {})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["size"] > 250e6 and told["peak"] > 0.9 * told["size"], told
    print(f"{kind}, {source.name}: {told['peak'] / told['size']:.3f} of the checkpoint")
    return float(told["peak"] / told["size"])


@pytest.fixture(scope="module")
def network() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = replace(TINY, hidden_size=1120, num_heads=10, linear_head_dim=112, depth=4)
    return config, weights(config=config)


@pytest.mark.parametrize("layout", ["upstream", "trainer", "safetensors", "diffusers", "shards", "before 1.6"])
def test_a_network(layout: str, network: tuple[ModelConfig, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    config, tensors = network
    path = tmp_path / (
        "transformer" if layout == "diffusers" else "model.safetensors" if layout == "shards" else "model"
    )
    if layout == "before 1.6":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        own: Layout = "safetensors" if layout == "shards" else layout  # type: ignore[assignment]
        save_checkpoint(dict(tensors), path, own, config, shard_bytes=100_000_000 if layout == "shards" else 10**10)
    if layout == "shards":
        path = tmp_path
    size = config.architecture()
    settings = {name: getattr(config, name) for name in ("in_channels", "caption_channels", "caption_length")}
    settings |= {"depth": size.depth, "hidden_size": size.hidden_size, "num_heads": size.num_heads}
    settings |= {
        "patch_size": size.patch_size,
        "linear_head_dim": config.linear_head_dim,
        "mlp_ratio": config.mlp_ratio,
    }
    assert loaded("network", path, settings) <= LARGEST


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_vae(layout: str, tmp_path: Path) -> None:
    model = AutoencoderKLWan(base_dim=96)
    path = tmp_path / "Wan2.1_VAE.pth"
    if layout == "original":
        torch.save(to_original_layout(model.state_dict()), path)
    else:
        path = tmp_path / "vae"
        model.save_pretrained(path)
    assert loaded("vae", path) <= LARGEST


def test_a_text_encoder(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    Gemma2Model(config).save_pretrained(tmp_path)
    assert loaded("text encoder", tmp_path) <= LARGEST
