"""Snapshots that the trainers of small parts save when they are stopped, so that the same command goes on."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from longsana.runtime.files import remove, write_exclusive
from longsana.runtime.stop import Stopped, deferred

log = logging.getLogger(__name__)

NAME = ".unfinished.safetensors"


class Snapshot:
    """Networks and their optimiser after some steps, in a file of `folder` that goes when training has ended.

    config: a dataclass; what was saved with another one is not gone on from. rate(step): the factor of the learning
    rate, which this sets.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        networks: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        rate: Callable[[int], float],
    ) -> None:
        self._path, self._optimiser, self._rate = folder / NAME, optimiser, rate
        self._config = json.dumps(dataclasses.asdict(config))
        self._weights = {
            f"{name}.{key}": weight for name, network in networks.items() for key, weight in network.named_parameters()
        }
        self._rates = [group["lr"] for group in optimiser.param_groups]
        self.first = self._restore()

    def steps(self, total: int, save_at: tuple[int, ...] = ()) -> Iterator[int]:
        """The steps from 0, or from where training was stopped, to `total`; between two of them requests to stop are
        obeyed, after saving. save_at: numbers of steps after which it saves in any case.

        Raises:
            Stopped: there was a request.
        """
        with deferred() as asked:
            for step in range(self.first, total):
                for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
                    group["lr"] = rate * self._rate(step)
                yield step
                number = asked()
                if number or step + 1 in save_at:
                    self._save(step + 1)
                if number:
                    raise Stopped(number)

    def remove(self) -> None:
        """Remove the file: what was trained is in its place."""
        remove(self._path)

    def _save(self, done: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.detach() for name, weight in self._weights.items()} | self._moments()
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._header(done))
        write_exclusive(self._path, content)

    def _restore(self) -> int:
        """Fill networks and optimiser with what was saved; returns the step that comes next."""
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata() or {}
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError):
            return 0
        done = int(header.get("done", 0))
        if header != self._header(done):
            return 0
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(stored.pop(name))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        self._optimiser.load_state_dict(self._optimiser.state_dict() | {"state": state})
        log.info("%s: going on after step %d", self._path.parent, done)
        return done

    def _moments(self) -> dict[str, Tensor]:
        state = self._optimiser.state_dict()["state"]
        return {f"{number}/{key}": tensor for number, values in state.items() for key, tensor in values.items()}

    def _header(self, done: int) -> dict[str, str]:
        return {"config": self._config, "done": str(done)}
