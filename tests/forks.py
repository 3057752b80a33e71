"""Processes that begin where their imports, which take seconds, are done: forks of one that has done them.

`forks.start("generate", arguments)` is a process that runs this command, or `main(arguments)` of any other module, and
exits with what it returns; it can be waited for and sent signals as one of `subprocess`. How a process of a command
begins, with imports, a script or a launcher, is tested with real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longsana import commands

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("inference.batch", "training.run", "training.build", "training.validation")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Read when libraries are imported."""
LEAST_PORT = 10_000


class Forks:
    """The process that has done its imports; `close` ends it, and all that it has started."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._ended: dict[int, int] = {}

    def start(self, command: str, arguments: Sequence[Any], *, file_size: int | None = None, **variables: str) -> Fork:
        """A process that runs `longsana COMMAND ARGUMENTS`, or `main(arguments)` of a module.

        file_size: bytes that no file may grow beyond, as on a full disk. variables: of its environment.
        """
        environment = os.environ | ENVIRONMENT | variables
        asked = Asked(command, list(map(str, arguments)), environment, file_size)
        ours, theirs = os.pipe()
        socket.send_fds(self._socket, [json.dumps(asked).encode()], [theirs])
        os.close(theirs)
        while (started := self._hear(120)) is None:
            pass
        return Fork(self, *started, ours)

    def launch(self, processes: int, command: str, arguments: Sequence[Any], **options: Any) -> list[Fork]:
        """Processes that meet each other, as a launcher would start them; but if one ends, none is told to."""
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        return [self.start(command, arguments, RANK=str(rank), **where, **options) for rank in range(processes)]

    def status(self, number: int, timeout: float) -> int | None:
        """How a process has ended; None if it has not, within so many seconds.

        number: of how many that were started it is. The system gives a process's id to another one later.
        """
        until = time.monotonic() + timeout
        while number not in self._ended and (left := until - time.monotonic()) > 0:
            self._hear(left)
        return self._ended.get(number)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def _hear(self, timeout: float) -> tuple[int, int] | None:
        """Take one message, if it comes in time; returns number and id of the process that it says was started."""
        self._socket.settimeout(timeout)
        try:
            said = self._socket.recv(1000)
        except TimeoutError:
            return None
        assert said, "the process that forks has ended"
        number, pid, *status = map(int, said.split())
        self._ended |= dict.fromkeys([number], *status) if status else {}
        return None if status else (number, pid)


def free_port() -> int:
    """Find a port that nobody listens at: if it can be, one below those that the system hands out to connections."""
    while True:
        low = handed_out()
        port = random.SystemRandom().randrange(LEAST_PORT, low) if low > LEAST_PORT else 0
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            found: int = free.getsockname()[1]
            return found


def handed_out() -> int:
    """The first of the ports that the system gives to whoever asks for any, or connects; 0 where it does not say."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 0


class Fork:
    """A process that was started; `output` reads what it writes to stdout and stderr."""

    def __init__(self, forks: Forks, number: int, pid: int, output: int) -> None:
        self._forks, self._number, self.pid = forks, number, pid
        self.output = os.fdopen(output, encoding="utf-8", errors="replace")

    @property
    def returncode(self) -> int | None:
        """Its exit status; minus a signal's number if that ended it; None while it runs."""
        return self._forks.status(self._number, 1e-3)

    def wait(self, timeout: float = 120) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        status = self._forks.status(self._number, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
        return status

    def finish(self, timeout: float = 120) -> str:
        """Wait for its end; returns what it wrote and nobody has read."""
        self.wait(timeout)
        with self.output as output:
            return output.read()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Asked(NamedTuple):
    """What a process is to do."""

    command: str
    arguments: list[str]
    environment: dict[str, str]
    file_size: int | None

    def do(self) -> int:
        os.environ.clear()
        os.environ.update(self.environment)
        if self.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        if self.command in commands.COMMANDS:
            return commands.run(self.command, self.arguments)
        status: int = importlib.import_module(self.command).main(self.arguments)
        return status


def serve(asks: socket.socket) -> Asked:
    """Start processes until nobody asks any more, and return in each of them; the first one never returns."""
    running: dict[int, int] = {}  # their numbers by their ids
    started = 0
    while True:
        if select.select([asks], [], [], 0.01 if running else None)[0]:
            said, fds, _, _ = socket.recv_fds(asks, 1 << 20, 1)
            if not said:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                asks.close()
                for stream in (1, 2):
                    os.dup2(fds[0], stream)
                os.close(fds[0])
                return Asked(*json.loads(said))
            os.close(fds[0])
            running[pid], started = started, started + 1
            asks.send(f"{running[pid]} {pid}".encode())
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                asks.send(f"{running.pop(pid)} {pid} {os.waitstatus_to_exitcode(status)}".encode())


if __name__ == "__main__":
    gc.disable()  # until all is imported: there is hardly any garbage, and to look for it takes a part of the time
    for module in HEAVY:
        importlib.import_module(f"longsana.{module}")
    for module, _ in commands.COMMANDS.values():
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each would go through what is imported, as often as it looks for garbage
    gc.enable()
    asked, status = serve(socket.socket(fileno=int(sys.argv[1]))), 1
    try:
        status = asked.do()
    except BaseException:
        traceback.print_exc()
    # As `commands.run` ends a process of a launch: taking Python down takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
