"""The text encoder: what the network is told about a prompt (method.md 5), and which folders it is loaded from."""

from __future__ import annotations

import hashlib
import importlib
import json
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longsana.config import TextEncoderConfig
from longsana.encoders.text import (
    GemmaTextEncoder,
    compact,
    complex_human_instruction,
    expand,
    negative_text,
    published_negative_prompt,
)
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.errors import InputError

ASSET = Path(__file__).parents[2] / "asset" / "shapes"
SMALL = ASSET / "text_encoder"
LENGTH = 32
CAPTION = "A small red circle moves slowly to the right on a black background. motion score: 10."


def load(
    name: str | Path, *, chi: str = "none", length: int = LENGTH, channels: int = 64, softcap: bool = False
) -> GemmaTextEncoder:
    config = TextEncoderConfig(text_encoder_name=str(name), chi_prompt=chi, softcap=softcap)
    return GemmaTextEncoder.load(
        config, caption_length=length, caption_channels=channels, device="cpu", dtype=torch.float32
    )


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def instructed() -> GemmaTextEncoder:
    return load(f"seeded:{SMALL}", chi="sana")


@pytest.fixture(scope="module")
def plain() -> GemmaTextEncoder:
    return load(f"seeded:{SMALL}")


@pytest.fixture(scope="module")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like gemma-2-2b-it: a causal LM in bfloat16 shards, GemmaTokenizer, padding on the left."""
    folder = tmp_path_factory.mktemp("gemma") / "it"
    config = {**json.loads((SMALL / "config.json").read_text()), "vocab_size": 704}  # Gemma's own class adds <mask>
    before = torch.random.get_rng_state()
    torch.manual_seed(3)
    Gemma2ForCausalLM(Gemma2Config(**config)).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    torch.random.set_rng_state(before)
    shutil.copy(SMALL / "tokenizer.json", folder)
    settings = json.loads((SMALL / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="GemmaTokenizer", padding_side="left", truncation_side="left")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def published(published_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published_once, tmp_path / "it"))


def hidden_states(encoder: GemmaTextEncoder, text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids and hidden states (n, C) of a text by itself, without padding."""
    ids: list[int] = encoder.tokenizer(text)["input_ids"]
    with torch.no_grad():
        return ids, encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


# The instruction


def test_the_instruction_is_the_published_one() -> None:
    text = complex_human_instruction()
    assert len(text) == 1057
    assert text.endswith("\nUser Prompt: ")
    assert text.count('"') == 2 and "\\" not in text and "'" not in text
    expected = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_the_negative_prompt_is_the_published_one() -> None:
    text = negative_text(None)
    assert len(text) == 285
    expected = "a38af16b9506f1c9817a43315c360fdef323c7483ea3b050803c349de9e73d8d"
    assert hashlib.sha256(text.encode()).hexdigest() == expected
    assert negative_text("") == ""
    assert negative_text("null") == "null"


def test_another_instruction_in_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def other(self: object, complex_human_instruction: list[str] = ["Make it pretty: "]) -> None:  # noqa: B006
        pass

    monkeypatch.setattr(diffusers.SanaPipeline, "__call__", other)
    with pytest.raises(InputError, match=r"diffusers .*0\.36 to 0\.42\.1.*text_encoder\.chi_prompt"):
        complex_human_instruction.__wrapped__()


@pytest.mark.parametrize("example", ['negative_prompt = "dull"', "no negative prompt", None])
def test_another_negative_prompt_in_diffusers_is_refused(example: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "diffusers.pipelines.sana_video.pipeline_sana_video"
    if example is None:  # a diffusers without this pipeline
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.setattr(importlib.import_module(name), "EXAMPLE_DOC_STRING", example)
    with pytest.raises(InputError, match=r"diffusers .*0\.36 to 0\.42\.1.*sampling\.negative_prompt") as caught:
        published_negative_prompt.__wrapped__()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("chi", "instruction"), [("none", ""), ("Describe it: ", "Describe it: ")])
def test_an_instruction_of_ones_own(chi: str, instruction: str) -> None:
    encoder = load(f"seeded:{SMALL}", chi=chi)
    assert encoder.instruction == instruction


@pytest.mark.parametrize("chi", ["snaa", "", " "])
def test_a_single_word_is_no_instruction(chi: str) -> None:
    with pytest.raises(InputError, match="must be sana, none, or an instruction in full"):
        load(f"seeded:{SMALL}", chi=chi)


