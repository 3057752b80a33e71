"""Repositories in diffusers' layout on this machine, looked at before the libraries that load them open a file."""

from __future__ import annotations

import os
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from longsana.config import ModelConfig, VAEConfig
from longsana.encoders.headers import CLASSES, check_vae, open_text_weights
from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded
from longsana.runtime.foreign import read_json
from longsana.runtime.hub import WEIGHT_SUFFIXES
from longsana.weights.names import diffusers_config, from_diffusers_config
from longsana.weights.network import check_fit

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LONGEST_HUB_NAME = 96


def on_this_machine(source: Any) -> Path | None:
    """Find the folder or file that a user names, with the home folder for `~`; None for a name on the hub.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        raise InputError(f"{source!r:.60}: must be a folder, or the name of a repository on the hub")
    path = expanded(os.fspath(source))
    if source != "" and os.path.exists(path):  # no error for a name that none can have
        return path
    named = isinstance(source, str) and HUB_NAME.fullmatch(source) is not None and len(source) <= LONGEST_HUB_NAME
    if not named or str(source).endswith(WEIGHT_SUFFIXES):
        shown = str(source)[:200] or repr(source)
        raise InputError(f"{shown}: not found: nothing is there, and it is no name of a repository on the hub")
    return None


def folder_of(source: Any) -> Path | None:
    """A folder on this machine, see `on_this_machine`.

    Raises:
        InputError: as there, or it is a file.
    """
    path = on_this_machine(source)
    if path is not None and not path.is_dir():
        raise InputError(f"{source}: a file; name the folder of the whole repository")
    return path


def check_repository(folder: Path, without: Container[str] = ()) -> None:
    """Refuse a pipeline's folder of which headers tell that a part is of another kind, or not whole.

    Folders without a part are left to diffusers.

    without: parts that are not read from it.

    Raises:
        InputError: what is wrong, and where.
    """

    def has(part: str) -> bool:
        return part not in without and (folder / part / "config.json").is_file()

    if has("transformer"):
        check_transformer(folder / "transformer")
    if has("vae"):
        _check_vae(folder / "vae")
    if has("text_encoder"):
        open_text_weights(folder / "text_encoder", _config(folder / "text_encoder"), headers_only=True)


def check_transformer(folder: Path) -> None:
    """Refuse a folder with a network whose headers tell that it is another, or not whole.

    Raises:
        InputError: what is wrong.
    """
    check_fit(folder, from_diffusers_config(diffusers_config(ModelConfig()) | _config(folder)))


def _check_vae(folder: Path) -> None:
    name = _config(folder).get("_class_name")
    for kind, class_name in CLASSES.items():
        if name == class_name:
            check_vae(VAEConfig(vae_type=kind, vae_pretrained=str(folder)), folder)  # type: ignore[arg-type]


def _config(folder: Path) -> dict[str, object]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: a JSON {type(config).__name__}; expected names and values")
    return config
