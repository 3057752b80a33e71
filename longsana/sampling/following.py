"""Videos of a team: its leader takes frames as it likes, and the others make the same passes along with it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from longsana.runtime.later import Later
from longsana.runtime.teams import Team
from longsana.sampling.continuation import Moment
from longsana.sampling.engine import Frames

NEXT, AFTER, STOP = "next", "after", "stop"
"""Words of the leader to those that follow it through a video."""


def led(samples: Iterator[Frames], team: Team, begin: Any) -> Generator[Frames]:
    """Frames as they come, with word to the others of the team before each of their passes.

    begin: the word with which they begin to follow.
    """
    waiting = False  # for a word: no pass is made, nor anything told
    try:
        team.tell(begin)
        while True:
            waiting = False
            team.tell(NEXT)
            own = team.together(partial(next, samples, None))
            if own is None:
                return

            def after(own: Frames = own) -> Moment:
                nonlocal waiting
                waiting = False
                team.tell(AFTER)
                moment = team.together(lambda: own.after)
                waiting = True
                assert moment is not None
                return moment

            waiting = True
            later = None if own.later is None else Later(after)
            yield own._replace(later=later)
            del own, later, after
    except (Exception, GeneratorExit):
        # Not of a request to stop, which ends this process: nor the others are to go on.
        if waiting:
            team.tell(STOP)
        raise


def follow(samples: Iterator[Frames], team: Team) -> None:
    """Make the passes of the same frames, as the leader says.

    Raises:
        PeerLost: it has ended, or a pass has failed on some members alone.
        Exception: a pass has failed on all.
    """
    frames: Frames | None = None
    while (word := team.told()) != STOP:
        if word == AFTER:
            assert frames is not None
            team.together(partial(getattr, frames, "after"))
        else:
            assert word == NEXT, word
            frames = None
            frames = team.together(partial(next, samples, None))
            if frames is None:
                return
