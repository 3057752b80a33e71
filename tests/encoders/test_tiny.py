"""Tiny decoders: layers, streams, files. `gpu`: the published sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders import tiny_decoder, tiny_graphs
from longsana.encoders.layouts import wan_original_name
from longsana.encoders.loading import load_vae
from longsana.encoders.tiny_layouts import (
    FULL,
    LATENTS,
    TINY,
    WAN_LATENTS,
    check_decoder,
    check_tiny,
    latents_key,
    source_of,
    tiny_tensors,
)
from longsana.encoders.tiny_network import Grow, MemoryBlock, Pool, TinyNetwork, load_tiny
from longsana.encoders.tiny_vae import TinyVAE
from longsana.encoders.vae import VAES, VideoVAE, WanVAE
from longsana.encoders.vae_files import WAN
from longsana.ops import FUSED
from longsana.ops.dispatch import fused_twin
from longsana.runtime.errors import InputError
from longsana.sampling.continuation import KEPT
from tests.encoders.streaming import draw, encoded_in_pieces, psnr, stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = Path(__file__).resolve().parents[2] / "asset/shapes/vae"
KINDS = pytest.mark.parametrize("name", TINY)
LAYOUTS = pytest.mark.parametrize("name", ["taew2_1", "taeltx_2", "tae_shapes"])
WITH_ENCODERS = pytest.mark.parametrize("name", [name for name, kind in TINY.items() if kind.encodes])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def config(name: str, source: str = "seeded:1", **settings: object) -> VAEConfig:
    chosen = VAEConfig(vae_type=TINY[name].vae_type, decoder=name, decoder_pretrained=source)  # type: ignore[arg-type]
    return replace(chosen, **settings)  # type: ignore[arg-type]


def tiny(name: str, latents_per_call: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TinyVAE:
    """With an encoder of its own where it has one, so that nothing else is needed."""
    encoder = "tiny" if TINY[name].encodes else FULL
    vae = load_vae(config(name, latents_per_call=latents_per_call, encoder=encoder), device, dtype)
    assert isinstance(vae, TinyVAE)
    return vae


def network(name: str, dtype: torch.dtype = torch.float32) -> TinyNetwork:
    made = load_tiny(TINY[name], "seeded:0", "cpu", dtype)
    tiny_decoder.prepare(made)
    return made


def latents_of(name: str, frames: int, size: tuple[int, int] = (2, 3), batch: int = 1) -> Tensor:
    return draw(batch, TINY[name].channels, frames, *size)


def cuts(count: int) -> Iterator[list[int]]:
    """Every way to cut so many latents into stretches."""
    for chosen in range(count):
        for places in combinations(range(1, count), chosen):
            edges = (0, *places, count)
            yield [b - a for a, b in pairwise(edges)]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("taew2_1", 1_470_928, 9_844_611),
        ("lighttaew2_1", 1_470_928, 9_844_611),
        ("taeltx_2", 1_565_568, 10_194_160),
        ("tae_shapes", 0, 869_635),
    ],
)
def test_numbers_of_tensors_and_parameters(name: str, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        made = TinyNetwork(TINY[name])
    assert {key: tuple(part.shape) for key, part in made.state_dict().items()} == tiny_tensors(TINY[name])
    assert len(tiny_tensors(TINY[name])) == (128 if encoder else 64)
    halves = [sum(part.numel() for part in half.parameters()) if half else 0 for half in (made.encoder, made.decoder)]
    assert halves == [encoder, decoder]


@pytest.mark.parametrize(
    ("name", "size", "count"), [("taew2_1", (60, 104), 33_546_240), ("taeltx_2", (22, 40), 4_730_880)]
)
def test_the_memory_is_nine_frames_at_any_length(name: str, size: tuple[int, int], count: int) -> None:
    sizes = set()
    for frames in (1, 4):
        _, cache = tiny(name, 3).decode_stream(latents_of(name, frames))
        assert len(cache.features) == 9 and {part.shape[2] for part in cache.features} == {1}
        assert cache.nbytes == sum(part.nbytes for part in cache.features), "a view keeps more alive"
        sizes.add(cache.nbytes // 4)
    assert sizes == {count * 6 // (size[0] * size[1])}  # for latents of 2x3


def test_a_memory_block_sees_itself_first_and_then_the_frame_before() -> None:
    block = MemoryBlock(2)
    for parameter in block.parameters():
        parameter.data.zero_()
    for layer in (block.conv[2], block.conv[4]):
        layer.weight.data[[0, 1], [0, 1], 1, 1] = 1  # type: ignore[union-attr, index]
    block.conv[0].weight.data[0, 3, 1, 1] = 1  # type: ignore[union-attr, index] # the past's second channel
    x, before = draw(1, 3, 2, 1, 1).abs(), draw(1, 1, 2, 1, 1, seed=1).abs()
    past = torch.cat([before, x[:, :-1]], dim=1)
    expected = x.clone()
    expected[:, :, 0] += past[:, :, 1]
    torch.testing.assert_close(block(x, before), expected)


def test_frames_are_folded_and_made_in_their_order() -> None:
    grow, pool = Grow(2, 3), Pool(2, 3)
    grow.conv.weight.data.zero_()
    for frame in range(3):
        grow.conv.weight.data[2 * frame + 1, 0] = 10**frame  # into the second channel of each frame
    frames = grow(torch.ones(1, 2, 2, 1, 1))
    assert frames.shape == (1, 6, 2, 1, 1)
    assert frames[0, :, 1, 0, 0].tolist() == [1, 10, 100] * 2 and not frames[0, :, 0].any()
    pool.conv.weight.data.zero_()
    pool.conv.weight.data[0, [1, 3, 5]] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert pool(frames)[0, :, 0, 0, 0].tolist() == [321, 321]


def test_a_patch_is_a_colour_then_a_row_then_a_column() -> None:
    made = network("taeltx_2")
    last = made.decoder[22]
    last.weight.data.zero_()  # type: ignore[union-attr, operator]
    last.bias.data = torch.arange(48, dtype=torch.float32)  # type: ignore[union-attr]
    tiny_decoder.prepare(made)
    latents = latents_of("taeltx_2", 1, (1, 1))
    for frames in (2 * made.decode(latents)[0] - 1, tiny_decoder.decode(made, latents, None)[0]):
        for colour, row, column in ((0, 0, 1), (1, 2, 0), (2, 3, 3)):
            assert frames[0, colour, 0, 4 + row, 8 + column] == 2 * (16 * colour + 4 * row + column) - 1


@LAYOUTS
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_stream_is_one_call_however_it_is_cut(name: str, dtype: torch.dtype) -> None:
    made, latents = network(name, dtype), latents_of(name, 4, (1, 2)).to(dtype)
    for decode in (made.decode, lambda *inputs: tiny_decoder.decode(made, *inputs)):
        whole, last = decode(latents, None)
        scale = whole.abs().max()
        for lengths in cuts(4):
            memory, frames = None, []
            for piece in latents.split(lengths, dim=2):
                decoded, memory = decode(piece, memory)
                frames.append(decoded)
            assert (torch.cat(frames, dim=2) - whole).abs().max() < TOLERANCE[dtype] * scale
            assert all((a - b).abs().max() < TOLERANCE[dtype] * 10 for a, b in zip(memory, last, strict=True))


@LAYOUTS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "size"), [(2, (2, 3)), (1, (1, 1))])
def test_the_fast_decoder_is_the_plain_one(name: str, dtype: torch.dtype, batch: int, size: tuple[int, int]) -> None:
    made, latents = network(name, dtype), latents_of(name, 3, size, batch).to(dtype)
    plain, memory = made.decode(latents)
    fast, features = tiny_decoder.decode(made, latents, None)
    assert fast.dtype == dtype
    expected = 2 * plain[:, :, TINY[name].stride - 1 :] - 1
    assert (fast - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()
    for own, other in zip(features, memory, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() < TOLERANCE[dtype] * other.abs().max()
    later, _ = tiny_decoder.decode(made, latents, features)
    expected = 2 * made.decode(latents, memory)[0] - 1
    assert (later - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@KINDS
def test_frames_of_a_stream(name: str) -> None:
    stride, latents = TINY[name].stride, latents_of(name, 5, batch=2)
    expected = tiny(name).decode(latents)
    assert expected.shape == (2, 3, 1 + 4 * stride, *(side * tiny(name).geometry.space_stride for side in (2, 3)))
    assert 0.05 < expected.std() < 0.5, "random pictures, hardly clamped"
    for lengths in ((5,), (1, 4), (2, 3), (4, 1)):
        frames, cache = stream(tiny(name, 2), latents, lengths)
        assert frames.shape == expected.shape and frames.dtype == torch.float32 and cache.latents == 5
        assert psnr(frames, expected) >= 100
    frames, _ = stream(tiny(name, 2, torch.bfloat16), latents, (5,))
    assert frames.dtype == torch.float32 and psnr(frames, expected) >= 35


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_between_groups_change_nothing(name: str, dtype: torch.dtype) -> None:
    vae, latents = tiny(name, 2, dtype), latents_of(name, 6, batch=2)
    whole, last = stream(vae, latents, (6,))
    for lengths in ((1, 5), (1, 2, 2, 1), (5, 1)):
        frames, cache = stream(vae, latents, lengths)
        assert torch.equal(frames, whole)
        assert all(torch.equal(a, b) for a, b in zip(cache.features, last.features, strict=True))


def test_the_cache_is_a_value() -> None:
    vae, latents = tiny("taew2_1", 3), latents_of("taew2_1", 7)
    _, cache = vae.decode_stream(latents[:, :, :4])
    kept = [part.clone() for part in cache.features]
    first, _ = vae.decode_stream(latents[:, :, 4:], cache)
    vae.decode_stream(latents_of("taew2_1", 2), cache)
    plain = cache._replace(features=tuple(part.contiguous() for part in cache.features))  # as checkpoints keep it
    for given in (cache, plain):
        assert torch.equal(vae.decode_stream(latents[:, :, 4:], given)[0], first)
    assert all(torch.equal(a, b) for a, b in zip(cache.features, kept, strict=True))
    with pytest.raises(ValueError, match="nothing waits"):
        vae.decode_end(cache)


class Counted:
    """In place of a recording."""

    made: ClassVar[list[Any]] = []

    def __init__(self, run: Any, inputs: Any, *, warm_up: Any, pool: Any) -> None:
        self.run, self.pool, self.count, self.shapes = run, object(), 0, [part.shape for part in inputs]
        assert pool is (Counted.made[0].pool if Counted.made else None), "one memory"
        Counted.made.append(self)

    def replay(self, inputs: list[Tensor]) -> list[Tensor]:
        self.count += 1
        assert [part.shape for part in inputs] == self.shapes
        return self.run(*inputs)


def test_calls_that_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of a kind and all after it, of any video; never the start of one."""
    monkeypatch.setattr(tiny_graphs, "Recording", Counted)
    monkeypatch.setattr(Counted, "made", [])
    vae, plain = tiny("taew2_1", 2), tiny("taew2_1", 2)
    vae.replay()
    latents = latents_of("taew2_1", 8, (1, 1))
    for _ in range(2):  # the start, two of one, two groups of two, one of one
        assert torch.equal(stream(vae, latents, (8,))[0], stream(plain, latents, (8,))[0])
    assert [made.count for made in Counted.made] == [4, 2]
    for _ in range(2):
        assert torch.equal(stream(vae, latents, (8,))[0], stream(plain, latents, (8,))[0])
    assert [made.count for made in Counted.made] == [10, 6]
    for height in range(2, 6):
        stream(vae, latents_of("taew2_1", 9, (height, 1)), (9,))
    assert len(Counted.made) == tiny_graphs.MOST_KINDS