# The cap of the attention's logits


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights so large that the cap bends the attention's logits."""
    folder = tmp_path_factory.mktemp("sharp")
    config = {**json.loads((SMALL / "config.json").read_text()), "initializer_range": 0.4}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        Gemma2Model(Gemma2Config(**config)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder)
    return folder


def kept(encoder: GemmaTextEncoder) -> torch.Tensor:
    embedding = encoder.encode(CAPTION)
    return embedding.tokens[embedding.mask]


def test_without_the_cap_it_is_the_attention_that_published_networks_saw(sharp: Path) -> None:
    """They saw transformers' `sdpa`, which newer versions refuse for Gemma 2 because it has no cap."""
    AttentionInterface.register("fused", sdpa_attention_forward)
    AttentionMaskInterface.register("fused", sdpa_mask)
    capped, plain = load(sharp, softcap=True), load(sharp)
    twin = load(sharp)
    twin.model.set_attn_implementation("fused")
    torch.testing.assert_close(kept(plain), kept(twin), rtol=1e-4, atol=1e-4)
    difference = (kept(capped) - kept(plain)).norm() / kept(plain).norm()
    assert 0.003 < float(difference) < 0.3


def test_with_the_cap_it_is_transformers_own(sharp: Path) -> None:
    reference = Gemma2Model.from_pretrained(sharp, attn_implementation="eager")
    ids, _ = hidden_states(load(sharp), CAPTION)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(kept(load(sharp, softcap=True)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kept(load(sharp)), expected, rtol=1e-3, atol=1e-3)


def test_a_model_is_set_to_the_cap_that_is_asked_for_and_keeps_its_config(sharp: Path) -> None:
    tokenizer, model = load(sharp).tokenizer, Gemma2ForCausalLM.from_pretrained(sharp)
    for softcap in (False, True, False):
        encoder = GemmaTextEncoder.around(
            tokenizer, model, chi_prompt="none", softcap=softcap, caption_length=LENGTH, caption_channels=64
        )
        assert torch.equal(kept(encoder), kept(load(sharp, softcap=softcap)))
        assert model.config.attn_logit_softcapping == 50.0


def test_a_cap_that_the_folder_does_not_name_is_refused(published: Path) -> None:
    edit("config.json", attn_logit_softcapping=None)(published)
    load(published)
    with pytest.raises(InputError, match=r"softcap=true: .* no attn_logit_softcapping"):
        load(published, softcap=True)


# Encoding


def test_with_the_instruction_bos_and_the_prompt_are_kept(instructed: GemmaTextEncoder) -> None:
    embedding = instructed.encode(CAPTION)
    ids, hidden = hidden_states(instructed, complex_human_instruction() + CAPTION)
    # The instruction's trailing space has become part of the prompt's first word, as with Gemma's own tokenizer.
    prompt_ids = instructed.tokenizer(f" {CAPTION}")["input_ids"]
    count = len(prompt_ids)
    assert ids[-(count - 1) :] == prompt_ids[1:]
    assert embedding.tokens.shape == (1, LENGTH, 64)
    assert embedding.mask.dtype == torch.bool
    assert embedding.mask.tolist() == [[True] * count + [False] * (LENGTH - count)]
    kept = torch.cat([hidden[:1], hidden[-(count - 1) :]])
    torch.testing.assert_close(embedding.tokens[0, :count], kept, rtol=1e-5, atol=1e-5)


def test_the_prompt_has_seen_the_instruction(instructed: GemmaTextEncoder) -> None:
    with_it, without = instructed.encode(CAPTION), instructed.encode(CAPTION, instruction=False)
    assert (with_it.tokens - without.tokens)[with_it.mask][1:].abs().mean() > 0.1


def test_a_prompt_that_does_not_merge_with_the_space_keeps_the_space(instructed: GemmaTextEncoder) -> None:
    embedding = instructed.encode("10")
    ids, hidden = hidden_states(instructed, complex_human_instruction() + "10")
    space = instructed.tokenizer.convert_tokens_to_ids("\u2581")
    assert ids[-3] == space
    assert int(embedding.mask.sum()) == 4  # <bos>, the space, 1, 0
    torch.testing.assert_close(embedding.tokens[0, 1:4], hidden[-3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chi", ["sana", "none"])
def test_without_the_instruction_it_is_the_tokens_of_the_prompt(
    chi: str, instructed: GemmaTextEncoder, plain: GemmaTextEncoder
) -> None:
    embedding = instructed.encode(CAPTION, instruction=False) if chi == "sana" else plain.encode(CAPTION)
    ids, hidden = hidden_states(plain, CAPTION)
    assert ids[0] == plain.tokenizer.bos_token_id
    assert embedding.mask.tolist() == [[True] * len(ids) + [False] * (LENGTH - len(ids))]
    torch.testing.assert_close(embedding.tokens[0, : len(ids)], hidden, rtol=1e-5, atol=1e-5)


def test_the_empty_prompt(instructed: GemmaTextEncoder) -> None:
    assert int(instructed.encode("", instruction=False).mask.sum()) == 1
    assert int(instructed.encode("").mask.sum()) == 2  # the instruction's last space


@pytest.mark.parametrize("instruction", [True, False])
def test_an_embedding_does_not_depend_on_what_was_encoded_before(
    instructed: GemmaTextEncoder, instruction: bool
) -> None:
    first = instructed.encode(CAPTION, instruction=instruction)
    instructed.encode("A huge cyan star. " * 20, instruction=not instruction)
    instructed.overflow("A tiny ring")
    instructed.encode("", instruction=instruction)
    again = instructed.encode(CAPTION, instruction=instruction)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.mask, again.mask)


@pytest.mark.parametrize("chi", ["sana", "none"])
def test_padding_does_not_change_the_prompt(chi: str) -> None:
    short, long = (load(f"seeded:{SMALL}", chi=chi, length=length).encode(CAPTION) for length in (LENGTH, 3 * LENGTH))
    assert int(short.mask.sum()) == int(long.mask.sum()) < LENGTH
    torch.testing.assert_close(short.tokens[short.mask], long.tokens[long.mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instruction", [True, False])
def test_overflow_counts_what_is_cut_from_the_end(instructed: GemmaTextEncoder, instruction: bool) -> None:
    fits = " ".join(["red"] * (LENGTH - 1))
    # "red" alone is not a word of the small tokenizer as " red" is: an "a" in front is one token either way.
    fits = "a" + fits.removeprefix("red")
    for extra in (0, 1, 5):
        prompt = fits + " blue" * extra
        embedding = instructed.encode(prompt, instruction=instruction)
        assert instructed.overflow(prompt, instruction=instruction) == extra
        assert bool(embedding.mask.all())
        assert torch.equal(embedding.tokens, instructed.encode(fits, instruction=instruction).tokens)
    assert instructed.overflow("a red circle", instruction=instruction) == 0


def test_compact_keeps_what_the_network_may_look_at(plain: GemmaTextEncoder) -> None:
    first, second = plain.encode(CAPTION), plain.encode("a ring")
    both = TextEmbedding(torch.cat([first.tokens, second.tokens]), torch.cat([first.mask, second.mask]))
    both.mask[1, 0] = False  # a hole at the start: nothing assumes that the kept ones come first
    stored = compact(both)
    assert stored.tokens.shape == (int(both.mask.sum()), 64)
    assert stored.tokens.untyped_storage().nbytes() == stored.tokens.nbytes  # no view that keeps the whole alive
    back = expand(stored, "cpu")
    assert back.tokens.dtype == both.tokens.dtype
    assert torch.equal(back.mask, both.mask)
    assert torch.equal(back.tokens, both.tokens * both.mask[..., None])


# Loading


def test_seeded_weights_are_always_the_same_and_draw_from_no_generator_of_others(plain: GemmaTextEncoder) -> None:
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    again = load(f"seeded:{SMALL}")
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert 0.09 < float(plain.model.embed_tokens.weight.std()) < 0.11  # the config's initializer_range


def test_the_loaded_model_is_frozen(published: Path) -> None:
    for name in (f"seeded:{SMALL}", published):
        model = load(name).model
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())


def test_a_published_folder(published: Path) -> None:
    encoder = load(published, softcap=True)
    reference = Gemma2ForCausalLM.from_pretrained(published, dtype=torch.float32, attn_implementation="eager").model
    embedding = encoder.encode(CAPTION)
    ids, _ = hidden_states(encoder, CAPTION)
    assert isinstance(encoder.model, Gemma2Model)
    assert embedding.mask.tolist() == [[True] * len(ids) + [False] * (LENGTH - len(ids))]  # padded on the right
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(embedding.tokens[:, : len(ids)], expected, rtol=1e-5, atol=1e-5)
    long = encoder.encode(CAPTION + " blue" * LENGTH)
    torch.testing.assert_close(long.tokens[:, : len(ids)], expected, rtol=1e-5, atol=1e-5)  # the end is cut


def test_the_dtype_is_the_callers(published: Path) -> None:
    config = TextEncoderConfig(text_encoder_name=str(published), chi_prompt="none")
    encoder = GemmaTextEncoder.load(
        config, caption_length=LENGTH, caption_channels=64, device="cpu", dtype=torch.bfloat16
    )
    assert encoder.encode(CAPTION).tokens.dtype == torch.bfloat16


def test_code_in_a_folder_is_not_run(published: Path) -> None:
    trace = published / "trace"
    (published / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    for name, auto_map in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ):
        edit(name, auto_map=auto_map)(published)
    load(published).encode(CAPTION)
    assert not trace.exists()


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return spoil


def write(name: str, content: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(content)

    return spoil


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = next(file for file in sorted(folder.glob("model-*.safetensors")) if len(load_file(file)) > 1)
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][gone]
    index.write_text(json.dumps(content))


def without_bos(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False)(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "no config.json"),
        (write("config.json", "{"), "config.json: cannot be read"),
        (edit("config.json", model_type="llama"), "model_type is 'llama'"),
        (edit("config.json", model_type="nonsense"), "config.json: cannot be read"),
        (remove("tokenizer.json"), r"no tokenizer\.json"),
        (write("tokenizer.json", "{}"), "not a tokenizer"),
        (write("tokenizer.json", '{"model": {}}'), "its tokenizer cannot be read"),
        (without_bos, "does not put <bos>"),
        (edit("config.json", vocab_size=500), "its tokenizer has 535 tokens, its config.json 500"),
        (remove("*.safetensors"), r"no \*\.safetensors weights; .*seeded:"),
        (without_a_tensor, "not the weights of its config.json: missing 1: "),
        (
            edit("config.json", num_hidden_layers=1, layer_types=["full_attention"]),
            r"not the weights of its config\.json: unexpected 11: layers\.1\.",
        ),
        (edit("config.json", intermediate_size=256), r"wrong shape or dtype \d: layers\.0\.mlp"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    ],
)
def test_a_spoiled_folder_is_refused_in_one_line(
    published: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(published)
    with pytest.raises(InputError, match=message) as caught:
        load(published)
    assert "\n" not in str(caught.value)
    assert str(published) in str(caught.value)


def test_another_width_than_the_networks_is_refused() -> None:
    with pytest.raises(InputError, match=r"64 wide, but model\.caption_channels is 2304"):
        load(f"seeded:{SMALL}", channels=2304)


def test_a_missing_folder() -> None:
    for name in ("no/such/folder", "seeded:no/such/folder"):
        with pytest.raises(InputError, match=r"text_encoder_name: 'no/such/folder'"):
            load(name)


# The small tokenizer in asset/shapes/text_encoder


def test_the_small_tokenizer_is_small_and_has_gemmas_special_tokens(plain: GemmaTextEncoder) -> None:
    assert sum(file.stat().st_size for file in SMALL.glob("*.json")) < 150_000
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert plain.tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert len(plain.tokenizer) == plain.model.config.vocab_size


@pytest.mark.parametrize("text", [CAPTION, "猫 and a zebra, 3 % \\ \n\t end", "<0x41>", " two  spaces "])
def test_the_small_tokenizer_loses_nothing(plain: GemmaTextEncoder, text: str) -> None:
    ids = plain.tokenizer(text)["input_ids"]
    assert plain.tokenizer.unk_token_id not in ids
    assert plain.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_small_tokenizer_knows_the_words_of_its_world(plain: GemmaTextEncoder) -> None:
    for line in (ASSET.parent / "samples" / "shapes_prompts.txt").read_text().splitlines():
        words = line.replace(",", " ,").replace(".", " .").split()
        assert len(plain.tokenizer(line)["input_ids"]) == 1 + len(words)


def test_the_script_makes_the_same_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["make_tokenizer.py", str(tmp_path / name)])
        runpy.run_path(str(ASSET / "make_tokenizer.py"), run_name="__main__")
    for file in SMALL.glob("*.json"):
        first = (tmp_path / "first" / file.name).read_bytes()
        assert first == (tmp_path / "second" / file.name).read_bytes()
        assert json.loads(first) == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [str(SMALL), f"seeded:{SMALL}"])
def test_low_precision_leaves_positions_exact(name: str) -> None:
    """The frequencies of rotary positions are no weights: casting them turns late words by the wrong angle."""
    low, exact = (
        GemmaTextEncoder.load(
            TextEncoderConfig(text_encoder_name=name, chi_prompt="none"),
            caption_length=LENGTH,
            caption_channels=64,
            device="cpu",
            dtype=dtype,
        ).model
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert torch.equal(low.rotary_emb.inv_freq, exact.rotary_emb.inv_freq)
