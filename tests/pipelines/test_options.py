"""What diffusers checks of its own pipelines (`PipelineTesterMixin`, which does not ship), by name; and our options."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longsana.pipelines.video import LongSanaVideoPipeline, scheduler_shift
from longsana.runtime.errors import InputError
from tests.pipelines.repository import OTHER, PROMPT, SIZE, quiet


def inputs(**changes: Any) -> dict[str, Any]:
    """One chunk of three latents."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt": PROMPT,
        "generator": generator,
        "num_inference_steps": 2,
        "num_frames": 9,
        "output_type": "pt",
        **SIZE,
        **changes,
    }


@pytest.fixture(params=["distilled", "base"])
def either(request: pytest.FixtureRequest) -> LongSanaVideoPipeline:
    fixture: LongSanaVideoPipeline = request.getfixturevalue(
        {"distilled": "loaded", "base": "loaded_base"}[request.param]
    )
    return fixture


def test_pipeline_call_signature() -> None:
    parameters = inspect.signature(LongSanaVideoPipeline.__call__).parameters
    required = {"prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds", "num_frames"}
    optional = {"num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type", "return_dict"}
    assert required | optional <= set(parameters)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in optional)


@pytest.mark.parametrize("batch", [2, 3])
def test_inference_batch_consistent(either: LongSanaVideoPipeline, batch: int) -> None:
    prompts = [PROMPT, OTHER, ""][:batch]
    assert len(either(**inputs(prompt=prompts)).frames) == batch


def test_inference_batch_single_identical(either: LongSanaVideoPipeline) -> None:
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    together = either(**inputs(prompt=[PROMPT, OTHER], generator=generators, output_type="latent")).frames
    alone = either(**inputs(prompt=OTHER, generator=torch.Generator().manual_seed(1), output_type="latent")).frames
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_dict_tuple_outputs_equivalent(either: LongSanaVideoPipeline) -> None:
    (frames,) = either(**inputs(return_dict=False))
    assert torch.equal(frames, either(**inputs()).frames)
    assert torch.equal(frames, either(**inputs())[0])


def test_components_function(loaded: LongSanaVideoPipeline) -> None:
    assert set(loaded.components) == {"vae", "transformer", "tokenizer", "text_encoder", "scheduler", "decoder"}
    again = LongSanaVideoPipeline(**loaded.components, **loaded.parameters)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**inputs()).frames, loaded(**inputs()).frames)


def test_num_videos_per_prompt(either: LongSanaVideoPipeline) -> None:
    frames = either(**inputs(prompt=[PROMPT, OTHER], num_videos_per_prompt=2, output_type="latent")).frames
    assert len(frames) == 4
    assert len({video.sum().item() for video in frames}) == 4


def test_cfg(loaded_base: LongSanaVideoPipeline) -> None:
    plain = loaded_base(**inputs(guidance_scale=1.0)).frames
    assert plain.shape == loaded_base(**inputs(guidance_scale=3.0)).frames.shape
    assert not torch.equal(plain, loaded_base(**inputs(guidance_scale=3.0)).frames)


def test_callback_inputs(either: LongSanaVideoPipeline) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        assert set(given) <= set(pipe._callback_tensor_inputs)
        seen.append((step, timestep))
        if step == pipe.num_timesteps - 1:
            given["latents"] = torch.zeros_like(given["latents"])
        return given

    names = either._callback_tensor_inputs
    call = inputs(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, output_type="latent")
    assert not either(**call).frames.any()
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] == (1000 if either.distilled else 999) > seen[1][1] > 0
    with pytest.raises(InputError, match="there are only latents"):
        either(**call | {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]})


def test_callbacks_count_through_the_chunks(loaded: LongSanaVideoPipeline) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
        seen.append((step, timestep, given["latents"].shape[2]))

    call = {"num_frames": 21, "chunk_frames": 2, "num_inference_steps": None}
    watched = loaded(**inputs(callback_on_step_end=callback, **call)).frames
    assert [step for step, *_ in seen] == list(range(12))
    assert [timestep for _, timestep, _ in seen] == [1000, 960, 889, 727] * 3
    assert [frames for *_, frames in seen] == [2] * 12
    assert torch.equal(watched, loaded(**inputs(**call)).frames)


