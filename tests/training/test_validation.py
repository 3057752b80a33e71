"""The probe set: what is measured, and that it shows the same whoever samples it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from longsana.config import load_config, save_config
from longsana.data.prompts import read_prompts
from longsana.encoders.vae import WanVAE
from longsana.evaluation.measures import end_drift, measure, measure_pieces
from longsana.models.dit import LongSanaDiT
from longsana.runtime.distributed import World
from longsana.runtime.errors import InputError
from longsana.runtime.strips import HEIGHT
from longsana.sampling.captions import caption_encoder
from longsana.sampling.engine import Engine
from longsana.training.checks import validation_prompts
from longsana.training.config import TrainingConfig
from longsana.training.parallel import connect, device_mesh, parallelise
from longsana.training.validation import InTraining, Meter, Report, Validation
from longsana.weights.build import build_model
from tests.forks import Forks

ROOT = Path(__file__).parents[2]


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def noise() -> Tensor:
    return torch.randint(0, 256, (2, 9, 4, 6, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("cuts", [[9], [1, 8], [4, 4, 1], [1] * 9])
def test_a_video_in_pieces_measures_the_same(cuts: list[int], noise: Tensor) -> None:
    meter = Meter(8.0)
    for piece in noise.split(cuts, dim=1):
        copy = piece.clone()
        meter.add(copy)
        copy.zero_()  # what came before may be overwritten
    probe, whole = meter.result(), measure(noise)
    assert probe.saturation == pytest.approx(whole.saturation.mean().item(), rel=1e-6)
    assert probe.movement == pytest.approx(8 * whole.change.nanmean().item(), rel=1e-6)
    assert probe.contrast == pytest.approx(whole.contrast.mean().item(), rel=1e-6)
    single = Meter(8.0)
    single.add(noise[:, :1])
    assert math.isnan(single.result().movement)


# --- the probe set ----------------------------------------------------------------------------------------------------

OVERRIDES = (
    "validation.val_samples=3",
    "validation.vis_video_lengths=[2,1]",
    "sampling.chunk_frames=1",
    "video.crf=0",
    "sampling.fps=8",
)


@pytest.fixture(scope="module")
def config(training_config: Callable[..., TrainingConfig]) -> TrainingConfig:
    return training_config("longsana", *OVERRIDES)


@pytest.fixture(scope="module")
def model(config: TrainingConfig) -> LongSanaDiT:
    return build_model(config.model, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Validation:
    return Validation(config, tmp_path_factory.mktemp("alone"), "cpu", World())


@pytest.fixture(scope="module")
def report(alone: Validation, model: LongSanaDiT, vae: WanVAE) -> Report:
    """Of iteration 40, by one process."""
    model.requires_grad_(True)
    graphs: list[bool] = []
    handle = model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    report = alone.run(40, model, vae)
    handle.remove()
    assert graphs and not any(graphs)
    return report


def frames_of(path: Path) -> Tensor:
    """(F, H, W, 3). Not bytes: x264 writes other ones now and then."""
    with av.open(path) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def videos(config: TrainingConfig, length: int, model: LongSanaDiT, vae: WanVAE) -> list[Tensor]:
    """(1, F, H, W, 3) of each probe, by the parts of inference."""
    sampling = dataclasses.replace(config.sampling, num_frames=4 * length - 3)
    engine = Engine(dataclasses.replace(config, sampling=sampling), "cpu")
    own = read_prompts(config.validation.val_data_path, height=32, width=48, aspect_ratio_type="none", pictures=True)
    prompts = own[: config.validation.val_samples]
    with caption_encoder(engine.config, engine.device) as encode:
        captions = [encode(prompt) for prompt in prompts]
    return [
        torch.cat([frames.pixels for frames in engine.sample(InTraining(model), vae, [prompt], [caption])], dim=1)
        for prompt, caption in zip(prompts, captions, strict=True)
    ]


@pytest.mark.parametrize("broken", ["latents", "decoded frames"])
def test_numbers_that_are_none_are_no_video(
    alone: Validation, model: LongSanaDiT, vae: WanVAE, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    bias = model.final.linear.bias if broken == "latents" else vae.model.decoder.conv_out.bias
    before = bias.detach().clone()
    bias.data[0] = float("nan")
    try:
        found = alone.run(41, model, vae)
    finally:
        bias.data.copy_(before)
    assert found == Report({}, [], 6)
    assert "numbers of 6 of 6 validation videos are not finite" in caplog.text
    assert not list((alone._folder / "vis" / "step_0000041").iterdir())


def test_videos_and_numbers_are_those_of_inference(
    config: TrainingConfig, alone: Validation, report: Report, model: LongSanaDiT, vae: WanVAE
) -> None:
    folder = alone._folder / "vis" / "step_0000040"
    names = [f"step_0000040_rank_0_sample_{sample}_len_{length}.mp4" for sample in range(3) for length in (1, 2)]
    assert report.videos == [folder / name for name in names] == sorted(folder.iterdir())
    of_one = {"saturation", "contrast", "sharpness"}  # one frame does not move
    drifts = {
        "movement",
        "saturation_drift",
        "contrast_drift",
        "sharpness_drift",
    }  # of five frames the ends are one each
    kinds = {(name, length) for length, names in ((1, of_one), (2, of_one | drifts)) for name in names}
    assert report.metrics.keys() == {f"probe_{name}_len_{length}" for name, length in kinds}
    clips = videos(config, 2, model, vae)
    looks = [measure_pieces(clip.split([2, 3], dim=1), torch.device("cpu")) for clip in clips]
    for name in ("saturation", "sharpness"):
        drift = sum(end_drift(getattr(look, name)).item() for look in looks) / 3
        assert report.metrics[f"probe_{name}_drift_len_2"] == pytest.approx(drift, rel=1e-4)
    assert report.sheet == folder.with_suffix(".png")
    with Image.open(report.sheet) as sheet:
        assert sheet.height > 6 * HEIGHT
    for length in (1, 2):
        wanted = videos(config, length, model, vae)
        for name in of_one:
            mean = sum(getattr(measure(clip), name).mean().item() for clip in wanted) / 3
            assert report.metrics[f"probe_{name}_len_{length}"] == pytest.approx(mean, rel=1e-6)
            assert 0 < mean < 1
            assert type(report.metrics[f"probe_{name}_len_{length}"]) is float
        for sample in range(3):
            written = frames_of(folder / f"step_0000040_rank_0_sample_{sample}_len_{length}.mp4")
            assert written.shape == (4 * length - 3, 32, 48, 3)
            # 4:2:0 blurs colours; another video of the set would be far off.
            errors = [(written.float() - other[0]).abs().mean().item() for other in wanted]
            assert min(errors) == errors[sample], errors


def test_the_same_every_time_for_one_network(
    alone: Validation, report: Report, model: LongSanaDiT, vae: WanVAE
) -> None:
    torch.manual_seed(99)
    again = alone.run(46, model, vae)
    assert report.metrics == again.metrics
    for path, twin in zip(report.videos, again.videos, strict=True):
        assert torch.equal(frames_of(path), frames_of(twin))
    other = build_model(model.config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for weight in other.final.parameters():
            weight.mul_(1.5)
    changed = alone.run(42, other, vae).metrics
    assert all(changed[name] != value for name, value in report.metrics.items())


def test_numbers_that_are_not_finite(
    alone: Validation, model: LongSanaDiT, vae: WanVAE, caplog: pytest.LogCaptureFixture
) -> None:
    """No videos, no measures, one warning; and no pass less than others who may be waiting for this process take."""
    broken = build_model(model.config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        next(broken.final.parameters()).fill_(float("nan"))
    passes = {}
    for name, network in (("whole", model), ("broken", broken)):
        passes[name] = 0

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        handle = network.register_forward_hook(count)
        report = alone.run(6, network, vae)
        handle.remove()
    assert report == Report({}, [], 6)
    assert passes["broken"] == passes["whole"] > 0
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "6 of 6 validation videos are not finite" in message
    assert not list((alone._folder / "vis" / "step_0000006").glob(".*"))


def test_one_broken_video_does_not_spoil_the_others(
    alone: Validation, report: Report, model: LongSanaDiT, vae: WanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Engine.sample

    def spoiled(self: Engine, network: Any, decoder: Any, prompts: Any, captions: Any, **options: Any) -> Any:
        for frames in sample(self, network, decoder, prompts, captions, **options):
            yield frames
            if self.plan.frames == 2 and prompts[0].line == 2:
                raise FloatingPointError("planted")

    monkeypatch.setattr(Engine, "sample", spoiled)
    found = alone.run(43, model, vae)
    assert found is not None and found.broken == 1
    names = [path.name.replace("step_0000040", "step_0000043") for path in report.videos]
    assert [path.name for path in found.videos] == [name for name in names if "sample_1_len_2" not in name]
    assert sorted(found.videos) == sorted((alone._folder / "vis" / "step_0000043").iterdir())
    for name, value in report.metrics.items():
        assert (found.metrics[name] == value) == name.endswith("len_1"), name


def test_a_full_disk_is_blamed_on_the_video(
    alone: Validation, model: LongSanaDiT, vae: WanVAE, limited: Callable[[int], Any]
) -> None:
    folder = alone._folder / "vis" / "step_0000045"
    with limited(500), pytest.raises(OSError, match="File too large") as caught:
        alone.run(45, model, vae)
    assert caught.value.filename == str(folder / "step_0000045_rank_0_sample_0_len_2.mp4")
    assert list(folder.iterdir()) == []


def test_it_stops_between_videos(alone: Validation, model: LongSanaDiT, vae: WanVAE) -> None:
    """Each video that is there is whole."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(list((alone._folder / "vis").glob("step_0000044/*"))))
        return len(asked) > 2

    assert alone.run(44, model, vae, stop) is None
    assert asked == [0, 1, 2]
    for path in (alone._folder / "vis" / "step_0000044").iterdir():
        assert len(frames_of(path)) == 5


def main(arguments: list[str]) -> int:
    """What each of two processes does."""
    torch.set_num_threads(1)
    folder = Path(arguments[0])
    config = load_config(folder / "config.yaml", (), TrainingConfig)
    world, device = World.from_environment(), torch.device("cpu")
    connect(world, device)
    model = build_model(config.model, device=device, dtype=torch.float32)
    model = parallelise(model, device_mesh("full", world, device), compute=torch.float32)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    vae = WanVAE.load(config.vae, "cpu", torch.float32)
    report = Validation(config, folder, device, world).run(40, model, vae)
    result = {"metrics": report.metrics, "videos": [path.name for path in report.videos], "forwards": len(forwards)}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(result))
    world.disconnect()
    return 0


def test_two_processes_with_a_sharded_network(
    config: TrainingConfig, report: Report, forks: Forks, tmp_path: Path
) -> None:
    """Three prompts for two: the second process samples one for company, which nobody writes or counts."""
    save_config(config, tmp_path / "config.yaml")
    for process in forks.launch(2, "tests.training.test_validation", [tmp_path]):
        told = process.finish()
        assert process.returncode == 0, told
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["forwards"] == 2 * 5 * (2 + 1)  # four steps and an absorbing pass for each chunk of two videos
    assert one["metrics"] == report.metrics
    folder = tmp_path / "vis" / "step_0000040"
    assert one["videos"] == sorted(path.name for path in folder.iterdir())
    assert one["videos"] == sorted(
        f"step_0000040_rank_{sample % 2}_sample_{sample}_len_{length}.mp4" for sample in range(3) for length in (1, 2)
    )
    for path in report.videos:
        sample = int(path.name.partition("sample_")[2][0])
        twin = folder / path.name.replace("rank_0", f"rank_{sample % 2}")
        assert torch.equal(frames_of(twin), frames_of(path))


def test_two_processes_that_make_each_video_together(
    config: TrainingConfig, report: Report, forks: Forks, tmp_path: Path
) -> None:
    """Of a sharded network; the videos are those of one process to rounding, and the second writes none."""
    validation = dataclasses.replace(config.validation, gpus_per_video=2)
    save_config(dataclasses.replace(config, validation=validation), tmp_path / "config.yaml")
    for process in forks.launch(2, "tests.training.test_validation", [tmp_path]):
        told = process.finish()
        assert process.returncode == 0, told
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["forwards"] == 3 * 5 * (2 + 1)
    assert one["metrics"] == pytest.approx(report.metrics, abs=1e-3)
    assert one["videos"] == sorted(path.name for path in report.videos)
    for path in report.videos:
        twin = tmp_path / "vis" / "step_0000040" / path.name
        assert (frames_of(twin).int() - frames_of(path).int()).abs().max() <= 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.val_samples=6"], r"val_samples=6: must be 1 to 5.*vis_interval=0"),
        (["validation.val_samples=0"], r"val_samples=0: must be at least 1"),
        (["validation.vis_video_lengths=[3,0]"], r"vis_video_lengths=0: must be at least 1"),
        (["validation.val_data_path=none.txt"], r"validation\.val_data_path.*not found"),
        (["text_encoder.text_encoder_name=none"], r"text_encoder\.text_encoder_name.*not found"),
    ],
)
def test_what_cannot_be_sampled(
    overrides: list[str], message: str, training_config: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        Validation(training_config("longsana", *overrides), tmp_path, "cpu", World())


def test_lines_of_the_prompt_file(training_config: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    setting = f"validation.val_data_path={path}"
    path.write_text("a red ball\n\na blue box <split> a green box\n")
    two_chunks = training_config("longsana", setting, "validation.vis_video_lengths=[5]")
    Validation(two_chunks, tmp_path, "cpu", World())
    one_chunk = training_config("longsana", setting, "validation.vis_video_lengths=[5,2]")
    with pytest.raises(InputError, match=r"vis_video_lengths=2: line 3: 2 parts"):
        Validation(one_chunk, tmp_path, "cpu", World())
    path.write_text("a red ball | [recache=1] a blue box\n" * 2)
    Validation(two_chunks, tmp_path, "cpu", World())
    with pytest.raises(InputError, match=r"line 1: .* takes passes that other processes do not make"):
        Validation(two_chunks, tmp_path, "cpu", World(size=2))
    path.write_text("a red ball --ar 9:16\n")
    with pytest.raises(InputError, match="line 1: a size flag"):
        Validation(two_chunks, tmp_path, "cpu", World())


@pytest.mark.parametrize("way", ["absorb", "pin"])
def test_prompts_that_begin_with_a_picture(
    way: str, training_config: Callable[..., TrainingConfig], model: LongSanaDiT, vae: WanVAE, tmp_path: Path
) -> None:
    """They are sampled as in inference; processes that would take other passes than others do are refused."""
    path, picture = tmp_path / "prompts.txt", tmp_path / "picture.png"
    Image.new("RGB", (60, 40), (200, 30, 90)).save(picture)
    path.write_text("a red ball<image>picture.png\na red ball\n")
    settings = [f"validation.val_data_path={path}", f"sampling.image_first={way}", *OVERRIDES[2:]]
    config = training_config("longsana", *settings, "validation.val_samples=2", "validation.vis_video_lengths=[2]")
    found = Validation(config, tmp_path, "cpu", World()).run(3, model, vae)
    assert found is not None
    begun, plain = (measure(video).saturation.mean().item() for video in videos(config, 2, model, vae))
    assert found.metrics["probe_saturation_len_2"] == pytest.approx((begun + plain) / 2, rel=1e-6)
    assert abs(begun - plain) > 0.01
    if way == "pin":
        Validation(config, tmp_path, "cpu", World(size=2))
    else:
        with pytest.raises(InputError, match=r"line 2: a picture that is absorbed takes a pass .*image_first=pin"):
            Validation(config, tmp_path, "cpu", World(size=2))
    with pytest.raises(InputError, match="lengths=1: line 1: num_frames=1: shows the picture"):
        Validation(training_config("longsana", *settings, "validation.vis_video_lengths=[1]"), tmp_path, "cpu", World())
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(InputError, match=r"prompts\.txt, line 1: .*picture\.png"):
        validation_prompts(config)


def test_the_prompts_that_ship() -> None:
    path = ROOT / "asset" / "samples" / "longsana_val.txt"
    prompts = read_prompts(path, height=480, width=832, aspect_ratio_type="none")
    assert len({prompt.text for prompt in prompts}) == 8
    assert all(len(prompt.parts) == 1 and 40 < len(prompt.text.split()) < 110 for prompt in prompts)
