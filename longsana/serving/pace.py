"""The pace of a viewer, as a studio knows it: by the clock, from the piece that it took first."""

from __future__ import annotations

SLACK = 0.005
"""Seconds that a piece may be late without a stall: a timer's own."""
IN_TIME = 0.05
"""Seconds by which a piece may miss its deadline, which a viewer's buffer hides."""


class Pace:
    """Media time of one viewer, who shows each piece as soon as it may. Times are `time.monotonic`'s.

    zero: when picture 0 was shown, moved by every stall and pause; None before it is.
    """

    def __init__(self) -> None:
        self.zero: float | None = None
        self.underruns, self.stalled = 0, 0.0
        self._paused: float | None = None

    def due(self, pts: float, lead: float) -> float:
        """The moment from which a piece may be taken that is shown from `pts` on, `lead` seconds ahead of it."""
        return 0.0 if self.zero is None else self.zero + pts - lead

    def dry(self, pts: float) -> float | None:
        """The moment at which a viewer runs dry who has all before `pts`."""
        return None if self.zero is None else self.zero + pts

    def took(self, pts: float, now: float, ready: float) -> None:
        """Note that a piece was taken that begins at `pts` and was ready at some time; a late one stalls the viewer."""
        if self.zero is None:
            self.zero = now - pts
            return
        if ready > self.zero + pts + SLACK:
            self.underruns += 1
            self.stalled += ready - self.zero - pts
        self.zero = max(self.zero, now - pts)

    def ahead(self, pts: float, now: float) -> float | None:
        """Seconds that a viewer who has all before `pts` has still to see; None before he was shown anything."""
        if self.zero is None:
            return None
        return max(0.0, self.zero + pts - (now if self._paused is None else self._paused))

    def pause(self, now: float) -> None:
        self._paused = now if self._paused is None else self._paused

    def resume(self, now: float) -> None:
        if self._paused is not None and self.zero is not None:
            self.zero += now - self._paused
        self._paused = None
