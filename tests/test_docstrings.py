"""Docstrings name what they stand on, and public functions over tensors say their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "longsana").rglob("*.py"))
NEITHER_VERB_NOR_NOUN = {
    "Ahead", "All", "As", "At", "Before", "By", "For", "From", "How", "If", "In", "Of", "On", "See", "That", "To",
    "What", "When", "Where", "Whether", "Which", "Why", "With", "Without",
}  # fmt: skip
SHAPE = re.compile(r"\(\w+( [+*] \w+)?, ?[^)]*\)|\(\.\.\.|\bshapes?\b|[Ss]calar")
"""(B, T, D); (n + 1,); (..., D); "of any shape"; or a scalar."""
# What is passed on as it is, whatever it holds: state dicts, checkpoints, and a benchmark's inputs.
PASSED_ON = {
    "Case.outputs", "Case.once", "Case.moved", "Checkpointer.save", "Learner.tensors", "LongSana.restore",
    "LongSana.state_tensors", "Numbers.settle", "SanaVideoCausalTransformer3DModel.load_lora_adapter", "Stage.restore",
    "Stage.state_tensors", "plain_lora", "read_lora", "read_weights", "write_safetensors",
}  # fmt: skip

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of a file and all that it defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the file"), text


def without_a_start(source: str) -> list[str]:
    found = []
    for name, text in docstrings(source):
        first, *rest = re.findall(r"[\w']+", text)[:2] or [""]
        if first in NEITHER_VERB_NOR_NOUN or (first == "The" and rest == ["same"]):
            found.append(f"{name}: {text.splitlines()[0]}")
    return found


def without_shapes(source: str) -> list[str]:
    """Public functions and methods over tensors whose docstring tells no shape."""
    tree, found = ast.parse(source), []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for owner, body in [("", tree.body), *((f"{node.name}.", node.body) for node in classes)]:
        for node in body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            signature = f"{ast.unparse(node.args)} -> {ast.unparse(node.returns) if node.returns else None}"
            name = f"{owner}{node.name}"
            if re.search(r"\bTensor\b", signature) and not SHAPE.search(ast.get_docstring(node) or ""):
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_begins_with_a_verb_or_a_noun(path: Path) -> None:
    assert without_a_start(path.read_text(encoding="utf-8")) == []


def test_public_functions_over_tensors_tell_shapes() -> None:
    silent = {name for path in FILES for name in without_shapes(path.read_text(encoding="utf-8"))}
    assert silent == PASSED_ON


def test_faults_are_seen() -> None:
    assert without_a_start('"""Whether it is."""\ndef f():\n    """The same again."""') == [
        "the file: Whether it is.",
        "f: The same again.",
    ]
    silent = 'class A:\n    def f(self, x: Tensor) -> int:\n        """Count tokens."""\n'
    assert without_shapes(silent) == ["A.f"]
    assert without_shapes(silent.replace("tokens", "tokens (B, N)")) == []
