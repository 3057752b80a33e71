"""Values that are made when somebody needs them."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar, cast

Made = TypeVar("Made")


class Later(Generic[Made]):
    """A value that is made once, when it is first asked for; asked by two threads, the second one waits.

    make: is let go of then, with all that it holds. One that fails is tried again.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make: Callable[[], Made] | None = make
        self._made: Made | None = None
        self._lock = Lock()

    @classmethod
    def of(cls, made: Made) -> Later[Made]:
        """A value that is there already."""
        later = cls(lambda: made)
        later()
        return later

    @property
    def made(self) -> Made | None:
        """The value, if it was made; None as long as nobody has asked for it."""
        return self._made

    def __call__(self) -> Made:
        with self._lock:
            if self._make is not None:
                self._made, self._make = self._make(), None
            return cast(Made, self._made)
