"""Published repositories load, and what is saved is one; `PipelineTesterMixin`'s checks of files, by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import longsana
from longsana import LongSanaVideoPipeline
from longsana.config import TextEncoderConfig
from longsana.encoders.text import GemmaTextEncoder
from longsana.pipelines.transformer import SanaVideoCausalTransformer3DModel, SanaVideoTransformer3DModel
from longsana.runtime.errors import InputError
from longsana.weights.names import diffusers_config
from tests.pipelines.repository import (
    ASSET,
    DEPTH,
    DISTILLED,
    PROMPT,
    few_blocks,
    quiet,
    shapes_config,
    shapes_repository,
    write_transformer,
)
from tests.pipelines.test_options import inputs
from tests.weights.checkpoints import TINY, weights


def latents(pipe: LongSanaVideoPipeline) -> torch.Tensor:
    frames: torch.Tensor = pipe(**inputs(output_type="latent")).frames
    return frames


@pytest.mark.parametrize("name", ["SanaVideoPipeline", "LongSanaVideoPipeline"])
def test_either_name_of_the_pipeline(name: str, tmp_path: Path, loaded: LongSanaVideoPipeline) -> None:
    pipe = quiet(shapes_repository(tmp_path, pipeline=name))
    assert type(pipe) is LongSanaVideoPipeline and pipe.distilled
    assert torch.equal(latents(pipe), latents(loaded))


@pytest.mark.parametrize("fixture", ["loaded", "loaded_base"])
def test_save_load_local(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(fixture)
    pipe.save_pretrained(tmp_path / "once")
    again = quiet(tmp_path / "once")
    assert torch.equal(latents(again), latents(pipe))
    named = [{key: value for key, value in p.config.items() if key[0] != "_"} for p in (again, pipe)]
    assert named[0] == named[1]
    index = json.loads((tmp_path / "once/model_index.json").read_text())
    assert index["transformer"] == ["diffusers", type(pipe.transformer).__name__]
    again.save_pretrained(tmp_path / "twice", max_shard_size="2MB")
    assert (tmp_path / "twice/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert torch.equal(latents(quiet(tmp_path / "twice")), latents(pipe))


def test_saved_files_are_the_published_ones(
    loaded: LongSanaVideoPipeline, distilled_folder: Path, tmp_path: Path
) -> None:
    loaded.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / "transformer" / name) for folder in (distilled_folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    published = diffusers_config(shapes_config().model) | {"_class_name": DISTILLED}
    written = json.loads((tmp_path / "transformer/config.json").read_text())
    assert written | published == written
    for part in ("vae/config.json", f"vae/{name}", "text_encoder/config.json", "text_encoder/model.safetensors"):
        assert (tmp_path / part).is_file()
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()
    assert (tmp_path / "scheduler/scheduler_config.json").is_file()


def test_diffusers_loads_the_base_model_that_we_save(loaded_base: LongSanaVideoPipeline, tmp_path: Path) -> None:
    import diffusers

    loaded_base.save_pretrained(tmp_path)
    theirs = diffusers.SanaVideoPipeline.from_pretrained(tmp_path)
    assert isinstance(theirs.transformer, diffusers.SanaVideoTransformer3DModel)


def test_save_load_optional_components(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    alone = LongSanaVideoPipeline(vae=loaded.vae, transformer=loaded.transformer, chi_prompt="none", caption_length=48)
    alone.save_pretrained(tmp_path)
    again = quiet(tmp_path)
    assert again.text_encoder is again.tokenizer is again.scheduler is None
    embeds, mask, *_ = loaded.encode_prompt("")
    given = inputs(prompt_embeds=embeds, prompt_attention_mask=mask, output_type="latent")
    expected = loaded(**inputs(prompt_embeds=embeds, prompt_attention_mask=mask, output_type="latent"))
    assert torch.equal(again(**given).frames, expected.frames)


def test_loading_with_variants(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "whole", variant="fp16")
    loaded.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="2MB")
    for folder in ("whole", "shards"):
        names = [file.name for file in (tmp_path / folder / "transformer").glob("*.safetensors")]
        assert names and all(".fp16" in name for name in names)
        pipe = quiet(tmp_path / folder, variant="fp16")
        assert torch.equal(latents(pipe), latents(loaded))


def test_loading_with_incorrect_variants_raises_error(loaded: LongSanaVideoPipeline, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="no such modeling files are available"):
        LongSanaVideoPipeline.from_pretrained(tmp_path, variant="notfp16")


def test_torch_dtype_dict(distilled_folder: Path) -> None:
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, torch_dtype=dtypes)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_save_pretrained_dtype(name: str, distilled_folder: Path, tmp_path: Path) -> None:
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, **{name: torch.bfloat16})
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert all(tensor.dtype == torch.bfloat16 for tensor in pipe.transformer.state_dict().values())
    pipe.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_pipeline_with_device_map(distilled_folder: Path, loaded: LongSanaVideoPipeline) -> None:
    pipe = quiet(distilled_folder, device_map="cpu")
    assert torch.equal(latents(pipe), latents(loaded))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_transformer_by_itself(distilled_folder: Path, low_cpu_mem_usage: bool) -> None:
    model, info = SanaVideoCausalTransformer3DModel.from_pretrained(
        distilled_folder, subfolder="transformer", low_cpu_mem_usage=low_cpu_mem_usage, output_loading_info=True
    )
    assert not any(info.values())
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    x, tokens, t = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 64), torch.tensor([700])
    out = model(x, tokens, t)
    sample, state = model(x, tokens, t, torch.ones(1, 7), return_dict=False)
    assert torch.equal(out.sample, sample) and out.state.frames == state.frames == 2


def test_a_transformer_of_other_sizes(tmp_path: Path) -> None:
    """Sizes come from its config.json, also those that no shape of a tensor tells."""
    model = SanaVideoTransformer3DModel(**{k: v for k, v in diffusers_config(TINY).items() if not k.startswith("_")})
    assert {name: tuple(t.shape) for name, t in model.network.state_dict().items() if "null" not in name} == {
        name: tuple(tensor.shape) for name, tensor in weights().items() if "null" not in name
    }
    assert model.network.heads == 6 and all(parameter.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = SanaVideoTransformer3DModel.from_pretrained(tmp_path)
    for name, tensor in model.network.named_parameters():
        assert torch.equal(again.network.get_parameter(name), tensor), name


@pytest.mark.parametrize("tokenizer", ["GemmaTokenizer", "GemmaTokenizerFast"])
def test_a_published_text_encoder(
    tokenizer: str, distilled_folder: Path, tmp_path: Path, loaded: LongSanaVideoPipeline
) -> None:
    """A causal LM in bfloat16 shards whose tokenizer pads on the left, read as the batch command reads that folder."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = shutil.copytree(distilled_folder, tmp_path / "repository")
    shutil.rmtree(folder / "text_encoder")
    settings = json.loads((ASSET / "text_encoder/config.json").read_text()) | {"vocab_size": 704}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Gemma2ForCausalLM(Gemma2Config(**settings)).bfloat16().save_pretrained(
            folder / "text_encoder", max_shard_size="100KB"
        )
    assert len(list((folder / "text_encoder").glob("model-*.safetensors"))) > 1
    edited("tokenizer/tokenizer_config.json", tokenizer_class=tokenizer, padding_side="left")(folder)
    edited(
        "model_index.json", text_encoder=["transformers", "Gemma2ForCausalLM"], tokenizer=["transformers", tokenizer]
    )(folder)
    together = shutil.copytree(folder / "text_encoder", tmp_path / "together")
    shutil.copytree(folder / "tokenizer", together, dirs_exist_ok=True)
    encoder = GemmaTextEncoder.load(
        TextEncoderConfig(text_encoder_name=str(together), chi_prompt="none", softcap=True),
        caption_length=48,
        caption_channels=64,
        device="cpu",
        dtype=torch.bfloat16,
    )
    expected = encoder.encode(f"{PROMPT} motion score: 10.")
    pipe = LongSanaVideoPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, transformer=loaded.transformer)
    embeds, mask, *_ = pipe.encode_prompt(PROMPT)
    assert torch.equal(mask, expected.mask) and torch.equal(embeds[mask], expected.tokens[mask])


