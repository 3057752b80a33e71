"""Videos of a team: its leader takes frames as it likes, and the others make the same passes along with it."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from longsana.runtime.later import Later
from longsana.runtime.teams import Team
from longsana.sampling.continuation import Moment
from longsana.sampling.engine import Frames

NEXT, AFTER, STOP = "next", "after", "stop"


def led(samples: Iterator[Frames], team: Team) -> Generator[Frames]:
    """Frames as they come, with word to the others of the team before each of their passes.

    What fails in a pass is taken to fail on all of them; what the taker fails at, or closing, is told.
    """
    in_pass = False
    try:
        while True:
            team.tell(NEXT)
            in_pass = True
            frames = next(samples, None)
            if frames is None:
                return
            in_pass = False
            own, later = frames, None
            if own.later is not None:

                def after(own: Frames = own) -> Moment:
                    team.tell(AFTER)
                    moment = own.after
                    assert moment is not None
                    return moment

                later = Later(after)
            del frames
            yield own._replace(later=later)
            del own, later
    finally:
        if not in_pass:
            team.tell(STOP)


def follow(samples: Iterator[Frames], team: Team) -> None:
    """Make the passes of the same frames, as the leader says.

    Raises:
        PeerLost: it has ended.
    """
    frames: Frames | None = None
    while (word := team.told()) != STOP:
        if word == AFTER:
            assert frames is not None and frames.after is not None
        else:
            frames = None
            frames = next(samples, None)
            if frames is None:
                return
