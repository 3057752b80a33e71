"""Does a video of the shapes world show what its caption promised, and does it go on with what it has shown?

`observe` (`longsana/shapes/sight.py`) looks at pictures and says what is there; `judge` compares that with promises
and with the video's own past. It knows captions, not scenes. Both work on any number of videos at once, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.shapes.identity import Looks, alike, recall
from longsana.shapes.motion import Course, as_promised
from longsana.shapes.presence import find_presence
from longsana.shapes.scenes import BACKGROUNDS, COLOURS, FPS, SHOWN, Actor, Promise
from longsana.shapes.sight import TOLERANCE, Seen


class Verdicts(NamedTuple):
    """Verdicts on each frame's promises, (B, F) each: a share in [0, 1]; nan where there is nothing to judge.

    A video without a promise is nan throughout. One who travels is not judged while it is cut by the rim of the picture
    or away, as promised (`presence.py`).

    colour: promised actors whose colour is seen, and right. kind: those whose colour's object is of their kind.
    background: whether it is the promised one. motion: actors that move as promised, within the second or two around
    the frame; nan in a clip of under 20 frames. persistence: whether all that should be in view is there, and nothing
    that was not promised. identity: actors whose kind, hue, size and marking are those of the first second. returns:
    those who came back and are what they were in the second before they left; 0 of one who should be back and is not,
    and while one is away and something else is in view; nan where none has left.
    """

    colour: Tensor
    kind: Tensor
    background: Tensor
    motion: Tensor
    persistence: Tensor
    identity: Tensor
    returns: Tensor

    @property
    def adherence(self) -> Tensor:
        """(B, F): mean of all that a caption says, which is all but persistence, identity and returns."""
        return torch.stack([self.colour, self.kind, self.background, self.motion]).nanmean(0)

    @property
    def right(self) -> Tensor:
        """(B, F), bool: whether all that a caption says is so, and persistence; what is not judged is not wrong."""
        judged = torch.stack([self.colour, self.kind, self.background, self.motion, self.persistence])
        return ((judged >= 1) | judged.isnan()).all(0)


def judge(seen: Seen, promises: Sequence[Promise | None]) -> Verdicts:
    """Compare what was seen in B videos with their promises; None: outside of the grammar, not scored."""
    batch, _ = seen.background.shape
    assert len(promises) == batch, (len(promises), batch)
    device = seen.core.device
    cast = _Cast.of(promises, device)
    there = cast.pick(seen.present)
    presence = find_presence(there, cast.pick(seen.rims), cast.actors)
    judged = ~presence.excused
    right_colour = there & (cast.pick(seen.off) <= TOLERANCE)
    right_kind = there & (cast.pick(seen.kind) == cast.kind[:, None]) & ~presence.torn
    moves = as_promised(cast.pick(seen.centre), Course.of(cast.actors, device), seen.size, presence.excused)

    # Whatever is in view must be promised, and in view what should be.
    strangers = (seen.present & ~cast.promised[:, None]).any(-1)
    complete = (cast.total(judged & ~right_kind) == 0) & ~strangers

    looks = _looks(seen, cast, presence.whole)
    first = torch.full((len(cast.actors), 1), min(FPS, there.shape[1]) - 1, device=device)
    identical = alike(looks, recall(looks, first))
    back = presence.whole & (presence.before >= 0)
    another = presence.excused & ~there & strangers[cast.video]
    returned = back & alike(looks, recall(looks, presence.before))

    grounds = [list(BACKGROUNDS).index(promise.background) if promise else 0 for promise in promises]
    right_ground = seen.background == torch.tensor(grounds, device=device)[:, None]
    unscored = torch.tensor([promise is None for promise in promises], device=device)[:, None]
    return Verdicts(
        cast.share(right_colour, judged),
        cast.share(right_kind, judged),
        right_ground.float().masked_fill(unscored, torch.nan),
        cast.share(moves == 1, moves.isfinite()),
        complete.float().masked_fill(unscored, torch.nan),
        cast.share(identical, judged),
        cast.share(returned, back | presence.missing | another),
    )


def all_in_view(seen: Seen, promises: Sequence[Promise | None]) -> Tensor:
    """Tell where nothing is cut or away as promised, (B, F): in these frames figures of the whole picture compare."""
    cast = _Cast.of(promises, seen.core.device)
    presence = find_presence(cast.pick(seen.present), cast.pick(seen.rims), cast.actors)
    return cast.total(presence.excused) == 0


@dataclass(frozen=True)
class _Cast:
    """The N actors of B videos. video: (N,) whose; colour, kind: (N,) indices; promised: (B, 7) colours."""

    actors: list[Actor]
    video: Tensor
    colour: Tensor
    kind: Tensor
    promised: Tensor

    @classmethod
    def of(cls, promises: Sequence[Promise | None], device: torch.device) -> _Cast:
        pairs = [
            (video, actor) for video, promise in enumerate(promises) for actor in (promise.actors if promise else ())
        ]
        actors = [actor for _, actor in pairs]
        video, colour, kind = (
            torch.tensor(values, dtype=torch.long, device=device)
            for values in (
                [video for video, _ in pairs],
                [list(COLOURS).index(actor.colour) for actor in actors],
                [SHOWN.index(actor.kind) for actor in actors],
            )
        )
        promised = torch.zeros(len(promises), len(COLOURS), dtype=torch.bool, device=device)
        promised[video, colour] = True
        return cls(actors, video, colour, kind, promised)

    def pick(self, field: Tensor) -> Tensor:
        """Take each actor's own, (N, F, ...), from a field (B, F, 7, ...) of `Seen`."""
        return field[self.video, :, self.colour]

    def total(self, values: Tensor) -> Tensor:
        """Sum over each video's actors, (B, F), of values (N, F)."""
        whole = torch.zeros(len(self.promised), values.shape[1], device=values.device)
        return whole.index_add(0, self.video, values.float())

    def share(self, kept: Tensor, judged: Tensor) -> Tensor:
        """Share of the actors judged (N, F) that keep it (N, F); nan where none is."""
        return self.total(kept & judged) / self.total(judged)


def _looks(seen: Seen, cast: _Cast, whole: Tensor) -> Looks:
    kind, radius = cast.pick(seen.kind), cast.pick(seen.radius)
    known = whole & (kind >= 0)
    return Looks(known, kind, cast.pick(seen.tint), radius.log(), cast.pick(seen.marking), cast.pick(seen.angle))


@dataclass(frozen=True)
class Score:
    """Means over all frames of all scored videos, in [0, 1]; nan where none is scored."""

    colour: float
    kind: float
    background: float
    motion: float
    persistence: float
    identity: float
    returns: float
    adherence: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(verdicts: Verdicts) -> Score:
    """Numbers of `judge(seen.first(frames), promises)`: of the whole videos, or of their first frames."""
    means = {name: float(getattr(verdicts, name).nanmean()) for name in (*Verdicts._fields, "adherence")}
    return Score(**means)