@pytest.mark.parametrize("stop", [0, 2, 3, 4])
def test_inference_interrupt(loaded: LongSanaVideoPipeline, stop: int) -> None:
    """What is there when it stops is the result: finished chunks, and the one in progress as it is."""
    kept = {}

    def record(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
        kept[step] = given["latents"]

    def interrupt(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
        pipe._interrupt = step == stop

    call = inputs(num_frames=21, chunk_frames=2, output_type="latent")
    assert loaded(**call | {"callback_on_step_end": record}).frames.shape[2] == 6
    stopped = loaded(**inputs(num_frames=21, chunk_frames=2, output_type="latent", callback_on_step_end=interrupt))
    expected = [kept[step] for step in range(stop) if step % 2] + [kept[stop]]
    assert torch.equal(stopped.frames, torch.cat(expected, dim=2))
    assert not loaded(**inputs(output_type="latent")).frames.isnan().any() and not loaded.interrupt


def test_encode_prompt_works_in_isolation(loaded: LongSanaVideoPipeline, distilled_folder: Path) -> None:
    """Without encoder; the prompt, which tells whose noise it is, is still named."""
    embeds, mask, *_ = loaded.encode_prompt(PROMPT)
    alone = LongSanaVideoPipeline(vae=loaded.vae, transformer=loaded.transformer)
    alone.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(alone(**inputs(**given)).frames, loaded(**inputs()).frames)
    assert not torch.equal(alone(**inputs(prompt=None, **given)).frames, loaded(**inputs()).frames)
    with pytest.raises(InputError, match="has no text encoder"):
        alone(**inputs())


def test_output_types(loaded: LongSanaVideoPipeline) -> None:
    pt = loaded(**inputs()).frames
    assert pt.shape == (1, 9, 3, 32, 48) and 0 <= pt.min() < pt.max() <= 1
    array = loaded(**inputs(output_type="np")).frames
    assert isinstance(array, np.ndarray) and np.array_equal(array, pt.permute(0, 1, 3, 4, 2).numpy())
    ((first, *others),) = loaded(**inputs(output_type="pil")).frames
    assert isinstance(first, Image.Image) and first.size == (48, 32) and len(others) == 8
    assert np.abs(np.asarray(first) / 255 - array[0, 0]).max() <= 1 / 255
    assert loaded(**inputs(output_type="latent")).frames.shape == (1, 16, 3, 4, 6)


def test_a_generator_advances(loaded: LongSanaVideoPipeline) -> None:
    call = inputs(output_type="latent")
    first, second = loaded(**call).frames, loaded(**call).frames
    assert not torch.equal(first, second)
    again = inputs(output_type="latent")
    assert torch.equal(loaded(**again).frames, first) and torch.equal(loaded(**again).frames, second)


def test_without_a_generator_the_global_one_seeds(loaded: LongSanaVideoPipeline) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        call = inputs(generator=None, output_type="latent")
        first, second = loaded(**call).frames, loaded(**call).frames
        torch.manual_seed(3)
        assert torch.equal(loaded(**call).frames, first) and not torch.equal(first, second)


def test_latents_are_the_initial_noise(loaded: LongSanaVideoPipeline) -> None:
    """Of each chunk its own frames."""
    call = {"num_frames": 21, "chunk_frames": 2, "output_type": "latent"}
    noise = torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(5))
    given = loaded(**inputs(latents=noise, **call)).frames
    assert not torch.equal(given, loaded(**inputs(**call)).frames)
    changed = noise.clone()
    changed[:, :, 4:] += 1
    later = loaded(**inputs(latents=changed, **call)).frames
    assert torch.equal(later[:, :, :4], given[:, :, :4]) and not torch.equal(later, given)


def test_frames_is_an_older_name(loaded: LongSanaVideoPipeline) -> None:
    older = inputs(frames=13)
    del older["num_frames"]
    assert torch.equal(loaded(**older).frames, loaded(**inputs(num_frames=13)).frames)


def test_four_steps_are_those_of_the_distillation(loaded: LongSanaVideoPipeline) -> None:
    call = {"output_type": "latent"}
    expected = loaded(**inputs(num_inference_steps=None, **call)).frames
    assert torch.equal(loaded(**inputs(num_inference_steps=4, **call)).frames, expected)
    listed = inputs(
        num_inference_steps=None, timesteps=[1000, 960, 889, 727, 0], flow_shift=7.0, guidance_scale=1.0, **call
    )
    assert torch.equal(loaded(**listed).frames, expected)


def test_progress_bar(distilled_folder: Path, capfd: Any) -> None:
    pipe = quiet(distilled_folder)
    capfd.readouterr()
    pipe(**inputs())
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config()
    pipe(**inputs())
    assert "2/2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 6.0}, "guidance_scale=6: the distilled model has learned its teacher's guidance"),
        ({"num_frames": 10}, "num_frames=10: must be 4n.1 for this VAE; nearest are 9 and 13"),
        ({"height": 30}, "height=30: must be a multiple of 16; nearest are 16 and 32"),
        ({"output_type": "mp4"}, "output_type=mp4: must be one of pil, np, pt, latent"),
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": 3}, "prompt: must be a text"),
        ({"prompt": []}, "prompt: must be a text"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 for 1 videos"),
        ({"latents": torch.zeros(1, 16, 2, 4, 6)}, r"latents has shape .*: this batch needs \(1, 16, 3, 4, 6\)"),
        ({"prompt_embeds": torch.zeros(1, 7, 3)}, r"prompt_embeds has shape .*: need \(1, length, 64\)"),
        (
            {"prompt_embeds": torch.zeros(1, 7, 64), "prompt_attention_mask": torch.ones(1, 6)},
            "prompt_attention_mask has shape",
        ),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"timesteps": [727, 1000]}, "need falling timesteps"),
        ({"flow_shift": -1.0}, "flow_shift=-1: must be positive"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
        ({"prompt": "a<split>b", "num_frames": 9}, "2 parts between '<split>' for a video of 1 chunk"),
        ({"prompt": "a[1s] | b", "num_frames": 9, "chunk_frames": 1}, "prompt: its parts last 1 s and leave nothing"),
        ({"prompt": "a | [recache] b"}, "prompt: 'recache' is no change of the past"),
        ({"prompt": ["a | [cut] b", "a"], "chunk_frames": 1}, "stories whose past changes at different places"),
    ],
)
def test_bad_input(loaded: LongSanaVideoPipeline, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded(**inputs(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [1000]}, "timesteps: the base model's follow"),
        ({"prompt": "a<split>b"}, "parts between .* are for a video of the distilled model"),
        ({"prompt": "a | [cut] b"}, "parts between ' | ' are for a video of the distilled model".replace("|", "[|]")),
        ({"prompt_change": "cut"}, "prompt_change: has no meaning for the base model"),
        ({"fps": 8.0}, "fps: has no meaning for the base model"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
    ],
)
def test_bad_input_for_the_base_model(
    loaded_base: LongSanaVideoPipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loaded_base(**inputs(**changes))


def test_to_dtype(pipe: LongSanaVideoPipeline) -> None:
    expected = pipe(**inputs(output_type="latent")).frames
    pipe.to(dtype=torch.bfloat16)
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    low = pipe(**inputs(output_type="latent")).frames
    assert pipe.text_encoder.rotary_emb.inv_freq.dtype == torch.float32
    assert low.dtype == torch.float32 and (low - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_layerwise_casting_inference(pipe: LongSanaVideoPipeline) -> None:
    expected = pipe(**inputs(output_type="latent")).frames
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    qkv = pipe.transformer.network.blocks[0].attn.qkv
    assert qkv.weight.dtype == torch.float8_e4m3fn
    stored = pipe(**inputs(output_type="latent")).frames
    assert 0 < (stored - expected).abs().mean() < 0.5 * expected.abs().mean()


def test_compiled_modules_are_seen_through(pipe: LongSanaVideoPipeline) -> None:
    expected = pipe(**inputs()).frames
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.distilled and pipe.config["transformer"][0] == "diffusers"
    assert torch.equal(pipe(**inputs()).frames, expected)
    again = LongSanaVideoPipeline(**pipe.components, caption_length=48, chi_prompt="none", softcap=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**inputs()).frames, expected)


def test_from_pipe(either: LongSanaVideoPipeline) -> None:
    """The same parts under another pipeline."""
    same = LongSanaVideoPipeline.from_pipe(either, torch_dtype=torch.float32)
    assert all(getattr(same, name) is part for name, part in either.components.items())
    same.set_progress_bar_config(disable=True)
    assert torch.equal(same(**inputs()).frames, either(**inputs()).frames)


def test_callback_cfg(loaded_base: LongSanaVideoPipeline) -> None:
    """Guidance may rise from step to step."""

    def raise_it(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        assert list(tensors) == ["latents"]
        pipe._guidance_scale += 1
        return {}

    plain = loaded_base(**inputs(guidance_scale=2.0)).frames
    risen = loaded_base(**inputs(guidance_scale=2.0, callback_on_step_end=raise_it)).frames
    assert loaded_base.guidance_scale == 2 + loaded_base.num_timesteps
    assert not torch.equal(plain, risen)


def test_a_callback_gets_what_it_asks_for_and_gives_what_fits(loaded: LongSanaVideoPipeline) -> None:
    given: list[Any] = []
    watch = {"callback_on_step_end": lambda *step: given.append(step[3]), "callback_on_step_end_tensor_inputs": []}
    assert torch.equal(loaded(**inputs(**watch)).frames, loaded(**inputs()).frames)
    assert given == [{}, {}]
    with pytest.raises(InputError, match="returned latents of shape"):
        loaded(**inputs(callback_on_step_end=lambda *step: {"latents": step[3]["latents"][:, :, :1]}))


@pytest.mark.parametrize(
    ("name", "settings", "shift"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}, 5.0),
        ("FlowMatchEulerDiscreteScheduler", {}, 1.0),
        ("UniPCMultistepScheduler", {"flow_shift": 3.0}, 3.0),
        ("DPMSolverMultistepScheduler", {}, 8.0),
        ("DDIMScheduler", {}, 8.0),
    ],
)
def test_any_scheduler_gives_its_own_shift(
    loaded_base: LongSanaVideoPipeline, name: str, settings: dict[str, Any], shift: float
) -> None:
    """Not what its config remembers of the scheduler before it."""
    import diffusers

    scheduler = getattr(diffusers, name).from_config(loaded_base.scheduler.config, **settings)
    assert scheduler_shift(scheduler) == shift
    if hasattr(scheduler, "set_shift"):
        scheduler.set_shift(2.5)
        assert scheduler_shift(scheduler) == 2.5


