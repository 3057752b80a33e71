"""LoRA by diffusers' layer names, of which three are one layer here: exact, and gone without a trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.models.dit import LongSanaDiT
from longsana.pipelines import video
from longsana.pipelines.lora import fused_adapter
from longsana.pipelines.transformer import LoraLoaderMixin
from longsana.pipelines.video import LongSanaVideoPipeline
from longsana.runtime.errors import InputError
from longsana.weights.names import foreign
from tests.pipelines.test_options import inputs

LAYERS = {  # name in diffusers: rank
    "transformer_blocks.0.attn1.to_q": 2,
    "transformer_blocks.0.attn1.to_k": 3,
    "transformer_blocks.0.attn1.to_v": 4,
    "transformer_blocks.0.attn1.to_out.0": 2,
    "transformer_blocks.1.attn1.to_k": 2,
    "transformer_blocks.1.attn2.to_q": 2,
    "transformer_blocks.1.attn2.to_v": 2,
    "transformer_blocks.1.ff.conv_inverted": 2,
    "transformer_blocks.1.ff.conv_point": 5,
    "caption_projection.linear_1": 2,
    "time_embed.linear": 2,
    "proj_out": 2,
}


def parts(network: LongSanaDiT) -> Iterator[tuple[str, int, str, tuple[int, ...], int]]:
    """Of each weight: our name, which of its parts, that one's name and shape in diffusers, and how many there are."""
    for name, tensor in network.state_dict().items():
        pieces = foreign(name, tuple(tensor.shape), "diffusers")
        for place, piece in enumerate(pieces):
            yield name, place, piece.name.removesuffix(".weight"), piece.shape, len(pieces)


