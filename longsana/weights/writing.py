"""Writing of weights: nothing is replaced unasked, and what is there is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longsana.runtime.errors import InputError
from longsana.runtime.files import atomic_write_text, check_writable, whole_folder
from longsana.runtime.hub import INDEX_SUFFIX, SCHEME, SEEDED
from longsana.weights.network import Layout
from longsana.weights.what_is import DIFFUSERS_WEIGHTS

CARD = "README.md"


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> dict[str, Tensor]:
    """Return tensors of any shapes in another dtype, or as they are where it is None.

    source: what the user calls where they come from.

    Raises:
        InputError: numbers that are finite would not be in it.
    """
    found = {}
    for name, tensor in tensors.items():
        found[name] = own = tensor.to(dtype or tensor.dtype)
        if own.dtype != tensor.dtype and tensor.isfinite().all() and not own.isfinite().all():
            raise InputError(
                f"--dtype {str(dtype)[6:]}: {name} of {source} would not be finite in it; bfloat16 holds numbers as "
                "large as float32 does"
            )
    return found


def card_of(out: Path, layout: Layout) -> Path:
    """Name the place of the model card of weights."""
    return out / CARD if layout == "diffusers" else out.with_name(f"{out.name}.md")


def check_target(out: Path, layout: Layout, option: str, *, force: bool, card: bool = False) -> None:
    """Refuse (InputError) what weights, and with `card` a model card, cannot be written to.

    option: what the user calls it.
    """
    if str(out).startswith((SCHEME[:-1], SEEDED)):
        raise InputError(f"{option} {out}: must be a file or folder on this machine")
    if layout != "diffusers":
        pickled = layout in ("upstream", "trainer")
        if out.name.endswith(INDEX_SUFFIX) or (pickled and out.suffix == ".safetensors"):
            raise InputError(f"{option} {out}: readers would not expect the layout {layout} here; name it .pth")
        if card and card_of(out, layout).exists() and not force:
            raise InputError(f"{option} {out}: its card {card_of(out, layout).name} exists; replace it with --force")
        if out.is_dir():
            raise InputError(f"{option} {out}: a folder; the layout {layout} is one file, so name that")
        index = out.with_name(out.name.removesuffix(".safetensors") + INDEX_SUFFIX)
        exists = out.exists() or (layout == "safetensors" and index.exists())
    else:
        if out.is_file():
            raise InputError(f"{option} {out}: a file; the layout diffusers is a folder")
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
        stem = DIFFUSERS_WEIGHTS.removesuffix(".safetensors")
        if strange := [name for name in names if name not in ("config.json", CARD) and not name.startswith(stem)]:
            raise InputError(
                f"{option} {out}: holds more than a network ({', '.join(strange[:3])}); choose another folder"
            )
        exists = bool(names)
    if exists and not force:
        raise InputError(f"{option} {out}: exists; choose another, or replace it with --force")
    check_writable(out.parent, option)


def write_weights(out: Path, layout: Layout, write: Callable[[Path], object], card: str = "") -> None:
    """Let `write` write a file, or fill a folder that takes the place of `out` when it is whole; and a model card."""
    if layout == "diffusers":
        with whole_folder(out) as partial:
            write(partial)
            if card:
                atomic_write_text(partial / CARD, card)
        return
    write(out)
    if card:
        atomic_write_text(card_of(out, layout), card)
