"""Flags of the inference command: those that are short for a setting, and what becomes of the other published ones.

The published command has 40 (facts 7.2). Each is honoured, or refused with the reason, or accepted with one line that
says that it changes nothing here; `docs/published.md` has them in a table.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from longsana.config import InferenceConfig, leaf_keys
from longsana.models.naming import PAST
from longsana.published import INFERENCE, Refused, height_and_width
from longsana.runtime.commandline import Parser
from longsana.runtime.errors import InputError
from longsana.sampling.request import DISTILLED, WHOLE_CLIP

log = logging.getLogger(__name__)

SETTING_FLAGS = {
    "model_path": "model.load_from",
    "num_cached_blocks": "model.num_cached_blocks",
    "sampling_algo": "scheduler.sampling_algo",
    "flow_shift": "scheduler.inference_flow_shift",
    "step": "scheduler.num_inference_steps",
    "interval_k": "scheduler.interval_k",
    "txt_file": "sampling.txt_file",
    "num_frames": "sampling.num_frames",
    "height": "sampling.height",
    "width": "sampling.width",
    "fps": "sampling.fps",
    "seed": "sampling.seed",
    "bs": "sampling.bs",
    "unified_noise": "sampling.unified_noise",
    "cfg_scale": "sampling.cfg_scale",
    "negative_prompt": "sampling.negative_prompt",
    "motion_score": "sampling.motion_score",
    "high_motion": "sampling.high_motion",
}
"""Flags that are short for a setting."""

SWITCHES = ("unified_noise", "high_motion")
LEFT_TO_THE_CONFIG = {
    **dict.fromkeys(("step", "num_frames"), ("-1",)),
    **dict.fromkeys(("sampling_algo", "flow_shift"), ("None", "null")),
}
"""Values with which a flag says that the config decides."""


class Flag(NamedTuple):
    """A published flag that is no setting.

    accepts: values with which nothing is lost; None: any. because: why it changes nothing, or what to do instead of
    another value.
    """

    accepts: tuple[Any, ...] | None
    because: str


OTHER_FLAGS = {
    "ablation_key": Flag((), "start the command once for each value"),
    "ablation_selections": Flag(([],), "start the command once for each value"),
    "apg_mode": Flag(None, "there is no adaptive projected guidance"),
    "debug": Flag(None, "there is nothing to switch, as there"),
    "exist_time_prefix": Flag(None, "a finished video is known by what it is"),
    "gpu_id": Flag(None, "it only named files; CUDA_VISIBLE_DEVICES chooses"),
    "guidance_type": Flag(("classifier-free",), "guidance is classifier-free"),
    "if_save_dirname": Flag((False,), "the results are in WORK_DIR/DATASET"),
    "image_split_token": Flag(("<image>",), "a line with a picture is refused by its number"),
    "prompt_split_token": Flag(("<split>",), "write <split> between the parts"),
    "skip_type": Flag(("time_uniform_flow",), "flow_dpm-solver has this grid"),
    "stg_applied_layers": Flag(([],), "there is no spatio-temporal guidance"),
    "stg_scale": Flag((0,), "there is no spatio-temporal guidance"),
    "tar_and_del": Flag((False,), "finished videos are what a stopped command goes on from; run tar afterwards"),
    "use_resolution_binning": Flag(None, "sizes are as asked for; --ar in a line takes a table's"),
}

MEANINGLESS = {
    DISTILLED: {
        "scheduler.num_inference_steps": "it takes the steps of scheduler.denoising_step_list",
        "sampling.negative_prompt": "it has no guidance",
        "sampling.null_caption": "it has no guidance",
    },
    "chunk_flow_euler": {
        "scheduler.denoising_step_list": "it takes scheduler.num_inference_steps steps",
        "scheduler.bf16_timesteps": "its timesteps are never rounded",
    },
    **{
        sampler: {
            **{f"model.{name}": "it samples a clip as one chunk" for name in PAST},
            "scheduler.denoising_step_list": "it takes scheduler.num_inference_steps steps",
            "scheduler.bf16_timesteps": "its timesteps are never rounded",
        }
        for sampler in WHOLE_CLIP
    },
}
"""Settings that a sampler cannot honour when they are given, and why."""


def parse_flags(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and every setting given on the command line as `section.key=value`.

    Raises:
        InputError: a flag is unknown, or has a value that cannot be honoured.
    """
    parser.add_argument("--json_file", help="a JSON file whose keys are the prompts, in place of --txt_file")
    parser.add_argument("--custom_height_width", metavar="[H, W]", help="height and width in one")
    for flag, (accepts, because) in OTHER_FLAGS.items():
        only = "changes nothing" if accepts is None else f"{' or '.join(map(str, accepts)) or 'None'} alone"
        parser.add_argument(f"--{flag}", nargs="?", const="true", metavar="VALUE", help=f"{only}: {because}")
    options, settings = parser.parse_command(
        arguments, SETTING_FLAGS, [*leaf_keys(InferenceConfig), *INFERENCE.rules], SWITCHES
    )
    left = {f"{SETTING_FLAGS[flag]}={value}" for flag, values in LEFT_TO_THE_CONFIG.items() for value in values}
    _settle(options)
    return options, [*(setting for setting in settings if setting not in left), *_combined(options)]


