"""The benchmark: a report whose parts are the whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longsana.config import InferenceConfig, load_config
from longsana.inference import benchmark
from longsana.inference.benchmark import PARTS
from longsana.inference.sidecar import commit
from longsana.models.float8 import PRODUCTS
from longsana.ops import FUSED
from longsana.ops.dispatch import WITHOUT_GRADIENTS
from longsana.sampling.graphs import PLAIN_PASSES
from tests.scripts import load_script

from .conftest import ROOT, SHIPPED, SMALL

script = load_script(ROOT / "inference_video_scripts" / "benchmark.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "report.json"
    # The whole network: beside the passes of two blocks, what is none of the parts would count for much.
    command = [*SMALL, *SHIPPED, "--num_frames", "49", "--kernels", "--profile", "--float8", "--out", str(out)]
    assert script.main(command) == 0
    read: dict[str, Any] = json.loads(out.read_text())
    return read


def test_the_parts_are_the_whole(report: dict[str, Any]) -> None:
    seconds = report["seconds"]
    assert seconds.keys() == {*PARTS, "wall"}
    assert min(seconds[part] for part in PARTS) >= 0
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["wall"])
    assert seconds["other"] < 0.03 * seconds["wall"]
    # All that happens while a video is made happens in a chunk, but for the closing of the file.
    assert sum(report["chunk"]["seconds"]) <= seconds["wall"]
    assert sum(report["chunk"]["seconds"]) == pytest.approx(seconds["wall"] - seconds["text"], rel=0.2)


def test_figures_follow_from_each_other(report: dict[str, Any]) -> None:
    video, seconds, fps = report["video"], report["seconds"], report["FPS"]
    assert (video["frames"], video["height"], video["width"]) == (49, 32, 48)
    assert video["chunks"] == [3, 2, 2, 2, 2, 2]
    assert len(report["chunk"]["seconds"]) == 6
    assert fps["end to end"] == pytest.approx(49 / seconds["wall"])
    assert 0.2 * fps["end to end"] < fps["before the mp4's encoder"]  # a film of its own, of as many frames
    assert fps["without decoder"] == pytest.approx(49 / (seconds["denoise"] + seconds["absorb"]))
    assert report["chunk"]["p50"] <= report["chunk"]["p95"]
    assert 0 < report["first picture"]["warm"] <= seconds["wall"]
    assert min(report["encoder alone, FPS"].values()) > 0
    assert report["memory"]["host RSS"] <= report["memory"]["host RSS peak"]
    assert report["commit"] == commit()


def test_every_operation_is_measured(report: dict[str, Any]) -> None:
    measured = report["operations"]["operations"]
    assert measured.keys() == FUSED.keys()
    learning = {name for name, row in measured.items() if "ms with gradients" in row}
    assert learning == FUSED.keys() - set(WITHOUT_GRADIENTS)
    assert all(measured[name]["ms with gradients"]["reference"] > 0 for name in learning)
    for row in measured.values():
        assert row["ms"].keys() == {"reference"}  # without a GPU nothing is fused
        assert row["GB/s"] > 0
        floor = max(
            row["GB/s"] / report["operations"]["copy, GB/s"], row["TFLOP/s"] / report["operations"]["product, TFLOP/s"]
        )
        assert row["share of the floor"] == pytest.approx(floor)
    assert "gated_conv, ms" in script.render(report)


def test_passes_are_measured(report: dict[str, Any]) -> None:
    assert report["passes"].keys() == {"forward", "decode a frame"}  # without a GPU nothing is replayed
    assert min(report["passes"].values()) > 0
    assert "decode a frame, ms" in script.render(report)


def test_float8_is_compared(report: dict[str, Any]) -> None:
    errors = [value for name, value in report["float8"].items() if name.startswith("error of")]
    assert len(errors) == len(PRODUCTS) + 3
    assert all(0.005 < error < 0.5 for error in errors), report["float8"]
    assert report["float8"]["forward, ms"] > 0


def test_a_tiny_decoder_is_measured_in_the_place_of_the_full_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "report.json", [*SMALL, "--decoder", "taew2_1", "--decoder_path", "seeded:0"]
    assert script.main([*given, f"vae.vae_pretrained={tmp_path / 'none.pth'}", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["video"]["decoder"] == "taew2_1" and report["passes"]["decode a frame"] > 0
    assert "17 frames of 48x32, taew2_1" in capsys.readouterr().out
    assert script.main([*given, "--peer", "diffusers", "--out", str(out)]) == 2
    assert "vae.decoder is taew2_1" in capsys.readouterr().err
    assert script.main([*SMALL, "--peer", "diffusers", "--out", str(out)]) == 2
    assert "vae.decoder is tae_shapes; leave it out, or give --decoder full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::CUDAFunctor_add"
            "<c10::BFloat16> >(at::TensorIteratorBase&, at::native::CUDAFunctor_add<c10::BFloat16> const&)>(int)",
            "elementwise_kernel CUDAFunctor_add",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
            "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const>(int)",
            "elementwise_kernel direct_copy_kernel_cuda",
        ),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)",
            "vectorized_layer_norm_kernel",
        ),
        ("nvjet_sm90_tst_192x208_64x4_2x1_v_bz_coopB_TNT", "nvjet_sm90_tst_192x208_64x4_2x1_v_bz_coopB_TNT"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("aten::addmm", "aten::addmm"),
    ],
)
def test_kernels_have_short_names_of_their_own(kernel: str, name: str) -> None:
    assert script.short_name(kernel) == name


def test_a_profile_says_where_the_time_goes(report: dict[str, Any]) -> None:
    assert report["profile"].keys() == {"forward", "decode"}
    for kernels in report["profile"].values():
        spent = [row["ms"] for row in kernels.values()]
        assert spent == sorted(spent, reverse=True) and min(spent) >= 0
        assert sum(spent) > 0.2
        assert all(row["calls"] >= 1 for row in kernels.values())
    assert report["profile"]["forward"]["aten::addmm"]["calls"] > 10
    assert any("convolution" in name for name in report["profile"]["decode"])
    table = script.render(report)
    assert "forward, ms: aten::addmm" in table


@pytest.mark.slow
def test_peers_are_measured_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert (
        script.main([*SMALL, "--decoder", "full", "--peer", "diffusers", "--backend", "compile", "--out", str(out)])
        == 0
    )
    report = json.loads(out.read_text())
    assert report["video"]["backend"] == "compile"
    assert report["peers"]["forward, ms"].keys() == {
        "ours, caption read before", "diffusers, eager", "diffusers, each block compiled",
    }  # fmt: skip
    assert report["peers"]["decoder, ms a frame"].keys() == {"ours", "diffusers, float32", "diffusers, bfloat16"}
    assert min(value for figures in report["peers"].values() for value in figures.values()) > 0


def test_the_table_shows_the_parts(report: dict[str, Any]) -> None:
    table = script.render(report)
    assert "49 frames of 48x32" in table
    for part in (*PARTS, "wall"):
        assert f"| {part}, s " in table


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    for arguments, says in (
        (["--num_frames", "50"], "num_frames"),
        (["--bs", "2"], "--bs 2"),
        (["--float8", "--backend", "compile"], "--float8"),
        (["--float8", "model.float8=true"], "--float8"),
        (["--float8", "--sampling.memory", "8"], "sampling.memory"),
        (["--peer", "diffusers", "sampling.offload=all"], "sampling.offload"),
        (["--threads", "0"], "--threads: 0: must be from 1 to 1024"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--backend", "triton"], "need an NVIDIA GPU"),
    ):
        assert script.main(["--out", str(out), *arguments]) == 2
        assert says in capsys.readouterr().err
    assert not out.exists()


def test_no_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


@pytest.mark.parametrize(("steps", "absorb"), [("[1000,960,889,727]", "clean"), ("[1000,889]", "last_step")])
def test_what_warms_up_records_the_passes_of_first_chunks(steps: str, absorb: str) -> None:
    """A film's first chunk has passes of a kind of its own, which are launched plainly so many times."""
    settings = [f"scheduler.denoising_step_list={steps}", f"scheduler.absorb={absorb}"]
    config: InferenceConfig = load_config(
        ROOT / "configs/sana_video_config/longsana/shapes/longsana.yaml", settings, InferenceConfig
    )
    engine = SimpleNamespace(config=config, recorded=True)
    loaded: Any = SimpleNamespace(engine=engine, vae=SimpleNamespace(ahead=0))
    films = benchmark._warming(loaded)
    assert len(films) * len(config.scheduler.denoising_step_list) > PLAIN_PASSES
    assert min(films) >= 2, "later chunks too"
    engine.recorded = False
    assert len(benchmark._warming(loaded)) == 1
