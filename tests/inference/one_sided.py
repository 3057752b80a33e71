"""The inference command, on one of several processes with passes that fail; see test_teams.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from longsana.commands import generate
from longsana.inference import batch
from longsana.runtime import teams
from longsana.runtime.errors import InputError


def main(arguments: Sequence[str]) -> int:
    teams.DOUBT = 1.0  # the other never comes to the end of its pass, however long it has
    if os.environ["RANK"] == arguments[0]:

        def broken(*given: Any, **more: Any) -> Any:
            raise InputError("a file that only this process cannot read")
            yield

        batch.sample_from = broken
    return generate.main(arguments[1:])
