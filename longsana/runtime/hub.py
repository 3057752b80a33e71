"""Sources of files: a path on this machine or a repository on the Hugging Face hub; and their digests."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from longsana.runtime.errors import InputError
from longsana.runtime.files import expanded
from longsana.runtime.foreign import read_json, reason_of

log = logging.getLogger(__name__)

_IN_PACKAGE = Path(__file__).resolve().parents[1] / "shipped"
SHIPPED = _IN_PACKAGE if _IN_PACKAGE.is_dir() else Path(__file__).resolve().parents[2]
"""Where configs, prompts and the small default's weights are: in the package, as in a wheel, or at the repository's
root."""
SCHEME = "hf://"
SEEDED = "seeded:"  # before what random weights are made from: a seed, or a folder with the shape
FOLDER_SUFFIXES = (".json", ".safetensors", ".model", ".txt")
WEIGHT_SUFFIXES = (".json", ".safetensors", ".model", ".pth", ".pt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
LONGEST_NAME = 255  # bytes of a file's name
_BASE_720P = tuple(
    f"Efficient-Large-Model/SANA-Video_2B_720p/checkpoints/{name}.pth"
    for name in ("SANA_Video_2B_720p", "SANA_Video_2B_720p_LTXVAE")
)
SAME_FILE = dict.fromkeys(_BASE_720P, _BASE_720P)
"""Files of the hub that are in use under several names."""


def locate(uri: str, what: str, part: str = "") -> Path:
    """The local file or folder that `uri` names, fetched from the hub first if it is there.

    uri: a path, tried from the working directory and then from `SHIPPED`; `hf://owner/repo/file.ext`
        for that one file (for an index of shards: the shards too); `hf://owner/repo[/folder]` for the configs,
        tokenizer files and safetensors inside. The hub's cache and HF_HUB_OFFLINE=1 are honoured.
    what: the thing's name in messages, such as "the checkpoint".
    part: the one sub-folder wanted from a folder that holds a whole pipeline, such as "transformer"; weights in
        its other sub-folders are not fetched. The folder itself is returned, with or without it.

    Raises:
        InputError: nothing is there, or the hub did not give it; the message says what to do.
    """
    if uri.startswith(SCHEME):
        return _fetch(uri, what, part)
    if (found := found_here(uri)) is not None:
        return found
    given = expanded(uri)
    places = [str(given)] if given.is_absolute() else [str(Path.cwd() / given), str(SHIPPED / given)]
    where = " or ".join(dict.fromkeys(places))
    raise InputError(
        f"{what}: '{uri}' not found (no file or folder {where}); give an existing path or hf://owner/repo/file"
    )


def found_here(path: str) -> Path | None:
    """The local file or folder of a path as `locate` finds it; None: nothing is there."""
    given = expanded(path)
    return next((place for place in (given, SHIPPED / given) if path and place.exists()), None)


def names_a_file(uri: str) -> bool:
    """Tell whether `hf://...` names one file, and not a repository or a folder of it."""
    inside = [piece for piece in uri.removeprefix(SCHEME).split("/") if piece][2:]
    return _names_a_file("/".join(inside))


def file_sha256(path: Path, without: Collection[str] = ()) -> str:
    """SHA-256 in hex of a file; for a folder or an index of shards, of the names and digests of its files.

    A folder's files are its weights and configs, but for those whose names are in `without`. Digests are remembered by
    path, size, times and inode, so that gigabytes are read once.

    Raises:
        InputError: `path` does not exist, lacks a shard, or is a folder without weights or configs.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
        files = [file for file in files if file.name not in without]
        if not files:
            raise InputError(f"{path}: no weights or configs in this folder")
        names = sorted(file.relative_to(path).as_posix() for file in files)
        return _digest_of_names(path, names)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _digest_of_names(path.parent, [path.name, *shards_of(path)])
    (digest,) = digests_of([path])
    return digest


def _fetch(uri: str, what: str, part: str) -> Path:
    parts = [piece for piece in uri.removeprefix(SCHEME).split("/") if piece]
    if len(parts) < 2 or ".." in parts:
        raise InputError(f"{what}: '{uri}' must have the form hf://owner/repo/file or hf://owner/repo")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if _names_a_file(inside):
        return _fetch_file(uri, what, repo, inside)
    return _fetch_folder(uri, what, repo, inside, part)


def _names_a_file(inside: str) -> bool:
    # A version number, as in a folder named Wan2.1, is no file suffix.
    return re.search(r"\.[A-Za-z]\w*$", inside) is not None


def _command(repo: str, inside: str) -> str:
    if not inside:
        return f"`hf download {repo}`"
    return f"`hf download {repo} " + (f"{inside}`" if _names_a_file(inside) else f"--include '{inside}/*'`")


def _fetch_file(uri: str, what: str, repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repo, name))
    except Exception as error:  # the transport's own classes differ between versions of the client
        raise _explain(error, uri, what, repo, name) from error
    if name.endswith(INDEX_SUFFIX):
        folder = name.rpartition("/")[0]
        for shard in shards_of(path):
            _fetch_file(uri, what, repo, f"{folder}/{shard}" if folder else shard)
    return path


