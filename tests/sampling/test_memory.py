"""Settings that fit into a GPU's memory: laws of what is chosen, and counts of what it is chosen by."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from torch import Tensor

from longsana.chunks import ChunkPlan
from longsana.config import InferenceConfig, ModelConfig, load_config
from longsana.data.prompts import Prompt
from longsana.data.story import Change, Mark
from longsana.encoders import ltx2_decoder, tiny_decoder, wan_decoder
from longsana.encoders.geometry import GEOMETRIES
from longsana.encoders.tiny_layouts import TINY
from longsana.encoders.tiny_network import TinyNetwork
from longsana.encoders.vae import VAES as KINDS
from longsana.models import attention, dit, feed_forward
from longsana.models.embeddings import TextEmbedding, TextMemory
from longsana.models.float8 import to_float8
from longsana.runtime.errors import InputError
from longsana.sampling import memory
from longsana.sampling.captions import caption_encoder
from longsana.sampling.checks import check_config, check_no_memory
from longsana.sampling.engine import Engine
from longsana.sampling.memory import Parts, Work, candidates, choose, needed, work_of
from longsana.training.memory import LiveBytes, as_on_gpu
from longsana.weights.build import build_model, empty_model
from tests.pipelines.repository import shallow

CONFIGS = "configs/sana_video_config/"
SIZES = {
    480: (
        CONFIGS + "Sana_2000M_480px_adamW_fsdp_longsana.yaml",
        Parts(126_892_531, 53_595_872, 2_614_341_888),
        "taew2_1",
    ),
    720: (CONFIGS + "Sana_2000M_720px_longsana.yaml", Parts(1_222_479_601, 694_098_881, 2_614_341_888), "taeltx_2"),
}
LADDER = (80, 24, 20, 16, 14, 12, 11, 10, 9, 8.5, 8, 7.5, 7, 6.5, 6.3)
DTYPE = torch.bfloat16


def load(size: int, *settings: str) -> tuple[InferenceConfig, Parts]:
    path, parts, tiny = SIZES[size]
    return load_config(path, [setting.replace("TINY", tiny) for setting in settings]), parts


def held_to(config: InferenceConfig, gib: float) -> InferenceConfig:
    return replace(config, sampling=replace(config.sampling, memory=gib))


def rank(config: InferenceConfig, chosen: InferenceConfig, work: Work) -> int:
    """The place of what was chosen among all that may be, the fastest first."""
    return list(candidates(held_to(config, chosen.sampling.memory or 0), work)).index(chosen)


@pytest.mark.parametrize("size", [480, 720])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "settings", [(), ("model.float8=true",), ("vae.decoder=TINY", "sampling.cuda_graphs=true"), ("sampling.bs=2",)]
)
def test_more_memory_is_never_slower_and_what_is_chosen_fits(size: int, live: bool, settings: tuple[str, ...]) -> None:
    config, parts = load(size, *settings)
    work = work_of(config, live=live)
    ranks = []
    for gib in LADDER:
        try:
            chosen = choose(held_to(config, gib), parts, work)
        except InputError:
            ranks.append(10**6)
            continue
        assert max(needed(chosen, parts, work).values()) <= gib
        ranks.append(rank(config, chosen, work))
    assert ranks == sorted(ranks)
    assert ranks[0] == 0 and len(set(ranks)) > 1


def test_nothing_that_a_video_shows_is_chosen() -> None:
    """But for rounding: network, precision, decoder and videos are the config's, whatever the memory."""
    config, parts = load(720)
    for gib in (80, 12, 8):
        chosen = choose(held_to(config, gib), parts, work_of(config))
        rounding = {"feed_forward_frames": config.model.feed_forward_frames}
        assert replace(chosen.model, **rounding) == config.model
        assert replace(chosen.vae, latents_per_call=config.vae.latents_per_call) == config.vae
        own = {"memory": None, "offload": "none", "cuda_graphs": config.sampling.cuda_graphs}
        assert replace(chosen.sampling, **own) == config.sampling
        assert chosen.scheduler == config.scheduler and chosen.text_encoder == config.text_encoder


def test_what_the_config_says_is_the_most_that_is_chosen() -> None:
    own = ("vae.latents_per_call=3", "model.feed_forward_frames=2", "sampling.offload=all")
    config, _ = load(480, *own)
    found = list(candidates(config, work_of(config)))
    assert found[0] == config and len(found) == len(set(found)) == 3
    assert {each.model.feed_forward_frames for each in found} == {2}
    assert {each.sampling.offload for each in found} == {"all"}
    config, _ = load(480, "model.feed_forward_frames=9")
    assert {each.model.feed_forward_frames for each in candidates(config, work_of(config))} == {9, 6}


