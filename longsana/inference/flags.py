"""Flags of the inference command: those that are short for a setting, and what becomes of the other published ones.

The published command has 40 (docs/published.md). Each is honoured, refused with a reason, or accepted with a line that
says that it changes nothing here; `docs/published.md` has them in a table.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from longsana.config import InferenceConfig, leaf_keys
from longsana.published import INFERENCE, Context, Refused, height_and_width
from longsana.runtime.commandline import SWITCH, Parser
from longsana.runtime.errors import InputError
from longsana.runtime.settings import typed
from longsana.sampling.checks import meaningless

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
    "image_fit": "sampling.image_fit",
    "decoder": "vae.decoder",
    "decoder_path": "vae.decoder_pretrained",
}
"""Flags that are short for a setting."""

SWITCHES = ("unified_noise", "high_motion")
HARMLESS = ("scheduler.interval_k", "sampling.high_motion", "sampling.cuda_graphs")
"""Settings that are no contradiction where they change nothing."""
LEFT_TO_THE_CONFIG = {
    **dict.fromkeys(("step", "num_frames"), ("-1",)),
    **dict.fromkeys(("sampling_algo", "flow_shift"), ("None", "null")),
}
"""Values with which a flag says that the config decides."""


ALIASES = {
    "model.num_cached_blocks=0": "model.num_cached_blocks=-1",
    "scheduler.sampling_algo=flow_euler_ltx": "scheduler.sampling_algo=flow_euler",
}
"""Published ways to say what has another form here."""


class Flag(NamedTuple):
    """A published flag that is no setting.

    accepts: values with which nothing is lost; None: any. because: why it changes nothing. instead: what to do where
    another value is wanted.
    """

    accepts: tuple[Any, ...] | None
    because: str
    instead: str = ""


_NO_STG = "there is no spatio-temporal guidance"
_ONE_BY_ONE = "start the command once for each value"
OTHER_FLAGS = {
    "ablation_key": Flag((), "nothing is swept", _ONE_BY_ONE),
    "ablation_selections": Flag(([],), "nothing is swept", _ONE_BY_ONE),
    "apg_mode": Flag(None, "there is no adaptive projected guidance"),
    "debug": Flag(None, "there is nothing to switch, as there"),
    "exist_time_prefix": Flag(None, "a finished video is known by what it is"),
    "gpu_id": Flag(None, "it only named files; CUDA_VISIBLE_DEVICES chooses"),
    "guidance_type": Flag(("classifier-free",), "guidance is classifier-free", "guidance is classifier-free"),
    "if_save_dirname": Flag((False,), "no such file is written", "the results are in WORK_DIR/DATASET"),
    "image_split_token": Flag(("<image>",), "so a picture is named", "write <image> between prompt and picture"),
    "prompt_split_token": Flag(("<split>",), "so parts are divided", "write <split> between the parts"),
    "skip_type": Flag(("time_uniform_flow",), "flow_dpm-solver has this grid", "flow_dpm-solver has one grid"),
    "stg_applied_layers": Flag(([],), _NO_STG, _NO_STG),
    "stg_scale": Flag((0,), _NO_STG, _NO_STG),
    "tar_and_del": Flag(
        (False,), "videos stay", "finished videos are what a stopped command goes on from; run tar afterwards"
    ),
    "use_resolution_binning": Flag(None, "sizes are as asked for; --ar in a line takes a table's"),
}


def parse_flags(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and every setting given on the command line as `section.key=value`.

    Raises:
        InputError: a flag is unknown, or has a value that cannot be honoured.
    """
    parser.add_argument("--json_file", help="a JSON file whose keys are the prompts, in place of --txt_file")
    parser.add_argument("--custom_height_width", metavar="[H, W]", help="height and width in one")
    for flag, (accepts, because, instead) in OTHER_FLAGS.items():
        only = f"changes nothing: {because}" if accepts is None else f"{[*accepts, None]} alone: {instead}"
        parser.add_argument(f"--{flag}", metavar="VALUE", help=only, **SWITCH)
    options, settings = parser.parse_command(
        arguments, SETTING_FLAGS, [*leaf_keys(InferenceConfig), *INFERENCE.rules], SWITCHES
    )
    _settle(options)
    left = {f"{SETTING_FLAGS[flag]}={value}" for flag, values in LEFT_TO_THE_CONFIG.items() for value in values}
    settings = [ALIASES.get(setting, setting) for setting in settings if setting not in left]
    return options, [*settings, *_combined(options)]


def _combined(options: argparse.Namespace) -> list[str]:
    """Settings of the flags that are not simply short for one."""
    settings = []
    if _value(options.json_file) is not None:
        settings.append(f"sampling.txt_file={options.json_file}")
    try:
        size = height_and_width("custom_height_width", _value(options.custom_height_width), Context({}))
    except Refused as refusal:
        raise InputError(f"--custom_height_width {options.custom_height_width}: {refusal}") from refusal
    return [*settings, *(f"{name}={side}" for name, side in size.items())]


def _settle(options: argparse.Namespace) -> None:
    """Say in one line which published flags change nothing here.

    Raises:
        InputError: some have values that cannot be honoured; it names all of them.
    """
    unused, refused = [], []
    for flag, (accepts, because, instead) in OTHER_FLAGS.items():
        text = getattr(options, flag)
        value = _value(text)
        if value is None:
            continue
        if accepts is not None and value not in accepts:
            refused.append(f"--{flag} {text}: cannot be honoured here: {instead}")
        unused.append(f"--{flag} ({because})")
    if refused:
        raise InputError("; ".join(refused))
    if unused:
        log.info("these flags change nothing here: %s", ", ".join(unused))


def _value(text: str | None) -> Any:
    if text in (None, "", "None", "null"):
        return None
    try:
        return typed(text, "")
    except yaml.YAMLError:
        return text
    except ValueError as error:
        raise InputError(f"{text}: {error}") from error


def check_settings(settings: Sequence[str], config: InferenceConfig) -> None:
    """Refuse what was given on the command line and the chosen sampler would ignore; say what changes nothing.

    Raises:
        InputError: the first such setting, and why.
    """
    flags = {setting: flag for flag, setting in SETTING_FLAGS.items()}
    sampler, reasons = config.scheduler.sampling_algo, meaningless(config)
    for setting in (item.partition("=")[0] for item in settings):
        name, reason = f"--{flags.get(setting, setting)}", reasons.get(setting)
        if reason is None or (setting == "model.num_cached_blocks" and config.model.num_cached_blocks == -1):
            continue
        if setting in HARMLESS:
            log.info("%s changes nothing here: %s", name, reason)
            continue
        raise InputError(f"{name}: has no meaning for the sampler {sampler} as it is set: {reason}")