def lora(network: LongSanaDiT, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {layer: shape for _, _, layer, shape, _ in parts(network)}
    state_dict = {}
    for layer, rank in LAYERS.items():
        rows, columns, *pixel = shapes[layer]
        state_dict |= {
            f"transformer.{layer}.lora_A.weight": torch.randn(rank, columns, *pixel, generator=rng) / columns**0.5,
            f"transformer.{layer}.lora_B.weight": 0.1 * torch.randn(rows, rank, *pixel, generator=rng),
        }
    return state_dict


def products(network: LongSanaDiT, state_dict: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """What it adds to each of our weights, by hand."""
    added = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    for name, place, layer, _, count in parts(network):
        if f"transformer.{layer}.lora_A.weight" in state_dict:
            a, b = (state_dict[f"transformer.{layer}.lora_{factor}.weight"].flatten(1) for factor in "AB")
            added[name].chunk(count)[place].add_(scale * (b @ a))
    return added


def latents(pipe: LongSanaVideoPipeline) -> Tensor:
    frames: Tensor = pipe(**inputs(output_type="latent")).frames
    return frames


def test_factors_of_a_fused_layer_make_the_products_of_its_parts(loaded: LongSanaVideoPipeline) -> None:
    network = loaded.transformer.network
    state_dict = lora(network)
    fused, config = fused_adapter(state_dict, network, prefix="transformer", metadata=None)
    expected = products(network, state_dict)
    for name in network.state_dict():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in fused:
            product = fused[f"{module}.lora_B.weight"] @ fused[f"{module}.lora_A.weight"]
            torch.testing.assert_close(product, expected.pop(name))
    assert not any(change.any() for change in expected.values())
    assert config["rank_pattern"]["network.blocks.0.attn.qkv"] == 9


@pytest.fixture
def with_peft() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft: pip install -e '.[lora]'")


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_injected_is_fused_is_added_by_hand(pipe: LongSanaVideoPipeline, tmp_path: Path, scale: float) -> None:
    network = pipe.transformer.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = latents(pipe)
    state_dict = lora(network)
    by_hand = products(network, state_dict, scale)
    save_file(state_dict, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="own")
    pipe.set_adapters("own", scale)
    assert pipe.get_active_adapters() == ["own"]
    injected = latents(pipe)
    pipe.fuse_lora()
    fused = latents(pipe)
    pipe.unload_lora_weights()  # what was fused stays
    assert torch.equal(latents(pipe), fused)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + by_hand[name])
    network.load_state_dict({name: before[name] + by_hand[name] for name in before})
    expected = latents(pipe)
    assert (expected - plain).abs().max() > 0.1
    for result in (injected, fused):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("with_peft")
def test_unload_restores_to_the_bit(pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    plain = latents(pipe)
    pipe.load_lora_weights(lora(pipe.transformer.network))
    assert not torch.equal(latents(pipe), plain)
    for saved in (pipe, pipe.transformer):
        with pytest.raises(InputError, match=r"^save_pretrained: a LoRA is loaded, .* call fuse_lora\(\) and then"):
            saved.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(latents(pipe), plain)
    pipe.save_pretrained(tmp_path / "saved")
    assert {"transformer", "vae"} <= {path.name for path in (tmp_path / "saved").iterdir()}


@pytest.mark.usefixtures("with_peft")
def test_saved_is_loaded(pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """Of layers that are one here each gets its own factors back, of its own rank, to the bit."""
    given = lora(pipe.transformer.network)
    pipe.load_lora_weights(dict(given), adapter_name="own")
    pipe.set_adapters("own", 0.5)  # how much of it is put on is not part of it
    pipe.save_lora_weights(tmp_path / "saved", "own")
    written = load_file(tmp_path / "saved/pytorch_lora_weights.safetensors")
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        assert written[name].shape == tensor.shape and torch.equal(written[name], tensor), name
    pipe.set_adapters("own", 1.0)
    expected = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "saved")
    assert torch.equal(latents(pipe), expected)


@pytest.mark.usefixtures("with_peft")
def test_a_lora_of_ones_own_is_saved(pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    """As a training script adds it: alpha is not the rank, and q, k and v share one a."""
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.qkv"], init_lora_weights=False)
    pipe.transformer.add_adapter(settings, adapter_name="mine")
    expected = latents(pipe)
    pipe.save_lora_weights(tmp_path, "mine", weight_name="mine.safetensors")
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in load_file(tmp_path / "mine.safetensors")
    pipe.transformer.delete_adapters("mine")
    pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("with_peft")
def test_what_cannot_be_saved(pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^adapter_name='own': no such LoRA; loaded are: none"):
        pipe.save_lora_weights(tmp_path, "own")
    given = lora(pipe.transformer.network)
    pipe.load_lora_weights({name: 0 * part for name, part in given.items()}, adapter_name="none")
    with pytest.raises(InputError, match=r"^adapter_name=none: all of its lora_B are zero"):
        pipe.save_lora_weights(tmp_path, "none")
    (tmp_path / "file").write_text("")
    pipe.load_lora_weights(dict(given), adapter_name="own")
    with pytest.raises(InputError, match="choose another save_directory"):
        pipe.save_lora_weights(tmp_path / "file", "own")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("with_peft")
def test_two_at_once(pipe: LongSanaVideoPipeline) -> None:
    network = pipe.transformer.network
    plain = latents(pipe)
    loras = [lora(network, seed) for seed in range(2)]
    added = [products(network, state_dict) for state_dict in loras]
    for name, state_dict in zip(("a", "b"), loras, strict=True):
        pipe.load_lora_weights(state_dict, adapter_name=name)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    both = latents(pipe)
    pipe.disable_lora()
    assert torch.equal(latents(pipe), plain)
    pipe.unload_lora_weights()
    weights = network.state_dict()
    network.load_state_dict({name: weights[name] + added[0][name] + 0.5 * added[1][name] for name in weights})
    torch.testing.assert_close(both, latents(pipe), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("with_peft")
def test_unfuse(pipe: LongSanaVideoPipeline) -> None:
    plain = latents(pipe)
    pipe.load_lora_weights(lora(pipe.transformer.network))
    injected = latents(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    torch.testing.assert_close(latents(pipe), injected, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"transformer.r": 2, "transformer.lora_alpha": 4}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"transformer.lora_alpha": 4, "transformer.use_rslora": True}, 4 / 2**0.5),
    ],
)
def test_alpha(loaded: LongSanaVideoPipeline, metadata: dict[str, Any], scale: float) -> None:
    network = loaded.transformer.network
    state_dict = {key: tensor for key, tensor in lora(network).items() if "0.attn1.to_q" in key}
    fused, _ = fused_adapter(state_dict, network, prefix="transformer", metadata=metadata)
    product = fused["blocks.0.attn.qkv.lora_B.weight"] @ fused["blocks.0.attn.qkv.lora_A.weight"]
    torch.testing.assert_close(product, products(network, state_dict, scale)["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "transformer.transformer_blocks.0.attn1.to_x.lora_A.weight",
            (2, 128),
            r"none can be put on here: .*to_x \(did",
        ),
        ("transformer.transformer_blocks.0.ff.conv_temp.lora_A.weight", (2, 128, 3, 1), "known are the linear layers"),
        ("transformer.proj_out.lora_A.weight", (2, 128), "proj_out has lora_A alone"),
        ("transformer.proj_out.alpha", (), "expected names that end in .lora_A.weight"),
        ("unet.proj_out.lora_A.weight", (2, 128), "no weights of the transformer in it"),
    ],
)
def test_other_loras_are_refused(loaded: LongSanaVideoPipeline, key: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fused_adapter({key: torch.zeros(shape)}, loaded.transformer.network, prefix="transformer", metadata=None)


def test_a_lora_of_another_width_is_refused(loaded: LongSanaVideoPipeline) -> None:
    factors = {f"transformer.proj_out.lora_{factor}.weight": torch.zeros(3, 3) for factor in "AB"}
    with pytest.raises(InputError, match=r"do not change a weight of \[64, 128\]; it is for another network"):
        fused_adapter(factors, loaded.transformer.network, prefix="transformer", metadata=None)


def test_without_peft_it_says_what_to_install(loaded: LongSanaVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "is_peft_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install -e '\.\[lora\]'"):
        loaded.load_lora_weights({})


# Files of others


def renamed(state_dict: dict[str, Tensor], pattern: str, replacement: str) -> dict[str, Tensor]:
    return {re.sub(pattern, replacement, key): tensor for key, tensor in state_dict.items()}


def with_alphas(state_dict: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    layers = {key.partition(".lora_")[0] for key in state_dict}
    return {**state_dict, **{f"{layer}.alpha": torch.tensor(alpha) for layer in layers}}


FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "an adapter's name": lambda lora: renamed(lora, r"\.weight$", ".default_0.weight"),
    "the default's name": lambda lora: renamed(lora, r"\.weight$", ".default.weight"),
    "peft's own": lambda lora: renamed(lora, r"^transformer\.", "base_model.model."),
    "older names": lambda lora: renamed(renamed(lora, "lora_A", "lora_down"), "lora_B", "lora_up"),
    "oldest names": lambda lora: renamed(renamed(lora, "lora_A", "lora.down"), "lora_B", "lora.up"),
    "wrapped": lambda lora: renamed(lora, r"^transformer\.", "module.transformer._orig_mod."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_forms_of_others_are_the_same_change(
    form: str, alpha: float | None, loaded: LongSanaVideoPipeline, tmp_path: Path
) -> None:
    network = loaded.transformer.network
    state_dict = lora(network)
    given, scaled = FORMS[form](state_dict), state_dict
    if alpha is not None:
        given = FORMS[form](with_alphas(state_dict, alpha))
        # Each part of a fused layer by its own rank.
        scaled = {key: x * (alpha / x.shape[1]) if ".lora_B." in key else x for key, x in state_dict.items()}
    expected, config = fused_adapter(scaled, network, prefix="transformer", metadata=None)
    save_file(given, tmp_path / "mine.safetensors")
    torch.save(given, tmp_path / "mine.bin")
    for file in ("mine.safetensors", "mine.bin"):
        plain, metadata = LoraLoaderMixin.lora_state_dict(tmp_path / file, return_lora_metadata=True)
        assert metadata is None and all("lora" in key for key in plain)
        fused, settings = fused_adapter(plain, network, prefix="transformer", metadata=metadata)
        assert settings == config and fused.keys() == expected.keys()
        assert all(torch.equal(fused[name], expected[name]) for name in fused)
    if form != "wrapped":  # which files alone are looked through for
        fused, _ = fused_adapter(given, network, prefix="transformer", metadata=None)
        assert all(torch.equal(fused[name], expected[name]) for name in expected)


def test_settings_beside_a_file_are_read_and_must_not_contradict_it(
    loaded: LongSanaVideoPipeline, tmp_path: Path
) -> None:
    state_dict, path = lora(loaded.transformer.network), tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state_dict, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})})
    _, metadata = LoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata == {"transformer.lora_alpha": 4}
    save_file(with_alphas(state_dict, 1), path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})})
    with pytest.raises(InputError, match=r"alphas both as tensors \(\.alpha\) and in its metadata"):
        LoraLoaderMixin.lora_state_dict(tmp_path)
    save_file(state_dict, path, {"lora_adapter_metadata": "{"})
    with pytest.raises(InputError, match="its lora_adapter_metadata is no JSON"):
        LoraLoaderMixin.lora_state_dict(tmp_path)