def _fetch_folder(uri: str, what: str, repo: str, folder: str, part: str) -> Path:
    from huggingface_hub import snapshot_download

    prefix = f"{folder}/" if folder else ""
    patterns = [f"{prefix}*{suffix}" for suffix in FOLDER_SUFFIXES]
    if part:
        # `*` matches a slash too: the folder's own weights are asked for by their usual names.
        own = ("model*.safetensors", "diffusion_pytorch_model*.safetensors", f"{part}/*.safetensors")
        patterns = [f"{prefix}*.json", *(prefix + name for name in own)]
    try:
        path = Path(snapshot_download(repo, allow_patterns=patterns)) / folder
    except Exception as error:  # as above
        raise _explain(error, uri, what, repo, folder) from error
    # Without a network the client returns a cached snapshot even where this folder was never fetched.
    if not any(file.suffix in FOLDER_SUFFIXES for file in path.rglob("*")):
        raise InputError(
            f"{what}: '{uri}' has no {', '.join(FOLDER_SUFFIXES)} files in {path}; check the folder's name, "
            f"or download it with {_command(repo, folder)} on a connected machine"
        )
    return path


def shards_of(index: Path) -> list[str]:
    """Sorted file names in a `*.safetensors.index.json`.

    Raises:
        InputError: the file is no such index, or names what is no safetensors file beside it.
    """
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: not an index of safetensors shards (no 'weight_map'); download it again")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name.encode()) > LONGEST_NAME:
            raise InputError(f"{index}: its shards must be plain file names beside it, found {name!r:.80}")
        if not name.endswith(".safetensors"):
            raise InputError(f"{index}: its shards must be .safetensors files, found {name}; download it again")
    return sorted(set(listed.values()))


def _explain(error: Exception, uri: str, what: str, repo: str, inside: str) -> InputError:
    from huggingface_hub import constants, errors

    if isinstance(error, InputError):
        return error
    download = _command(repo, inside)
    if isinstance(error, errors.GatedRepoError):
        reason = f"access is restricted: accept its terms at https://huggingface.co/{repo}, then `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "no such repository, or it is private: check the name, or `hf auth login`"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            why = "not in the cache, and HF_HUB_OFFLINE=1 forbids fetching it"
        else:
            why = "not in the cache, and the hub cannot be reached"
        reason = (
            f"{why} (cache: {constants.HF_HUB_CACHE}); download it with {download} on a connected machine, "
            "or give a local path"
        )
    elif isinstance(error, errors.EntryNotFoundError):
        reason = f"no such file in the repository: see https://huggingface.co/{repo}/tree/main"
    elif isinstance(error, errors.HFValidationError):
        reason = "not a valid repository name: hf://owner/repo/file or hf://owner/repo"
    else:
        detail = " ".join(str(error).split())[:200]
        reason = f"could not be fetched ({type(error).__name__}: {detail}); try again, or {download}"
    lacking = isinstance(error, errors.EntryNotFoundError | errors.OfflineModeIsEnabled)
    return InputError(f"{what}: '{uri}': {reason}{_other_names(repo, inside) if lacking else ''}")


def _other_names(repo: str, inside: str) -> str:
    """Other names under which the same file has been published."""
    others = [name for name in SAME_FILE.get(f"{repo}/{inside}", ()) if name != f"{repo}/{inside}"]
    return f"; the same file is also published as {', '.join(SCHEME + name for name in others)}" if others else ""


def _digest_of_names(folder: Path, names: list[str]) -> str:
    digests = digests_of([folder / name for name in names])
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def digests_of(files: Sequence[Path], *, remembered: bool = True) -> list[str]:
    """SHA-256 in hex of files, several read at a time; all of them are remembered, see `file_sha256`.

    remembered: take those that are, of files that have not changed since.

    Raises:
        InputError: a file is not there.
    """
    known = _read_digests()
    before = dict(known)
    asked = known if remembered else {}
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="sha256") as pool:
        digests = list(pool.map(lambda file: _digest(file, asked), files))
    known |= asked
    if known != before:
        _write_digests(known)
    return digests


def _digest(path: Path, known: dict[str, Any]) -> str:
    resolved = path.resolve()
    if not resolved.is_file():
        raise InputError(f"{path}: no such file, but its index lists it; download it again")
    status = resolved.stat()  # before reading: a file that changes meanwhile is not taken for the one that was read
    # The time of its last change beside that of its content, which tools set back.
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    entry = known.get(str(resolved))
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    try:
        with resolved.open("rb") as stream:
            digest = stream_sha256(stream)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)})") from error
    known[str(resolved)] = {"stamp": stamp, "sha256": digest}
    return digest


def stream_sha256(stream: BinaryIO, size: int = sys.maxsize) -> str:
    """SHA-256 in hex of what follows in an open file, of at most `size` bytes, read block by block."""
    digest = hashlib.sha256()
    while block := stream.read(min(size, 1 << 22)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _digest_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "longsana" / "sha256.json"


def _read_digests() -> dict[str, Any]:
    try:
        known = json.loads(_digest_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
        log.debug("no remembered digests: %s", error)
        known = {}
    return (known if isinstance(known, dict) else {}) | _UNWRITTEN


_UNWRITTEN: dict[str, Any] = {}  # digests that this process remembers where it cannot write them down


def _write_digests(known: dict[str, Any]) -> None:
    alive = {path: entry for path, entry in known.items() if os.path.exists(path)}
    try:
        target = _digest_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch) / target.name
            fresh.write_text(json.dumps(alive), encoding="utf-8")
            os.replace(fresh, target)
    except (OSError, RuntimeError) as error:
        log.debug("digests are not remembered beyond this process: %s", error)
        _UNWRITTEN.update(alive)
