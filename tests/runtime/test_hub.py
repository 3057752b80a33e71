from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from longsana.runtime import hub
from longsana.runtime.errors import InputError
from longsana.runtime.hub import file_sha256, locate, stream_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {
    "gone": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "empty": (404, "EntryNotFound"),
    "sick": (500, ""),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no hub to fill it from."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def endpoint(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that answers every request with the error that the repository's name asks for."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = next(name for name in ERRORS if f"owner/{name}" in self.path)
            status, code = ERRORS[name]
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "longsana" / "sha256.json"


def store(cache: Path, repo: str, files: dict[str, str]) -> Path:
    """Put files into a hub cache in the layout of huggingface_hub; returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content.encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_text("x")
    assert locate("weights.pth", "the checkpoint").resolve() == tmp_path / "weights.pth"
    assert locate(str(tmp_path), "the checkpoint") == tmp_path
    assert (
        locate("longsana/config.py", "the checkpoint").read_bytes() == (hub.SHIPPED / "longsana/config.py").read_bytes()
    )
    (tmp_path / "longsana").mkdir()
    assert locate("longsana", "the checkpoint").resolve() == tmp_path / "longsana"  # the working directory comes first


@pytest.mark.parametrize("uri", ["no/such.pth", "/no/such.pth", ""])
def test_missing_local_path(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the VAE: '.*not found") as caught:
        locate(uri, "the VAE")
    assert "\n" not in str(caught.value)
    assert "hf://" in str(caught.value)
    if uri == "no/such.pth":
        assert str(tmp_path / uri) in str(caught.value)
        assert str(hub.SHIPPED / uri) in str(caught.value)


def test_cached_file_and_folders(cache: Path) -> None:
    snapshot = store(
        cache,
        "owner/repo",
        {"checkpoints/a.pth": "A", "config.json": "{}", "Wan2.1/config.json": "{}", "x/notes.md": ""},
    )
    assert locate("hf://owner/repo/checkpoints/a.pth", "the checkpoint").read_text() == "A"
    assert locate("hf://owner/repo", "the text encoder") == snapshot
    assert locate("hf://owner/repo/", "the text encoder") == snapshot
    assert locate("hf://owner/repo/Wan2.1", "the VAE") == snapshot / "Wan2.1"
    for folder in ("vae", "x"):  # absent, and without anything a folder load needs
        with pytest.raises(InputError, match=rf"hf download owner/repo --include '{folder}/\*'"):
            locate(f"hf://owner/repo/{folder}", "the VAE")


def test_environment_is_honoured(tmp_path: Path) -> None:
    store(tmp_path, "owner/repo", {"a.pth": "A"})
    script = (
        "import sys\nfrom longsana.runtime.hub import locate\n"
        "print(locate('hf://owner/repo/a.pth', 'the checkpoint').read_text())\n"
        "try: locate('hf://owner/repo/b.pth', 'the checkpoint')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(hub.SHIPPED), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    content, message = run.stdout.splitlines()
    assert content == "A"
    assert "HF_HUB_OFFLINE=1" in message
    assert "`hf download owner/repo b.pth`" in message
    assert str(tmp_path) in message


def test_index_brings_its_shards(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}})
    store(cache, "owner/repo", {"t/m.safetensors.index.json": index, "t/m-1.safetensors": "1"})
    with pytest.raises(InputError, match=r"owner/repo t/m-2.safetensors"):
        locate("hf://owner/repo/t/m.safetensors.index.json", "the checkpoint")
    store(cache, "owner/repo", {"t/m-2.safetensors": "2"})
    path = locate("hf://owner/repo/t/m.safetensors.index.json", "the checkpoint")
    assert (path.parent / "m-2.safetensors").read_text() == "2"


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../b.safetensors"}}']
)
def test_bad_index(index: str, cache: Path) -> None:
    store(cache, "owner/repo", {"m.safetensors.index.json": index})
    with pytest.raises(InputError, match=r"m\.safetensors\.index\.json: "):
        locate("hf://owner/repo/m.safetensors.index.json", "the checkpoint")


def test_only_what_is_needed_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "config.json", "model.safetensors", "tokenizer.model", "merges.txt", "pytorch_model.bin", "README.md",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    ]  # fmt: skip
    fetched: list[str] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        fetched[:] = filter_repo_objects(files, allow_patterns=allow_patterns)
        return str(store(cache, f"{repo}-{len(list(cache.iterdir()))}", dict.fromkeys(fetched, "")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate("hf://owner/repo", "the text encoder")
    assert set(files) - set(fetched) == {"pytorch_model.bin", "README.md"}
    locate("hf://owner/repo/transformer", "the checkpoint")
    assert fetched == ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    locate("hf://owner/repo", "the checkpoint", part="transformer")
    assert "transformer/diffusion_pytorch_model.safetensors" in fetched
    assert "model.safetensors" in fetched
    assert "text_encoder/model.safetensors" not in fetched


@pytest.mark.parametrize("uri", ["hf://", "hf://owner", "hf://owner/repo/../secret.pth", "hf://own er/re:po/a.pth"])
def test_malformed_uri(uri: str, cache: Path) -> None:
    with pytest.raises(InputError, match="hf://owner/repo/file"):
        locate(uri, "the checkpoint")


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("hf://owner/gone/a.pth", "no such repository"),
        ("hf://owner/gone", "no such repository"),
        ("hf://owner/gated/a.pth", "accept its terms at https://huggingface.co/owner/gated"),
        ("hf://owner/gated/part", "accept its terms at https://huggingface.co/owner/gated"),
        ("hf://owner/empty/a.pth", "no such file in the repository"),
    ],
)
def test_hub_refusals(uri: str, advice: str, endpoint: str) -> None:
    with pytest.raises(InputError, match=advice) as caught:
        locate(uri, "the checkpoint")
    assert str(caught.value).startswith(f"the checkpoint: '{uri}': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reason", ["not there", "not in the cache"])
@pytest.mark.parametrize("names", [("", "_LTXVAE"), ("_LTXVAE", "")])
def test_a_missing_file_that_has_another_name(
    names: tuple[str, str], reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 720p checkpoint is in use under two names."""
    from huggingface_hub.errors import EntryNotFoundError

    def missing(*args: object) -> str:
        raise EntryNotFoundError("404")

    if reason == "not there":
        monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    folder = "hf://Efficient-Large-Model/SANA-Video_2B_720p/checkpoints/SANA_Video_2B_720p"
    own, other = (f"{folder}{name}.pth" for name in names)
    with pytest.raises(InputError) as caught:
        locate(own, "the checkpoint")
    assert str(caught.value).endswith(f"; the same file is also published as {other}")
    with pytest.raises(InputError) as caught:
        locate(own.replace("720p.pth", "900p.pth").replace("_LTXVAE", "_X"), "the checkpoint")
    assert "also published" not in str(caught.value)


def test_hub_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("Connection refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for uri in ("hf://owner/repo/a.pth", "hf://owner/repo"):
        with pytest.raises(InputError, match=r"the hub cannot be reached.*hf download owner/repo.*local path"):
            locate(uri, "the checkpoint")


def test_interrupted_download_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> str:
        raise ConnectionResetError("peer went away\nwith a second line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(InputError, match=r"ConnectionResetError: peer went away with a second line.*try again"):
        locate("hf://owner/repo/a.pth", "the checkpoint")


def test_digest_of_a_file_is_remembered(tmp_path: Path, digests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert file_sha256(file) == expected
    assert json.loads(digests.read_text())[str(file)]["sha256"] == expected

    def forbidden(*args: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", forbidden)
        assert file_sha256(file) == expected
        link = tmp_path / "link.pth"
        link.symlink_to(file)
        assert file_sha256(link) == expected

    stamp = file.stat()
    file.write_bytes(b"two")  # same size
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert file_sha256(file) == hashlib.sha256(b"two").hexdigest()

    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(stamp.st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)  # same size and time, another inode
    assert file_sha256(file) == hashlib.sha256(b"six").hexdigest()


def test_digest_of_a_piece_is_that_of_its_bytes() -> None:
    """From where the file stands, over blocks' ends, to the end or for so many bytes."""
    content = bytes(range(251)) * (1 << 15)  # nearly two blocks
    for first, size in ((0, None), (7, None), (7, 0), (7, 1), (7, 1 << 22), (7, (1 << 22) + 1), (7, 2 * len(content))):
        stream = io.BytesIO(content)
        stream.seek(first)
        found = stream_sha256(stream) if size is None else stream_sha256(stream, size)
        end = None if size is None else first + size
        assert found == hashlib.sha256(content[first:end]).hexdigest(), (first, size)


def test_digest_of_a_folder(tmp_path: Path, digests: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> Path:
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(content)
        return tmp_path / name

    base = {"config.json": "{}", "sub/a.safetensors": "A"}
    first = file_sha256(folder("1", base))
    assert file_sha256(folder("2", {**base, "README.md": "not a weight", ".cache/x.lock": ""})) == first
    others = [
        folder("3", {"config.json": "{}", "sub/a.safetensors": "B"}),
        folder("4", {"config.json": "{}", "sub/b.safetensors": "A"}),
        folder("5", {**base, "tokenizer.model": "T"}),
        folder("6", {"config.json": "A", "sub/a.safetensors": "{}"}),
    ]
    assert len({first, *map(file_sha256, others)}) == 5
    with pytest.raises(InputError, match="no weights or configs"):
        file_sha256(folder("7", {"README.md": ""}))
    with pytest.raises(InputError, match="no such file or folder"):
        file_sha256(tmp_path / "8")


def test_digest_of_an_index_covers_its_shards(tmp_path: Path, digests: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    (tmp_path / "m-1.safetensors").write_text("1")
    with pytest.raises(InputError, match=r"m-2\.safetensors: no such file"):
        file_sha256(index)
    (tmp_path / "m-2.safetensors").write_text("2")
    first = file_sha256(index)
    (tmp_path / "other.safetensors").write_text("3")
    assert file_sha256(index) == first
    (tmp_path / "m-2.safetensors").write_text("two")
    assert file_sha256(index) != first


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"PATH": 3}', '{"PATH": {"stamp": [1]}}', "\udcff"])
def test_damaged_memory_is_rebuilt(damage: str, tmp_path: Path, digests: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"one")
    digests.parent.mkdir(parents=True)
    digests.write_bytes(damage.replace("PATH", str(file)).encode("utf-8", "surrogateescape"))
    expected = hashlib.sha256(b"one").hexdigest()
    assert file_sha256(file) == expected
    assert json.loads(digests.read_text())[str(file)]["sha256"] == expected
    assert [path.name for path in digests.parent.iterdir()] == [digests.name]


def test_forgets_files_that_are_gone(tmp_path: Path, digests: Path) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_text(name)
        file_sha256(tmp_path / name)
        (tmp_path / name).unlink()
    (tmp_path / "c.pth").write_text("c")
    file_sha256(tmp_path / "c.pth")
    assert list(json.loads(digests.read_text())) == [str(tmp_path / "c.pth")]


def test_memory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "xdg").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "a.pth").write_bytes(b"one")
    with caplog.at_level(logging.DEBUG, "longsana"):
        assert file_sha256(tmp_path / "a.pth") == hashlib.sha256(b"one").hexdigest()
    assert "not remembered" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