@LAYOUTS
def test_frames_as_a_gpu_makes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in ("relu_into", "copy_into"):
        pytest.importorskip("triton")
        monkeypatch.setattr(tiny_decoder, operation, fused_twin(operation, FUSED))
    vae, latents = tiny(name, 2, device=DEVICE), latents_of(name, 3, (1, 2), batch=2).to(DEVICE)
    frames, cache = vae.decode_stream(latents[:, :, :2])
    later, _ = vae.decode_stream(latents[:, :, 2:], cache)
    assert psnr(torch.cat([frames, later], dim=2), vae.decode(latents)) >= 80


@WITH_ENCODERS
def test_an_encoder_repeats_the_last_frame(name: str) -> None:
    vae = tiny(name, 2)
    stride, size = vae.geometry.time_stride, vae.geometry.space_stride
    film = draw(1, 3, 1 + 4 * stride, 2 * size, 2 * size).clamp(-1, 1)
    whole = vae.encode(film)
    assert whole.shape == (1, TINY[name].channels, 5, 2, 2)
    padded = torch.cat([film, film[:, :, -1:].expand(-1, -1, stride - 1, -1, -1)], dim=2)
    expected, _ = vae.model.encode((padded + 1) / 2)
    torch.testing.assert_close(whole, vae._normalise(expected), rtol=0, atol=2e-5)
    for count in (1, 3):
        first, cache = vae.encode_stream(film[:, :, : count * stride])
        rest, ended = vae.encode_stream(film[:, :, count * stride :], cache)
        torch.testing.assert_close(torch.cat([first, rest], dim=2), whole, rtol=0, atol=2e-5)
        assert ended.latents == 5
    with pytest.raises(ValueError, match="has ended after 5 latents"):
        vae.encode_stream(film, ended)
    picture = (film[0, :, 0].permute(1, 2, 0) * 127.5 + 127.5).to(torch.uint8)
    exact = picture.permute(2, 0, 1)[None, :, None] / 127.5 - 1
    expected, _ = vae.model.encode((exact.expand(-1, -1, stride, -1, -1) + 1) / 2)
    torch.testing.assert_close(vae.encode_pictures([picture.numpy()]), vae._normalise(expected), rtol=0, atol=2e-5)


