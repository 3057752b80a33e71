"""Steps of training that the small world's VAE and its tiny decoder share."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longsana.runtime.graphs import Recording
from longsana.shapes.material import PhasesConfig
from longsana.shapes.rate import warm_cosine
from longsana.shapes.snapshot import Snapshot

WARM_UP = 3
"""Steps before recording: what libraries set up on first use must not be part of a graph."""
EVERY = 50
"""Steps between two lines of the log."""


class Descent:
    """A network in training: weights in float32, a working copy that computes, and an average that is kept.

    On a GPU the working copy computes in bfloat16, channels last.

    master: the network at its start, on the device. folder: where a stopped run leaves what it has; see `Snapshot`.
    """

    def __init__(self, master: nn.Module, config: PhasesConfig, folder: Path, device: torch.device) -> None:
        self._config, self._device, self._total = config, device, sum(config.steps)
        on_gpu = device.type == "cuda"
        # The method of modules: diffusers' own would keep some layers in float32.
        self.network = nn.Module.to(copy.deepcopy(master), torch.bfloat16 if on_gpu else torch.float32)
        if on_gpu:
            torch.backends.cudnn.benchmark = True  # a phase's shapes never change
            _lay_out(self.network)
        self.average = copy.deepcopy(master)
        networks = (master, self.network, self.average)
        lists: list[list[Tensor]] = [list(model.parameters()) for model in networks]
        self._weights, self._working, self._averaged = lists
        self._optimiser = torch.optim.AdamW(self._weights, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        kept = {"weights": master, "average": self.average}
        self._snapshot = Snapshot(folder, config, kept, self._optimiser, lambda step: warm_cosine(step, self._total))
        with torch.no_grad():
            torch._foreach_copy_(self._working, self._weights)
        self._started = time.perf_counter()

    def steps(self) -> Iterator[tuple[int, int]]:
        """Each step that is to be made, and its phase; a stopped run's were saved, and so is a phase's last.

        Raises:
            Stopped: there was a request to stop.
        """
        ends = tuple(itertools.accumulate(self._config.steps))
        phases = [phase for phase, count in enumerate(self._config.steps) for _ in range(count)]
        for step in self._snapshot.steps(self._total, save_at=ends):
            yield step, phases[step]

    def gradients(self, losses: Callable[..., Sequence[Tensor]]) -> Gradients:
        """Differentiate scalar losses by the working copy's weights in a phase; see `Gradients`."""
        return Gradients(losses, self._working, recorded=replays(self._config, self._device))

    def apply(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """Make a step by the gradients, each of its weight's shape; None: of a weight that was not used."""
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self._working, self._weights)
            torch._foreach_lerp_(self._averaged, self._weights, 1 - min(self._config.average, step / (step + 10)))

    def progress(self, step: int, clips: Tensor) -> str | None:
        """Tell how far it is after a step with clips (B, C, F, H, W); None where the log says nothing."""
        if (step + 1) % EVERY and step + 1 != self._total:
            return None
        spent = time.perf_counter() - self._started
        return f"step {step + 1} of {self._total}, {len(clips)} clips of {clips.shape[2]} frames, {spent:.0f} s"

    def finish(self) -> None:
        """Remove what a stopped run would have gone on from: what was trained is in its place."""
        self._snapshot.remove()


def replays(config: PhasesConfig, device: torch.device) -> bool:
    """Tell whether steps are recorded and replayed."""
    return device.type == "cuda" and config.cuda_graphs


class Gradients:
    """Gradients of a phase's steps, whose shapes never change.

    losses(*inputs): what is to become small, then numbers for the log; scalars. recorded: as a CUDA graph.
    """

    def __init__(self, losses: Callable[..., Sequence[Tensor]], weights: Sequence[Tensor], *, recorded: bool) -> None:
        self._losses, self._weights, self._recorded = losses, weights, recorded
        self._learned = [True] * len(weights)
        self._recording: Recording | None = None

    def __call__(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The numbers for the log, and the gradient of each weight, of its shape, float32; None of an unused one."""
        if self._recorded and self._recording is None:
            self._recording = Recording(self._differentiate, inputs, warm_up=self._differentiate, warm_ups=WARM_UP)
        made = self._differentiate(*inputs) if self._recording is None else self._recording.replay(inputs)
        shown = len(made) - sum(self._learned)
        gradients = iter(made[shown:])
        return made[:shown], [next(gradients) if learned else None for learned in self._learned]

    def _differentiate(self, *inputs: Tensor) -> list[Tensor]:
        objective, *shown = self._losses(*inputs)
        gradients = torch.autograd.grad(objective, self._weights, allow_unused=True)
        self._learned = [gradient is not None for gradient in gradients]  # single frames use no temporal strides
        return [*(one.detach() for one in shown), *(part.float() for part in gradients if part is not None)]


def _lay_out(network: nn.Module) -> None:
    """Put channels last: in any other layout a GPU reorders them in every convolution."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