def test_what_does_not_fit_is_told_with_what_would() -> None:
    config, parts = load(480)
    work = work_of(config)
    with pytest.raises(InputError) as refused:
        choose(held_to(config, 7), parts, work)
    said = str(refused.value)
    assert said.startswith("sampling.memory=7: 480x832 needs ") and "\n" not in said
    assert "model.float8=true" in said and "vae.decoder=taew2_1" in said
    for change in ({"model": replace(config.model, float8=True)}, {"vae": replace(config.vae, decoder="taew2_1")}):
        choose(held_to(replace(config, **change), 7), parts, work)
    gib = float(said.split("needs ")[1].split(" GiB")[0])
    choose(held_to(config, gib), parts, work)
    with pytest.raises(InputError, match="needs") as refused:  # on a GPU without float8
        choose(held_to(config, 7), parts, work, float8=False)
    assert "float8" not in str(refused.value)
    with pytest.raises(InputError, match="or make smaller videos"):
        choose(held_to(config, 3), parts, work)


def test_the_work_is_the_largest_of_all_prompts() -> None:
    config, _ = load(480, "sampling.num_frames=81")
    plain = Prompt(1, "a", ("a",), 0, 480, 832)
    story = Prompt(2, "b", ("b", "c"), 0, 640, 640, frames=73, marks=(Mark(), Mark(change=Change("recache", 2))))
    assert work_of(config) == work_of(config, [plain]) == Work((480, 832), 11)
    assert work_of(config, [plain, story]) == Work((640, 640), 19, reach=2)


def test_the_settings_exclude_each_other() -> None:
    config, _ = load(720, "sampling.offload=all")
    with pytest.raises(InputError, match=r"sampling\.cuda_graphs=true"):
        check_config(config)
    for setting in ("sampling.offload=all", "sampling.memory=8"):
        with pytest.raises(InputError, match=f"{setting.partition('=')[0]}.* no meaning for training"):
            check_no_memory(load(480, setting)[0])


# What it is chosen by -------------------------------------------------------------------------------------------------


