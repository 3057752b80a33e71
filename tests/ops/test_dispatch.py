"""Which operations run: settled once, and said where it is not what one would expect."""

from __future__ import annotations

import importlib
import logging
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from longsana.config import Dtype
from longsana.runtime import gpu
from longsana.runtime.errors import InputError
from longsana.training.config import TrainingConfig
from longsana.training.learner import compute_dtype
from longsana.weights.build import resolve_dtype

module = importlib.import_module("longsana.ops.dispatch")  # longsana.ops.dispatch is also the name of the function


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    for variable in (module.VARIABLE, module.MEMORY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    cached = (module.backend, module.shared_memory, gpu.has_bfloat16)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def found(monkeypatch):
    """`found("Tesla T4", (7, 5), 64)`: this process has that GPU, with so many KB of shared memory."""

    def pretend(name, capability, shared):
        properties = SimpleNamespace(shared_memory_per_block_optin=shared << 10)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return pretend


GPUS = [
    ("NVIDIA H200", (9, 0), 227, 227),
    ("NVIDIA B200", (10, 0), 227, 227),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 163, 163),
    ("NVIDIA GeForce RTX 3090", (8, 6), 99, 99),
    ("NVIDIA GeForce RTX 4090", (8, 9), 99, 99),
    ("NVIDIA GeForce RTX 5090", (12, 0), 99, 99),
    ("a GPU to come", (13, 0), 300, 227),
]


@pytest.mark.parametrize(("name", "capability", "shared", "tiles"), GPUS)
def test_tiles_are_the_largest_that_fit(name, capability, shared, tiles, found):
    found(name, capability, shared)
    assert module.backend() == "triton"
    assert module.shared_memory() == tiles


@pytest.mark.parametrize("asked", module.SHARED_MEMORY)
def test_smaller_tiles_can_be_asked_for(asked, found, monkeypatch):
    found("NVIDIA H200", (9, 0), 227)
    monkeypatch.setenv(module.MEMORY_VARIABLE, str(asked))
    assert module.shared_memory() == asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("100", "LONGSANA_SHARED_MEMORY=100: must be one of 227, 163, 99 (KB)"),
        ("much", "LONGSANA_SHARED_MEMORY=much: must be one of 227, 163, 99 (KB)"),
        ("227", "LONGSANA_SHARED_MEMORY=227: a program has 163 KB on this GPU"),
    ],
)
def test_tiles_that_there_are_not_are_an_error(asked, message, found, monkeypatch):
    found("NVIDIA A100-SXM4-80GB", (8, 0), 163)
    monkeypatch.setenv(module.MEMORY_VARIABLE, asked)
    with pytest.raises(InputError, match=re.escape(message)):
        module.backend()


def test_plain_operations_can_be_asked_for(found, monkeypatch, caplog):
    found("NVIDIA H200", (9, 0), 227)
    monkeypatch.setenv(module.VARIABLE, "reference")
    with caplog.at_level(logging.WARNING):
        assert module.backend() == "reference"
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "capability", "shared", "message"),
    [
        ("Tesla T4", (7, 5), 64, "the fused ones need compute capability 8.0, and Tesla T4 has 7.5"),
        ("Tesla V100", (7, 0), 96, "the fused ones need compute capability 8.0, and Tesla V100 has 7.0"),
        ("a slice", (8, 6), 48, "the fused ones need 99 KB of shared memory, and a program has 48 here"),
    ],
)
def test_a_gpu_that_cannot_is_said_once(name, capability, shared, message, found, caplog):
    found(name, capability, shared)
    with caplog.at_level(logging.WARNING):
        assert [module.backend() for _ in range(3)] == ["reference"] * 3
    assert [record.message for record in caplog.records] == [f"plain PyTorch operations: {message}"]


def test_without_a_gpu_of_nvidia_nothing_is_fused(monkeypatch, found):
    found("AMD Instinct MI300X", (9, 4), 64)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert module.obstacle() == "the fused ones need an NVIDIA GPU"
    assert gpu.has_bfloat16()


def test_an_older_gpu_takes_float32_for_bfloat16(found, caplog):
    """And says so once; float16, whose range the network may leave, only where a setting says it."""
    found("Tesla T4", (7, 5), 64)
    with caplog.at_level(logging.WARNING):
        given = {dtype: resolve_dtype(dtype, torch.device("cuda")) for dtype in get_args(Dtype)}
    assert given == {
        "auto": torch.float32, "bfloat16": torch.float32, "float16": torch.float16, "float32": torch.float32,
    }  # fmt: skip
    assert compute_dtype(TrainingConfig()) == torch.float32
    assert [record.message for record in caplog.records] == [
        "float32 in the place of bfloat16, which needs compute capability 8.0, and Tesla T4 has 7.5; float16 where a "
        "setting says so"
    ]
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_newer_gpu_has_bfloat16(capability, found):
    found("NVIDIA", capability, 163)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(TrainingConfig()) == torch.bfloat16


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "cuda")
    with pytest.raises(InputError, match="LONGSANA_OPS=cuda: must be triton or reference"):
        module.backend()


@pytest.mark.parametrize(
    ("count", "others", "programs", "step"), [(1, 1, 528, 1), (15600, 20, 264, 64), (7, 100, 4, 1)]
)
def test_shares_are_all_there_is_and_none_is_empty(count, others, programs, step):
    parts, share = module.shares(count, others, programs=programs, step=step)
    assert share % step == 0
    assert (parts - 1) * share < count <= parts * share
    assert parts * others <= max(programs, others)
