"""A video that goes on from a saved state is the uncut one; files of states are whole, or refused in one line."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longsana.config import InferenceConfig, load_config
from longsana.data.prompts import Prompt
from longsana.data.story import Change, Outline, Placed
from longsana.encoders.vae import DecodeCache
from longsana.runtime.errors import InputError
from longsana.sampling import continuation
from longsana.sampling.captions import Caption, caption_encoder
from longsana.sampling.continuation import (
    KEPT,
    Continuation,
    Moment,
    Telling,
    latest,
    mark_of,
    restored,
    vae_mark_of,
)
from longsana.sampling.engine import Engine, Frames, stretches
from longsana.sampling.recent import Held, Kept, each_of_state
from longsana.sampling.transition import shown_in
from tests.pipelines.repository import shallow
from tests.sampling.pieces import by_chunk

CONFIG = "configs/sana_video_config/longsana/shapes/longsana.yaml"
PROMPT = Prompt(1, "a red circle", ("a red circle",), 0, 32, 48)
LENGTHS = (5, 4, 4, 4)  # 17 latents in chunks of 4: longer than what is kept of them


# A value and a file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(small_config, random_model, random_text, random_latents) -> Continuation:
    _, network = random_model(small_config(num_cached_blocks=2), torch.bfloat16)(
        random_latents(1, 3), torch.zeros(1), random_text(1)
    )
    decoder = DecodeCache((torch.randn(1, 4, 2, 3, 3).bfloat16(), torch.randn(1, 8, 2, 6, 6)), 3)
    before = [each_of_state(network, lambda tensor, batch: torch.randn_like(tensor))._replace(frames=n) for n in (0, 1)]
    return Continuation(
        network,
        decoder,
        2**63 + 5,
        "ein Kreis, größer",
        (32, 48),
        torch.randn(1, 4, 3, 4, 6),
        2,
        1,
        (3, 4),
        8,
        ("a", "b"),
        recent=Held(3, tuple(Kept(torch.randn(1, 4, 2, 4, 6), state.frames, state, 1) for state in before)),
        words="ein großer Kreis",
        before="ein Quadrat",
        faded=1,
        telling=Telling(4, 23.976, "recache=2", 3, "spherical", "pin"),
        pictures={2: torch.randn(1, 4, 1, 4, 6), 11: torch.randn(1, 4, 1, 4, 6)},
    )


def assert_equal(given: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert given.dtype == expected.dtype and torch.equal(given, expected)
    elif isinstance(expected, Mapping):
        assert_equal(tuple(sorted(given.items())), tuple(sorted(expected.items())))
    elif isinstance(expected, tuple):
        assert type(given) is type(expected) and len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            assert_equal(one, other)
    else:
        assert given == expected and type(given) is type(expected)


@pytest.mark.parametrize("memory", ["full", "latents"])
def test_it_round_trips_through_a_file(saved: Continuation, memory: Any, tmp_path: Path) -> None:
    saved.save(tmp_path / "state.safetensors", memory)
    expected = saved if memory == "full" else saved._replace(decoder=None)
    assert_equal(Continuation.load(tmp_path / "state.safetensors"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        (text,) = file.metadata().values()
    assert json.loads(text)["prompt"] == saved.prompt


def test_it_can_be_pickled(saved: Continuation) -> None:
    """With pictures to come and without, as by processes that hand states on."""
    plain = Continuation(*saved[:5])
    for state in (saved, plain):
        assert_equal(pickle.loads(pickle.dumps(state.moment)), state.moment)
        assert_equal(pickle.loads(pickle.dumps(state)), state)


def test_views_keep_nothing_else_alive(saved: Continuation) -> None:
    latents = torch.randn(1, 4, 40, 4, 6)
    kept = latest(saved.latents, latents)
    assert torch.equal(kept, latents[:, :, -KEPT:]) and kept.untyped_storage().nbytes() == kept.nbytes
    few = latest(saved.latents, latents[:, :, :2])
    assert saved.latents is not None and torch.equal(few, torch.cat([saved.latents, latents[:, :, :2]], dim=2))


def test_one_of_a_batch_and_copies(saved: Continuation) -> None:
    three = saved.moment.copies(3)
    assert three.network.kv.shape[1] == 3 and three.decoder is not None and len(three.decoder.features[0]) == 3
    for index in range(3):
        assert_equal(three.of(index), saved.moment)


def spoilt(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = value
    return tensor


def network(**changes: Any) -> Any:
    return lambda state: {"network": state.network._replace(**{k: f(state.network) for k, f in changes.items()})}


def last_chunk(**changes: Any) -> Any:
    def change(state: Continuation) -> dict[str, Any]:
        first, kept = state.recent.chunks
        kept = kept._replace(**{name: value(kept) for name, value in changes.items()})
        return {"recent": state.recent._replace(chunks=(first, kept))}

    return change


NO_STATES: dict[str, Any] = {
    r"holds numbers that are not finite \(kv\)": network(kv=lambda own: spoilt(own.kv, math.nan)),
    r"holds numbers that are not finite \(k_sum\)": network(k_sum=lambda own: spoilt(own.k_sum, math.inf)),
    r"holds numbers that are not finite \(tail\)": network(tail=lambda own: spoilt(own.tail, -math.inf)),
    r"dtypes that no state has: .*kv torch\.int32": network(kv=lambda own: own.kv.int()),
    r"dtypes that no state has: .*k_sum torch\.bfloat16": network(k_sum=lambda own: own.k_sum.bfloat16()),
    r"dtypes that no state has: .*tail torch\.int64": network(tail=lambda own: own.tail.long()),
    r"dtypes that no state has: .*tail torch\.float8": network(tail=lambda own: own.tail.to(torch.float8_e4m3fn)),
    r"shapes that do not belong together: kv \[": network(kv=lambda own: own.kv[:-1]),
    r"shapes that do not belong together: .*k_sum \[\]": network(k_sum=lambda own: torch.zeros(())),
    r"shapes that do not belong together: .*tail": network(tail=lambda own: own.tail[..., 1:]),
    r"without numbers in it": network(tail=lambda own: own.tail[:, :, :0]),
    r"frames=-1: must be at least 0": network(frames=lambda own: -1),
    r"frames=10.*: must be at most": network(frames=lambda own: 10**30),
    r"sinks=-1: must be at least 0": network(sinks=lambda own: -1),
    r"holds numbers that are not finite \(decoder 1\)": lambda state: {
        "decoder": state.decoder._replace(features=(state.decoder.features[0], spoilt(state.latents, math.nan)))
    },
    r"holds numbers that are not finite \(latents\)": lambda state: {"latents": spoilt(state.latents, math.nan)},
    r"its latents have shape": lambda state: {"latents": torch.zeros(1, 4, KEPT + 1, 4, 6)},
    r"its seed=.*: must be at most": lambda state: {"seed": 2**64},
    r"its size": lambda state: {"size": (32, 0)},
    r"its chunk=-1": lambda state: {"chunk": -1},
    r"its prompt: a NUL": lambda state: {"prompt": "a\0"},
    r"its caption before: a NUL": lambda state: {"before": "a\0"},
    r"its words: a NUL": lambda state: {"words": "a\0"},
    r"1 chunks of a transition from no caption": lambda state: {"before": ""},
    r"3 last latents of a video of 2": network(frames=lambda own: 2),
    r"its plan\[1\]=0: must be at least 1": lambda state: {"plan": (3, 0)},
    r"fps=0: must be positive": lambda state: {"telling": state.telling._replace(fps=0.0)},
    r"'burn' is no change of the past": lambda state: {"telling": state.telling._replace(prompt_change="burn")},
    r"last chunk 1: ends at latent 4 of a video of 3": last_chunk(start=lambda kept: 2),
    r"reach of its last chunks=.*must be at most 1000": lambda state: {"recent": state.recent._replace(reach=10**8)},
    r"its last chunks are a tuple": lambda state: {"recent": ()},
    r"holds 2 last chunks, where changes reach back 1": lambda state: {"recent": state.recent._replace(reach=1)},
    r"last chunk 1: its start=-1": last_chunk(start=lambda kept: -1),
    r"last chunk 1: holds numbers that are not finite \(latents\)": last_chunk(
        latents=lambda kept: spoilt(kept.latents, math.nan)
    ),
    r"last chunk 1: its latents have shape": last_chunk(latents=lambda kept: kept.latents[:, :, :0]),
    r"last chunk 1: holds numbers that are not finite \(k_sum\)": last_chunk(
        before=lambda kept: kept.before._replace(k_sum=spoilt(kept.before.k_sum, math.nan))
    ),
    r"last chunk 1: latents by themselves=2: must be": last_chunk(alone=lambda kept: 2),
    r"last chunk 1: 1 latents by themselves of a chunk of 1": last_chunk(latents=lambda kept: kept.latents[:, :, :1]),
    r"its pictures are a tuple; must be a mapping": lambda state: {"pictures": ()},
    r"part of a picture=-1: must be at least 0": lambda state: {"pictures": {-1: state.pictures[2]}},
    r"picture of part 2: its latents have shape": lambda state: {"pictures": {2: state.pictures[2][:, :, :, 1:]}},
    r"picture of part 2: holds numbers that are not finite": lambda state: {
        "pictures": {2: spoilt(state.pictures[2], math.nan)}
    },
    r"image_first=first: must be": lambda state: {"telling": state.telling._replace(image_first="first")},
    r"last chunk 1: the state before it has other shapes": last_chunk(
        before=lambda kept: each_of_state(kept.before, lambda tensor, batch: torch.cat([tensor] * 2, dim=batch))
    ),
}


@pytest.mark.parametrize("message", NO_STATES)
def test_numbers_that_no_state_has_are_refused(saved: Continuation, message: str, tmp_path: Path) -> None:
    state = saved._replace(**NO_STATES[message](saved))
    with pytest.raises(InputError, match=f"^state: {message}") as caught:
        state.save(tmp_path / "state.safetensors")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def rewrite(path: Path, *, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["longsana"])
    content, record = load_file(path) | (tensors or {}), record | changes
    if changes:  # so that nothing but these is wrong with it
        record.pop("sha256")
        record["sha256"] = continuation._digest(content, record)
    save_file(content, path, metadata={"longsana": json.dumps(record)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "a web page"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00."), "a PyTorch file, or another pickle, which is not opened"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 99), "a PyTorch file"),
        (lambda path: path.write_bytes(b""), "not a saved state of a video, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "not a saved state of a video, or damaged"),
        (lambda path: save_file({"kv": torch.zeros(1)}, path), "not a saved state of a video, or damaged"),
        (lambda path: rewrite(path, tensors={"latents": torch.zeros(1, 4, 3, 4, 6)}), "not those that were saved"),
        (lambda path: rewrite(path, schema=5), "a state of version 5, this LongSANA reads versions up to 4"),
        (lambda path: rewrite(path, schema="x"), "not a saved state of a video, or damaged"),
        (lambda path: rewrite(path, decoder=[9, 3, False]), r"damaged \('decoder.2'\)"),
        (lambda path: rewrite(path, size=[32]), "not a saved state of a video, or damaged"),
        (lambda path: rewrite(path, frames=-1), "frames=-1: must be at least 0"),
        (lambda path: path.unlink(), r"cannot be read \(No such file"),
    ],
)
def test_files_that_are_no_state(saved: Continuation, damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    saved.save(path)
    damage(path)
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as caught:
        Continuation.load(path)
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_noticed(saved: Continuation, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    saved.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a saved state of a video, or damaged"):
        Continuation.load(path)


@pytest.mark.parametrize(
    ("said", "other"), [('"chunk": 1', '"chunk": 2'), ("Kreis", "Krebs"), ("recache=2", "recache=3")]
)
def test_another_number_or_word_of_its_header_is_noticed(
    saved: Continuation, said: str, other: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.safetensors"
    saved.save(path)
    content = path.read_bytes()
    escaped = [text.replace('"', '\\"').encode() for text in (said, other)]
    assert content.count(escaped[0]) >= 1
    path.write_bytes(content.replace(*escaped))
    with pytest.raises(InputError, match="its numbers or words are not those that were saved"):
        Continuation.load(path)


def test_files_of_version_1_are_read(saved: Continuation, tmp_path: Path) -> None:
    """They hold no last chunks, say nothing of how a prompt was told, and their digest is of the tensors alone."""
    path = tmp_path / "state.safetensors"
    saved._replace(recent=Held(), pictures={}).save(path)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["longsana"])
    for name in continuation.LATER:
        del record[name]
    tensors = load_file(path)
    record |= {"schema": 1, "sha256": continuation._digest(tensors, None)}
    save_file(tensors, path, metadata={"longsana": json.dumps(record)})
    plain = saved._replace(recent=Held(), words="", before="", faded=0, telling=None, pictures={})
    assert_equal(Continuation.load(path), plain)


def test_its_paths(saved: Continuation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved.save("~/a.safetensors")
    assert torch.equal(Continuation.load("~/a.safetensors").network.kv, saved.network.kv)
    saved.save("b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    for path, message in (
        ("~/none/a", r"^~/none/a: no such folder as .*/none; make it first$"),
        ("~", r"^~: a folder; name a file in it$"),
        ("", r"^'': a folder"),
        ("~nosuchuser/a", r"^~nosuchuser/a: not found"),
        (b"a", r"^path=b'a': must be a path"),
        (None, r"^path=None: must be a path"),
        (5, r"^path=5: must be a path"),
        ("a\0b", r"^path='a.x00b': must be a path"),
    ):
        with pytest.raises(InputError, match=message):
            saved.save(path)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            Continuation.load(path)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="File name too long: 'xxx"):
        saved.save("x" * 300)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "meta", "", 99, 5.5])
def test_a_device_that_there_is_not(saved: Continuation, device: Any, tmp_path: Path) -> None:
    saved.save(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=r"^device=") as caught:
        Continuation.load(tmp_path / "state.safetensors", device=device)
    assert "\n" not in str(caught.value)


# Whose it is ----------------------------------------------------------------------------------------------------------


def test_a_network_is_known_by_settings_and_weights(small_config, random_model) -> None:
    network = random_model(small_config(), torch.float32)
    mark = mark_of(network)
    assert mark == mark_of(random_model(small_config(), torch.float32).to(torch.bfloat16)), "rounding makes no other"
    assert mark != mark_of(random_model(small_config(), seed=1))
    assert mark != mark_of(random_model(small_config(num_cached_blocks=2)))
    assert mark != mark_of(random_model(small_config(state_decay=0.9)))
    assert mark != mark_of(random_model(small_config(linear_attn_eps=1e-3)))
    network.optimize_layout()
    assert mark == mark_of(network)


def test_a_state_of_another_is_refused(saved: Continuation) -> None:
    saved.fitted("a", "b", "here")
    saved._replace(marks=("", "")).fitted("a", "b", "here")
    with pytest.raises(
        InputError, match=r"^here: of another network \(fingerprint a\) than this one \(c\); go on with"
    ):
        saved.fitted("c", "b", "here")
    with pytest.raises(InputError, match=r"^here: of another VAE"):
        saved.fitted("a", "c", "here")


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[["vae.latents_per_call=4"], ["vae.decoder=full"]], ids=["tiny", "full"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """With either decoder. The tiny one's groups end where chunks do, as the default's: its rounding is a group's."""
    frames = 4 * sum(LENGTHS) - 3
    settings = [f"sampling.num_frames={frames}", "sampling.chunk_frames=4", "sampling.height=32", "sampling.width=48"]
    config: InferenceConfig = load_config(
        CONFIG, [*settings, *shallow(), *request.param, "scheduler.denoising_step_list=[1000, 727]"]
    )
    return Engine(config, "cpu")


