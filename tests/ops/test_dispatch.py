"""Which operations run: settled once, and said where it is not what one would expect."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

module = importlib.import_module("longsana.ops.dispatch")  # longsana.ops.dispatch is also the name of the function


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    monkeypatch.delenv(module.VARIABLE, raising=False)
    module.backend.cache_clear()
    yield
    module.backend.cache_clear()


@pytest.mark.parametrize(
    ("asked", "able", "picked"),
    [(None, True, "triton"), ("triton", True, "triton"), ("reference", True, "reference"), (None, False, "reference")],
)
def test_the_fused_ones_run_where_they_can_unless_the_plain_ones_are_asked_for(asked, able, picked, monkeypatch):
    monkeypatch.setattr(module, "can_fuse", lambda: able)
    if asked:
        monkeypatch.setenv(module.VARIABLE, asked)
    assert module.backend() == picked


@pytest.mark.parametrize(
    ("there", "shared", "able"),
    [(True, 227, True), (True, 228, True), (True, 163, False), (True, 99, False), (False, 227, False)],
)
def test_the_tiles_must_fit(there, shared, able, monkeypatch):
    """H100, an A100's and a consumer card's shared memory, in KB; and no GPU at all."""
    properties = SimpleNamespace(shared_memory_per_block_optin=shared << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert module.can_fuse() is able


def test_a_device_that_cannot_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "can_fuse", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [module.backend() for _ in range(3)] == ["reference"] * 3
    assert [record.message for record in caplog.records] == [
        "plain PyTorch operations: the fused ones need an NVIDIA GPU with the shared memory of an H100"
    ]


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="LONGSANA_OPS=cuda: must be triton or reference"):
        module.backend()


@pytest.mark.parametrize(
    ("count", "others", "programs", "step"), [(1, 1, 528, 1), (15600, 20, 264, 64), (7, 100, 4, 1)]
)
def test_shares_are_all_there_is_and_none_is_empty(count, others, programs, step):
    parts, share = module.shares(count, others, programs=programs, step=step)
    assert share % step == 0
    assert (parts - 1) * share < count <= parts * share
    assert parts * others <= max(programs, others)
