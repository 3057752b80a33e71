"""Values that are made when somebody needs them, or a little before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from threading import Lock, Thread
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


Item = TypeVar("Item")


def ahead(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """Yield what `make` makes of each item, in order, while so many threads make it of the next ones.

    A command that is stopped does not wait for them.
    """
    waiting: deque[_Making[Made]] = deque()
    for item in items:
        if len(waiting) == workers:
            yield waiting.popleft().result()
        waiting.append(_Making(partial(make, item)))
    while waiting:
        yield waiting.popleft().result()


class _Making(Generic[Made]):
    """A value that a thread of its own makes."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._outcome: tuple[Made | None, BaseException | None] = None, None
        self._thread = Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def result(self) -> Made:
        """Wait for it; what was raised is raised here."""
        self._thread.join()
        made, error = self._outcome
        if error is not None:
            raise error
        return cast(Made, made)

    def _run(self, make: Callable[[], Made]) -> None:
        try:
            self._outcome = make(), None
        except BaseException as error:
            self._outcome = None, error