ONE = torch.zeros(1)
MORE: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA, kohya's": ({"transformer.proj_out.dora_scale": ONE}, "DoRA's magnitudes have no place here; merge it"),
    "DoRA, peft's": ({"transformer.proj_out.lora_magnitude_vector.weight": ONE}, "DoRA's magnitudes"),
    "DoRA, an adapter's": ({"transformer.proj_out.lora_magnitude_vector.default.weight": ONE}, "DoRA's magnitudes"),
    "text encoder": (
        {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": ONE},
        "parts of the text encoder have no",
    ),
    "second text encoder": ({"text_encoder_2.q_proj.lora_A.weight": ONE}, "parts of the text encoder"),
    "kohya's text encoder": ({"lora_te1_layers_0_q_proj.lora_down.weight": ONE}, "parts of the text encoder"),
    "kohya's": ({"lora_unet_blocks_0_attn_q.lora_down.weight": ONE}, "the names of kohya's trainer"),
    "another part": ({"vae.decoder.conv_in.lora_A.weight": ONE}, "1 tensors are not the transformer's, such as vae."),
    "two adapters": (
        {"transformer.proj_out.lora_A.other.weight": ONE},
        r"several adapters in one file \(\(none\), other",
    ),
    "LoHa": ({"transformer.proj_out.hada_w1_a": ONE}, "another kind of adapter"),
    "LoKr": ({"transformer.proj_out.lokr_w1": ONE}, "another kind of adapter"),
    "biases": ({"transformer.proj_out.lora_B.bias": ONE}, "lora_bias has no place here"),
    "an alpha of nothing": ({"transformer.proj_in.alpha": ONE}, r"proj_in\.alpha: expected names that end in"),
    "alphas": ({"transformer.proj_out.alpha": torch.ones(2)}, r"proj_out\.alpha: must be one finite number"),
    "no alpha": ({"transformer.proj_out.alpha": torch.tensor(float("nan"))}, r"proj_out\.alpha: must be one finite"),
    "a whole change": ({"transformer.proj_out.diff": ONE}, r"proj_out\.diff: expected names that end in \.lora_A"),
}