@pytest.fixture(scope="module")
def parts(engine: Engine) -> tuple[Any, Any]:
    return engine.load()


@pytest.fixture(scope="module")
def caption(engine: Engine) -> Caption:
    with caption_encoder(engine.config, engine.device) as encode:
        return encode(PROMPT)


def always(chunk: int) -> bool:
    return True


@pytest.fixture(scope="module")
def uncut(engine: Engine, parts: Any, caption: Caption) -> list[Frames]:
    return by_chunk(engine.sample(*parts, [PROMPT], [caption], wanted=always))


def gone_on(engine: Engine, parts: Any, caption: Caption, moment: Moment, chunks: int) -> list[Frames]:
    prompt = Prompt(*vars(PROMPT).values())
    object.__setattr__(prompt, "frames", 16 * chunks + 1)
    return list(engine.sample(*parts, [prompt], [caption], begun=moment, wanted=always))


def joined(frames: list[Frames]) -> tuple[Tensor, Tensor]:
    return torch.cat([part.latents for part in frames], dim=2), torch.cat([part.pixels for part in frames], dim=1)


def test_asking_for_states_changes_nothing(engine: Engine, parts: Any, caption: Caption, uncut: list[Frames]) -> None:
    plain = list(engine.sample(*parts, [PROMPT], [caption]))
    assert all(part.after is None for part in plain)
    for one, other in zip(joined(plain), joined(uncut), strict=True):
        assert torch.equal(one, other)


