"""Small networks with no zero weight in them, and what they eat."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which some of the next lines may do

from longsana.config import ModelConfig
from longsana.models.dit import LongSanaDiT
from longsana.models.embeddings import TextEmbedding
from longsana.runtime.stop import SIGNALS
from longsana.weights.names import Naming, foreign
from tests.forks import Forks

_module: list[Path] = []
"""The module of the test that was set up last."""


def pytest_configure() -> None:
    """Take the signals that this process was told to ignore (nohup, a shell's `&`), and do nothing.

    A child inherits that a signal is ignored, and a command rightly leaves such a signal alone; it does not inherit a
    handler, and so tests of signals do not depend on how pytest was started.
    """
    # Until all tests are collected: looking for garbage among imports and syntax trees, where there is none, takes a
    # quarter of that time.
    gc.disable()
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread, whatever the commands that earlier tests called have set.

    Networks this small only wait for each other's threads: minutes on a busy machine, seconds with one. And sums of
    other numbers of threads are rounded otherwise. A hook, as a module's fixtures are made before a test's own.

    What earlier modules and their imports have left is no longer looked at by the garbage collector: going through
    these millions of objects took half of the time of a small command, which collects before it loads its network.
    """
    torch.set_num_threads(1)
    if _module != [item.path]:
        _module[:] = [item.path]
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


CAPTION_CHANNELS, CAPTION_LENGTH = 32, 8


@pytest.fixture(scope="session")
def small_config() -> Callable[..., ModelConfig]:
    """`small_config(depth=3, num_cached_blocks=1)`: the network's config; heads of 28 (12 + 8 + 8 rotary)."""

    def build(**changes: Any) -> ModelConfig:
        sizes: dict[str, Any] = {
            "depth": 2,
            "hidden_size": 56,
            "num_heads": 4,
            "mlp_ratio": 0.5,  # torch convolves each channel of float64 by itself, for two thirds of a pass
            "in_channels": 4,
            "linear_head_dim": 28,
            "caption_channels": CAPTION_CHANNELS,
            "caption_length": CAPTION_LENGTH,
        }
        return ModelConfig(**{**sizes, **changes})

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[..., LongSanaDiT]:
    """`random_model(config, dtype)`: every weight and buffer random and of the size that keeps activations near 1."""

    @torch.no_grad()
    def build(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> LongSanaDiT:
        rng = torch.Generator().manual_seed(seed)
        model = LongSanaDiT(config).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            values = torch.randn(tensor.shape, generator=rng)
            if "norm" in name:
                values = 1 + 0.3 * values
            elif name.endswith(("bias", "modulation")):
                values = 0.3 * values
            else:
                values = values / values[0].numel() ** 0.5
            tensor.copy_(values)
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def random_text() -> Callable[..., TextEmbedding]:
    """`random_text(batch)`: captions of 8, 3, 6, 1, ... tokens."""

    def build(batch: int, seed: int = 1) -> TextEmbedding:
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([(8, 3, 6, 1)[i % 4] for i in range(batch)])
        tokens = torch.randn(batch, CAPTION_LENGTH, CAPTION_CHANNELS, generator=rng)
        return TextEmbedding(tokens, torch.arange(CAPTION_LENGTH) < lengths[:, None])

    return build


@pytest.fixture(scope="session")
def random_latents() -> Callable[..., torch.Tensor]:
    """`random_latents(batch, frames)`: (B, 4, T, 4, 6) in float64, a grid of 2 x 3 tokens a frame."""

    def build(
        batch: int, frames: int, seed: int = 2, *, channels: int = 4, height: int = 4, width: int = 6
    ) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(batch, channels, frames, height, width, generator=rng, dtype=torch.float64)

    return build


@pytest.fixture(scope="session")
def renamed() -> Callable[..., dict[str, torch.Tensor]]:
    """`renamed(model, "upstream")`: its weights under another naming, in their own dtype."""

    def build(model: LongSanaDiT, naming: Naming) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in model.state_dict().items():
            parts = foreign(name, tuple(tensor.shape), naming)
            for part, piece in zip(parts, tensor.chunk(max(len(parts), 1)), strict=False):
                result[part.name] = piece.reshape(part.shape)
        return result

    return build


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """`forks.start("train", arguments)`: a process without the seconds of its imports."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def limited() -> Callable[[int], AbstractContextManager[None]]:
    """`with limited(1000):` a full disk, as far as single files go: none may grow beyond so many bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


# A browser

CHROMIUM = Path(os.environ.get("LONGSANA_CHROMIUM", "/usr/bin/chromium"))
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser; without one tests are skipped, and with LONGSANA_BROWSER=required, as in CI, they fail.

    Beside other tests (pytest -n) they are skipped: what plays in real time needs the cores for itself.
    """
    reason = "" if CHROMIUM.exists() else f"there is no browser at {CHROMIUM}"
    if "PYTEST_XDIST_WORKER" in os.environ:
        reason = "alone, without -n: pytest tests/serving/test_page.py tests/evaluation/test_page.py"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "playwright is not installed"
    if reason and os.environ.get("LONGSANA_BROWSER") == "required":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
