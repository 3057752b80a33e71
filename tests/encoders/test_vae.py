"""The VAE: streaming equals one-shot, the cache is a value, weights come whole or not at all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.config import VAEConfig
from longsana.encoders import wan_decoder
from longsana.encoders.vae import WanVAE, decode_clip, encode_clip
from longsana.encoders.vae_files import new_model, save_model, to_original_layout
from longsana.runtime.errors import InputError
from tests.encoders.streaming import assert_memory_is_taken_over, draw, encoded_in_pieces, stream

SHAPE = Path(__file__).resolve().parents[2] / "asset/shapes/vae"
CPU = torch.device("cpu")
PUBLISHED_MEAN_OF_CHANNEL_7 = 1.5508  # method.md 6.1
PUBLISHED_STD_OF_CHANNEL_7 = 2.0743
ROUNDING = {"atol": 2e-5, "rtol": 0}  # of float32, between two orders of summing


def load(source: str | Path, latents_per_call: int = 1, dtype: torch.dtype = torch.float32) -> WanVAE:
    return WanVAE.load(VAEConfig(vae_pretrained=str(source), latents_per_call=latents_per_call), CPU, dtype)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load(f"seeded:{SHAPE}")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Wan2.1_VAE.pth, of width 4."""
    path = tmp_path_factory.mktemp("wan") / "Wan2.1_VAE.pth"
    torch.save(original_weights(), path)
    return path


def original_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return to_original_layout(AutoencoderKLWan(base_dim=4).state_dict())


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(11, 10), (1, 1, 1), (5,), (2, 1, 4), (1, 6)])
def test_streaming_equals_one_shot_to_the_bit(vae: WanVAE, lengths: tuple[int, ...]) -> None:
    latents = draw(1, 16, sum(lengths), 2, 3)
    frames, cache = stream(vae, latents, lengths)
    assert torch.equal(frames, vae.decode_stream(latents)[0])
    torch.testing.assert_close(frames, vae.decode(latents), **ROUNDING)
    assert cache.latents == sum(lengths)
    assert frames.shape == (1, 3, vae.geometry.pixel_frames(sum(lengths)), 16, 24)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_stay_so(value: float) -> None:
    """An infinite one would be white or black when it is clamped, and pass for a picture."""
    vae = load(f"seeded:{SHAPE}")
    expected, _ = vae.decode_stream(draw(1, 16, 2, 2, 3))
    vae.model.decoder.conv_out.bias[1] = value
    frames, _ = vae.decode_stream(draw(1, 16, 2, 2, 3))
    assert frames[:, 1].isnan().all()
    assert torch.equal(frames[:, ::2], expected[:, ::2])


def test_streaming_equals_one_shot_in_a_batch_and_at_low_precision() -> None:
    latents = draw(2, 16, 5, 4, 3)
    for dtype in (torch.float32, torch.bfloat16):
        vae = load(f"seeded:{SHAPE}", dtype=dtype)
        frames, _ = stream(vae, latents, (3, 2))
        assert frames.dtype == torch.float32
        assert torch.equal(frames, vae.decode_stream(latents)[0])


def test_batches_hold_separate_videos(vae: WanVAE) -> None:
    latents = draw(2, 16, 4, 3, 4)
    together, _ = stream(vae, latents, (2, 2))
    for i in range(2):
        alone, _ = stream(vae, latents[i : i + 1], (2, 2))
        torch.testing.assert_close(together[i : i + 1], alone, **ROUNDING)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_groups_differ_from_one_at_a_time_by_rounding(vae: WanVAE, size: int) -> None:
    latents = draw(1, 16, 9, 3, 4)
    frames, _ = stream(load(f"seeded:{SHAPE}", size), latents, (9,))
    torch.testing.assert_close(frames, vae.decode(latents), **ROUNDING)


def test_groups_are_counted_from_the_start_of_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load(f"seeded:{SHAPE}", latents_per_call=5)
    seen: list[int] = []
    decode = wan_decoder.decode

    def counted(net: Any, x: Tensor, past: Any, **how: Any) -> Any:
        seen.append(x.shape[2])
        return decode(net, x, past, **how)

    monkeypatch.setattr(wan_decoder, "decode", counted)
    latents = draw(1, 16, 21, 2, 2)
    whole, _ = stream(vae, latents, (21,))
    assert seen == [1, 1, 4, 5, 5, 5]  # the first that moves does not wait for others
    seen.clear()
    chunked, _ = stream(vae, latents, (11, 10))
    assert seen == [1, 1, 4, 5, 5, 5]
    assert torch.equal(chunked, whole)
    seen.clear()
    odd, _ = stream(vae, latents, (3, 7, 11))
    assert seen == [1, 1, 1, 3, 4, 1, 5, 5]  # a cut inside a group splits it; the ones after are where they were
    torch.testing.assert_close(odd, whole, **ROUNDING)