@pytest.mark.parametrize("name", MORE)
def test_nothing_is_dropped_in_silence(name: str, loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    more, says = MORE[name]
    state_dict = {**lora(loaded.transformer.network), **more}
    save_file(state_dict, tmp_path / "mine.safetensors")
    for load in (
        lambda: fused_adapter(state_dict, loaded.transformer.network, prefix="transformer", metadata=None),
        lambda: LoraLoaderMixin.lora_state_dict(tmp_path / "mine.safetensors"),
        lambda: LoraLoaderMixin.lora_state_dict(tmp_path, weight_name="mine.safetensors"),
        lambda: LoraLoaderMixin.lora_state_dict(state_dict),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load()
        assert str(caught.value).startswith("LoRA: ") and "\n" not in str(caught.value)


def test_a_lora_file_is_opened_like_all_weights(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    for content, says in ((b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"), (b"", "damaged")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"mine\.safetensors: .*{says}"):
            LoraLoaderMixin.lora_state_dict(tmp_path)
    with pytest.raises(InputError, match=r"other\.safetensors: no such file"):
        LoraLoaderMixin.lora_state_dict(tmp_path, weight_name="other.safetensors")
    save_file({"a": ONE}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"several weights files .* here; name it as weight_name"):
        LoraLoaderMixin.lora_state_dict(tmp_path)


@pytest.mark.usefixtures("with_peft")
def test_alphas_through_the_pipeline(pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    network = pipe.transformer.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state_dict = {key: tensor for key, tensor in lora(network).items() if "proj_out" in key}  # of rank 2
    save_file(FORMS["an adapter's name"](with_alphas(state_dict, 4.0)), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    added = products(network, state_dict, 2.0)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + added[name])


NO_FACTORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "whole numbers": (lambda x: x.int(), r"lora_A\.weight has dtype torch\.int32"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), r"lora_A\.weight has dtype torch\.float8_e4m3fn"),
    "complex numbers": (lambda x: x.to(torch.complex64), r"lora_A\.weight has dtype torch\.complex64"),
    "a vector": (lambda x: x[0], r"lora_A\.weight has shape \[128\]: must be a matrix"),
    "a number": (lambda x: x[0, 0], r"lora_A\.weight has shape \[\]: must be a matrix"),
    "rank 0": (lambda x: x[:0], r"lora_A\.weight has shape \[0, 128\]: must be a matrix"),
    "meta": (lambda x: x.to("meta"), r"lora_A\.weight: a tensor on the meta device"),
    "a list": (lambda x: x.tolist(), r"lora_A\.weight=.*must be a tensor"),
    "too large for the network": (
        lambda x: x.double() * 1e300,
        r"numbers that are not finite \(transformer\.proj_out\.lora_A",
    ),
}


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize("name", NO_FACTORS)
def test_what_are_no_factors_is_refused_before_it_is_put_on(name: str, pipe: LongSanaVideoPipeline) -> None:
    spoil, says = NO_FACTORS[name]
    state_dict: dict[str, Any] = lora(pipe.transformer.network)
    key = "transformer.proj_out.lora_A.weight"
    state_dict[key] = spoil(state_dict[key])
    with pytest.raises(InputError, match=rf"^LoRA: .*{says}") as caught:
        pipe.load_lora_weights(state_dict)
    assert "\n" not in str(caught.value) and pipe.get_list_adapters() == {}


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize("name", MORE)
def test_the_pipeline_drops_nothing_either(name: str, pipe: LongSanaVideoPipeline, tmp_path: Path) -> None:
    more, says = MORE[name]
    state_dict = {**lora(pipe.transformer.network), **more}
    save_file(state_dict, tmp_path / "mine.safetensors")
    for source in (state_dict, tmp_path, tmp_path / "mine.safetensors", str(tmp_path / "mine.safetensors")):
        with pytest.raises(InputError, match=rf"^LoRA: .*{says}"):
            pipe.load_lora_weights(source)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"", "damaged"),
        (b"\x00" * 99, "damaged"),
        ("cut", "damaged or cut short"),
        ("pickle", "refused: it holds a Python object"),
        ("network", "no weights of the transformer in it"),
        (None, "no such file"),
    ],
)
@pytest.mark.usefixtures("with_peft")
def test_files_that_are_none(content: bytes | str | None, says: str, pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    if content == "cut":
        save_file(lora(pipe.transformer.network), path)
        path.write_bytes(path.read_bytes()[:-9])
    elif content == "pickle":
        torch.save({"a": Path("a")}, tmp_path / "mine.bin")
        (tmp_path / "mine.bin").rename(path)
    elif content == "network":
        save_file(dict(pipe.transformer.network.state_dict()), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    assert "\n" not in str(caught.value) and pipe.get_list_adapters() == {}


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize(
    "source", ["/nosuch/x", "nosuch/x.safetensors", "~nosuchuser/x", "", "a\0b", Path("nosuch"), 5]
)
def test_a_lora_that_is_not_there(source: Any, loaded: LongSanaVideoPipeline) -> None:
    with pytest.raises(InputError, match=r"not found|must be a folder"):
        loaded.load_lora_weights(source)


@pytest.mark.usefixtures("with_peft")
@pytest.mark.parametrize(
    "options", [{"adapter_name": "a.b"}, {"adapter_name": 5}, {"adapter_name": ""}, {"weight_name": 5}]
)
def test_names_that_are_none(options: dict[str, Any], pipe: LongSanaVideoPipeline) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}=.*: must be a text"):
        pipe.load_lora_weights(lora(pipe.transformer.network), **options)
    assert pipe.get_list_adapters() == {}


@pytest.mark.usefixtures("with_peft")
def test_a_lora_in_the_home_folder(
    pipe: LongSanaVideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(lora(pipe.transformer.network), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights("~", adapter_name="own")
    assert pipe.get_list_adapters() == {"transformer": ["own"]}


@pytest.mark.usefixtures("with_peft")
def test_scales_are_finite_numbers(pipe: LongSanaVideoPipeline) -> None:
    pipe.load_lora_weights(lora(pipe.transformer.network), adapter_name="own")
    before = latents(pipe)
    for scale in (float("nan"), float("inf"), "1", True, 1e300, [float("nan")], {"transformer": float("nan")}):
        with pytest.raises(InputError, match=r"^adapter_weights.*: must be"):
            pipe.set_adapters("own", scale)
        if not isinstance(scale, list | dict):
            with pytest.raises(InputError, match=r"^lora_scale=.*: must be"):
                pipe.fuse_lora(lora_scale=scale)
            with pytest.raises(InputError, match=r"^weights=.*: must be"):
                pipe.transformer.set_adapters("own", scale)
    assert torch.equal(latents(pipe), before)
    for own in (1, [1.0], None, {"transformer": torch.tensor(1.0)}):
        pipe.set_adapters("own", own)
        assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: must be a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha='8': must be a finite number"),
        ({"alpha_pattern": [1]}, "alpha_pattern in its metadata is a list"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern in its metadata: \( is no pattern"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern, to_q=None: must be a finite number"),
    ],
)
def test_settings_that_mean_nothing(loaded: LongSanaVideoPipeline, metadata: dict[str, Any], says: str) -> None:
    network = loaded.transformer.network
    with pytest.raises(InputError, match=f"^LoRA: {says}"):
        fused_adapter(lora(network), network, prefix="transformer", metadata=metadata)


def test_a_lora_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    factors = {f"transformer.proj_out.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file(factors, tmp_path / "only.safetensors")
    names = ["sub/only.safetensors", "other/one.safetensors", "README.md"]

    def download(repository: str, name: str, subfolder: str = "", **rest: Any) -> str:
        assert repository == "owner/lora" and not rest
        if f"{subfolder}/{name}" not in names:
            raise EntryNotFoundError("no such entry")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *arguments, **options: names)
    for name in (None, "only.safetensors"):
        assert LoraLoaderMixin.lora_state_dict("owner/lora", subfolder="sub", weight_name=name).keys() == factors.keys()
    with pytest.raises(InputError, match=r"^LoRA: owner/lora: no weights there; name the file as weight_name"):
        LoraLoaderMixin.lora_state_dict("owner/lora")
    with pytest.raises(InputError, match=r"^LoRA: owner/lora: x\.bin could not be fetched \(EntryNotFoundError"):
        LoraLoaderMixin.lora_state_dict("owner/lora", weight_name="x.bin")
    save_file(factors | {"transformer.proj_out.dora_scale": ONE}, tmp_path / "only.safetensors")
    with pytest.raises(InputError, match="DoRA's magnitudes"):
        LoraLoaderMixin.lora_state_dict("owner/lora", subfolder="sub")
