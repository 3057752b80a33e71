"""PyTorch's defaults as they come, whatever the caller of this package has set them to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Make float32 and the CPU what a tensor gets when nothing else is said, for as long as the block runs.

    For other libraries' code, which relies on them: tokenizers, models as they are built and read, schedulers. Our own
    tensors name their dtype and device. The default dtype belongs to the whole process, so other threads see it too.
    Serves as a decorator of plain functions as well; of a generator it would cover nothing.
    """
    with ExitStack() as stack:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        # Only where it is needed: within such a block every call of torch takes a detour.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