def test_a_cache_that_is_given_away_is_there_once(vae: WanVAE) -> None:
    assert assert_memory_is_taken_over(vae, draw(1, 16, 9, 3, 4)) == 1


def test_the_cache_is_a_value(vae: WanVAE) -> None:
    latents = draw(1, 16, 6, 3, 4)
    other = draw(1, 16, 2, 3, 4, seed=1)
    _, cache = vae.decode_stream(latents[:, :, :3])
    before = [feature.clone() for feature in cache.features]
    first, _ = vae.decode_stream(latents[:, :, 3:], cache)
    branch, _ = vae.decode_stream(other, cache)
    again, _ = vae.decode_stream(latents[:, :, 3:], cache)
    assert torch.equal(first, again)
    assert torch.equal(branch, vae.decode_stream(torch.cat([latents[:, :, :3], other], dim=2))[0][:, :, 9:])
    assert all(torch.equal(a, b) for a, b in zip(before, cache.features, strict=True))


def test_two_videos_can_be_decoded_in_turns(vae: WanVAE) -> None:
    a, b = draw(1, 16, 4, 3, 4), draw(1, 16, 4, 2, 2, seed=1)
    cache_a = cache_b = None
    for i in range(4):
        frames_a, cache_a = vae.decode_stream(a[:, :, i : i + 1], cache_a)
        frames_b, cache_b = vae.decode_stream(b[:, :, i : i + 1], cache_b)
        vae.encode(frames_b[:, :, :1])
    assert torch.equal(frames_a, vae.decode_stream(a)[0][:, :, -4:])
    assert torch.equal(frames_b, vae.decode_stream(b)[0][:, :, -4:])


@pytest.mark.parametrize("size", [1, 5])
def test_the_cache_keeps_the_same_memory_alive_at_any_length(size: int) -> None:
    vae = load(f"seeded:{SHAPE}", size)
    sizes = [stream(vae, draw(1, 16, sum(lengths), 2, 3), lengths)[1].nbytes for lengths in ((1,), (2,), (4,), (3, 6))]
    _, cache = stream(load(f"seeded:{SHAPE}", 3), draw(1, 16, 6, 2, 3), (6,))
    assert {*sizes} == {cache.nbytes}
    # Storage, not shapes: a view would keep a whole activation alive.
    assert cache.nbytes == sum(feature.numel() * feature.element_size() for feature in cache.features)
    assert {feature.shape[2] for feature in cache.features} == {2}