@pytest.mark.parametrize(
    "changes",
    [
        {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
        {"latents": torch.zeros(1, 16, 1, 1, 1)},
        {"num_frames": 10},
    ],
)
def test_what_is_refused_leaves_the_generator_alone(
    loaded_base: LongSanaVideoPipeline, changes: dict[str, Any]
) -> None:
    call = inputs(**changes)
    before = call["generator"].get_state()
    with pytest.raises(InputError):
        loaded_base(**call)
    assert torch.equal(call["generator"].get_state(), before)


def test_offload_hooks_bring_each_part(pipe: LongSanaVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU this only sees the order in which parts are fetched; `pytest -m gpu` sees one."""
    from accelerate import cpu_offload_with_hook

    expected = pipe(**inputs()).frames
    fetched = []
    hook = None
    for name in pipe.model_cpu_offload_seq.split("->"):
        module = getattr(pipe, name)
        _, hook = cpu_offload_with_hook(module, "cpu", prev_module_hook=hook)
        own = module._hf_hook.pre_forward
        monkeypatch.setattr(
            module._hf_hook, "pre_forward", lambda *a, own=own, name=name, **k: fetched.append(name) or own(*a, **k)
        )
    assert torch.equal(pipe(**inputs()).frames, expected)
    assert list(dict.fromkeys(fetched)) == ["text_encoder", "transformer", "vae"]
    with pytest.raises(InputError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_cpu_offload_forward_pass(distilled_folder: Path, dtype: torch.dtype) -> None:
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, torch_dtype=dtype).to("cuda")
    expected = pipe(**inputs(num_frames=21, chunk_frames=2)).frames
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, torch_dtype=dtype)
    pipe.enable_model_cpu_offload()
    for _ in range(2):  # the hooks are renewed after each call
        assert torch.equal(pipe(**inputs(num_frames=21, chunk_frames=2)).frames, expected)
    streamed = [chunk.frames for chunk in pipe.stream(**inputs(num_frames=21, chunk_frames=2))]
    assert torch.equal(torch.cat(streamed, dim=1), expected)
    assert {pipe.transformer.device.type, pipe.vae.device.type} == {"cpu"}


def test_the_text_encoder_waits_between_prompts(pipe: LongSanaVideoPipeline) -> None:
    """Where it works is here the host, too: its weights are other memory than those that wait."""
    expected, other = (pipe(**inputs(prompt=prompt)).frames for prompt in (PROMPT, OTHER))
    pipe.enable_text_encoder_offload("cpu")
    weight = pipe.text_encoder.base_model.layers[0].mlp.up_proj.weight
    waiting, seen = weight.data_ptr(), []
    pipe.text_encoder.base_model.register_forward_hook(lambda *_: seen.append(weight.data_ptr()))
    for prompt, frames in ((PROMPT, expected), (OTHER, other)):
        assert torch.equal(pipe(**inputs(prompt=prompt)).frames, frames)
        assert weight.data_ptr() == waiting
    assert len(seen) == 2 and waiting not in seen
    pipe.enable_text_encoder_offload("cpu")  # again changes nothing
    assert weight.data_ptr() == waiting
    with pytest.raises(InputError, match="to: enable_text_encoder_offload"):
        pipe.to(torch.float64)
    pipe.text_encoder = None
    with pytest.raises(InputError, match="no text encoder"):
        pipe.enable_text_encoder_offload()


@pytest.mark.gpu
def test_the_text_encoder_waits_on_the_host(distilled_folder: Path) -> None:
    expected = LongSanaVideoPipeline.from_pretrained(distilled_folder).to("cuda")(**inputs()).frames
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder)
    pipe.enable_text_encoder_offload()
    assert torch.equal(pipe(**inputs()).frames, expected)
    where = {name: next(getattr(pipe, name).parameters()) for name in ("text_encoder", "transformer", "vae")}
    assert {name: part.device.type for name, part in where.items()} == {
        "text_encoder": "cpu",
        "transformer": "cuda",
        "vae": "cuda",
    }
    assert where["text_encoder"].is_pinned()


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_pipeline_with_accelerator_device_map(distilled_folder: Path, device_map: str) -> None:
    expected = LongSanaVideoPipeline.from_pretrained(distilled_folder).to("cuda")(**inputs()).frames
    pipe = LongSanaVideoPipeline.from_pretrained(distilled_folder, device_map=device_map)
    assert torch.equal(pipe(**inputs()).frames, expected)


def test_usual_sizes(loaded: LongSanaVideoPipeline, looking_ahead: LongSanaVideoPipeline) -> None:
    for pipe, shape in ((loaded, (1, 16, 1, 60, 104)), (looking_ahead, (1, 128, 1, 22, 40))):
        assert pipe(PROMPT, num_frames=1, num_inference_steps=1, output_type="latent").frames.shape == shape
