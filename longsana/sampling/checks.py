"""What the headers of weights tell, before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longsana.config import InferenceConfig, ModelConfig
from longsana.encoders.headers import check_text_encoder, check_vae
from longsana.models.checkpoint_files import PIPELINE_PART
from longsana.models.weights import check_fit
from longsana.runtime.errors import InputError
from longsana.runtime.hub import SCHEME, SEEDED, locate
from longsana.sampling.request import SOURCES


def check_weights(
    config: InferenceConfig, *, fetch: bool = False, sections: Sequence[str] = ("model", "vae", "text_encoder")
) -> None:
    """Refuse weights of which headers and config.json tell that they are of another kind, or not whole.

    Neither diffusers nor transformers is imported, and no tensor is read: it takes a fraction of a second at full size.

    fetch: also of files on the hub, which are fetched now.
    sections: those whose weights will be used.

    Raises:
        InputError: the first that is wrong, by the setting that names it.
    """
    if "model" in sections:
        check_network(config.model, "model.load_from", fetch=fetch)
    if "vae" in sections:
        setting, uri = _named("vae"), config.vae.vae_pretrained
        with blame(setting):
            if (path := _here(uri, setting, "vae", fetch)) is not None:
                check_vae(config.vae, path)
    if "text_encoder" in sections:
        setting, uri = _named("text_encoder"), config.text_encoder.text_encoder_name
        with blame(setting):
            if (path := _here(uri, setting, "", fetch)) is not None:
                check_text_encoder(path, config.model.caption_channels, seeded=uri.startswith(SEEDED))


def check_network(config: ModelConfig, setting: str, *, fetch: bool = False) -> None:
    """Refuse the weights of one network, which `setting` names; see `check_weights`.

    Raises:
        InputError: they are of another kind, or not whole.
    """
    if config.load_from.startswith(SEEDED):
        return
    with blame(setting):
        if (path := _here(config.load_from, setting, PIPELINE_PART, fetch)) is not None:
            check_fit(path, config, key=config.checkpoint_key)


@contextmanager
def blame(setting: str) -> Iterator[None]:
    """Name the setting that an error's file came from."""
    try:
        yield
    except InputError as error:
        known = str(error).startswith(setting)
        raise error if known else InputError(f"{setting}: {error}") from error


def _named(section: str) -> str:
    return f"{section}.{SOURCES[section]}"


def _here(uri: str, setting: str, part: str, fetch: bool) -> Path | None:
    """Where the file or folder is; None where it is on the hub and not to be fetched."""
    uri = uri.removeprefix(SEEDED)
    return None if uri.startswith(SCHEME) and not fetch else locate(uri, setting, part)
