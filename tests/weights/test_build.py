from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longsana.config import ModelConfig
from longsana.runtime.errors import InputError
from longsana.weights.build import build_model
from longsana.weights.network import LAYOUTS, Layout, load_weights, save_checkpoint
from tests.weights.checkpoints import PATHS, TINY, assert_same, load, meta, upstream, weights


def test_loaded_tensors_are_our_own(tmp_path: Path) -> None:
    """In the asked dtype, contiguous, trainable, and not a window on the file."""
    state = upstream()
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"].T.contiguous().T
    torch.save(state, tmp_path / "a.pth")
    model = meta()
    load_weights(model, tmp_path / "a.pth", dtype=torch.float32)
    with (tmp_path / "a.pth").open("r+b") as stream:
        stream.write(bytes((tmp_path / "a.pth").stat().st_size))
    assert_same(dict(model.state_dict()), weights())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert len(list(model.parameters())) == len(state) - 1

    save_file(upstream(), tmp_path / "a.safetensors")
    half = load(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert_same(half, {name: tensor.bfloat16() for name, tensor in weights().items()})


def test_seeded_model_is_filled_and_depends_on_the_seed_alone() -> None:
    def build(load_from: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        config = dataclasses.replace(TINY, load_from=load_from)
        model = build_model(config, device="cpu", dtype=dtype)
        assert not model.training
        assert not any(module.training for module in model.modules())
        return dict(model.state_dict())

    # Memory that nothing fills is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        first = build("seeded:3")
        torch.manual_seed(99)
        assert_same(build("seeded:3"), first)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert not torch.equal(build("seeded:4")["final.linear.weight"], first["final.linear.weight"])
    assert_same(build("seeded:3", torch.bfloat16), {name: tensor.bfloat16() for name, tensor in first.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_from": "seeded:x"}, "model.load_from=seeded:x: the seed must be a whole number"),
        ({"load_from": "seeded:-1"}, "the seed must be"),
        ({"load_from": "no/such.pth"}, r"the checkpoint \(model.load_from\): 'no/such.pth' not found"),
        ({"hidden_size": 50}, "^model: hidden_size 50 must be a multiple"),
        ({"model": "SanaMSVideo_2000M_P2_D21"}, "did you mean 'SanaMSVideo_2000M_P2_D20'"),
    ],
)
def test_configs_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(dataclasses.replace(TINY, **changes), device="cpu", dtype=torch.float32)


MEMORY_SCRIPT = """
import sys, threading, time
import torch
import safetensors.torch
from longsana.config import ModelConfig
from longsana.weights.build import build_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

config = eval(sys.argv[1])
# Warm up allocators, thread pools and imports on a model that weighs nothing.
tiny = ModelConfig(depth=1, hidden_size=48, num_heads=4, linear_head_dim=8, caption_channels=20, caption_length=7)
build_model(tiny, device="cpu", dtype=torch.bfloat16)
torch.cat([torch.zeros(1000, 1000), torch.zeros(1000, 1000)]).bfloat16()
base, peak, running = anonymous(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = build_model(config, device="cpu", dtype=getattr(torch, sys.argv[2]))
peak = max(peak, anonymous())
running = False
thread.join()
size = sum(t.nbytes for t in model.state_dict().values())
print(peak - base, anonymous() - base, size, model.final.linear.weight.float().sum().item())
"""


def measure(config: ModelConfig, dtype: str) -> tuple[float, ...]:
    """Anonymous memory of a fresh process above its baseline: peak, after loading; bytes of the model; a checksum."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, repr(config), dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return tuple(map(float, run.stdout.split()))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "layout", [layout if layout == "upstream" else pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS]
)
def test_loading_holds_one_copy(layout: Layout, tmp_path: Path) -> None:
    wide = ModelConfig(depth=3, hidden_size=1120, num_heads=10, caption_channels=64, caption_length=8)
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in meta(wide).state_dict().items()}
    path = tmp_path / PATHS[layout]
    # The network that is not asked for must not be read.
    others = {"critic": {name: tensor + 1 for name, tensor in state.items()}} if layout == "trainer" else None
    save_checkpoint(state, path, layout, wide, others=others)
    file = sum(tensor.nbytes for tensor in state.values())
    assert 250e6 < file < 450e6
    peak, after, size, checksum = measure(dataclasses.replace(wide, load_from=str(path)), "float32")
    assert checksum == state["final.linear.weight"].sum().item()
    assert 0.9 * size < after  # the measure sees the model: nothing of it is still in the file
    assert peak < 1.3 * file


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_the_2b_network_holds_one_copy(tmp_path: Path) -> None:
    config = ModelConfig()
    state = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16) for name, tensor in meta(config).state_dict().items()
    }
    checksum = state["final.linear.weight"].float().sum().item()
    path = tmp_path / "model.pth"
    save_checkpoint(state, path, "upstream", config)
    del state
    peak, after, size, loaded = measure(dataclasses.replace(config, load_from=str(path)), "bfloat16")
    assert path.stat().st_size > 4.1e9
    assert loaded == checksum
    assert 0.9 * size < after
    assert peak < 1.3 * path.stat().st_size
