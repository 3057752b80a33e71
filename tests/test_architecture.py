"""Imports point down, heavy libraries stay with their owners, and `import longsana` costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_video_scripts", "inference_video_scripts")
# A layer may import those after it, never one beside it.
LAYERS = [
    [*SCRIPTS, "convert"],
    ["commands"],
    ["serving"],
    ["training", "pipelines", "inference"],
    ["evaluation"],
    ["sampling"],
    ["data"],
    ["shapes"],
    ["encoders"],
    ["weights"],
    ["flow", "models"],
    ["ops", "state"],
    ["config"],
    ["chunks", "published"],
    ["runtime"],
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
OWNERS = {
    "transformers": {"longsana/encoders/text.py"},
    "diffusers": {
        "longsana/encoders/text.py",
        "longsana/encoders/vae_files.py",
        "longsana/flow/solvers.py",
        "longsana/pipelines/outputs.py",
        "longsana/pipelines/tiny.py",
        "longsana/pipelines/transformer.py",
        "longsana/pipelines/video.py",
        "longsana/inference/microbenchmark.py",  # a peer
    },
    "cv2": {"longsana/evaluation/flow.py"},
    "wandb": {"longsana/runtime/logging.py"},
    "fastapi": {"longsana/serving/app.py"},
    "starlette": {"longsana/serving/app.py"},
    "uvicorn": {"longsana/commands/serve.py"},
    "websockets": {"longsana/serving/client.py", "longsana/serving/load.py"},
    "ray": {"longsana/serving/on_ray.py"},
    "prometheus_client": {"longsana/serving/metrics.py"},
}


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(files: dict[str, str]) -> list[str]:
    found = []
    for path, source in files.items():
        unit = path.removeprefix("longsana/").split("/")[0].removesuffix(".py")
        for name in imports(source):
            top, *rest = name.split(".")
            if path not in OWNERS.get(top, {path}):
                found.append(f"{path} imports {name}, which is for {', '.join(OWNERS[top])}")
            target = top if top in SCRIPTS else rest[0] if top == "longsana" and rest else None
            if target not in DEPTH or target == unit or unit == "__init__":
                continue
            if DEPTH[target] <= DEPTH[unit]:
                found.append(f"{path} imports {name}, which is not below it")
    return found


def test_imports_point_down():
    folders = [ROOT / name for name in ("longsana", *SCRIPTS)]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert len(paths) > 20
    units = {path.relative_to(ROOT / "longsana").parts[0] for path in paths if path.is_relative_to(ROOT / "longsana")}
    assert {unit.removesuffix(".py") for unit in units} <= {*DEPTH, "__init__"}, "a package that has no layer"
    assert violations({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("longsana/ops/x.py", "from longsana.models.dit import LongSanaDiT"),
        ("longsana/flow/x.py", "def f():\n    from longsana.models import dit"),
        ("longsana/flow/x.py", "from longsana.sampling.sampler import generate"),
        ("longsana/encoders/x.py", "import longsana.shapes.scenes"),
        ("longsana/models/x.py", "from longsana.weights.network import load_weights"),
        ("longsana/runtime/x.py", "from longsana import config"),
        ("longsana/state.py", "from longsana.ops import reference"),
        ("longsana/sampling/x.py", "from inference_video_scripts import inference_sana_video"),
        ("longsana/weights/network.py", "import diffusers.models"),
        ("longsana/sampling/engine.py", "def f():\n    from transformers import AutoTokenizer"),
        ("inference_video_scripts/x.py", "import wandb"),
        ("longsana/serving/live.py", "from starlette.websockets import WebSocket"),
    ],
)
def test_imports_that_point_up_are_seen(path, source):
    assert len(violations({path: source})) == 1


def takes(code: str, limit: float) -> bool:
    """Whether `code` takes at most so many seconds in a fresh interpreter after torch, in the best of three."""
    program = f"import time, torch, sys\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    program += f"\nassert not {set(OWNERS)!r} & set(sys.modules), sorted({set(OWNERS)!r} & set(sys.modules))"
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        if float(run.stdout) <= limit:
            return True
    return False


def test_import_is_light():
    assert takes("import longsana", 0.5)


def test_the_network_and_its_sampler_need_no_heavy_library():
    assert takes("import longsana.weights.build, longsana.sampling.sampler, longsana.sampling.checks", 2)


LIGHT = ("longsana.commands", "longsana.commands.run")
"""What begins a program by itself."""
HEAVY = ("torch", "diffusers", "transformers", "longsana", "tests")
BEGINNINGS = ("begin()", "share_cores()")


def begins_late(source: str) -> str | None:
    """The first import of torch, or of what may bring it, in a program that has not begun by then.

    Imports inside functions are none before its beginning; where it has none, they count too.
    """
    tree = ast.parse(source)
    programs = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    if not programs:
        return None
    begun = [line.lineno for node in programs for line in node.body if ast.unparse(line) in BEGINNINGS]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)} if begun else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
            if begun and node.lineno > min(begun):
                continue
            for name in imports(ast.unparse(node)):
                light = name in LIGHT or name.startswith("longsana.runtime.process.")
                if name.split(".")[0] in HEAVY and not light:
                    return name
    return None


def test_every_program_begins_before_it_imports_torch():
    """Else its threads spin while they wait; and of a command, a signal meets it halfway through an import."""
    # Those of asset/ compute nothing with torch.
    files = [path for folder in ("longsana", "tests", *SCRIPTS) for path in (ROOT / folder).rglob("*.py")]
    programs = {path: source for path in files if "__main__" in (source := path.read_text())}
    late = {str(path.relative_to(ROOT)): begins_late(source) for path, source in programs.items()}
    assert {path: name for path, name in late.items() if name} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\nif __name__ == '__main__':\n    begin()", "torch"),
        ("if __name__ == '__main__':\n    import torch\n    begin()", "torch"),
        ("try:\n    import diffusers\nexcept ImportError: pass\nif __name__ == '__main__':\n    begin()", "diffusers"),
        ("def main():\n    import torch\nif __name__ == '__main__':\n    main()", "torch"),
        ("def main():\n    import torch\nif __name__ == '__main__':\n    begin()\n    main()", None),
        ("if __name__ == '__main__':\n    share_cores()\nimport torch", None),
        ("import torch", None),
    ],
)
def test_programs_that_begin_late_are_seen(source, name):
    assert begins_late(source) == name