def test_decoding_starts_from_normalised_latents(original: Path) -> None:
    vae = load(original)
    latents = draw(1, 16, 1, 3, 4)
    raw = latents.clone()
    mean, std = torch.tensor(vae.model.config.latents_mean), torch.tensor(vae.model.config.latents_std)
    assert mean[7].item() == pytest.approx(PUBLISHED_MEAN_OF_CHANNEL_7)
    assert std[7].item() == pytest.approx(PUBLISHED_STD_OF_CHANNEL_7)
    for i in range(16):
        raw[:, i] = latents[:, i] * std[i] + mean[i]
    with torch.no_grad():
        expected = vae.model.decode(raw).sample
    torch.testing.assert_close(vae.decode(latents), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(vae.decode_stream(latents)[0], expected, **ROUNDING)


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_encoding_is_the_normalised_posterior_mean(original: Path) -> None:
    vae = load(original)
    frames = draw(2, 3, 5, 16, 24).clamp(-1, 1)
    latents = vae.encode(frames)
    assert latents.shape == (2, 16, 2, 2, 3)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        posterior = vae.model.encode(frames).latent_dist.mean
    expected = (posterior[:, 7] - PUBLISHED_MEAN_OF_CHANNEL_7) / PUBLISHED_STD_OF_CHANNEL_7
    torch.testing.assert_close(latents[:, 7], expected, atol=1e-5, rtol=0)


def test_encoding_is_causal(vae: WanVAE) -> None:
    frames = draw(1, 3, 9, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(vae.encode(frames)[:, :, :2], vae.encode(frames[:, :, :5]), atol=1e-5, rtol=0)


def test_encoding_refuses_what_would_be_cut_off(vae: WanVAE) -> None:
    with pytest.raises(InputError, match="num_frames=6"):
        vae.encode(torch.zeros(1, 3, 6, 16, 16))
    with pytest.raises(InputError, match="width=20"):
        vae.encode(torch.zeros(1, 3, 5, 16, 20))


def test_bytes_are_clamped_and_truncated(vae: WanVAE) -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5])
    frames = values.view(1, 1, 1, 1, 6).repeat(2, 3, 4, 5, 1)
    frames[:, 1] = 0
    kept = frames.clone()
    pictures = vae.to_uint8(frames)
    assert pictures.shape == (2, 4, 5, 6, 3)
    assert pictures.dtype == torch.uint8
    assert pictures.is_contiguous()
    assert pictures[1, 2, 3, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert pictures[1, 2, 3, :, 1].tolist() == [127] * 6
    assert torch.equal(frames, kept)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_seeded_weights_are_the_same_each_time_and_leave_the_global_generator_alone(vae: WanVAE) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load(f"seeded:{SHAPE}")
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in vae.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_seeded_weights_give_pictures_and_latents_of_a_fair_size(vae: WanVAE) -> None:
    frames = vae.decode(draw(1, 16, 3, 4, 4))
    assert (frames.abs() == 1).float().mean() < 0.25  # clamped; how many depends on the config's statistics
    assert (frames.std(dim=(2, 3, 4)) > 0.1).all()
    latents = vae.encode(frames)
    assert 0.1 < latents.std() < 3
    # What one latent says is seen in the frames.
    assert (vae.decode(-draw(1, 16, 3, 4, 4)) - frames).abs().mean() > 0.1


def test_original_layout_round_trip_to_the_bit() -> None:
    with torch.random.fork_rng(devices=[]):
        weights = AutoencoderKLWan(base_dim=4).state_dict()
    renamed = to_original_layout(weights)
    assert "decoder.upsamples.4.shortcut.weight" in renamed
    assert "encoder.middle.1.to_qkv.weight" in renamed
    # diffusers' own converter is the authority on the layout.
    back = convert_wan_vae_to_diffusers(renamed)
    assert back.keys() == weights.keys()
    assert all(back[name] is weights[name] for name in weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_layout_loads_without_a_hub(
    suffix: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    weights = original_weights()
    path = original
    if suffix == ".safetensors":
        path = tmp_path / "vae.safetensors"
        save_file(weights, path)
    vae = load(path)
    assert vae.model.config.base_dim == 4
    loaded = to_original_layout(vae.model.state_dict())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())


def test_old_pickle_format_loads(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(original_weights(), path, _use_new_zipfile_serialization=False)
    assert load(path).model.config.base_dim == 4


def test_diffusers_folder_loads(vae: WanVAE, tmp_path: Path) -> None:
    save_folder(vae, tmp_path)
    loaded = load(tmp_path)
    latents = draw(1, 16, 2, 3, 4)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    AutoencoderKLWan.from_pretrained(tmp_path)  # it is one for diffusers too


def save_folder(vae: WanVAE, folder: Path, **changes: object) -> None:
    config = json.loads((SHAPE / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in vae.model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_dim": 24}, "wrong shape or dtype"),
        ({"num_res_blocks": 2}, "missing"),
        ({"z_dim": 48}, "not a Wan 2.1 VAE"),
        ({"temperal_downsample": [False, False, True]}, "not a Wan 2.1 VAE"),
        ({"patch_size": 2}, "not a Wan 2.1 VAE"),
        ({"latents_std": [1.0]}, "latents_std must be 16"),
        ({"bas_dim": 12}, r"unknown key bas_dim \(did you mean 'base_dim'\?\)"),
        ({"dim_mult": "wide"}, "makes no AutoencoderKLWan"),
        ({"_class_name": "AutoencoderKL"}, "not the config of an AutoencoderKLWan"),
    ],
)
def test_configs_that_do_not_fit(vae: WanVAE, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_folder(vae, tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_folders_that_are_incomplete(vae: WanVAE, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    save_folder(vae, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights here; one must have the usual name"):
        load(tmp_path)


def test_wrong_keys_are_listed_together(tmp_path: Path) -> None:
    weights = original_weights()
    del weights["decoder.conv1.weight"]
    weights["decoder.upsamples.odd.thing"] = torch.zeros(1)
    weights["conv2.bias"] = torch.zeros(3)
    torch.save(weights, tmp_path / "vae.pth")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "vae.pth")
    message = str(caught.value)
    assert "missing 1: decoder.conv1.weight" in message
    assert "unexpected 1: decoder.upsamples.odd.thing" in message
    assert "wrong shape or dtype 1: conv2.bias [3] (needed: [16])" in message
    assert "\n" not in message


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"missing 194: .*, \.\.\.; unexpected 1: weight"):
        load(tmp_path / "other.pth")
    torch.save({"state_dict": {}, "step": 3}, tmp_path / "trainer.pth")
    with pytest.raises(InputError, match="no network in this file: expected names and tensors"):
        load(tmp_path / "trainer.pth")


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_damaged_and_dangerous_files_are_refused(original: Path, tmp_path: Path) -> None:
    whole = original.read_bytes()
    cases = {
        "empty.pth": b"",
        "short.pth": whole[: len(whole) // 2],
        "head.pth": whole[:100],
        "text.pth": b"not weights",
        "code.pth": pickle.dumps(RunsCode(), protocol=2),
        "short.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
    }
    torch.save(RunsCode(), tmp_path / "zipped.pth", pickle_protocol=2)
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in [*cases, "zipped.pth"]:
        with pytest.raises(InputError, match=f"{name}: (refused|damaged|neither|cannot)") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


# --- training ---------------------------------------------------------------------------------------------------------

WHOLE = 1 << 20  # latents a call


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a VAE of width 4."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads((SHAPE / "config.json").read_text()) | {"base_dim": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_a_clip_is_encoded_as_diffusers_does(vae: WanVAE) -> None:
    for frames in (1, 5, 17):
        clip = draw(2, 3, frames, 16, 24).clamp(-1, 1)
        expected = vae.model.encode(clip).latent_dist.parameters
        assert torch.equal(encode_clip(vae.model, clip, latents_per_call=1), expected)
        for size in (2, 3, WHOLE):
            grouped = encode_clip(vae.model, clip, latents_per_call=size)
            torch.testing.assert_close(grouped, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_clip_is_decoded_as_diffusers_does(vae: WanVAE) -> None:
    for count in (1, 2, 5):
        latents = 1.5 * draw(2, 16, count, 2, 3)
        expected = vae.model.decode(latents).sample
        frames = decode_clip(vae.model, latents, latents_per_call=1)
        assert torch.equal(frames.clamp(-1, 1), expected)
        assert frames.abs().max() > 1, "for a loss that sees what is too bright"
        for size in (2, 3, WHOLE):
            grouped = decode_clip(vae.model, latents, latents_per_call=size)
            torch.testing.assert_close(grouped, frames, atol=2e-5, rtol=1e-5)


def test_encoding_in_groups_differs_by_rounding(vae: WanVAE) -> None:
    clip = draw(1, 3, 29, 16, 24).clamp(-1, 1)
    torch.testing.assert_close(load(f"seeded:{SHAPE}", 5).encode(clip), vae.encode(clip), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(11, 10), (1, 1, 1), (2, 1, 4), (1, 6), (5,)])
@pytest.mark.parametrize("latents_per_call", [1, 2, 5])
def test_a_film_is_encoded_as_a_stream(latents_per_call: int, lengths: tuple[int, ...]) -> None:
    vae = load(f"seeded:{SHAPE}", latents_per_call)
    film = draw(1, 3, vae.geometry.pixel_frames(sum(lengths)), 16, 24).clamp(-1, 1)
    latents, cache = encoded_in_pieces(vae, film, lengths)
    torch.testing.assert_close(latents, vae.encode(film), atol=1e-5, rtol=1e-5)
    assert cache.latents == sum(lengths)


def test_the_encoders_memory_is_a_value_of_one_size(vae: WanVAE) -> None:
    film = draw(1, 3, 33, 16, 24).clamp(-1, 1)
    sizes, (_, cache) = [], vae.encode_stream(film[:, :, :9])
    for first in (9, 17, 25):
        before = [feature.clone() for feature in cache.features]
        piece = film[:, :, first : first + 8]
        latents, after = vae.encode_stream(piece, cache)
        assert torch.equal(latents, vae.encode_stream(piece, cache)[0])
        assert all(torch.equal(a, b) for a, b in zip(before, cache.features, strict=True))
        sizes.append(sum(feature.untyped_storage().nbytes() for feature in after.features))
        cache = after
    assert len(set(sizes)) == 1
    with pytest.raises(InputError, match="num_frames=8"):
        vae.encode_stream(film[:, :, :7], cache)


@pytest.mark.parametrize("latents_per_call", [1, WHOLE])
def test_gradients_reach_every_parameter(small: Path, latents_per_call: int) -> None:
    model = new_model(small, 0)
    moments = encode_clip(model, draw(1, 3, 9, 16, 16).clamp(-1, 1), latents_per_call=latents_per_call)
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + (0.5 * log_variance).exp() * draw(*mean.shape)
    decode_clip(model, latents, latents_per_call=latents_per_call).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_do_not_depend_on_the_groups(small: Path) -> None:
    clip = draw(1, 3, 13, 16, 16).clamp(-1, 1)
    gradients = []
    for size in (1, 2, WHOLE):
        model = new_model(small, 0).double()
        mean, _ = encode_clip(model, clip.double(), latents_per_call=size).chunk(2, dim=1)
        decode_clip(model, mean, latents_per_call=size).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-9, rtol=1e-9)


def test_a_new_model_is_a_function_of_the_seed(small: Path) -> None:
    torch.manual_seed(1)
    one = new_model(small, 0).state_dict()
    torch.manual_seed(2)
    same, other = new_model(small, 0).state_dict(), new_model(small, 1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if name.endswith("conv1.weight")]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


@torch.no_grad()
def test_a_new_model_knows_nothing_of_time(small: Path) -> None:
    """Each latent is the last of its frames as a picture alone, and becomes the same picture four times."""
    model = new_model(small, 0)
    clip = draw(1, 3, 13, 16, 16).clamp(-1, 1)
    latents = encode_clip(model, clip, latents_per_call=WHOLE)
    for index in range(4):
        alone = encode_clip(model, clip[:, :, 4 * index : 4 * index + 1], latents_per_call=1)
        torch.testing.assert_close(latents[:, :, index : index + 1], alone, atol=1e-5, rtol=1e-5)
    changed = clip.clone()
    changed[:, :, [2, 7]] = 0  # frames that no stride picks
    torch.testing.assert_close(encode_clip(model, changed, latents_per_call=WHOLE), latents, atol=1e-5, rtol=1e-5)

    mean = latents.chunk(2, dim=1)[0]
    frames = decode_clip(model, mean, latents_per_call=WHOLE)
    for index in range(4):
        alone = decode_clip(model, mean[:, :, index : index + 1], latents_per_call=1)
        mine = frames[:, :, max(4 * index - 3, 0) : 4 * index + 1]
        torch.testing.assert_close(mine, alone.expand_as(mine), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_new_model_has_a_narrow_posterior_and_tells_pictures_apart(small: Path) -> None:
    model = new_model(small, 0)
    pictures = draw(4, 3, 1, 16, 16).clamp(-1, 1)
    mean, log_variance = encode_clip(model, pictures, latents_per_call=1).chunk(2, dim=1)
    assert log_variance.mean().item() == pytest.approx(-6, abs=1.5)
    assert mean.std(dim=0).mean() > 3 * (0.5 * log_variance).exp().mean()
    decoded = decode_clip(model, mean, latents_per_call=1)
    assert decoded.std(dim=0).mean() > 0.1


def test_a_saved_model_is_loaded_as_the_vae_that_it_was(small: Path, tmp_path: Path) -> None:
    model = new_model(small, 3)
    mean, std = [index / 10 for index in range(16)], [1 + index / 10 for index in range(16)]
    model.register_to_config(latents_mean=mean, latents_std=std)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}, "the caller's stays"
    loaded = load(tmp_path / "saved")
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-3, msg=name)
    assert all(
        tensor.dtype == torch.float16 for tensor in load_file(next((tmp_path / "saved").glob("*.safet*"))).values()
    )
    clip = draw(1, 3, 5, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        raw = encode_clip(model, clip, latents_per_call=1).chunk(2, dim=1)[0]
    expected = (raw - torch.tensor(mean).view(1, -1, 1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(loaded.encode(clip), expected, atol=0.02, rtol=0.02)