def _combined(options: argparse.Namespace) -> list[str]:
    """Settings of the flags that are not simply short for one."""
    settings = []
    if _value(options.json_file) is not None:
        settings.append(f"sampling.txt_file={options.json_file}")
    try:
        size = height_and_width("custom_height_width", _value(options.custom_height_width), {})
    except Refused as refusal:
        raise InputError(f"--custom_height_width {options.custom_height_width}: {refusal}") from refusal
    return [*settings, *(f"{name}={side}" for name, side in size.items())]


def _settle(options: argparse.Namespace) -> None:
    """Say in one line which published flags change nothing here.

    Raises:
        InputError: one of them has a value that cannot be honoured.
    """
    unused = []
    for flag, (accepts, because) in OTHER_FLAGS.items():
        text = getattr(options, flag)
        value = _value(text)
        if text is None or value is None:
            continue
        if accepts is not None and value not in accepts:
            raise InputError(f"--{flag} {text}: cannot be honoured here: {because}")
        unused.append(f"--{flag} ({because})")
    if unused:
        log.info("these flags change nothing here: %s", ", ".join(unused))


def _value(text: str | None) -> Any:
    if text is None or text in ("None", "null"):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_settings(settings: Sequence[str], config: InferenceConfig) -> None:
    """Refuse what was given on the command line and the chosen sampler would ignore; say what changes nothing.

    Raises:
        InputError: the first such setting, and why.
    """
    flags = {setting: flag for flag, setting in SETTING_FLAGS.items()}
    sampler, sampling = config.scheduler.sampling_algo, config.sampling
    given = [item.partition("=")[0] for item in settings]
    for setting in given:
        name = f"--{flags.get(setting, setting)}"
        if reason := MEANINGLESS[sampler].get(setting):
            raise InputError(f"{name}: has no meaning for the sampler {sampler}: {reason}")
        if setting in ("sampling.negative_prompt", "sampling.null_caption") and sampling.cfg_scale == 1:
            raise InputError(f"{name}: has no meaning with cfg_scale 1, where nothing is guided away from it")
        if setting == "sampling.negative_prompt" and sampling.null_caption == "learned" and sampling.negative_prompt:
            raise InputError(f"{name}: has no meaning with sampling.null_caption=learned, which takes its place")
    if "scheduler.interval_k" in given and sampler != "chunk_flow_euler":
        log.info("--interval_k changes nothing with the sampler %s; it is chunk_flow_euler's", sampler)
    if "sampling.high_motion" in given and (sampling.motion_score is None or sampling.motion_score > 0):
        log.info("--high_motion changes nothing with motion_score %s; it counts at 0 or less", sampling.motion_score)
