"""The network as diffusers' pipelines hold one: `LongSanaDiT` inside, published names in its files.

`SanaVideoCausalTransformer3DModel` is the distilled network that samples chunk by chunk (no diffusers release has the
class), `SanaVideoTransformer3DModel` the bidirectional base model. Both are the same network; the class is what a
repository says of how it was trained.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import Text, TextEmbedding, TextMemory
from longsana.models.past import LEARNED, Past
from longsana.ops import backend
from longsana.pipelines.files import check_transformer, folder_of, on_this_machine
from longsana.pipelines.lora import (
    SCALE,
    USUAL,
    fetch_lora,
    fused_adapter,
    plain_factors,
    plain_lora,
    read_lora,
    settled_scales,
)
from longsana.runtime.arguments import TEXT, checked
from longsana.runtime.defaults import plain_defaults
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, expanded
from longsana.runtime.peers import Peers
from longsana.state import CausalState
from longsana.weights.files import write_safetensors
from longsana.weights.lora import BASE, Base
from longsana.weights.names import PAST, chosen_past, from_diffusers_config
from longsana.weights.network import load_weights, rename


@dataclass
class VideoTransformerOutput(BaseOutput):
    """sample: velocity (noise - clean), like the latents. state: the past that includes them."""

    sample: Tensor
    state: CausalState


class SanaVideoCausalTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The network of LongSANA: its past is one `CausalState` of constant size.

    The arguments are the keys of a published `config.json`; and num_cached_blocks, state_decay and num_sink_blocks,
    which say what is kept of the past (see `longsana.models.past`): all of it, as published, unless they are given.

    Raises:
        InputError: they describe another kind of network, or a past that means nothing.
    """

    # Operations take weights from modules that are never called, where diffusers' hooks would wait in vain. So it moves
    # as a whole, and only what is called may be stored in another dtype.
    _no_split_modules = None
    _supports_group_offloading = False
    _skip_layerwise_casting_patterns: Any = ("norm", "patch_embed", "time_embed", "text_embed", "depthwise", "temporal")
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = 16,
        num_attention_heads: int = 20,
        attention_head_dim: int = 112,
        num_layers: int = 20,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 3.0,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 30,
        patch_size: Sequence[int] = (1, 2, 2),
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = "rms_norm_across_heads",
        rope_max_seq_len: int = 1024,
        num_cached_blocks: int = -1,
        state_decay: float | Sequence[float] | str | None = None,
        num_sink_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.network = LongSanaDiT(from_diffusers_config(self.config))
        if not next(self.network.parameters()).is_meta:  # as loading builds it
            self.network.init_weights(seed=0)
        self.network.eval().requires_grad_(False)
        self.peers: Peers | None = None  # processes that make each pass together

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Text,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        state: CausalState | None = None,
        return_dict: bool = True,
    ) -> VideoTransformerOutput | tuple[Tensor, CausalState]:
        """Velocity of noisy latents, and the past that includes them.

        Args:
            hidden_states: (B, C, T, H, W).
            encoder_hidden_states: (B, L, caption_channels); or what `read` made of them.
            timestep: (B,) or (B, T), in [0, 1000].
            encoder_attention_mask: (B, L), true where tokens may be looked at; None is all of them.
            state: everything before; None is nothing.
        """
        text = encoder_hidden_states
        if isinstance(text, Tensor):
            text = text_embedding(text, encoder_attention_mask)
        velocity, state = self.network(hidden_states, timestep, text, state=state, peers=self.peers)
        return VideoTransformerOutput(velocity, state) if return_dict else (velocity, state)

    def cache_caption(self, text: TextEmbedding) -> TextMemory:
        """Keys and values of a caption for all passes; see `LongSanaDiT.cache_caption`."""
        onload(self)
        if self.device.type == "cuda" and backend() == "triton":
            self.network.optimize_layout()
        return self.network.cache_caption(text)

    def set_past(
        self,
        *,
        num_cached_blocks: int | None = None,
        state_decay: float | Sequence[float] | str | None = None,
        num_sink_blocks: int | None = None,
    ) -> None:
        """Keep something else of the past from now on; None leaves a setting as it is.

        Raises:
            InputError: the settings mean nothing; or factors are to become learned, or no more, which is decided by the
                weights. Nothing is changed then.
        """
        asked = {"num_cached_blocks": num_cached_blocks, "state_decay": state_decay, "num_sink_blocks": num_sink_blocks}
        given = {name: value for name, value in asked.items() if value is not None}
        config = dataclasses.replace(self.network.config, **given)  # type: ignore[arg-type]
        past, before = Past.of(config), self.network.past
        if (past.decay == LEARNED) != (before.decay == LEARNED):
            has = "its own learned factors" if before.decay == LEARNED else "no learned factors"
            raise InputError(f"state_decay={state_decay}: this transformer was loaded with {has}")
        self.network.config, self.network.past = config, past
        self.register_to_config(**given)

    def check_savable(self) -> None:
        """Refuse to save a network that a LoRA is on.

        Raises:
            InputError: one is.
        """
        if any(".base_layer." in name for name in self.network.state_dict()):
            raise InputError(
                "save_pretrained: a LoRA is loaded, for which the files of a network have no place; to save its change "
                "in the weights call fuse_lora() and then unload_lora_weights(), to save without it the latter alone"
            )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save as diffusers' own does, under the published names.

        Raises:
            InputError: a LoRA is loaded, for which these files have no place.
        """
        self.check_savable()
        renamed = rename(self.network.state_dict(), "diffusers", self.network.config)
        published = copy.copy(self)
        published.__dict__["state_dict"] = lambda: renamed
        # As all of the past is kept where nothing is said, nothing is said that diffusers' own class would warn of.
        plain = set(PAST) - chosen_past(self.network.config).keys()
        published._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key not in plain})
        ModelMixin.save_pretrained(
            published,
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **options,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load as diffusers' own does, after a look at the headers of a folder on this machine.

        Raises:
            InputError: they tell that it is another network, or not whole; or nothing is there.
        """
        folder = folder_of(pretrained_model_name_or_path)
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        own = folder / (options.get("subfolder") or "")
        if (own / "config.json").is_file() and options.get("variant") is None:
            check_transformer(own)
        return super().from_pretrained(folder, **options)

    @classmethod
    def _load_pretrained_model(  # type: ignore[override]
        cls,
        model: SanaVideoCausalTransformer3DModel,
        state_dict: Any,
        resolved_model_file: Sequence[str],
        *others: Any,
        hf_quantizer: Any = None,
        dtype: torch.dtype | None = None,
        device_map: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Fill the model that diffusers' loader, which knows all its options, has built."""
        if hf_quantizer is not None:
            raise InputError("quantization_config: this transformer cannot be quantised")
        device = device_map[""] if device_map else "cpu"
        load_weights(
            model.network,
            [Path(file) for file in resolved_model_file],
            device=device,
            dtype=dtype or torch.float32,
        )
        return model, [], [], [], None, []

    @plain_defaults()
    def load_lora_adapter(  # type: ignore[override]
        self, state_dict: dict[str, Tensor], prefix: str | None = "transformer", **options: Any
    ) -> None:
        """Load as diffusers' own does, from a state dict with the names of its layers; see `fused_adapter`.

        Raises:
            InputError: the LoRA is for another network, or holds what has no place here; or `adapter_name` is none.
        """
        metadata, adapter = options.pop("metadata", None), options.get("adapter_name")
        if adapter is not None and (not isinstance(adapter, str) or not adapter or "." in adapter):
            raise InputError(f"adapter_name={adapter!r:.60}: must be a text without dots")
        if options.pop("network_alphas", None):
            raise InputError("network_alphas: not supported; put alpha / rank into lora_B")
        fused, config = fused_adapter(state_dict, self.network, prefix=prefix, metadata=metadata)
        named = {f"network.{name}": tensor for name, tensor in fused.items()}
        super().load_lora_adapter(named, prefix=None, metadata=config, **options)

    def set_adapters(self, adapter_names: Any, weights: Any = None) -> None:
        """Do as diffusers' own, with checked weights.

        Raises:
            InputError: a weight is no number, not finite or too large.
        """
        super().set_adapters(adapter_names, settled_scales("weights", weights))

    @checked({"lora_scale": SCALE})
    def fuse_lora(self, lora_scale: float = 1.0, **options: Any) -> None:  # type: ignore[override]
        """Do as diffusers' own, with checked weights.

        Raises:
            InputError: `lora_scale` is no number, not finite or too large.
        """
        super().fuse_lora(lora_scale, **options)

    def save_lora_adapter(  # type: ignore[override]
        self, save_directory: str | Path, adapter_name: str = "default", *, weight_name: str | None = None
    ) -> None:
        """Write a LoRA's factors by the names of diffusers' layers, whole or not at all, for `load_lora_weights`.

        Args:
            save_directory: a folder, made where it is missing.
            adapter_name: of the LoRA, as it was loaded or added.
            weight_name: the file; `pytorch_lora_weights.safetensors` unless said otherwise.

        Raises:
            InputError: there is no such LoRA, it changes nothing, or the folder cannot be written to.
        """
        known = list(getattr(self, "peft_config", {}))
        if adapter_name not in known:
            raise InputError(
                f"adapter_name={adapter_name!r:.60}: no such LoRA; loaded are: {', '.join(known) or 'none'}"
            )
        factors = plain_factors(self.network, adapter_name)
        if not factors:
            raise InputError(f"adapter_name={adapter_name}: all of its lora_B are zero, so that it changes nothing")
        folder = expanded(save_directory)
        check_writable(folder, "save_directory")
        named = {f"transformer.{name}": factor.cpu() for name, factor in factors.items()}
        words = {BASE: Base.of(self.network.config).text()}
        write_safetensors(named, folder / (weight_name or USUAL), sum(it.nbytes for it in named.values()), words)


class SanaVideoTransformer3DModel(SanaVideoCausalTransformer3DModel):
    """The bidirectional base model, which denoises a whole clip at once with many guided steps."""


class LoraLoaderMixin(SanaLoraLoaderMixin):
    """Load as diffusers' own does, but files are read by the opener of all weights, and nothing in them is dropped."""

    @classmethod
    def lora_state_dict(  # type: ignore[override]
        cls, pretrained_model_name_or_path_or_dict: Any, **options: Any
    ) -> Any:
        """The factors of a LoRA, see `plain_lora`; with `return_lora_metadata` also the settings saved with them.

        Raises:
            InputError: a file is missing or damaged, or holds what has no place here.
        """
        given, metadata = pretrained_model_name_or_path_or_dict, None
        for option in ("weight_name", "subfolder"):
            if options.get(option) is not None:
                TEXT.settle(option, options[option])
        if not isinstance(given, dict):
            path, name = on_this_machine(given), options.get("weight_name")
            if path is None:
                path, name = fetch_lora(given, **options), None
            elif options.get("subfolder"):
                path /= options["subfolder"]
            given, metadata = read_lora(path, name)
        plain = plain_lora(given, cls.transformer_name, metadata)
        return (plain, metadata) if options.get("return_lora_metadata") else plain

    def set_adapters(self, adapter_names: Any, adapter_weights: Any = None) -> None:
        """Do as diffusers' own, with checked weights.

        Raises:
            InputError: a weight is no number, not finite or too large.
        """
        super().set_adapters(adapter_names, settled_scales("adapter_weights", adapter_weights))


def text_embedding(tokens: Tensor, mask: Tensor | None) -> TextEmbedding:
    """tokens: (B, L, C); mask: (B, L), or None for all."""
    seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    return TextEmbedding(tokens, seen)


def uncompiled(module: Any) -> Any:
    """Unwrap what torch.compile has wrapped."""
    return getattr(module, "_orig_mod", module)


def onload(module: nn.Module) -> None:
    """Bring an offloaded module where it runs, as calling it would; for those who call its parts."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