def test_a_passed_part_is_taken(distilled_folder: Path, loaded: LongSanaVideoPipeline) -> None:
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, transformer=loaded.transformer, text_encoder=None)
    assert pipe.transformer is loaded.transformer and pipe.text_encoder is None


def test_a_repository_in_the_hubs_cache(distilled_folder: Path, tmp_path: Path, loaded: LongSanaVideoPipeline) -> None:
    cached = tmp_path / "models--owner--video"
    shutil.copytree(distilled_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)
    pipe = LongSanaVideoPipeline.from_pretrained("owner/video", cache_dir=tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(latents(pipe), latents(loaded))


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut(folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn1.to_x.weight"] = tensors.pop("transformer_blocks.0.attn1.to_q.weight")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edited("model_index.json", transformer=["diffusers", "UNet2DModel"]), "transformer is UNet2DModel; this pipe"),
        (edited("transformer/config.json", qk_norm="layer_norm"), "config.json: not a network .*qk_norm layer_norm"),
        (edited("transformer/config.json", guidance_embeds=True), "guidance_embeds True"),
        (edited("transformer/config.json", cross_attention_dim=7), "cross_attention_dim 7"),
        (edited("transformer/config.json", num_layers=DEPTH - 1), f"unexpected .*transformer_blocks.{DEPTH - 1}"),
        (edited("transformer/config.json", in_channels=8, out_channels=8), "wrong shape"),
        (edited("model_index.json", chi_prompt="long"), "chi_prompt=long"),
        (cut, r"missing 1: .*to_q.weight; unexpected 1: .*to_x.weight \(did you mean"),
    ],
)
def test_other_repositories_are_refused(
    spoil: Callable[[Path], None], message: str, distilled_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(distilled_folder, tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        LongSanaVideoPipeline.from_pretrained(folder)


def test_parts_that_do_not_belong_together(
    loaded: LongSanaVideoPipeline, distilled_folder: Path, tmp_path: Path
) -> None:
    import diffusers

    theirs = diffusers.SanaVideoTransformer3DModel.from_pretrained(distilled_folder / "transformer")
    with pytest.raises(InputError, match="vae: a AutoencoderKL; needed is an AutoencoderKLWan"):
        LongSanaVideoPipeline(vae=diffusers.AutoencoderKL(), transformer=loaded.transformer)
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=8, latents_mean=[0] * 8, latents_std=[1] * 8)
    with pytest.raises(InputError, match="vae: not a Wan"):
        LongSanaVideoPipeline(vae=vae, transformer=loaded.transformer)
    with pytest.raises(InputError, match=r"a diffusers.*; needed is SanaVideoCausal.* which from_pretrained builds"):
        LongSanaVideoPipeline(vae=loaded.vae, transformer=theirs)
    folder = shutil.copytree(distilled_folder, tmp_path / "wide")
    wide = shapes_config(**{"model.caption_channels": 32}).model
    shutil.rmtree(folder / "transformer")
    model = SanaVideoCausalTransformer3DModel(
        **{k: v for k, v in diffusers_config(wide).items() if not k.startswith("_")}
    )
    model.save_pretrained(folder / "transformer")
    with pytest.raises(InputError, match="a gemma2 64 wide; the transformer needs a gemma2 of 32"):
        quiet(folder)(**inputs())


def test_shards_of_a_published_transformer(distilled_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(distilled_folder, tmp_path / "shards")
    shutil.rmtree(folder / "transformer")
    write_transformer(
        folder / "transformer", few_blocks("longsana"), shapes_config().model, DISTILLED, shard_bytes=500_000
    )
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(latents(quiet(folder)), latents(quiet(distilled_folder)))


def test_the_package_stays_light() -> None:
    program = (
        "import sys, longsana\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "try:\n    longsana.LongSana\nexcept AttributeError as error:\n    assert 'LongSana' in str(error)\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert longsana.LongSanaVideoPipeline.__name__ == "LongSanaVideoPipeline"