def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operations allocate as those of a GPU do."""

    def like(x: Tensor, *inputs: Any, **settings: Any) -> Tensor:
        return torch.empty_like(x)

    def features(qkv: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        q, k, v = qkv.chunk(3, -1)
        return q.new_empty(q.shape), k.new_empty(k.shape), v

    def sums(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, k_sum: Tensor, **how: Any) -> Any:
        return q.new_empty(q.shape), torch.empty_like(kv), torch.empty_like(k_sum)

    def halved(x: Tensor, *inputs: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    for name in ("norm_modulate", "gated_residual"):
        monkeypatch.setattr(dit, name, like)
    monkeypatch.setattr(dit, "add_norm_modulate", lambda x, *inputs: (torch.empty_like(x), torch.empty_like(x)))
    monkeypatch.setattr(feed_forward, "temporal_conv", like)
    monkeypatch.setattr(feed_forward, "gated_conv", halved)
    monkeypatch.setattr(attention, "qk_features", features)
    monkeypatch.setattr(attention, "linear_attention", sums)
    for module in (wan_decoder, ltx2_decoder):
        monkeypatch.setattr(module, "norm_silu_into", lambda *inputs, **settings: None)
        monkeypatch.setattr(module, "add_shortcut", lambda x, *inputs: x)
        monkeypatch.setattr(module, "biases_come_late", lambda x: True)
    monkeypatch.setattr(tiny_decoder, "relu_into", lambda *inputs, **settings: None)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        kernels(monkeypatch)
    return bool(request.param)


@pytest.mark.parametrize(("size", "cut"), [((60, 104), 0), ((60, 104), 6), ((22, 40), 0), ((22, 40), 6)])
def test_a_pass_has_as_much_as_is_counted(size: tuple[int, int], cut: int, fused: bool) -> None:
    wide = size == (60, 104)
    config, _ = load(480 if wide else 720, f"model.feed_forward_frames={cut}")
    model = empty_model(config.model).to(DTYPE).requires_grad_(False)
    for block in model.blocks:
        block.forward = as_on_gpu(block.forward)
    x = torch.empty(1, config.model.in_channels, 11, *size, device="meta")
    t = torch.empty(1, device="meta")
    keys = torch.empty(1, 20, 300, 112, device="meta", dtype=DTYPE)
    text = TextMemory([(keys, keys)] * len(model.blocks), torch.empty(1, 300, dtype=torch.bool, device="meta"))
    state = model.empty_state(1, *size)
    with torch.no_grad(), LiveBytes(ignore=[*model.parameters(), x, t, keys, *state[:3]]) as live:
        model(x, t, text, state=state)
    counted = memory._network(config, work_of(config), fused=fused)
    assert counted.state == sum(part.nbytes for part in state[:3])
    assert live.peak <= 1.01 * counted.passing and counted.passing <= 1.05 * live.peak
    assert counted.weights == counted.loaded == sum(weight.nbytes for weight in model.parameters())


def test_float8_is_a_byte_for_a_number() -> None:
    config, _ = load(480, "model.float8=true")
    counted = memory._network(config, work_of(config), fused=True)
    names = {f"{product}.weight" for product in memory.PRODUCTS}
    blocks = empty_model(ModelConfig()).blocks
    saved = sum(part.numel() for block in blocks for name, part in block.named_parameters() if name in names)
    assert saved > 10**9 and counted.loaded - counted.weights == saved


def groups_of(size: int, decoder: str) -> Iterator[tuple[int, int, int]]:
    """Latents of a call, and the bytes that are there at its fullest and afterwards."""
    config, _ = load(size, f"vae.decoder={decoder}")
    shape = GEOMETRIES[config.vae.vae_type]
    latent = (480 // 8, 832 // 8) if size == 480 else (704 // 32, 1280 // 32)
    model: Any
    with torch.device("meta"):
        if decoder == "full":
            model = (AutoencoderKLWan if size == 480 else AutoencoderKLLTX2Video)()
        else:
            model = TinyNetwork(TINY[decoder])
    model = model.eval().requires_grad_(False).to(DTYPE)
    for count in (1, 2, 5):
        latents = torch.empty(1, shape.channels, count, *latent, device="meta", dtype=DTYPE)
        if decoder == "full":
            vae = KINDS[config.vae.vae_type](model, shape, count)
            # The first latents of a video remember in another layout.
            features = vae.decode_stream(torch.empty(1, shape.channels, 5, *latent, device="meta"))[1].features
            decode = vae._decode_group
        else:
            tiny_decoder.prepare(model)
            features = tiny_decoder.decode(model, latents, None)[1]
        with LiveBytes(ignore=[*model.parameters(), *model.buffers(), *features, latents]) as live:
            if decoder == "full":
                _, after = decode(latents, features, 5, last=False, consumed=True)
            else:
                _, after = tiny_decoder.decode(model, latents, features)
        yield count, live.peak, sum(part.nbytes for part in after)


@pytest.mark.parametrize(("size", "decoder"), [(480, "full"), (720, "full"), (480, "taew2_1"), (720, "taeltx_2")])
def test_decoding_has_as_much_as_is_counted(size: int, decoder: str, fused: bool) -> None:
    """Beside the decoder's memory, which a call of the full ones takes over and does not make again."""
    for latents, peak, cache in groups_of(size, decoder):
        config, parts = load(size, f"vae.decoder={decoder}", f"vae.latents_per_call={latents}")
        counted = memory._decoding(config, parts, work_of(config), fused=fused)
        assert counted.cache == cache
        assert peak <= 1.01 * counted.call and counted.call <= 1.1 * peak, (latents, peak, counted.call)


# What is chosen changes no video --------------------------------------------------------------------------------------

SMALL = (
    *("sampling.num_frames=37", "sampling.chunk_frames=4", "sampling.height=32", "sampling.width=48"),
    *("vae.decoder=full", "vae.latents_per_call=2", *shallow()),
)
SHAPES = CONFIGS + "longsana/shapes/longsana.yaml"
TEXTS = ("A big red circle moves slowly to the left on a black background.", "A small blue square stays still.")


@functools.cache
def video(*settings: str, live: bool = False) -> tuple[Tensor, Tensor]:
    """Latents and pixels of a video of two parts, and of a second one by the same networks."""
    config: InferenceConfig = load_config(SHAPES, [*SMALL, *settings])
    engine, prompt = Engine(config, "cpu"), Prompt(1, "\n".join(TEXTS), TEXTS, 0, 32, 48)
    with caption_encoder(engine.config, engine.device, engine.turns if live else None) as encode:
        caption = None if live else encode(prompt)
        network, decoder = engine.load()
        made = []
        for _ in range(2):
            caption = encode(prompt) if live else caption
            assert caption is not None
            made += list(engine.sample(network, decoder, [prompt], [caption]))
    return torch.cat([frames.latents for frames in made], 2), torch.cat([frames.pixels for frames in made], 1)


