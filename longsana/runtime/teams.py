"""Teams of processes: each makes one video at a time, whose passes its members divide.

The leader reads and writes files, and says what comes next; the others wait for its words and make the same passes.
After each pass all agree on whether it failed. Beside that each holds a connection to the leader, which is looked at by
threads: a member whose main thread waits for a GPU, or for one that has gone, hears of it there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longsana.runtime import stop
from longsana.runtime.distributed import FOR_HOURS, LOST, PeerLost, World, among_peers
from longsana.runtime.errors import InputError
from longsana.runtime.files import remove_unfinished
from longsana.runtime.peers import Peers

Made = TypeVar("Made")

GRACE = 3.0
"""Seconds that a process has to end by itself when another of its team has gone; one that waits for a GPU cannot."""
DOUBT = 6.0
"""Seconds that members have to come to the end of a pass that has failed on one of them, and to agree."""
MEETING = 60.0
"""Seconds for members to reach their leader."""
DONE, GONE, FAILED = b"d", b"g", b"f"
"""Words over connections: of a member that has come to the end; of a leader that knows of one that has not; of one on
which a pass has failed, before the pass' number in four bytes."""


class Team:
    """This process's team among the teams of a launch; `Team()` is this process alone.

    index, count: which one it is, of how many. peers: its members, in passes; None: this process alone.
    """

    def __init__(
        self, index: int = 0, count: int = 1, peers: Peers | None = None, words: Any = None, world: World | None = None
    ) -> None:
        """words: gloo's group of the members: what a leader says is no matter of GPUs."""
        self.index, self.count, self.peers = index, count, peers
        self._words, self._world = words, world or World()
        self._connections: list[socket.socket] = []
        self._over = threading.Event()
        self._unsaid = threading.Lock()  # taken by the thread that says that a member has gone
        self._told = self._lost = False
        """Whether another process says what ended this one, and whether this one found out that another has gone."""
        self._begun = self._agreed = 0  # passes

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
        passes, words = (
            [dist.new_group(ranks, timeout=FOR_HOURS, backend=name) for ranks in teams] for name in (backend, "gloo")
        )
        return cls(index, count, Peers(passes[index]), words[index], world)

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

    def together(self, make: Callable[[], Made]) -> Made:
        """Make a pass, as all members do, and agree on whether it failed.

        Raises:
            Exception: that of `make`; it failed on all, or this process is to end.
            PeerLost: it failed elsewhere, and not here; or another member has ended.
        """
        self._begun += 1
        made: Made | None = None
        error: Exception | None = None
        try:
            made = make()
        except PeerLost:
            raise
        except Exception as failure:
            error = failure
            for connection in self._connections:
                _say(connection, FAILED + self._begun.to_bytes(4, "big"))
        failed: list[Any] = [None] * self.size
        try:
            with among_peers():
                dist.all_gather_object(failed, error is not None, group=self._words)
        except PeerLost:
            if error is not None:  # what the others have ended of
                raise error from None
            raise
        self._agreed = self._begun
        if error is not None:
            raise error
        if any(failed):
            self._told = True
            raise PeerLost(LOST)
        return made  # type: ignore[return-value]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a member that ends takes this process with it, whatever it waits for: on a GPU that may be for ever.

        All members come in and go out.

        Raises:
            InputError: the leader cannot be reached.
        """
        if self.peers is None:
            yield
            return
        self._connections = self._connected()
        watches = [threading.Thread(target=self._watch, args=(one,), daemon=True) for one in self._connections]
        for watch in watches:
            watch.start()
        try:
            yield
        except BaseException as error:
            # The others are not to wait for this process, nor it for what it has begun on a GPU.
            for connection in self._connections:
                if isinstance(error, PeerLost):
                    _say(connection, GONE)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            self._lost = isinstance(error, PeerLost) and not self._told
            self._over.set()
            last = threading.Timer(2 * GRACE, _end, [getattr(error, "status", 1)])
            last.daemon = True
            last.start()
            if self._lost:  # who is to say so, the connections tell
                for watch in watches:
                    watch.join(GRACE / len(watches))
            raise
        for connection in self._connections:
            _say(connection, DONE)
        self._over.set()

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
        word, found = secrets.token_bytes(16), list[socket.socket]()
        with socket.create_server((_own_address(), 0)) as server:
            self.tell((server.getsockname()[:2], word))
            until = time.monotonic() + MEETING
            while len(found) < self.peers.size - 1:
                try:
                    server.settimeout(max(until - time.monotonic(), 0.01))
                    connection, _ = server.accept()
                except OSError as error:
                    raise InputError("another process of this video did not come within a minute") from error
                with contextlib.suppress(OSError):  # else it is a stranger
                    connection.settimeout(1.0)
                    if connection.recv(len(word), socket.MSG_WAITALL) == word:
                        connection.settimeout(None)
                        found.append(connection)
        return found

    def _watch(self, connection: socket.socket) -> None:
        """Follow what a member, or the leader, says over its connection, until one of them is done."""
        assert self.peers is not None
        while True:
            try:
                word = connection.recv(1)
                number = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big") if word == FAILED else 0
            except OSError:
                word = b""
            if word == DONE:
                return
            others = [other for other in self._connections if other is not connection]
            for other in others:
                _say(other, FAILED + number.to_bytes(4, "big") if word == FAILED else GONE)
            if word == FAILED:
                if self._agrees(number):
                    continue
            elif word == b"" and (self._lost or not self._over.is_set()):
                self._speak()
            if self._over.wait(GRACE):
                return
            if word == FAILED and self.leads:
                self._speak()
                for other in self._connections:
                    _say(other, GONE)
            _end(1)

    def _agrees(self, number: int) -> bool:
        """Wait a while for this process to come to the end of a pass."""
        until = time.monotonic() + DOUBT
        while self._agreed < number and time.monotonic() < until:
            if self._over.wait(0.05):
                return True
        return self._agreed >= number

    def _speak(self) -> None:
        """Say that another process has gone: the leader does, or the first of those that it has left.

        The main process of the launch says it by itself, if it can, when its main thread finds out.
        """
        assert self.peers is not None
        # Of two threads the later one hears of a member that has ended because another has: it is no news.
        if self.peers.rank > 1 or not self._unsaid.acquire(blocking=False):
            return
        if not (self._world.is_main and self._over.wait(GRACE)):
            print(f"failed: {LOST}", file=sys.stderr, flush=True)

    def _broadcast(self, word: Any) -> Any:
        assert self.peers is not None
        box = [word]
        with among_peers():
            dist.broadcast_object_list(box, src=self.peers.ranks[0], group=self._words)
        return box[0]


def _own_address() -> str:
    """The address by which the others of this launch reach this process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:  # nothing is sent
            way.connect(address)
            own: str = way.getsockname()[0]
            return own
    except OSError as error:
        raise InputError(f"MASTER_ADDR={host}: there is no way to it from here ({error})") from error


def _end(status: int) -> None:
    """End this process, whose main thread does not."""
    remove_unfinished()
    os._exit(stop.requested() or status)


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
