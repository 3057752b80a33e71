"""Repositories in diffusers' layout on this machine, looked at before the libraries that load them open a file."""

from __future__ import annotations

import os
from pathlib import Path

from longsana.config import ModelConfig, VAEConfig
from longsana.encoders.headers import CLASSES, check_vae, open_text_weights
from longsana.runtime.errors import InputError
from longsana.runtime.foreign import read_json
from longsana.weights.names import diffusers_config, from_diffusers_config
from longsana.weights.network import check_fit


def check_repository(source: str | os.PathLike[str]) -> None:
    """Refuse a pipeline's folder of which headers tell that a part is of another kind, or not whole.

    Names on the hub, and folders without a part, are left to diffusers.

    Raises:
        InputError: what is wrong, and where.
    """
    folder = Path(os.path.expanduser(source))
    if (folder / "transformer/config.json").is_file():
        check_transformer(folder / "transformer")
    if (folder / "vae/config.json").is_file():
        _check_vae(folder / "vae")
    if (folder / "text_encoder/config.json").is_file():
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
