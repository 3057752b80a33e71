"""A tiny encoder and decoder as diffusers' pipelines hold one: a part beside the VAE, with files of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from longsana.encoders.tiny_layouts import TINY, seed_of_tiny
from longsana.encoders.tiny_network import TinyNetwork, load_tiny
from longsana.pipelines.arguments import ARGUMENTS
from longsana.runtime.arguments import OneOf, checked
from longsana.runtime.defaults import plain_defaults


class TinyVideoAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A tiny network that decodes a VAE's latents in its place.

    Args:
        kind: taew2_1, lighttaew2_1, taeltx_2 or tae_shapes. Files of the first two cannot be told apart, so it is
            said.
        latents: which VAE's latents it was trained on, as its file says it; None: unknown.

    Raises:
        InputError: there is no such kind.
    """

    _no_split_modules = None
    _supports_group_offloading = False
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, kind: str = "taew2_1", latents: str | None = None) -> None:
        super().__init__()
        OneOf(tuple(TINY)).settle("kind", kind)
        self.network = TinyNetwork(TINY[kind]).eval().requires_grad_(False)

    @classmethod
    @plain_defaults()
    @checked(ARGUMENTS)
    def from_file(
        cls, kind: str, source: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> TinyVideoAutoencoder:
        """Read a published file.

        Args:
            kind: what the file is; see the class.
            source: a .pth or .safetensors file, hf://owner/repo/file, or seeded:N for random weights.

        Raises:
            InputError: there is no such kind, nothing is there, or its tensors are not exactly those of this kind.
        """
        OneOf(tuple(TINY)).settle("kind", kind)
        seed_of_tiny(source)
        with torch.device("meta"):
            made = cls(kind)
        made.network = load_tiny(TINY[kind], source, device, dtype)
        made.register_to_config(latents=made.network.latents)
        return made

    def forward(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, F, H, W) in [0, 1] of a whole video's latents (B, C, T, h, w), as the network takes them."""
        frames: Any = self.network.decode(latents.to(self.dtype))[0]
        return frames[:, :, self.network.kind.stride - 1 :].clamp(0, 1)