@pytest.mark.parametrize(
    ("settings", "live"),
    [
        (("sampling.offload=encoder",), False),
        (("sampling.offload=all",), False),
        (("sampling.offload=all",), True),
        (("sampling.offload=text_encoder",), True),
    ],
)
def test_taking_turns_changes_no_bit(settings: tuple[str, ...], live: bool) -> None:
    expected, given = video(), video(*settings, live=live)
    assert all(torch.equal(*pair) for pair in zip(expected, given, strict=True))


@pytest.mark.parametrize("offload", ["encoder", "all"])
def test_an_encoder_comes_for_what_it_encodes(offload: str) -> None:
    """And leaves: a decoder's turn has no weights of it."""
    picture = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    plain, own = (
        Engine(load_config(SHAPES, [*SMALL, f"sampling.offload={how}"]), "cpu").load_decoder()
        for how in ("none", offload)
    )
    encoder, decoder = (next(part.parameters()) for part in (own.model.encoder, own.model.decoder))
    waiting = encoder.data_ptr(), decoder.data_ptr()
    assert torch.equal(own.encode_pictures([picture]), plain.encode_pictures([picture]))
    assert encoder.data_ptr() == waiting[0]
    latents = torch.randn(1, 16, 3, 4, 6)
    assert torch.equal(own.decode_stream(latents)[0], plain.decode_stream(latents)[0])
    assert encoder.data_ptr() == waiting[0] and (decoder.data_ptr() == waiting[1]) == (offload == "encoder")


def test_what_costs_nothing_comes_first() -> None:
    """Where nothing is encoded the encoder waits before anything else is changed; else it is one of several ways."""
    config, _ = load(720)
    first, second = list(candidates(config, work_of(config)))[:2]
    assert first == config and second == replace(config, sampling=replace(config.sampling, offload="encoder"))
    assert list(candidates(config, work_of(config, encodes=True)))[1].sampling.offload == "none"


def test_fewer_frames_of_the_feed_forward_differ_by_rounding() -> None:
    model = build_model(ModelConfig(depth=2, hidden_size=224, num_heads=4), device="cpu", dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 7, 4, 6, generator=rng, dtype=torch.float64)
    text = TextEmbedding(
        torch.randn(2, 300, 2304, generator=rng, dtype=torch.float64), torch.ones(2, 300, dtype=torch.bool)
    )
    t = torch.tensor([300.0, 800.0], dtype=torch.float64)
    expected, state = model(x, t, text, plan=ChunkPlan((4, 3)))
    for frames in (1, 2, 3, 6, 7, 9):
        for block in model.blocks:
            block.feed_forward.frames_per_call = frames
        given, own = model(x, t, text, plan=ChunkPlan((4, 3)))
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own[:3], state[:3], rtol=1e-12, atol=1e-12)


def test_in_float8_too() -> None:
    """Whose Mix-FFN takes rows that the norm before it has rounded, each with a scale of its own."""
    model = build_model(ModelConfig(depth=2, hidden_size=224, num_heads=4), device="cpu", dtype=torch.float32)
    to_float8(model)
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 16, 7, 4, 6, generator=rng), torch.tensor([300.0, 800.0])
    text = TextEmbedding(torch.randn(2, 300, 2304, generator=rng), torch.ones(2, 300, dtype=torch.bool))
    with torch.no_grad():
        expected, _ = model(x, t, text)
        for block in model.blocks:
            block.feed_forward.frames_per_call = 3
        given, _ = model(x, t, text)
    # A rounded row that rounds the other way is a step of three bits.
    assert (given - expected).norm() < 1e-3 * expected.norm()


def test_the_setting_reaches_every_block() -> None:
    model = empty_model(ModelConfig(depth=3, feed_forward_frames=5))
    assert [block.feed_forward.frames_per_call for block in model.blocks] == [5, 5, 5]


def test_a_moment_that_somebody_holds_stays_as_it_is() -> None:
    """The decoder's memory of a saved state is not the one that the video goes on with."""
    config: InferenceConfig = load_config(SHAPES, list(SMALL))
    engine, prompt = Engine(config, "cpu"), Prompt(1, TEXTS[0], TEXTS[:1], 0, 32, 48)
    with caption_encoder(engine.config, engine.device) as encode:
        caption = encode(prompt)
    models = engine.load()
    held, copies = [], []
    for frames in engine.sample(*models, [prompt], [caption], wanted=lambda chunk: True):
        if (after := frames.after) is not None:
            assert after.decoder is not None
            held.append(after.decoder.features)
            copies.append([feature.clone() for feature in after.decoder.features])
    assert len(held) == 2
    for features, own in zip(held, copies, strict=True):
        assert all(torch.equal(*pair) for pair in zip(features, own, strict=True))
