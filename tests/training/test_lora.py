"""LoRA in training: factors alone learn and are kept, and what they are is what files say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longsana.models.attention import CrossAttention
from longsana.models.dit import LongSanaDiT
from longsana.runtime.distributed import World
from longsana.training.build import StageBuilder
from longsana.training.config import AdamWConfig, LoraConfig
from longsana.training.graphs import replay_passes
from longsana.training.learner import Learner
from longsana.training.lora import put_on
from longsana.training.parallel import device_mesh, parallelise
from longsana.training.stages.stage import MicroBatches
from longsana.weights.checkpoint_folder import open_tensors
from longsana.weights.lora import fuse, targeted
from tests.training.conftest import CPU
from tests.training.test_graphs import graphs  # noqa: F401 (a fixture)
from tests.training.test_parallel import train_compiled, two_chunks
from tests.training.test_resume import assert_equal, contents

LORA = ("train.lora.rank=2", "train.lora.alpha=3", "optimizer.generator.lr=1e-2")
EVERYWHERE = LoraConfig(
    3, 6.0, ("to_q", "attn1.to_v", "attn2.to_k", "to_out.0", "conv_inverted", "conv_point", "linear_1", "proj_out")
)


@pytest.fixture
def train(command: Callable[..., Any], small_training: Callable[..., Path], trajectories: Path) -> Callable[..., Any]:
    """`train("ode", logdir, "train.max_iters=2")`: a small run with a LoRA; its result."""

    def run(trainer: str, logdir: Path, *overrides: str) -> Any:
        data = (f"data.data_path={trajectories}",) if trainer == "ode" else ()
        config = small_training(trainer, *LORA, *data)
        return command("--config_path", config, "--logdir", logdir, "--threads", "1", *overrides)

    return run


@pytest.mark.parametrize(
    "trainer",
    [
        "flow_matching",
        pytest.param("ode", marks=pytest.mark.slow),
        pytest.param("self_forcing", marks=pytest.mark.slow),
        "longsana",
        pytest.param("consistency", marks=pytest.mark.slow),
    ],
)
def test_factors_alone_are_kept_and_a_run_goes_on_from_its_own(train, tmp_path, trainer):
    """Stopped after iteration 4 and gone on with, it is to the bit what a run without a stop is."""
    assert train(trainer, tmp_path / "whole", "train.log_iters=6").status == 0
    assert train(trainer, tmp_path / "cut", "train.max_iters=4").status == 0
    assert train(trainer, tmp_path / "cut").status == 0
    whole, cut = (contents(tmp_path / name / "checkpoint_model_000006") for name in ("whole", "cut"))
    assert_equal(whole, cut)
    names = list(open_tensors(tmp_path / "cut" / "checkpoint_model_000006"))
    assert all(".lora_A." in name or ".lora_B." in name for name in names), names
    roles = {"generator", "critic"} if trainer in ("self_forcing", "longsana") else {"generator"}
    groups = {*roles, *(f"optimizer.{role}" for role in roles), "generator_ema"}
    assert {name.partition("/")[0] for name in names} == groups
    changed = [name for name in names if name.partition("/")[0] in roles and ".lora_B." in name]
    assert changed and all(whole[name].any() for name in changed)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lora.rank=0", "train.lora.rank=0: must be at least 1"),
        ("train.lora.rank=57", "train.lora.rank=57: above 56, the smaller side of transformer_blocks.0.attn1.to_q"),
        ("train.lora.targets=to_q", "train.lora.targets=to_q: must be a list, as in [to_q]"),
        ("train.lora.targets=[to_x]", "train.lora.targets: 'to_x' means no layer (did you mean 'to_v'?); there are"),
        ("train.lora.targets=['']", "train.lora.targets: '' means no layer; there are"),
        (
            "train.lora.targets=[' to_q']",
            "train.lora.targets: ' to_q' means no layer (did you mean 'to_q'?); there are",
        ),
        (
            "train.lora.targets=[transformer_blocks.1]",
            "'transformer_blocks.1' is no layer and has some, such as transformer_blocks.1.attn1.to_q; there are",
        ),
        ("train.lora.targets=[attn2]", "'attn2' is no layer and has some, such as transformer_blocks.0.attn2.to_q;"),
        ("train.lora.targets=[to_q,conv_temp]", "train.lora.targets: 'conv_temp' is no linear layer"),
        ("train.lora.targets=[conv_depth]", "train.lora.targets: 'conv_depth' is no linear layer"),
        ("train.lora.targets=[]", "train.lora.targets=[]: there is nothing to put factors on"),
        ("optimizer.generator.muon_lr=1e-3", "Muon is for whole matrices, and with train.lora.rank factors learn"),
    ],
)
def test_bad_input_is_one_line(train, tmp_path, override, says):
    result = train("flow_matching", tmp_path, override)
    assert result.status == 2 and says in result.error


def test_settings_of_no_lora_are_refused(command, small_training, tmp_path):
    for setting, told in (("alpha=4", "alpha=4.0"), ("targets=[to_q,to_k]", "targets=[to_q,to_k]")):
        result = command("--config_path", small_training("ode", f"train.lora.{setting}"), "--logdir", tmp_path)
        assert result.status == 2
        assert f"train.lora.{told}: without train.lora.rank there is no LoRA" in result.error


def test_without_peft_it_says_what_to_install(train, tmp_path, monkeypatch):
    monkeypatch.setattr("longsana.training.lora.find_spec", lambda name: None)
    assert "pip install -e '.[lora]'" in train("flow_matching", tmp_path).error


def test_another_rank_or_base_is_no_run_to_go_on_with(train, tmp_path):
    assert train("flow_matching", tmp_path, "train.max_iters=2").status == 0
    anyway = "--allow-config-change"
    default = "[to_q,to_k,to_v,to_out.0,conv_inverted,conv_point]"
    other = ("targets=[attn1.to_q]", f"targets: {default} -> [attn1.to_q]")
    for setting, change in (("rank=3", "rank: 2 -> 3"), other):
        told = train("flow_matching", tmp_path, f"train.lora.{setting}", anyway).error
        assert f"{tmp_path}: its factors are those of another LoRA (train.lora.{change}" in told and len(told) < 300
    told = train("flow_matching", tmp_path, "model.load_from=seeded:9").error
    assert "model.load_from: seeded:1 -> seeded:9" in told
    assert train("flow_matching", tmp_path, "train.lora.alpha=2", "train.max_iters=3", anyway).status == 0


def test_targets_that_mean_the_same_layers_are_the_same(train, tmp_path):
    """In another order, by other names, one of them twice."""
    short, more = (f"train.max_iters={count}" for count in (1, 2))
    assert train("flow_matching", tmp_path / "cut", short, "train.lora.targets=[to_q,proj_out]").status == 0
    others = "train.lora.targets=[proj_out,attn2.to_q,attn1.to_q,attn1.to_q]"
    assert train("flow_matching", tmp_path / "cut", more, others).status == 0
    assert train("flow_matching", tmp_path / "whole", more, others, "train.log_iters=2").status == 0
    whole, cut = (contents(tmp_path / name / "checkpoint_model_000002") for name in ("whole", "cut"))
    assert_equal(whole, cut)


def test_a_run_has_a_lora_from_its_start_or_none(command, train, small_training, tmp_path):
    one = "train.max_iters=1"
    assert train("flow_matching", tmp_path / "lora", one).status == 0
    plain = small_training("flow_matching")
    assert command("--config_path", plain, "--logdir", tmp_path / "plain", "--threads", "1", one).status == 0
    told = command("--config_path", plain, "--logdir", tmp_path / "lora", "--threads", "1").error
    assert f"{tmp_path / 'lora'}: factors of a LoRA have learned, and without train.lora.rank whole weights" in told
    told = train("flow_matching", tmp_path / "plain", "--allow-config-change").error
    assert f"{tmp_path / 'plain'}: its whole weights have learned, and with train.lora.rank=2 factors would" in told


def test_a_learned_decay_is_said_to_stay(train, tmp_path, caplog):
    assert train("self_forcing", tmp_path, "model.state_decay=learned", "--dry_run").status == 0
    assert "those of the past stay as model.load_from has them" in caplog.text


def test_a_layer_that_is_not_computed_with_is_an_error(train, tmp_path, monkeypatch):
    """As an operation is that takes a layer's weights and never calls it: peft's factors would be ignored."""
    plain = CrossAttention.forward

    def fused(self: Any, x: Tensor, text: Any, mask: Any) -> Tensor:
        out, self.out = self.out, self.out.base_layer
        try:
            return plain(self, x, text, mask)
        finally:
            self.out = out

    monkeypatch.setattr(CrossAttention, "forward", fused)
    result = train("flow_matching", tmp_path)
    assert result.status == 2
    assert "train.lora.targets: no gradient of the generator has come to 4 factors" in result.error
    assert "blocks.0.cross_attn.out.lora_A.weight" in result.error


def test_factors_that_learn_nothing_are_told(train, tmp_path, caplog):
    """Their gradients are zero everywhere, as float32 has no number for the change that they make."""
    result = train("flow_matching", tmp_path, "train.lora.alpha=1e-30", "train.max_iters=12")
    assert "iteration 0: the gradient of the generator is zero everywhere" in caplog.text
    assert result.status == 1
    assert "10 updates of the generator in a row had a gradient of zero (iteration 9)" in result.err


# What a network with factors computes -----------------------------------------------------------------------------


@pytest.fixture
def with_lora(random_model, small_config) -> Callable[..., LongSanaDiT]:
    """`with_lora(depth=3)`: always the same float32 network, with factors of which none is zero."""

    def build(settings: LoraConfig = EVERYWHERE, dtype: torch.dtype = torch.float32, **sizes: Any) -> LongSanaDiT:
        model = put_on(random_model(small_config(**sizes), dtype), settings, 0)
        rng = torch.Generator().manual_seed(5)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.copy_(0.3 * torch.randn(weight.shape, generator=rng))
        return model

    return build


def factors(model: LongSanaDiT) -> dict[str, Tensor]:
    return {name.replace(".trained.", "."): weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model: LongSanaDiT, inputs: Any) -> dict[str, Tensor]:
    velocity, _ = two_chunks(model, *inputs)
    velocity.float().square().mean().backward()
    return {name: weight.grad.clone() for name, weight in factors(model).items()}


@pytest.fixture
def inputs(random_latents, random_text) -> tuple[Tensor, Any]:
    return random_latents(2, 5).float(), random_text(2)


def test_a_network_with_factors_is_one_with_their_product_added(with_lora, random_model, small_config, inputs):
    """Of layers that are one here each part has factors of its own, and those that are not targeted have none."""
    plain, model = random_model(small_config(), torch.float32), with_lora()
    own = factors(model)
    layers = targeted(plain, EVERYWHERE.targets, "targets")
    assert {name: list(parts) for name, parts in layers.items()}["blocks.1.attn.qkv"] == [
        "transformer_blocks.1.attn1.to_q",
        "transformer_blocks.1.attn1.to_v",
    ]
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parts in layers.items():
            a, b = own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]
            for part, below in zip(a.split(3), b.split([part.rows for part in parts.values()]), strict=True):
                assert part.shape[0] == below.shape[1] == 3
        width = len(weights["blocks.0.attn.qkv.weight"]) // 3
        for block in ("blocks.0", "blocks.1"):
            for name, places in {"attn.qkv": (0, 2), "cross_attn.kv": (0,)}.items():
                a, b = own.pop(f"{block}.{name}.lora_A.weight"), own.pop(f"{block}.{name}.lora_B.weight")
                for place, above, below in zip(places, a.split(3), b.split(width), strict=True):
                    weights[f"{block}.{name}.weight"][place * width : (place + 1) * width] += 2 * below @ above
        for name in [name for name in own if ".lora_A." in name]:
            product = own[name.replace("lora_A", "lora_B")] @ own[name]
            weights[name.replace(".lora_A.", ".")] += 2 * product
        expected, _ = plain(inputs[0], torch.full((2,), 889.0), inputs[1])
        found, _ = model(inputs[0], torch.full((2,), 889.0), inputs[1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_new_factors_change_nothing_to_the_bit(random_model, small_config, inputs):
    model = random_model(small_config(), torch.bfloat16)
    with torch.no_grad():
        plain, _ = two_chunks(model, *inputs)
        again, _ = two_chunks(put_on(copy.deepcopy(model), EVERYWHERE, 0).bfloat16(), *inputs)
    assert torch.equal(again, plain)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("strategy", ["full", "no_shard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_and_computed_twice_they_have_the_same_gradients(with_lora, inputs, strategy, dtype):
    """To the bit with checkpointing and without; the base is as it was, and the gradients are float32."""
    mesh, found = device_mesh(strategy, World(), CPU), []
    for flag in (False, True):
        model = with_lora(dtype=dtype)
        before = model.blocks[0].attn.qkv.base_layer.weight
        parallelise(model, mesh, compute=dtype, strategy=strategy, checkpointing=flag)
        assert model.blocks[0].attn.qkv.base_layer.weight is before, "the base is left alone"
        found.append({name: value.full_tensor() for name, value in gradients(model, inputs).items()})
    once, twice = found
    assert {gradient.dtype for gradient in once.values()} == {torch.float32}
    assert all(gradient.any() and torch.equal(gradient, twice[name]) for name, gradient in once.items())
    if dtype == torch.float32:
        for name, gradient in gradients(with_lora(), inputs).items():
            torch.testing.assert_close(once[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike(with_lora, inputs, checkpointing, monkeypatch):
    compile_block = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_block(function, backend="aot_eager"))
    mesh = device_mesh("full", World(), CPU)
    build = partial(parallelise, mesh=mesh, compute=torch.float32, checkpointing=checkpointing)
    plain = train_compiled(build(with_lora()), inputs)
    compiled = train_compiled(build(with_lora(), compile_blocks=True), inputs)
    assert compiled.graphs > 0 and compiled.breaks == 0
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert plain.losses[1] != pytest.approx(plain.losses[0], rel=1e-3)


@pytest.mark.usefixtures("graphs")
def test_a_replayed_pass_is_the_pass_itself(with_lora, inputs):
    """Factors that a step changed are seen, and the base is in memory once."""
    plain, model = with_lora(), with_lora()
    base = model.blocks[0].attn.qkv.base_layer.weight
    replayed = replay_passes(model, torch.float32)
    assert replayed.forward.working.blocks[0].attn.qkv.base_layer.weight is base  # type: ignore[attr-defined]
    learners = [Learner("generator", each, AdamWConfig(lr=1e-2, beta1=0.9)) for each in (plain, replayed)]
    for step in range(3):
        (expected, found) = (gradients(each.model, inputs) for each in learners)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
        for each in learners:
            each.update(step)


# One base of several networks -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_networks_of_one_base_share_it_and_learn_apart(training_config, tmp_path):
    """Teacher and critic from one file have one copy of it, and the generator another."""
    config = training_config("self_forcing", *LORA, "fake_score.load_from=seeded:2", "model.depth=1")
    builder = StageBuilder(config, micro_batches=MicroBatches(0, 1, 1), world=World(), device=CPU, folder=tmp_path)
    networks = {role: builder.network(role) for role in ("generator", "critic", "teacher")}

    def base(role: str) -> dict[str, int]:
        held = networks[role].state_dict(keep_vars=True)
        return {
            name.replace(".base_layer.", "."): tensor.data_ptr() for name, tensor in held.items() if "lora_" not in name
        }

    assert base("critic") == base("teacher")
    assert not base("critic").items() & base("generator").items()
    assert not any(weight.requires_grad for weight in networks["teacher"].parameters())
    starts = [factors(networks[role]) for role in ("generator", "critic")]
    assert starts[0].keys() == starts[1].keys() and factors(networks["teacher"]) == {}
    assert not torch.equal(*(each["blocks.0.attn.qkv.lora_A.weight"].full_tensor() for each in starts))


def test_a_factor_is_a_function_of_seed_network_and_layer(random_model, small_config):
    def first(*key: int | str) -> dict[str, Tensor]:
        return factors(put_on(random_model(small_config()), LoraConfig(2), *key))

    one, again, other = first(0, "critic"), first(0, "critic"), first(0, "generator")
    assert all(torch.equal(one[name], again[name]) for name in one)
    above = [name for name in one if ".lora_A." in name]
    assert not any(torch.equal(one[name], other[name]) for name in above)
    assert not torch.equal(one["blocks.0.attn.out.lora_A.weight"], one["blocks.1.attn.out.lora_A.weight"])


def test_fused_is_added_in_float64_and_rounded_once():
    rng = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=rng) for shape in ((6, 4), (2, 4), (6, 2)))
    weights = {"final.linear.weight": weight.bfloat16(), "final.linear.bias": weight[0]}
    fuse(weights, {"final.linear.lora_A.weight": a, "final.linear.lora_B.weight": b}, "the LoRA")
    expected = (weight.bfloat16().double() + b.double() @ a.double()).bfloat16()
    assert torch.equal(weights["final.linear.weight"], expected)
    assert F.mse_loss(weights["final.linear.bias"], weight[0]) == 0
