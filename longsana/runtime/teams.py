"""Teams of processes: each makes one video at a time, whose passes its members divide."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longsana.runtime.distributed import LOST, World, among_peers
from longsana.runtime.errors import InputError
from longsana.runtime.files import remove_unfinished
from longsana.runtime.peers import Peers

log = logging.getLogger(__name__)

GRACE = 3.0
"""Seconds that a process has to end by itself when another of its team has gone; one that waits for a GPU cannot."""
MEETING = 60.0
"""Seconds for members to reach their leader."""
DONE, GONE = b"d", b"g"
"""Words of a member that has come to the end, and of a leader that knows of one that has not."""


@dataclass(frozen=True)
class Team:
    """This process's team among the teams of a launch.

    index, count: which one it is, of how many. peers: its members, in passes; None: this process alone.
    """

    index: int = 0
    count: int = 1
    peers: Peers | None = None
    _told: Any = None  # gloo's group of the members: what a leader says is no matter of GPUs
    _leader: int = 0

    @classmethod
    def of(cls, world: World, size: int, device: torch.device) -> Team:
        """Divide the processes of a launch, which all call this, into teams of `size`, neighbours together.

        Raises:
            InputError: their number does not come out.
        """
        check_team(world, size)
        index, count = world.rank // size, world.size // size
        if size == 1:
            return cls(index, count)
        backend = "nccl" if device.type == "cuda" else "gloo"
        teams = [list(range(first, first + size)) for first in range(0, world.size, size)]
        # Everyone makes all groups, in one order.
        passes, words = ([dist.new_group(ranks, backend=name) for ranks in teams] for name in (backend, "gloo"))
        return cls(index, count, Peers(passes[index]), words[index], teams[index][0])

    @property
    def size(self) -> int:
        return 1 if self.peers is None else self.peers.size

    @property
    def leads(self) -> bool:
        """True of the one that reads and writes files; the others follow it."""
        return self.peers is None or self.peers.rank == 0

    def tell(self, word: Any) -> None:
        """Tell the others something that can be pickled; they wait for it in `told`."""
        if self.peers is not None:
            self._broadcast(word)

    def told(self) -> Any:
        """Wait for what the leader tells next.

        Raises:
            PeerLost: it has ended.
        """
        return self._broadcast(None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a member that ends takes this process with it, whatever it waits for: on a GPU that may be for ever.

        All members come in and go out. Each holds a connection to the leader, which a process's end closes.

        Raises:
            InputError: the leader cannot be reached.
        """
        if self.peers is None:
            yield
            return
        over, connections = threading.Event(), self._connected()
        for connection in connections:
            others = [other for other in connections if other is not connection]
            threading.Thread(target=self._watch, args=(connection, others, over), daemon=True).start()
        try:
            yield
            for connection in connections:
                _say(connection, DONE)  # after a failure the others are not to wait for this process
        finally:
            over.set()

    def _connected(self) -> list[socket.socket]:
        assert self.peers is not None
        if not self.leads:
            (host, port), word = self.told()
            try:
                connection = socket.create_connection((host, port), timeout=MEETING)
                connection.sendall(word)
                connection.settimeout(None)
            except OSError as error:
                raise InputError(f"the first process of this video, at {host}, cannot be reached ({error})") from error
            return [connection]
        word = secrets.token_bytes(16)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # nothing is sent: which address is ours?
            way.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            host = way.getsockname()[0]
        found: list[socket.socket] = []
        with socket.create_server((host, 0)) as server:
            server.settimeout(MEETING)
            self.tell((server.getsockname(), word))
            while len(found) < self.peers.size - 1:
                try:
                    connection, _ = server.accept()
                    connection.settimeout(MEETING)
                    known = connection.recv(len(word), socket.MSG_WAITALL) == word
                except OSError as error:
                    raise InputError("another process of this video did not come") from error
                connection.settimeout(None)
                if known:
                    found.append(connection)
        return found

    def _watch(self, connection: socket.socket, others: list[socket.socket], over: threading.Event) -> None:
        try:
            word = connection.recv(1)
        except OSError:
            word = b""
        if word == DONE:
            return
        for other in others:
            _say(other, GONE)
        if over.wait(GRACE):
            return
        remove_unfinished()
        assert self.peers is not None
        if word != GONE and self.peers.rank < 2:  # the leader, or the first of those that it has left
            print(f"failed: {LOST}", file=sys.stderr, flush=True)
        os._exit(1)

    def _broadcast(self, word: Any) -> Any:
        box = [word]
        with among_peers():
            dist.broadcast_object_list(box, src=self._leader, group=self._told)
        return box[0]


def _say(connection: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(word)


def check_team(world: World, size: int) -> None:
    """Refuse (InputError) a number of GPUs for a video that the processes of a launch cannot be divided by."""
    if size < 1 or world.size % size:
        raise InputError(
            f"--gpus_per_video {size}: does not divide the number of processes of this launch, {world.size}; start a "
            f"multiple of it, as in torchrun --nproc_per_node={max(size, 1)}"
        )
