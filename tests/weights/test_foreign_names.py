"""What wrapped a network in training is taken off its names, wherever it stands, and said once; and saved states."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.sampling.continuation import Continuation
from tests.weights.checkpoints import assert_same, load, upstream, weights


def in_blocks(wrapper: str) -> Callable[[str], str]:
    return lambda name: re.sub(r"^(blocks\.\d+)\.", rf"\1.{wrapper}.", name)


def nested(name: str) -> str:
    return f"module._orig_mod.model._fsdp_wrapped_module.{in_blocks('_checkpoint_wrapped_module._orig_mod')(name)}"


NAMES: dict[str, Callable[[str], str]] = {
    "ddp": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "older fsdp": lambda name: f"_fpw_module.{name}",
    "ddp over compile": lambda name: f"module._orig_mod.{name}",
    "compile over ddp": lambda name: f"_orig_mod.module.{name}",
    "a trainer's": lambda name: f"model.module.{name}",
    "a trainer's, wrapped": lambda name: f"module.model.{name}",
    "lightning in a trainer": lambda name: f"model.model.{name}",
    "fsdp of blocks": in_blocks("_fsdp_wrapped_module"),
    "ddp of blocks": in_blocks("module"),
    "all": nested,
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", ["upstream", "longsana"])
def test_wrappers_are_taken_off(names: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = upstream() if kind == "upstream" else weights()
    wrapped = {NAMES[names](name): tensor for name, tensor in plain.items()}
    files: dict[str, object] = {
        "a.pth": wrapped,
        "b.pt": {"generator": wrapped, "step": 3},
        "c.pth": {"state_dict": wrapped},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    save_file(wrapped, tmp_path / "d.safetensors")
    for path in sorted(tmp_path.iterdir()):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert_same(load(path), weights())
            assert_same(load(path), weights())
        said = [record.getMessage() for record in caplog.records if "taken off its names" in record.getMessage()]
        assert len(said) == (0 if names == "lightning in a trainer" else 1), said
        assert all(line.startswith(f"{path}: ") for line in said)


def test_two_tensors_that_would_be_one_are_refused(tmp_path: Path) -> None:
    content: dict[str, Tensor] = {**upstream(), "module.x_embedder.proj.bias": torch.zeros(48)}
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: several tensors are x_embedder\.proj\.bias without"):
        load(tmp_path / "a.safetensors")


def test_a_flattened_network_is_not_taken_for_one(tmp_path: Path) -> None:
    save_file({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"not a LongSANA or SANA-Video network: .*_flat_param"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself"),
        (b"", "not a saved state of a video, or damaged"),
        (b"{" * 99, "not a saved state of a video, or damaged"),
        (None, "not a saved state of a video, or damaged"),
    ],
)
def test_a_file_that_is_no_state_is_refused_in_one_line(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    if content is None:
        save_file({"kv": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    for wrong, reason in ((path, says), (tmp_path / "nowhere", "cannot be read (No such file or directory)")):
        with pytest.raises(InputError, match=f"^{re.escape(f'{wrong}: {reason}')}") as caught:
            Continuation.load(wrong)
        assert "\n" not in str(caught.value)
