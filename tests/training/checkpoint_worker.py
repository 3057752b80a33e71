"""A small network under FSDP2 with all that is saved of it; and `main([FOLDER, *PARTS])`, what processes do with that.

FOLDER/one holds a checkpoint by one process. The part save_forever never ends, to be killed in.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from longsana.runtime.distributed import World
from longsana.training import checkpoint
from longsana.training.checkpoint import Checkpointer, SaveFailed
from longsana.weights.checkpoint_folder import TENSOR_FILES, own_names, read_own, read_progress


class Run:
    """Training, and its live tensors; one layer has fewer rows than there are processes."""

    def __init__(self, seed: int, device: str = "cpu", *, replicas: bool = False) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3), nn.SiLU(), nn.Linear(3, 1))
        self.model.register_buffer("table", torch.randn(4, 3))
        self.model.to(device)
        size = dist.get_world_size()
        names = ("replicate", "shard") if replicas else ("shard",)
        mesh = init_device_mesh(device, (size, 1) if replicas else (size,), mesh_dim_names=names)
        for layer in (self.model[0], self.model[2], self.model):
            fully_shard(layer, mesh=mesh)
        self.weights = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.1, betas=(0.5, 0.9))
        for weight in self.weights.values():
            self.optimizer.state[weight] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def train(self, *steps: int) -> Run:
        for step in steps:
            rng = torch.Generator().manual_seed(step)
            self.model(torch.randn(4, 5, generator=rng).to(self.device)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, weight in self.weights.items():
                self.average[name].lerp_(weight.detach(), 0.3)
        return self

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {
            f"{name}.{part}": value
            for name, weight in self.weights.items()
            for part, value in self.optimizer.state[weight].items()
        }
        return {
            "generator": self.weights | dict(self.model.named_buffers()),
            "generator_ema": dict(self.average),
            "optimizer.generator": moments,
        }

    def whole(self) -> dict[str, Tensor]:
        """Everything by name, gathered."""
        return {
            f"{group}/{name}": (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for group, named in self.tensors().items()
            for name, value in named.items()
        }


def save(checkpointer: Checkpointer, step: int, run: Run, **changes: Any) -> None:
    rank = checkpointer.world.rank
    own = {f"rng_{rank:05d}": {"cpu": torch.arange(5, dtype=torch.uint8) + rank}}
    given = {"own": own, "progress": {"step": step}, "texts": {"config.yaml": f"# {step}\n"}}
    checkpointer.save(step, run.tensors(), **{**given, **changes})


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def reshard(folder: Path, world: World) -> None:
    """Read what other numbers of processes saved."""
    for name in ("one", "two", "async"):
        path = folder / name / "checkpoint_model_000002"
        if path.exists():
            run = Run(seed=1)
            Checkpointer(path.parent, world, keep=1, asynchronous=False).load(path, run.tensors())
            found = run.whole()
            if world.is_main:
                torch.save(found, folder / f"{name}_by_{world.size}.pt")


def replicas(folder: Path, world: World) -> None:
    """Each part is on both processes: one of the two writes it, and both write about as much."""
    checkpointer = Checkpointer(folder / "replicas", world, keep=2, asynchronous=False)
    whole = Run(seed=0).train(0, 1).whole()
    run = Run(seed=0, replicas=True)
    for group, named in run.tensors().items():
        for name, value in named.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            local.detach().copy_(whole[f"{group}/{name}"])
    save(checkpointer, 2, run)
    path = folder / "replicas/checkpoint_model_000002"
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in sorted(path.glob(TENSOR_FILES))]
    assert len(sizes) == 2 and sum(sizes) == sum(value.numel() for value in whole.values())
    assert max(sizes) < 1.5 * min(sizes), sizes
    for other in (Run(seed=1, replicas=True), Run(seed=1)):
        checkpointer.load(path, other.tensors())
        assert_equal(other.whole(), whole)


def resume(folder: Path, world: World) -> None:
    """Two iterations, a checkpoint and two more are four; and each process finds its own file."""
    checkpointer = Checkpointer(folder / "two", world, keep=2, asynchronous=False)
    first = Run(seed=0).train(0, 1)
    save(checkpointer, 2, first)
    saved = first.whole()
    if world.is_main:
        torch.save(saved, folder / "two.pt")
    second = Run(seed=1)
    path = checkpointer.latest()
    assert path == folder / "two/checkpoint_model_000002"
    checkpointer.load(path, second.tensors())
    assert_equal(second.whole(), saved)
    assert_equal(second.train(2, 3).whole(), first.train(2, 3).whole())
    assert read_progress(path) == {"step": 2}
    assert own_names(path) == ["rng_00000", "rng_00001"]
    own = read_own(path, f"rng_{world.rank:05d}")
    assert own is not None and own["cpu"].tolist() == [world.rank + i for i in range(5)]


def asynchronous(folder: Path, world: World) -> None:
    """What is written is what was there when `save` returned, also while the processes exchange messages."""
    name = "async" if world.size == 2 else f"async{world.size}"
    checkpointer = Checkpointer(folder / name, world, keep=2, asynchronous=True)
    run = Run(seed=0).train(0, 1)
    expected = run.whole()
    if world.is_main:
        torch.save(expected, folder / f"{name}.pt")
    save(checkpointer, 2, run)
    run.train(2, 3, 4)
    save(checkpointer, 5, run)
    later = run.whole()
    run.train(5, 6, 7)
    checkpointer.wait()
    for step, tensors in ((2, expected), (5, later)):
        run = Run(seed=1)
        checkpointer.load(folder / f"{name}/checkpoint_model_{step:06d}", run.tensors())
        assert_equal(run.whole(), tensors)


def fail_on_one(folder: Path, world: World) -> None:
    """All processes hear of it, and nothing is left; the next save is as good as ever."""
    checkpointer = Checkpointer(folder / "failing", world, keep=2, asynchronous=False)
    run = Run(seed=0)
    save(checkpointer, 1, run)
    genuine = checkpoint.save_tensors

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        checkpoint.save_tensors = full_disk
    with pytest.raises(SaveFailed, match="No space left") as caught:
        save(checkpointer, 2, run)
    assert caught.value.filename == str(folder / "failing/checkpoint_model_000002")
    checkpoint.save_tensors = genuine
    if world.is_main:  # who tidies up, and goes on to the next save only then
        assert [path.name for path in (folder / "failing").iterdir()] == ["checkpoint_model_000001"]
    save(checkpointer, 2, run)
    assert checkpointer.latest() == folder / "failing/checkpoint_model_000002"


def save_forever(folder: Path, world: World) -> None:
    checkpointer = Checkpointer(folder / "two", world, keep=2, asynchronous=False)
    genuine = checkpoint.write_parts

    def stuck(*arguments: Any, **options: Any) -> Any:
        result = genuine(*arguments, **options)
        if world.rank == 1:
            time.sleep(1000)
        return result

    checkpoint.write_parts = stuck
    save(checkpointer, 4, Run(seed=0))


PARTS = (reshard, resume, asynchronous, replicas, fail_on_one, save_forever)


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    folder, world = Path(arguments[0]), World.from_environment()
    world.connect(alone=True)
    for part in arguments[1:]:
        {part.__name__: part for part in PARTS}[part](folder, world)
        print(f"{part} ok")
    return 0
