"""Training of the small world's tiny decoder: it comes closer to the full decoder, and inference reads its file."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.commands import shapes
from longsana.config import VAEConfig, load_config
from longsana.encoders.loading import load_vae
from longsana.encoders.tiny_layouts import FULL, SHAPES
from longsana.encoders.tiny_network import load_tiny
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import WanVAE
from longsana.evaluation.shapes_table import ROWS, sampler
from longsana.runtime.errors import InputError
from longsana.runtime.stop import Stopped
from longsana.shapes import descent, material
from longsana.shapes import train_decoder as training
from longsana.shapes.remembered import WORLDS
from longsana.shapes.scenes import draw_scene, render
from longsana.shapes.snapshot import NAME
from longsana.shapes.train_decoder import DecoderTrainingConfig, train_decoder

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZE = (32, 32)
FILE = f"{SHAPES}.safetensors"
TINY = DecoderTrainingConfig(
    steps=(2, 2),
    clips=(2, 1),
    frames=(5, 9),
    heights=(32, 16),
    widths=(32, 32),
    pool=(6, 3),
    test_clips=1,
    test_frames=5,
)


@pytest.fixture(scope="module", autouse=True)
def _small_pictures() -> object:
    """Where the test takes full pictures, it gets small ones."""
    with pytest.MonkeyPatch.context() as patch:
        for world, draw in tuple(WORLDS.items()):
            patch.setitem(WORLDS, world, functools.partial(draw, size=SIZE))
        patch.setattr(material, "render", functools.partial(render, size=SIZE))
        yield


@pytest.fixture(scope="module")
def full() -> WanVAE:
    return WanVAE.load(VAEConfig(latents_per_call=5, vae_pretrained="asset/shapes/vae"), CPU, torch.float32)


class Trained:
    """A run of 60 steps, and its log."""

    def __init__(self, folder: Path) -> None:
        self.file, self.messages = folder / FILE, []
        self.config = replace(TINY, steps=(57, 3), clips=(4, 1), pool=(24, 2), average=0.9, test_clips=2)
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        training.log.addHandler(handler)
        level = training.log.level
        training.log.setLevel(logging.INFO)
        self.psnr = train_decoder(self.config, folder, CPU)
        training.log.setLevel(level)
        training.log.removeHandler(handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def load(file: Path) -> TinyVAE:
    config = VAEConfig(vae_pretrained="asset/shapes/vae", decoder=SHAPES, decoder_pretrained=str(file))
    vae = load_vae(config, CPU, torch.float32)
    assert isinstance(vae, TinyVAE)
    return vae


def clips(seed: int, count: int, frames: int) -> Tensor:
    return render([draw_scene(seed, index, size=SIZE) for index in range(count)], range(frames), size=SIZE)


def test_training_brings_its_pictures_closer_to_the_full_decoders(trained: Trained, full: WanVAE) -> None:
    """On clips of no seed that it was trained on, of a length that it has not seen."""
    latents = full.encode(clips(9, 4, 17))
    expected, _ = full.decode_stream(latents)
    new = TinyVAE(load_tiny(training.KIND, "seeded:0", CPU, torch.float32), 1)
    before, after = ((vae.decode_stream(latents)[0] - expected).square().mean() for vae in (new, load(trained.file)))
    assert after < 0.5 * before


def test_the_file_is_small_and_streams_as_one_call(trained: Trained, full: WanVAE) -> None:
    assert trained.file.stat().st_size < 2e6, "in float16"
    vae, latents = load(trained.file), full.encode(clips(9, 1, 17))
    whole = vae.decode(latents)
    assert whole.shape == (1, 3, 17, *SIZE)
    first, cache = vae.decode_stream(latents[:, :, :2])
    rest, _ = vae.decode_stream(latents[:, :, 2:], cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole, rtol=0, atol=1e-5)
    pictures = clips(9, 1, 5)
    assert torch.equal(vae.encode(pictures), full.encode(pictures)), "the VAE itself encodes"


def test_the_log_has_the_likeness_of_streamed_pictures(trained: Trained, full: WanVAE) -> None:
    assert [message.split(",")[0] for message in trained.messages[:2]] == [
        "decoder: step 50 of 60",
        "decoder: step 60 of 60",
    ]
    vae = load(trained.file)
    errors = torch.zeros(3, dtype=torch.float64)
    for index in range(2):
        truth = render([draw_scene(0, index, held_out=True, size=SIZE)], range(5), size=SIZE)
        latents = full.encode(truth)
        own, expected = (decoder.decode_stream(latents)[0] for decoder in (vae, full))
        pairs = ((own, expected), (own, truth), (expected, truth))
        errors += torch.tensor([(a - b).square().mean().item() / 2 for a, b in pairs], dtype=torch.float64)
    told = [float(number) for number in re.findall(r"([\d.]+) dB", trained.messages[-1])]
    assert told == pytest.approx((10 * torch.log10(4 / errors)).tolist(), abs=0.01)
    assert trained.psnr == pytest.approx(told[0], abs=0.01)
    for batch in (1, 8):
        found = training.held_out_likeness(trained.file, trained.config, full, CPU, batch=batch)
        assert found == pytest.approx(told, abs=0.02)


def test_a_pool_has_what_the_vae_sees(full: WanVAE) -> None:
    lessons = training._Lessons(TINY, 1, full, CPU)
    latents, pictures, mask = lessons(3)
    assert latents.shape == (1, 16, 3, 2, 4) and pictures.shape == (1, 3, 9, 16, 32) and mask.shape == (1, 1, 9, 16, 32)
    expected = full.decode_stream(latents)[0]
    assert (material.from_bytes(pictures) - expected).abs().max() < 1 / 255 + 1e-6
    again = training._Lessons(TINY, 1, full, CPU)(3)
    assert all(torch.equal(a, b) for a, b in zip((latents, pictures, mask), again, strict=True)), (
        "a function of the step"
    )
    taken = {lessons(step)[0].numpy().tobytes() for step in range(30)}
    assert len(taken) == 3
    truth = next(material.draw_pool(TINY, 1, CPU))
    assert any(torch.equal(material.objects(own[None]).byte(), mask) for own in truth), "where the true clip has shapes"


def test_a_stop_saves_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and not from what another config has left."""
    train_decoder(TINY, tmp_path / "whole", CPU)
    loss, calls = training._loss, itertools.count(1)

    def asked(*arguments: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(*arguments)

    monkeypatch.setattr(training, "_loss", asked)
    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        train_decoder(TINY, broken, CPU)
    assert [path.name for path in broken.iterdir()] == [NAME]
    shutil.copytree(broken, tmp_path / "other")
    train_decoder(TINY, broken, CPU)
    assert next(calls) == 5, "three steps and one"
    assert [path.name for path in broken.iterdir()] == [FILE]
    assert (broken / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    train_decoder(replace(TINY, seed=1), tmp_path / "other", CPU)
    assert next(calls) == 10
    assert (tmp_path / "other" / FILE).read_bytes() != (broken / FILE).read_bytes()


def test_a_stop_does_not_wait_for_the_whole_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase before it was saved, and the same call goes on to the bit."""
    monkeypatch.setattr(material, "DRAWN_TOGETHER", 1)
    train_decoder(TINY, tmp_path / "whole", CPU)
    draw, drawn = material.clips_of, list[int]()

    def asked(config: Any, phase: int, *arguments: Any) -> Any:
        drawn.append(phase)
        if drawn.count(1) == 1 and phase == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(config, phase, *arguments)

    monkeypatch.setattr(material, "clips_of", asked)
    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        train_decoder(TINY, broken, CPU)
    assert drawn.count(1) == 1 < TINY.pool[1]
    assert [path.name for path in broken.iterdir()] == [NAME]
    train_decoder(TINY, broken, CPU)
    assert drawn.count(0) == TINY.pool[0], "the first phase was not made again"
    assert (broken / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


class _Standin:
    """A recording that calls the function again, as replaying it does on a GPU."""

    replayed = 0

    def __init__(self, function: Any, inputs: Any, *, warm_up: Any, warm_ups: int) -> None:
        self.function, self.warm = function, [warm_up(*inputs) for _ in range(warm_ups)]

    def replay(self, inputs: Any) -> Any:
        _Standin.replayed += 1
        return self.function(*inputs)


def test_recorded_steps_are_the_steps_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_decoder(TINY, tmp_path / "plain", CPU)
    monkeypatch.setattr(descent, "Recording", _Standin)
    monkeypatch.setattr(descent, "replays", lambda config, device: True)
    assert train_decoder(TINY, tmp_path / "recorded", CPU) == plain
    assert _Standin.replayed == sum(TINY.steps)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pool": ()}, r"^pool=\[\]: must have 2 entries, as steps has$"),
        ({"heights": (32,)}, r"^heights=\[32\]: must have 2 entries, as steps has$"),
        ({"world": "remembered_shapes"}, r"^vae=asset/shapes/vae: was trained on the world shapes; give that of remem"),
        ({"vae": "none"}, "'none' not found"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told) as caught:
        train_decoder(replace(TINY, **changes), tmp_path, CPU)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_command_trains_it_and_rows_of_the_table_show_it(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(ROOT / "asset/shapes/vae", parts / "vae")
    names = ("steps", "clips", "frames", "heights", "widths", "pool", "test_clips", "test_frames")
    settings = [f"{name}={getattr(TINY, name)}".replace("(", "[").replace(")", "]") for name in names]
    command = ["decoder", str(parts / "decoder"), f"vae={parts / 'vae'}", *(one.replace(" ", "") for one in settings)]
    assert shapes.main(command) == 0
    assert [path.name for path in (parts / "decoder").iterdir()] == [FILE]
    assert shapes.main(command) == 0, "it is there"
    full = [row for row in ROWS if row.full_decoder]
    assert [bool(row.weights) for row in full] == [False, True], "the truth, and the model"
    for row in ROWS:
        config = sampler(parts, row, tiny=True)
        assert config.vae.decoder == (FULL if row.full_decoder else SHAPES)
        assert row.full_decoder or Path(config.vae.decoder_pretrained or "").is_file()
        assert config.vae.vae_pretrained == str(parts / "vae")
    (parts / "decoder" / FILE).unlink()
    with pytest.raises(InputError, match=r"vae\.decoder_pretrained: '.*tae_shapes\.safetensors' not found"):
        load_vae(config.vae, CPU, torch.float32)


def test_the_published_config_is_the_default() -> None:
    path = ROOT / "configs/sana_video_config/longsana/shapes/decoder.yaml"
    assert load_config(path, [], DecoderTrainingConfig) == DecoderTrainingConfig()
