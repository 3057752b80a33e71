"""The VAE that a config names, whichever network decodes."""

from __future__ import annotations

import torch

from longsana.config import VAEConfig
from longsana.encoders.tiny_layouts import FULL, check_decoder
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import VAES, VideoVAE
from longsana.runtime.arguments import settled


def load_vae(config: VAEConfig, device: torch.device | str, dtype: torch.dtype) -> VideoVAE:
    """The VAE of `config.vae_type` with the decoder that `config.decoder` says, on `device` as `dtype`.

    With a tiny decoder the VAE itself is read only when something is to be encoded with it.

    Raises:
        InputError: a setting is wrong, weights are not there, or not of this kind.
    """
    config = settled(config, "vae")
    check_decoder(config)
    kind = VAES[config.vae_type] if config.decoder == FULL else TinyVAE
    return kind.load(config, device, dtype)
