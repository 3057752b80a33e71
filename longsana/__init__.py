"""LongSANA: text in, minute-long video out, with a memory that never grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longsana.pipelines.video import LongSanaVideoPipeline as LongSanaVideoPipeline

__version__ = "0.1.0"
__all__ = ["LongSanaVideoPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LongSanaVideoPipeline":  # brings torch and diffusers, which takes seconds
        from longsana.pipelines.video import LongSanaVideoPipeline

        return LongSanaVideoPipeline
    raise AttributeError(f"module 'longsana' has no attribute '{name}'")
