"""Recognition of what lies at a path to be read as weights, by names, first bytes and config.json."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longsana.runtime.errors import InputError
from longsana.runtime.foreign import read_json, reason_of, stand_in
from longsana.runtime.hub import INDEX_SUFFIX
from longsana.weights.checkpoint_folder import checkpoints_in, is_checkpoint, read_manifest, refuse_old

PIPELINE_PART = "transformer"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

Kind = Literal["checkpoint", "shards", "safetensors", "pytorch", "old pytorch", "damaged", "missing"]


class Weights(NamedTuple):
    """The weights that a path means.

    kind: "checkpoint" is a checkpoint folder of training; "shards" an index of them; "safetensors" such a file;
        "pytorch" a file of PyTorch's, which may be a trainer's with several networks, and "old pytorch" one in its
        format before 1.6; "damaged" is something else, and "missing" nothing.
    file: what is opened: the folder, the index or the file.
    """

    kind: Kind
    file: Path

    @property
    def config(self) -> dict[str, Any]:
        """The content of the config.json beside a file, such as a diffusers folder has; empty if there is none.

        Raises:
            InputError: it cannot be read.
        """
        path = self.file.parent / "config.json"
        if self.kind == "checkpoint" or not path.exists():
            return {}
        written = read_json(path)
        if not isinstance(written, dict):
            raise InputError(f"{path}: expected a mapping, found a {type(written).__name__}")
        return written

    @property
    def headers_tell(self) -> bool:
        """Tell whether names and shapes are known without reading all of it: not in PyTorch's format before 1.6."""
        return self.kind != "old pytorch"


def what_is(path: Path, remedy: str = "name the file") -> Weights:
    """Find the weights that a path means: a file, an index of shards, a folder with one of them such as a network's of
    diffusers, the pipeline around that, or a checkpoint folder of training.

    Of several files the one with the usual name (`diffusion_pytorch_model`, `model`) counts, not a variant's beside it.
    A file need not be there: opening it says so.

    remedy: what to do where none can be chosen, for the message.

    Raises:
        InputError: the folder holds no weights, or several and none with a usual name; it is a run with its
            checkpoints, or a checkpoint whose format is not read; a file cannot be read, or is of another kind.
    """
    if not path.is_dir():
        return _file(path)
    if is_checkpoint(path):
        refuse_old(path)
        return Weights("checkpoint", path)
    if checkpoints := checkpoints_in(path):
        newest = next((folder for folder in checkpoints if _looks_whole(folder)), checkpoints[0])
        raise InputError(
            f"{path}: a run; name one of its checkpoints (there: {len(checkpoints)}), such as {newest}, the newest"
        )
    if (path / PIPELINE_PART).is_dir():
        return what_is(path / PIPELINE_PART, remedy)
    for name in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS):
        for usual in (path / name.replace(".safetensors", INDEX_SUFFIX), path / name):
            if usual.is_file():
                return _file(usual)
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found = [file for file in files if file.name.endswith(INDEX_SUFFIX)]
    found = found or [file for file in files if file.suffix in SUFFIXES]
    if len(found) == 1:
        return _file(found[0])
    names = ", ".join(file.name for file in found[:5])
    if found and all(re.search(r"-\d+-of-\d+\.\w+$", file.name) for file in found):
        raise InputError(f"{path}: shards ({names}) without their index, *{INDEX_SUFFIX}; download it too")
    raise InputError(f"{path}: {f'several weights files ({names})' if found else 'no weights'} here; {remedy}")


def kind_of_file(path: Path) -> Kind:
    """Recognise a file by its first bytes, never by its suffix.

    Raises:
        InputError: it cannot be read, or is something that often lies in such a file's place, such as a web page.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(24)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)})") from error
    if (instead := stand_in(head)) is not None:
        raise InputError(f"{path}: {instead.what}, neither a PyTorch nor a safetensors file; {instead.remedy}")
    # First: a header's length, in the eight bytes before it, may begin as a pickle does.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    return "pytorch" if head.startswith(b"PK\x03\x04") else "old pytorch" if head.startswith(b"\x80") else "damaged"


def _file(path: Path) -> Weights:
    if not path.is_file():
        return Weights("missing", path)
    return Weights("shards" if path.name.endswith(INDEX_SUFFIX) else kind_of_file(path), path)


def _looks_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except InputError:
        return False
    return True
