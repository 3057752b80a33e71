"""The commands as modules, to be called in this process."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

COMMANDS = {
    "inference_sana_video": "generate",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "serve": "serve",
    "load": "load",
    "train_longsana": "train",
    "generate_ode_pairs": "ode_pairs",
    "encode_clips": "encode",
    "export": "export",
}
"""Scripts whose text is a module of `longsana.commands`."""


def load_script(path: Path) -> ModuleType:
    """The module of a script; of one that is a thin name for a command, the command's."""
    if path.parent.name in ("inference_video_scripts", "train_video_scripts") and path.stem in COMMANDS:
        return importlib.import_module(f"longsana.commands.{COMMANDS[path.stem]}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
