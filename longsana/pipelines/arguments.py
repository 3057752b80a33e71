"""Rules for the values of the pipeline's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from longsana.chunks import Absorb, ImageFirst
from longsana.data.pictures import Fit
from longsana.flow.schedule import TIMESTEPS
from longsana.runtime.arguments import TEXT, Callback, Flag, Is, Number, OneOf, Rule, Several, Whole
from longsana.runtime.errors import InputError
from longsana.runtime.finite import not_finite

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of numbers that are computed with."""
LONGEST = 10_000_000
"""Pixel frames of a video: a week at 16 a second."""
MOST_LATENTS = 10_000
"""Latent frames that are sampled or decoded together."""


@dataclass(frozen=True)
class Numbers:
    """A tensor that holds numbers."""

    def settle(self, name: str, value: Any) -> Tensor:
        tensor: Tensor = Is(Tensor, "a tensor").settle(name, value)
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device, which holds no numbers" if tensor.is_meta else f"in layout {tensor.layout}"
            raise InputError(f"{name}: a tensor {kind}; give a plain one")
        return tensor


@dataclass(frozen=True)
class Like:
    """An object that has some attributes, of a class that need not be loaded; `what` is what a message calls it."""

    attributes: tuple[str, ...]
    what: str

    def settle(self, name: str, value: Any) -> Any:
        if not all(hasattr(value, attribute) for attribute in self.attributes):
            raise InputError(f"{name}: a {type(value).__name__}; must be {self.what}")
        return value


PARTS: dict[str, Rule] = {
    "tokenizer": Like(("encode", "bos_token_id"), "a tokenizer of transformers"),
    "text_encoder": Like(("forward", "config", "base_model"), "a model of transformers"),
    "scheduler": Like(("config", "from_config", "set_timesteps"), "a scheduler of diffusers"),
}
"""Rules of a pipeline's parts; the others have readers of their own."""

ARGUMENTS: dict[str, Rule] = {
    "num_inference_steps": Whole(1, TIMESTEPS),
    "timesteps": Several(Whole(0, TIMESTEPS)),
    "guidance_scale": Number(0, 100),
    "do_classifier_free_guidance": Flag(),
    "num_videos_per_prompt": Whole(1, 1000),
    # The VAE's geometry says which of them are possible, and names the nearest.
    "height": Whole(most=2**14),
    "width": Whole(most=2**14),
    "num_frames": Whole(most=LONGEST),
    "frames": Whole(most=LONGEST),
    **dict.fromkeys(("latents", "prompt_embeds", "prompt_attention_mask"), Numbers()),
    **dict.fromkeys(("negative_prompt_embeds", "negative_prompt_attention_mask"), Numbers()),
    "output_type": OneOf(OUTPUT_TYPES),
    "return_dict": Flag(),
    "callback_on_step_end": Callback(),
    "callback_on_step_end_tensor_inputs": Several(TEXT),
    "motion_score": Whole(0, 1000),
    "flow_shift": Number(above=0, most=1000),
    **dict.fromkeys(("chunk_frames", "base_chunk_frames"), Whole(1, MOST_LATENTS)),
    "absorb": OneOf(get_args(Absorb)),
    "first_chunk_frames": Whole(0, MOST_LATENTS + 1),
    "latents_per_call": Whole(1, MOST_LATENTS),
    "fps": Number(above=0, most=1000),
    "prompt_change": TEXT,
    "transition_chunks": Whole(0, 1000),
    "transition": OneOf(("linear", "spherical")),
    "image_fit": OneOf(get_args(Fit)),
    "image_first": OneOf(get_args(ImageFirst)),
    "caption_length": Whole(1, MOST_LATENTS),
    "chi_prompt": TEXT,
    "softcap": Flag(),
    **dict.fromkeys(("new_frames_only", "tiny_encoder"), Flag()),
    **dict.fromkeys(("kind", "source"), TEXT),
    "num_cached_blocks": Whole(-1, LONGEST),
    "num_sink_blocks": Whole(0, LONGEST),
}
"""The rule of each argument that a public method may have. Prompts, generators, states, films, pictures and
decays have readers of their own."""


def check_finite(name: str, values: Mapping[str, Tensor]) -> None:
    """Refuse an argument that holds numbers which are not finite: of these tensors of any shape, by name.

    Raises:
        InputError: it does.
    """
    if found := not_finite(values):
        which = "" if found[0] == name else f" ({found[0]})"
        raise InputError(f"{name}: holds numbers that are not finite{which}")


def check_numbers(name: str, values: Tensor, most: float) -> None:
    """Refuse an argument, of any shape, that is not of floating-point numbers from -most to most: others overflow.

    Raises:
        InputError: it is not.
    """
    if values.dtype not in FLOATS:
        raise InputError(f"{name} has dtype {values.dtype}: must be floating-point numbers of 16 to 64 bits")
    check_finite(name, {name: values})
    if values.numel() and (largest := float(values.detach().abs().max())) > most:
        raise InputError(f"{name}: holds numbers up to {largest:.3g}; must be at most {most:g}")


def refuse_ignored(given: Mapping[str, Any], because: str) -> None:
    """Refuse arguments that would change nothing, as the command line does.

    given: what was given, by name; None is nothing.

    Raises:
        InputError: the first one that is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name}: has no meaning {because}")
