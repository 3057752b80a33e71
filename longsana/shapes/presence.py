"""Presence of an object that travels: wholly in view, cut by the rim of the picture, or away.

A caption promises that it leaves on one side and comes back on the other; it does not say for how long it is away. So
an object is excused from being seen, or from being seen in whole, from when it reaches the side where it goes out until
it has come in on the other, if that takes no longer than in any scene of the world. An object that vanishes elsewhere,
comes back elsewhere, or does not come back in time was not excused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longsana.shapes.looks import RADII
from longsana.shapes.remembered import AWAY
from longsana.shapes.scenes import FPS, SPEEDS, Actor
from longsana.shapes.sight import RIM

RIMS = ("left", "up", "right", "down")
"""Sides of the picture in the order of `Seen.rims`, as directions."""
LEAST_AWAY = 4
"""Frames unseen, at least, of one who left; the world's shortest absence is 8, and what flickers has not left."""
LARGEST = 1.1 * max(radius for _, radius in RADII.values())
"""Pixels from the centre to the farthest edge of any object."""


class Presence(NamedTuple):
    """The presence of N actors in F frames, (N, F) each.

    whole: bool, in view and not cut by the rims that it travels across; of one that does not travel, seen.
    torn: bool, at both of these rims at once, as if it were to leave and to come in.
    excused: bool, cut or away, as promised.
    missing: bool, away and not excused; of those who travel alone.
    before: int64, for one who has come back the last frame that showed it whole before it left; -1 until then.
    """

    whole: Tensor
    torn: Tensor
    excused: Tensor
    missing: Tensor
    before: Tensor


def find_presence(present: Tensor, rims: Tensor, actors: Sequence[Actor]) -> Presence:
    """Follow N actors through F frames, from where they were seen alone.

    present: (N, F) bool, whether each is seen. rims: (N, F, 4) bool, the rims that it touches, see `Seen`.
    """
    travels, out, into, limit = _ways(actors, present.device)
    leaving, entering = (
        present & travels & rims.gather(2, side.expand_as(present)[..., None])[..., 0] for side in (out, into)
    )
    whole, torn = present & ~leaving & ~entering, leaving & entering

    frames = present.shape[1]
    index = torch.arange(frames, device=present.device).expand_as(present)
    last = index.where(whole, -1).cummax(1).values
    following = index.where(whole, frames).flip(1).cummin(1).values.flip(1)
    # Of each frame that does not show it whole: the first and the last one of this stretch.
    first, final = (last + 1).clamp(max=frames - 1), following - 1
    final = torch.maximum(final, index)
    unseen = (~present).cumsum(1)
    absent = unseen.gather(1, final) - (unseen - (~present).long()).gather(1, first)
    comes = (following == frames) | entering.gather(1, final)
    promised = (absent == 0) | leaving.gather(1, first) & comes
    seen_before = last >= 0
    excused = travels & ~whole & ~torn & seen_before & promised & (index - last <= limit)
    missing = travels & ~whole & ~excused & seen_before & (absent >= LEAST_AWAY)

    # Where it is whole again after an absence, the frame before that; and so until the next absence.
    came = torch.zeros_like(whole)
    came[:, 1:] = whole[:, 1:] & ~whole[:, :-1] & (absent[:, :-1] >= LEAST_AWAY) & seen_before[:, :-1] & travels
    left = last.roll(1, 1).where(came, -1).cummax(1).values
    return Presence(whole, torn, excused, missing, left)


def _ways(actors: Sequence[Actor], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read whether actors travel, where they go out and come in (indices into RIMS), and frames; (N, 1) each.

    Frames: that it takes at most from the one rim until it is wholly in view at the other, with a second to spare.
    """
    rows = []
    for actor in actors:
        side = RIMS.index(actor.motion) if actor.travels else 0
        speed = SPEEDS.get(actor.speed, 1.0)
        rows.append((actor.travels, side, (side + 2) % 4, AWAY[1] + 2 * (2 * LARGEST + RIM) / speed + FPS))
    values = torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 4, 1)
    travels, out, into, limit = values.unbind(1)
    return travels.bool(), out.long(), into.long(), limit
