"""Tiles for every size of shared memory: kernels fit it, on GPUs that are not here too, and compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longsana.inference.microbenchmark import Sizes, cases
from longsana.ops import FUSED, reference
from longsana.ops.dispatch import MEMORY_VARIABLE, SHARED_MEMORY, WITHOUT_GRADIENTS, fused_twin, shared_memory
from longsana.runtime.errors import InputError
from tests.ops.launches import GRIDS, gradients, published, recorded, select_tiles, small

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float8_e4m3fn: 0.08}
"""Of the largest number of a result in float64; float32 that comes of 16 bits, too. Float8's steps are a 14th."""
SPILLED = 256
"""Bytes of a thread that may have no register, in bfloat16: what the tiles for 227 KB are fastest with."""


@pytest.fixture(params=SHARED_MEMORY)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """KB that the kernels have tiles for, in one test."""
    monkeypatch.setenv(MEMORY_VARIABLE, "")  # so that it is put back
    select_tiles(request.param)
    try:
        yield shared_memory()
    except InputError as error:
        pytest.skip(str(error))
    finally:
        shared_memory.cache_clear()


def compiled(targets: Sequence[str], cache: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """Kernels by target, from a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}  # no GPU's own memory is asked for
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.launches", *options, *targets],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    launches = [json.loads(line) for line in run.stdout.splitlines()]
    return {target: [launch for launch in launches if launch["target"] == target] for target in targets}


def check_shared_memory(found: dict[str, list[dict[str, Any]]]) -> None:
    for target, launches in found.items():
        memory, _, dtype, *heads = target.split(":")
        modules = {launch["kernel"].partition(".")[0] for launch in launches}
        assert modules >= {"norms", "decoder"}, target
        # A head's sums in float32 are more than 99 KB: that is plain.
        assert ("attention" in modules) == (memory != "99" or dtype != "float32" or bool(heads)), target
        for launch in launches:
            assert launch["shared"] <= int(memory) << 10, launch
            assert dtype != "bfloat16" or launch["spilled"] <= SPILLED, launch


@pytest.mark.slow
def test_kernels_of_every_set_fit_what_it_is_for(tmp_path: Path) -> None:
    """An H100, an A100 and an RTX 3090, as Triton compiles for them, in the dtype of the 2B network."""
    found = compiled(
        ["227:90:bfloat16", "163:80:bfloat16", "99:86:bfloat16"],
        tmp_path,
        "--without=gated_conv",  # has no shared memory, and takes long to compile
    )
    check_shared_memory(found)
    for launches in found.values():
        kernels = {launch["kernel"] for launch in launches}
        assert kernels >= {f"attention.{name}_kernel" for name in ("sums", "output", "sums_gradients")}, kernels


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_kernels_fit_on_every_generation(dtype: str, tmp_path: Path) -> None:
    """Also B200, Jetson Orin, RTX 40 and 50."""
    gpus = ("227:90", "227:100", "163:80", "163:87", "99:86", "99:89", "99:120")
    check_shared_memory(compiled([f"{gpu}:{dtype}" for gpu in gpus], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16:32", "float32:32", "float32:64"])
def test_kernels_of_smaller_heads_fit(dtype: str, tmp_path: Path) -> None:
    """Gradients of heads of up to 64 are fused in float32 too."""
    gpus = ("227:90", "163:80", "99:86", "99:120")
    check_shared_memory(compiled([f"{gpu}:{dtype}" for gpu in gpus], tmp_path, "--without=gated_conv"))


def largest_error(given: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[torch.dtype, float]:
    """Of the results of each dtype, relative to the largest number of each."""
    errors: dict[torch.dtype, float] = {}
    for own, wanted in zip(given, exact, strict=True):
        assert own.shape == wanted.shape
        error = (own.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        errors[own.dtype] = max(errors.get(own.dtype, 0.0), error.item() if error.isfinite() else float("inf"))
    return errors


def check_twins(sizes: Sizes) -> None:
    """Compare every operation and its gradients with the plain twin in float64."""
    rng = torch.Generator(sizes.device).manual_seed(1)
    for case in cases(sizes):
        interpreted = sizes.device.type == "cpu"
        if FUSED[case.name] == "temporal" or (case.in_float8 and interpreted):
            continue  # PyTorch's products; numbers that Triton's interpreter rounds otherwise
        plain, fused = getattr(reference, case.name), fused_twin(case.name, FUSED)
        wide = case._replace(inputs=[part.double() if isinstance(part, Tensor) else part for part in case.inputs])
        with torch.no_grad():
            exact = wide.once(plain)
            for dtype, error in largest_error(case.once(fused), exact).items():
                # Scales of rows in float8 are those of numbers that have been rounded.
                scale = case.in_float8 and dtype == torch.float32
                assert error < TOLERANCE[sizes.dtype if scale else dtype], (case.name, dtype, error)
        if case.name in WITHOUT_GRADIENTS:
            continue
        cotangents = [torch.randn(part.shape, generator=rng, device=sizes.device).to(sizes.dtype) for part in exact]
        given = gradients(case, fused, cotangents)
        for dtype, error in largest_error(given, gradients(wide, plain, cotangents)).items():
            assert error < 2 * TOLERANCE[sizes.dtype], (case.name, "gradients", dtype, error)


@pytest.mark.parametrize(
    ("dtype", "memory"),
    [
        # The largest tiles and the smallest; those between them take as long in the interpreter.
        *((torch.bfloat16, memory) for memory in (SHARED_MEMORY[0], SHARED_MEMORY[-1])),
        *(pytest.param(torch.bfloat16, memory, marks=pytest.mark.slow) for memory in SHARED_MEMORY[1:-1]),
        *(pytest.param(torch.float32, memory, marks=pytest.mark.slow) for memory in SHARED_MEMORY),
    ],
    indirect=["memory"],
)
def test_operations_are_their_twins_with_the_tiles_of_every_set(dtype: torch.dtype, memory: int) -> None:
    """Small, for the interpreter: in bfloat16 two heads of 112 and several tiles, in float32 heads of 32."""
    if torch.cuda.is_available():
        pytest.skip("a GPU computes at full size")
    heads = {} if dtype == torch.bfloat16 else {"linear_head_dim": 32, "hidden_size": 64}
    check_twins(small(dtype, "cpu", **heads))


@pytest.mark.gpu
@pytest.mark.parametrize("size", list(GRIDS))
def test_operations_are_their_twins_at_full_size(size: str, memory: int) -> None:
    """And the kernels that were started need no more shared memory than the set is for."""
    with recorded() as launches:
        check_twins(published(size, torch.bfloat16, "cuda"))
    assert {launch.kernel.partition(".")[0] for launch in launches} >= {"attention", "norms", "gated_conv", "decoder"}
    assert max(launch.shared for launch in launches) > 64 << 10  # a head's sums are there
    for launch in launches:
        assert launch.shared <= memory << 10, launch


@pytest.mark.slow
def test_every_set_is_timed(tmp_path: Path) -> None:
    """By the script that a GPU runs at full size; here in the interpreter."""
    out = tmp_path / "tiles.json"
    script = ROOT / "tests" / "full_size" / "measure_tiles.py"
    run = subprocess.run(
        [sys.executable, str(script), "--small", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    operations = FUSED.keys() - {"temporal_conv"}
    for title, rows in json.loads(out.read_text())["ms"].items():
        assert title in GRIDS and rows.keys() == operations
        for name, row in rows.items():
            wanted = {"forward"} if name in WITHOUT_GRADIENTS else {"forward", "with gradients"}
            for way in ("plain", *(f"{memory} KB" for memory in SHARED_MEMORY)):
                assert row[way].keys() == wanted and min(row[way].values()) > 0
            assert f"| {name} " in run.stdout
