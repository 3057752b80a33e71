"""What the pipeline's arguments may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longsana.flow.schedule import TIMESTEPS
from longsana.runtime.arguments import TEXT, Callback, Flag, Is, Number, OneOf, Rule, Several, Whole
from longsana.runtime.errors import InputError
from longsana.runtime.finite import not_finite

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TENSOR = Is(Tensor, "a tensor")
LONGEST = 10_000_000
"""Pixel frames of a video: a week at 16 a second."""
MOST_LATENTS = 10_000
"""Latent frames that are sampled or decoded together."""

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
    **dict.fromkeys(("latents", "prompt_embeds", "prompt_attention_mask"), TENSOR),
    **dict.fromkeys(("negative_prompt_embeds", "negative_prompt_attention_mask"), TENSOR),
    "output_type": OneOf(OUTPUT_TYPES),
    "return_dict": Flag(),
    "callback_on_step_end": Callback(),
    "callback_on_step_end_tensor_inputs": Several(TEXT),
    "motion_score": Whole(0, 1000),
    "flow_shift": Number(above=0, most=1000),
    "chunk_frames": Whole(1, MOST_LATENTS),
    "latents_per_call": Whole(1, MOST_LATENTS),
    "caption_length": Whole(1, MOST_LATENTS),
    "chi_prompt": TEXT,
    "softcap": Flag(),
    "num_cached_blocks": Whole(-1, LONGEST),
    "num_sink_blocks": Whole(0, LONGEST),
}
"""The rule of each argument that a public method may have. Prompts, generators, states and decays have readers of
their own."""


def check_finite(name: str, values: Mapping[str, Tensor]) -> None:
    """Refuse an argument that holds numbers which are not finite: of these tensors, by their names in it.

    Raises:
        InputError: it does.
    """
    if found := not_finite(values):
        which = "" if found[0] == name else f" ({found[0]})"
        raise InputError(f"{name}: holds numbers that are not finite{which}")


def refuse_ignored(given: Mapping[str, Any], because: str) -> None:
    """Refuse arguments that would change nothing, as the command line does.

    given: what was given, by name; None is nothing.

    Raises:
        InputError: the first one that is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name}: has no meaning {because}")
