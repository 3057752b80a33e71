"""Which operations run: settled once, and said where it is not what one would expect."""

from __future__ import annotations

import importlib
import logging

import pytest

module = importlib.import_module("longsana.ops.backend")  # longsana.ops.backend is also the name of the function


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


def test_a_device_that_cannot_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "can_fuse", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [module.backend() for _ in range(3)] == ["reference"] * 3
    assert [record.message for record in caplog.records] == [
        "plain PyTorch operations: the fused ones need an NVIDIA GPU of compute capability 9.0"
    ]


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="LONGSANA_OPS=cuda: must be triton or reference"):
        module.backend()