def psnr(given: Tensor, expected: Tensor) -> float:
    """In dB, of bytes."""
    error = float((given.float() - expected.float()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("memory", ["full", "latents"])
def test_a_video_that_goes_on_is_the_uncut_one(
    engine: Engine, parts: Any, caption: Caption, uncut: list[Frames], done: int, memory: Any, tmp_path: Path
) -> None:
    """Latents to the bit always; frames with the decoder's memory, or where the kept latents are all there were."""
    after = uncut[done - 1].after
    assert after is not None
    state = Continuation(after.network, after.decoder, 0, PROMPT.text, (32, 48), after.latents)
    state.save(tmp_path / "state.safetensors", memory)
    moment = restored(Continuation.load(tmp_path / "state.safetensors").moment, parts[1])
    rest = gone_on(engine, parts, caption, moment, len(LENGTHS) - done)
    (latents, pixels), (expected, shown) = joined(rest), joined(uncut[done:])
    assert torch.equal(latents, expected)
    if memory == "full" or sum(LENGTHS[:done]) <= KEPT:
        assert torch.equal(pixels, shown)
    else:
        assert psnr(pixels, shown) > 50
    assert_equal(rest[-1].after and rest[-1].after.network, uncut[-1].after and uncut[-1].after.network)


def test_the_more_latents_are_kept_the_nearer_the_frames(
    engine: Engine, parts: Any, caption: Caption, uncut: list[Frames]
) -> None:
    after = uncut[2].after
    assert after is not None and after.latents is not None
    found = []
    for count in (1, 3, 6, KEPT):
        moment = restored(after._replace(decoder=None, latents=after.latents[:, :, -count:]), parts[1])
        found.append(psnr(*(joined(part)[1] for part in (gone_on(engine, parts, caption, moment, 1), uncut[3:]))))
    assert found == sorted(found) and found[0] < 70 < found[-1], found


def test_its_memory_does_not_grow(uncut: list[Frames]) -> None:
    sizes = set()
    for part in uncut[2:]:
        assert part.after is not None and part.after.decoder is not None and part.after.latents is not None
        sizes.add((part.after.network.nbytes, part.after.decoder.nbytes, part.after.latents.untyped_storage().nbytes()))
    assert len(sizes) == 1


def test_forks(engine: Engine, parts: Any, caption: Caption, uncut: list[Frames]) -> None:
    """Several videos go on from one state together; each is the one that goes on alone, within rounding."""
    after = uncut[1].after
    assert after is not None
    seeds = [Prompt(1, PROMPT.text, PROMPT.parts, 0, 32, 48, seed, 33) for seed in (0, 7)]
    both = joined(list(engine.sample(*parts, seeds, [caption] * 2, begun=after.copies(2))))
    for index, seed in enumerate(seeds):
        alone = joined(list(engine.sample(*parts, [seed], [caption], begun=after)))
        torch.testing.assert_close(both[0][index : index + 1], alone[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(both[0][0], both[0][1])


def test_another_vaes_latents_are_refused(parts: Any, uncut: list[Frames]) -> None:
    after = uncut[0].after
    assert after is not None and after.latents is not None and after.decoder is not None
    with pytest.raises(InputError, match="its latents have 4 channels, this VAE's 16"):
        restored(after._replace(decoder=None, latents=after.latents[:, :4]), parts[1])
    half = after.decoder._replace(features=tuple(part.bfloat16() for part in after.decoder.features))
    with pytest.raises(InputError, match=r"of a VAE in torch\.bfloat16, this one is in torch\.float32"):
        restored(after._replace(decoder=half), parts[1])
    with pytest.raises(InputError, match="without the last of them"):
        restored(after._replace(decoder=None, latents=None), parts[1])


# How latents are grouped ----------------------------------------------------------------------------------------------


def cuts(lengths: list[int], size: int, start: int = 0) -> Iterator[int]:
    for length in lengths:
        for piece in stretches(torch.zeros(1, 1, length, 1, 1), start, size):
            start += piece.shape[2]
            yield start


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10])
def test_cuts_are_a_function_of_the_absolute_index(size: int) -> None:
    whole = set(cuts([61], size))
    assert whole == {*range(1 + size, 61, size), 61}
    for lengths in ([11, 10, 10, 30], [15, 10, 36], [1, 60], [7, 7, 7, 40]):
        given, start = list(cuts(lengths, size)), 0
        for length in lengths:
            inside = [cut for cut in given if start < cut < start + length]
            long = length > size + 1
            assert inside == [cut for cut in sorted(whole) if start < cut < start + length and long]
            start += length
        for done in range(1, len(lengths)):
            start = sum(lengths[:done])
            assert list(cuts(lengths[done:], size, start)) == [cut for cut in given if cut > start]
    assert max(piece.shape[2] for piece in stretches(torch.zeros(1, 1, 61, 1, 1), 0, size)) == size + 1


@pytest.mark.parametrize("done", range(7))
def test_parts_of_a_caption_go_on_as_planned(done: int) -> None:
    """Within a transition, too; after the plan the last part stays."""
    parts = (Placed(0), Placed(1, Change("rebuild", 1)), Placed(4, Change("recache", 1)))
    whole = Outline(parts, 6)
    for chunks in range(1, 5):
        rest, uncut = whole.after(done), shown_in(whole, done + chunks, 2)
        assert shown_in(rest, chunks, 2) == uncut[done:]
        assert list(rest.shown(chunks)) == sorted({one.part for one in uncut[done:]})
        assert rest.changes == {chunk - done: change for chunk, change in whole.changes.items() if chunk >= done}
    assert whole.after(2).shown(9) == {1: Placed(0), 2: Placed(2, Change("recache", 1))}
    assert whole.after(1).shown(3) == {1: Placed(0, Change("rebuild", 1))}


def test_marks_of_the_shipped_parts(parts: Any) -> None:
    assert mark_of(parts[0]) == mark_of(parts[0]) and vae_mark_of(parts[1]) != mark_of(parts[0])