@LAYOUTS
def test_the_last_twelve_latents_are_all_that_it_remembers(name: str) -> None:
    """As many as saved states keep: its memory is rebuilt from them."""
    made, latents = network(name, torch.float64), latents_of(name, KEPT + 2, (1, 1)).double()
    _, expected = tiny_decoder.decode(made, latents, None)
    _, rebuilt = tiny_decoder.decode(made, latents[:, :, -KEPT:], None)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(expected, rebuilt, strict=True))
    _, shorter = tiny_decoder.decode(made, latents[:, :, -2:], None)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(expected, shorter, strict=True))


def test_lighttaew_takes_latents_that_are_not_normalised() -> None:
    """z * std + mean, by Wan's published constants; the other kind of the same layout takes z itself."""
    published = WAN().config
    mean, std = (torch.tensor(published[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
    raw, plain, latents = tiny("lighttaew2_1"), tiny("taew2_1"), latents_of("taew2_1", 2)
    given, _ = raw.decode_stream(latents)
    torch.testing.assert_close(given, plain.decode_stream(latents * std + mean)[0], rtol=0, atol=1e-5)
    assert not torch.allclose(given, plain.decode_stream(latents)[0], atol=1e-2)
    film = draw(1, 3, 5, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(raw.encode(film), (plain.encode(film) - mean) / std, rtol=0, atol=1e-5)


def test_the_whole_vae_is_read_when_something_is_encoded() -> None:
    asked = []

    def whole() -> VideoVAE:
        asked.append(1)
        return WanVAE.load(VAEConfig(vae_pretrained=str(SHAPES)), "cpu", torch.float32)

    vae = TinyVAE(network("taew2_1"), 1, whole)
    assert not vae.looks_on
    vae.decode_stream(latents_of("taew2_1", 2))
    assert not asked
    film = draw(1, 3, 9, 16, 16).clamp(-1, 1)
    expected = whole()
    assert torch.equal(vae.encode(film), expected.encode(film))
    given, own = (encoded_in_pieces(one, film, (2, 1)) for one in (vae, expected))
    assert torch.equal(given[0], own[0])
    overlap, _ = vae.overlap_latent(latents_of("taew2_1", 2))
    assert overlap.shape == (1, 16, 1, 2, 3) and len(asked) == 2


def test_a_missing_vae_is_no_matter_until_something_is_encoded(tmp_path: Path) -> None:
    vae = load_vae(config("taew2_1", vae_pretrained=str(tmp_path / "none.pth")), "cpu", torch.float32)
    vae.decode_stream(latents_of("taew2_1", 1))
    with pytest.raises(InputError, match=r"none\.pth"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16))


@LAYOUTS
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files(name: str, suffix: str, tmp_path: Path) -> None:
    made = network(name)
    half = {key: part.half().contiguous() for key, part in made.state_dict().items()}
    path = tmp_path / f"{name}.{suffix}"
    if suffix == "pth":
        torch.save(half, path)
    else:
        save_file(half, path)
    assert len(half) == len(tiny_tensors(TINY[name])) and "decoder.3.joint" not in half, "what is prepared is not saved"
    check_tiny(config(name, str(path)), path)
    vae = load_vae(config(name, str(path)), "cpu", torch.float32)
    given = vae.model.state_dict()
    assert given.keys() == half.keys() and all(torch.equal(given[key], part.float()) for key, part in half.items())
    path.write_bytes(b"")  # the weights are no map of the file
    vae.decode_stream(latents_of(name, 1))


FROM_48_CHANNELS: dict[str, tuple[int, ...]] = {
    "decoder.1.weight": (256, 48, 3, 3),
    "decoder.22.weight": (12, 64, 3, 3),
}
"""As of `taew2_2`."""


def changed(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.zeros(shapes.get(key, shape)) for key, shape in tiny_tensors(TINY[name]).items()}


@pytest.mark.parametrize(
    ("asked", "tensors", "told"),
    [
        ("taew2_1", changed("taeltx_2", {}), r"takes 128 channels at a width of 256, and gives patches of 4x4.*needed"),
        ("taeltx_2", changed("taew2_1", {}), "takes 16 channels"),
        ("tae_shapes", changed("taew2_1", {}), "not a file of a tae_shapes: .* a width of 256"),
        (
            "tae_shapes",
            changed("tae_shapes", {}) | {"encoder.0.bias": torch.zeros(64)},
            "not a tae_shapes as it is published: unexpected 1: encoder.0.bias.* a whole one",
        ),
        ("taew2_1", changed("tae_shapes", {}), "a width of 64.*missing 64"),
        (
            "taew2_1",
            changed("taew2_1", {"decoder.1.weight": (256, 48, 3, 3), "decoder.22.weight": (12, 64, 3, 3)}),
            "48 ch",
        ),
        ("taeltx_2", changed("taeltx_2", {"decoder.1.weight": (512, 128, 3, 3)}), "a width of 512"),
        ("taew2_1", {"decoder.1.weight": torch.zeros(256, 16, 3, 3)}, "missing 127"),
        ("taew2_1", {"weight": torch.zeros(1)}, "not a file of a taew2_1; give one that is.*unexpected 1: weight"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_of_another_layout_are_refused(
    asked: str, tensors: dict[str, Tensor], told: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"file.{suffix}"
    (torch.save if suffix == "pth" else save_file)(tensors, path)
    asked_for = config(asked, str(path))
    for refuse in (lambda: check_tiny(asked_for, path), lambda: load_vae(asked_for, "cpu", torch.float32)):
        with pytest.raises(InputError, match=told) as caught:
            refuse()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "vae.decoder" in str(caught.value)


def test_a_folder_a_program_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder; vae\.decoder_pretrained names the file"):
        check_tiny(config("taew2_1", str(tmp_path)), tmp_path)
    torch.save({"decoder.1.weight": torch.zeros(1), "more": Path}, tmp_path / "program.pth")
    with pytest.raises(InputError, match="could run code"):
        check_tiny(config("taew2_1", str(tmp_path / "program.pth")), tmp_path / "program.pth")
    with pytest.raises(InputError, match=r"vae\.decoder_pretrained: '.*none\.pth' not found"):
        load_vae(config("taew2_1", str(tmp_path / "none.pth")), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decoder": "taew2_1"}, r"vae\.decoder=taew2_1: vae\.decoder_pretrained must say where its file lies"),
        ({"decoder_pretrained": "a.pth"}, r"pretrained=a\.pth: with vae\.decoder=full.*taew2_1 or lighttaew2_1"),
        ({"encoder": "tiny"}, r"vae\.encoder=tiny: with vae\.decoder=full there is no tiny encoder"),
        ({"decoder": "taeltx_2", "decoder_pretrained": "seeded:0"}, "latents of LTX2VAE_diffusers.*use taew2_1 or"),
        (
            {"decoder": "taew2_1", "decoder_pretrained": "seeded:0", "vae_type": "LTX2VAE_diffusers"},
            r"vae\.decoder=taew2_1: it decodes latents of WanVAE.*use taeltx_2, or full",
        ),
        ({"decoder": "taew2_1", "decoder_pretrained": "seeded:x"}, "seeded:N with a whole number N"),
        (
            {"decoder": "tae_shapes", "decoder_pretrained": "seeded:0", "encoder": "tiny"},
            r"^vae\.encoder=tiny: a tae_shapes has no encoder of its own; use vae\.encoder=full$",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        check_decoder(VAEConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=told):
        load_vae(VAEConfig(**settings), "cpu", torch.float32)  # type: ignore[arg-type]


FILE = SHAPES / "tae_shapes.safetensors"


def beside(vae: str | Path, **settings: Any) -> VAEConfig:
    return VAEConfig(vae_pretrained=str(vae), decoder="tae_shapes", **settings)


def test_without_a_path_it_lies_beside_the_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found as the VAE is: from any folder, and in that of a whole pipeline."""
    shutil.copytree(SHAPES, tmp_path / "pipeline/vae")
    expected = load_file(FILE)
    for vae in ("asset/shapes/vae", SHAPES, tmp_path / "pipeline", tmp_path / "pipeline/vae"):
        for folder in (SHAPES.parents[2], tmp_path):
            monkeypatch.chdir(folder)
            check_decoder(beside(vae))
            check_tiny(beside(vae), Path(source_of(beside(vae))))
            made = load_vae(beside(vae), "cpu", torch.float32)
            assert isinstance(made, TinyVAE)
            assert torch.equal(made.model.state_dict()["decoder.1.weight"], expected["decoder.1.weight"].float())
    elsewhere = beside(SHAPES, decoder_pretrained="seeded:1")
    assert source_of(elsewhere) == "seeded:1"
    for vae in (tmp_path, FILE, "hf://owner/repo/vae", f"seeded:{SHAPES}"):
        with pytest.raises(InputError, match=r"is no folder on this machine with a tae_shapes\.safetensors") as caught:
            load_vae(beside(vae), "cpu", torch.float32)
        assert "\n" not in str(caught.value) and "vae.decoder=full" in str(caught.value)
    with pytest.raises(InputError, match=r"^vae\.vae_pretrained: '.*none' not found"):
        load_vae(beside(tmp_path / "none"), "cpu", torch.float32)


def test_a_vae_is_known_by_mean_and_deviation_of_its_latents(tmp_path: Path) -> None:
    """What tells them in the file of a decoder is compared where both say it."""
    assert latents_key(WAN(base_dim=8).config) == WAN_LATENTS
    own, plain, published = (tmp_path / f"{name}.safetensors" for name in ("own", "plain", "published"))
    shutil.copy(FILE, own)
    save_file(load_file(FILE), plain)
    save_file(load_file(FILE), published, {LATENTS: WAN_LATENTS})
    told = json.loads((SHAPES / "config.json").read_text())
    silent = {key: value for key, value in told.items() if key not in ("latents_mean", "latents_std")}
    configs = {
        "same": told,
        "other": {**told, "latents_std": [2 * told["latents_std"][0], *told["latents_std"][1:]]},
        "silent": silent,
        "half": {**silent, "latents_mean": told["latents_mean"]},
        "none": {**told, "latents_mean": None, "latents_std": None},
        "words": {**told, "latents_std": "ones"},
        "list": [told],
    }
    for name, content in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "file.pth").touch()
    (tmp_path / "empty").mkdir()
    vaes = [str(tmp_path / name) for name in (*configs, "file.pth", "empty", "not there")]
    vaes += ["hf://owner/repo/vae.pth", "hf://owner/repo/vae", f"seeded:{tmp_path / 'other'}"]
    taken = {
        own: {"same", "half", "words", "list", "empty", "not there", "hf://owner/repo/vae", "other"},
        published: {"silent", "none", "half", "words", "list", "file.pth", "empty", "not there", "hf://owner/repo/vae",
                    "hf://owner/repo/vae.pth", "other"},
    }  # fmt: skip
    for path in (own, plain, published):
        for vae in vaes:
            asked = beside(vae, decoder_pretrained=str(path))
            name = vae if vae.startswith("hf") else Path(vae).name
            # A seeded one is random, and its config says nothing of its latents.
            if path == plain or (name in taken[path] and (name != "other" or vae.startswith("seeded:"))):
                check_tiny(asked, path)
                load_vae(asked, "cpu", torch.float32)
                continue
            for refuse in (partial(check_tiny, asked, path), partial(load_vae, asked, "cpu", torch.float32)):
                with pytest.raises(InputError) as caught:
                    refuse()
                assert str(caught.value) == (
                    f"vae.decoder_pretrained={path}: was trained on latents of another VAE than vae.vae_pretrained="
                    f"{vae}; give its own, or vae.decoder=full"
                )


def test_every_kind_is_a_setting() -> None:
    for name, kind in TINY.items():
        check_decoder(config(name))
        assert VAES[kind.vae_type] and kind.name == name != FULL
        assert kind.stride == tiny(name).geometry.time_stride


def test_a_wan_vae_of_width_24_loads_by_its_original_names(tmp_path: Path) -> None:
    """`lightvaew2_1`: another width than published, and the fused decoder."""
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = WAN(base_dim=24)
    weights = {
        wan_original_name(name): torch.randn(part.shape) / max(part[0].numel(), 1) ** 0.5
        if name.endswith("weight")
        else torch.ones(part.shape) * name.endswith("gamma")
        for name, part in empty.state_dict().items()
    }
    assert "encoder.downsamples.0.residual.2.weight" in weights
    torch.save(weights, path := tmp_path / "lightvaew2_1.pth")
    vae = load_vae(VAEConfig(vae_pretrained=str(path), latents_per_call=2), "cpu", torch.float32)
    assert isinstance(vae, WanVAE) and vae.model.config.base_dim == 24 and vae.widest == (24, 1)
    latents = draw(1, 16, 3, 2, 3)
    frames, _ = stream(vae, latents, (1, 2))
    assert psnr(frames, vae.decode(latents)) >= 80


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "size"), [("taew2_1", (60, 104)), ("taeltx_2", (22, 40))])
def test_at_its_own_size_on_a_gpu(name: str, size: tuple[int, int]) -> None:
    """In bfloat16, with the kernels, in groups; and replayed, to the bit."""
    latents = latents_of(name, 13, size).cuda()
    expected = tiny(name, device="cuda").decode(latents)
    vae = tiny(name, 3, torch.bfloat16, "cuda")
    frames, last = stream(vae, latents, (13,))
    assert psnr(frames, expected) >= 35
    in_parts, cache = stream(vae, latents, (4, 9))
    assert torch.equal(in_parts, frames)
    assert cache.nbytes == last.nbytes == sum(part.nbytes for part in cache.features)
    vae.replay()
    for _ in range(2):
        replayed, cache = stream(vae, latents, (13,))
        assert torch.equal(replayed, frames)
        assert all(torch.equal(own, other) for own, other in zip(cache.features, last.features, strict=True))


def test_cuts_are_all_of_them() -> None:
    assert sorted(map(tuple, cuts(3))) == [(1, 1, 1), (1, 2), (2, 1), (3,)]
    assert {list(accumulate(lengths))[-1] for lengths in cuts(4)} == {4}
