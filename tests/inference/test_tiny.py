"""Tiny decoders in the batch command: without the VAE's file, known by their sidecars, with states and films."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from longsana.config import InferenceConfig, load_config
from longsana.encoders.tiny_layouts import LATENTS, TINY
from longsana.encoders.tiny_network import load_tiny
from longsana.inference.sidecar import fingerprint, resolved_settings, source_digests
from longsana.runtime.hub import file_sha256
from longsana.runtime.video import VideoWriter
from longsana.training import run_folder
from tests.inference.test_sidecar import CONFIG, DIGESTS, PROMPT

from .conftest import ROOT, sidecars

Command = Callable[..., int]
Prompts = Callable[..., Path]
TEXT = "a red circle moves left"
SEEDED = ("vae.decoder=taew2_1", "vae.decoder_pretrained=seeded:3")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.safetensors"
    weights = load_tiny(TINY["taew2_1"], "seeded:3", "cpu", torch.float32).state_dict()
    save_file({name: part.half() for name, part in weights.items()}, path)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return tmp_path / "out" / "videos"


def test_videos_without_the_vae(
    command: Command, prompts: Prompts, videos: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    txt = ("--txt_file", prompts(TEXT))
    assert command(*txt, "vae.decoder=full") == 0
    full = sidecars(videos)[0]
    given = (
        "--vae.decoder",
        "taew2_1",
        "--vae.decoder_pretrained",
        file,
        f"vae.vae_pretrained={tmp_path / 'none.pth'}",
    )
    assert command(*txt, *given) == 0
    tiny = sidecars(videos)[0]
    assert tiny["latents_sha256"] == full["latents_sha256"] and tiny["fingerprint"] != full["fingerprint"]
    assert tiny["sha256"].keys() == {"model", "text_encoder", "decoder"} and tiny["sha256"]["decoder"] == file_sha256(
        file
    )
    assert full["sha256"].keys() == {"model", "text_encoder", "vae"}
    caplog.set_level(logging.INFO)
    assert command(*txt, *given) == 0
    assert "1 of 1 videos are in" in caplog.text
    caplog.clear()
    assert command(*txt, *SEEDED) == 0
    assert "RANDOM WEIGHTS (vae.decoder_pretrained=seeded:3)" in caplog.text
    assert sidecars(videos)[0]["sha256"]["decoder"] == "seeded:3"


@pytest.mark.parametrize("line", [f"{TEXT}<image>red.png", f"{TEXT} | [cut] {TEXT}<image>red.png"])
def test_a_picture_needs_the_vae_or_the_tiny_encoder(
    command: Command, prompts: Prompts, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """At the beginning, and where a later part alone has one."""
    Image.new("RGB", (48, 32), (200, 40, 40)).save(tmp_path / "red.png")
    txt = ("--txt_file", prompts(line), *SEEDED)
    assert command(*txt, f"vae.vae_pretrained={tmp_path / 'none.pth'}") == 2
    assert "none.pth" in capsys.readouterr().err
    assert command(*txt) == 0
    by_vae = sidecars(videos)[0]
    assert by_vae["sha256"].keys() == {"model", "vae", "text_encoder", "decoder"}
    assert command(*txt, "vae.encoder=tiny", f"vae.vae_pretrained={tmp_path / 'none.pth'}") == 0
    by_itself = sidecars(videos)[0]
    assert by_itself["sha256"].keys() == {"model", "text_encoder", "decoder"}
    assert by_itself["fingerprint"] != by_vae["fingerprint"]
    assert by_itself["latents_sha256"] != by_vae["latents_sha256"]


def test_a_video_goes_on(command: Command, prompts: Prompts, videos: Path, tmp_path: Path) -> None:
    """From a state to the bit, from a state of the full decoder, and from a film."""
    txt = ("--txt_file", prompts(TEXT))
    assert command(*txt, *SEEDED, "--save_state", "full", "--save_every", "1") == 0
    whole = iio.imread(next(videos.glob("*.mp4")), plugin="pyav")
    state = next(videos.glob("*.chunk00001.safetensors")).rename(tmp_path / "state.safetensors")
    assert command("--from_state", state, "--num_frames", "9", *SEEDED, "--dataset", "rest") == 0
    rest = iio.imread(next((tmp_path / "out/rest").glob("*.mp4")), plugin="pyav")
    assert len(rest) == 8 and abs(rest.astype(int) - whole[-8:].astype(int)).mean() < 3  # of two mp4s
    assert command("--from_state", state, "--num_frames", "9", "vae.decoder=full", "--dataset", "full") == 0
    there = json.loads(next((tmp_path / "out/full").glob("*.json")).read_text())
    again = json.loads(next((tmp_path / "out/rest").glob("*.json")).read_text())
    assert there["latents_sha256"] == again["latents_sha256"] and there["fingerprint"] != again["fingerprint"]
    with VideoWriter(tmp_path / "film.mp4", 8, 32, 48, crf=20, preset="veryfast", threads=1) as writer:
        writer.append(torch.full((21, 32, 48, 3), 90, dtype=torch.uint8))
    for encoder in ("full", "tiny"):
        name = f"film-{encoder}"
        assert (
            command(*txt, *SEEDED, f"vae.encoder={encoder}", "--video", tmp_path / "film.mp4", "--dataset", name) == 0
        )
        record = json.loads(next((tmp_path / "out" / name).glob("*.json")).read_text())
        assert record["frames"] == 21 + 16 and ("vae" in record["sha256"]) == (encoder == "full")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("vae.decoder=taew2_1",), "vae.decoder_pretrained must say where its file lies"),
        (("vae.decoder=taeltx_2", "vae.decoder_pretrained=seeded:1"), "decodes latents of LTX2VAE_diffusers"),
        (
            ("vae.decoder=full", "vae.decoder_pretrained=seeded:1"),
            "with vae.decoder=full nothing would be decoded with it",
        ),
        (("vae.decoder=taew2_2", "vae.decoder_pretrained=seeded:1"), "vae.decoder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    settings: tuple[str, ...], told: str, command: Command, prompts: Prompts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--txt_file", prompts(TEXT), *settings, "model.load_from=seeded:0") == 2
    assert told in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused_before_anything_is_loaded(
    command: Command, prompts: Prompts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}, path := tmp_path / "taew2_2.safetensors")
    assert command("--txt_file", prompts(TEXT), "vae.decoder=taew2_1", f"vae.decoder_pretrained={path}") == 2
    assert f"vae.decoder_pretrained: {path}: not a file of a taew2_1" in capsys.readouterr().err


def mark(*settings: str, digests: dict[str, str], picture: str | None = None, film: bool = False) -> str:
    config = load_config(CONFIG, ["vae.decoder=full", *settings], InferenceConfig)
    began = {"sha256": "f", "film_frames": 9, "shown": True} if film else None
    return fingerprint(
        resolved_settings(config, PROMPT, torch.device("cpu")),
        PROMPT,
        digests,
        (),
        (),
        began,
        picture,
        encodes=bool(began or picture),
    )


def test_what_a_tiny_decoder_decides() -> None:
    """Its kind and weights; the VAE and who encodes where something is encoded; never where files lie."""
    digests = DIGESTS | {"decoder": "d"}
    plain = mark(*SEEDED, digests=digests)
    assert plain == mark(SEEDED[0], "vae.decoder_pretrained=elsewhere.pth", digests=digests)
    assert plain == mark(*SEEDED, digests={name: digests[name] for name in ("model", "text_encoder", "decoder")})
    assert plain == mark(*SEEDED, "vae.encoder=tiny", digests=digests), "nothing is encoded"
    kinds = [SEEDED, ("vae.decoder=lighttaew2_1", SEEDED[1])]
    others = [digests, digests | {"decoder": "e"}]
    assert len({mark(*kind, digests=other) for kind in kinds for other in others} | {mark(digests=DIGESTS)}) == 5
    for made in ({"picture": "p"}, {"film": True}):
        encoded = {
            mark(*SEEDED, *encoder, digests=digests | {"vae": vae}, **made)  # type: ignore[arg-type]
            for encoder in ((), ("vae.encoder=tiny",))
            for vae in ("b", "c")
        }
        assert len(encoded) == 3, "the tiny encoder does without the VAE"


# The default's own ----------------------------------------------------------------------------------------------------

VAE = ROOT / "asset/shapes/vae"


def another_vae(folder: Path) -> Path:
    """The shipped one but for the mean of its latents, without a tiny decoder."""
    shutil.copytree(VAE, folder, ignore=shutil.ignore_patterns("tae_*"))
    told = json.loads((folder / "config.json").read_text())
    told["latents_mean"][0] += 0.5
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_the_default_is_decoded_by_the_decoder_beside_its_vae(
    command: Command, prompts: Prompts, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder; and by the full one where that is asked for, without more."""
    monkeypatch.chdir(tmp_path)
    txt = ("--txt_file", prompts(TEXT))
    assert command(*txt) == 0
    default = sidecars(videos)[0]
    assert default["sha256"].keys() == {"model", "text_encoder", "decoder"}
    assert default["sha256"]["decoder"] == file_sha256(VAE / "tae_shapes.safetensors")
    assert command(*txt, "--decoder", "tae_shapes", "--decoder_path", VAE / "tae_shapes.safetensors") == 0
    assert sidecars(videos)[0]["fingerprint"] == default["fingerprint"], "wherever it lies"
    assert command(*txt, "--decoder", "full") == 0
    full = sidecars(videos)[0]
    assert full["sha256"].keys() == {"model", "text_encoder", "vae"}
    assert full["latents_sha256"] == default["latents_sha256"] and full["fingerprint"] != default["fingerprint"]


