"""Tensors name their dtype and device: PyTorch's defaults are the caller's, and no number here depends on them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CREATORS = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
ELSEWHERE = (
    # The shapes world and its measures, which are made and looked at under PyTorch's own defaults.
    *("longsana/shapes/", "longsana/evaluation/"),
    # Called within `plain_defaults`.
    *("longsana/encoders/vae_files.py", "longsana/weights/checkpoint_folder.py", "longsana/pipelines/lora.py"),
    # A command's process has PyTorch's own defaults.
    "longsana/training/loop.py",
)
"""Files, and beginnings of files' names, that need not."""


def unnamed(node: ast.AST) -> Iterator[int]:
    """Lines that create a tensor without both dtype and device; the parameters of a module's __init__ may."""
    if isinstance(node, ast.FunctionDef) and node.name == "__init__":
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner, named = node.func.value, {keyword.arg for keyword in node.keywords}
        creates = isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in CREATORS
        if creates and not {"dtype", "device"} <= named:
            yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from unnamed(child)


def test_every_tensor_names_its_dtype_and_device() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "longsana").rglob("*.py")}
    own = {name: source for name, source in sources.items() if not name.startswith(ELSEWHERE)}
    assert len(own) > 80
    assert [f"{name}:{line}" for name, source in own.items() for line in unnamed(ast.parse(source))] == []


@pytest.mark.parametrize(
    "source", ["torch.zeros(3)", "f(torch.randn(3, dtype=x))", "def f():\n  return torch.tensor(1, device='cpu')"]
)
def test_a_tensor_that_does_not_is_seen(source: str) -> None:
    assert len(list(unnamed(ast.parse(source)))) == 1