def test_a_decoder_beside_a_vae_leaves_the_vaes_digest_as_it_was(tmp_path: Path) -> None:
    """And so the fingerprints of videos that were made before there was one."""
    plain = shutil.copytree(VAE, tmp_path / "vae", ignore=shutil.ignore_patterns("tae_*"))
    for seeded in ("", "seeded:"):
        shipped, before = (
            source_digests(
                load_config(CONFIG, ["vae.decoder=full", f"vae.vae_pretrained={seeded}{folder}"], InferenceConfig),
                encodes=False,
            )["vae"]
            for folder in (VAE, plain)
        )
        assert shipped == before == seeded + file_sha256(plain)
        assert shipped == run_folder._digest("vae.vae_pretrained", f"{seeded}{VAE}"), "and runs go on"
    assert file_sha256(VAE) != file_sha256(plain)


def test_another_vae_is_refused_with_what_to_do(
    command: Command, prompts: Prompts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded; and it is taken with its own decoder, whichever that is."""
    vae = f"vae.vae_pretrained={another_vae(tmp_path / 'vae')}"
    txt, own = ("--txt_file", prompts(TEXT)), "vae.decoder_pretrained=asset/shapes/vae/tae_shapes.safetensors"
    cases = {
        (vae,): "no folder on this machine with a tae_shapes.safetensors. vae.decoder=full does without one",
        ("vae.vae_pretrained=hf://owner/repo/vae",): "vae.vae_pretrained=hf://owner/repo/vae is no folder on this",
        ("vae.vae_pretrained=seeded:asset/shapes/vae",): "vae.decoder=full does without one",
        (f"vae.vae_pretrained={tmp_path / 'none'}",): "vae.vae_pretrained: '",
        (vae, own): "latents of another VAE than vae.vae_pret",
        ("vae.vae_pretrained=hf://owner/repo/vae.pth", own):
            "latents of another VAE than vae.vae_pretrained=hf://owner/repo/vae.pth; give its own, or vae.decoder=full",
    }  # fmt: skip
    for settings, told in cases.items():
        assert command(*txt, *settings) == 2, settings
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: vae.") and told in line
    assert command(*txt, vae, "vae.decoder=full") == 0
    save_file(load_file(VAE / "tae_shapes.safetensors"), tmp_path / "vae/tae_shapes.safetensors")
    assert command(*txt, vae) == 0, "its file does not say of which latents it is"
    save_file(load_file(VAE / "tae_shapes.safetensors"), tmp_path / "vae/tae_shapes.safetensors", {LATENTS: "others"})
    assert command(*txt, vae) == 2
    assert "give its own, or vae.decoder=full" in capsys.readouterr().err
