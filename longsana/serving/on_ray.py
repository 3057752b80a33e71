"""Replicas on Ray Serve, which starts, restarts, replaces and counts them. Ray is known here alone.

Chunks do not pass through Serve's own HTTP proxy, whose streams pile up for a client that does not read: the process
with the page and the WebSockets (`longsana serve --replicas`) pulls them, one a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers that nobody asked for

import ray
from ray import exceptions, serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from longsana.config import InferenceConfig
from longsana.runtime import stop
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.errors import InputError
from longsana.serving.fleet import Lost
from longsana.serving.replica import CATCH_UP, Elsewhere, Replica
from longsana.serving.studio import Studio
from longsana.serving.values import Figures, Full, Limits

log = logging.getLogger(__name__)

APP = "longsana"
"""The application's name in a cluster, and its deployment's."""
FRONT = "front"
"""The name of the one process that has replicas in a cluster."""
ANSWER = 20.0
"""Seconds after which a replica that has not answered is taken for lost, beside those in which a session catches up."""
LOOK = 5.0
"""Seconds in which replicas say what they have to do; those that do not are passed over."""
SPARE_CALLS = 16
"""Calls that a replica answers at a time beside those in which its sessions wait."""
LOOK_EVERY, HUNG = 5.0, 15.0
"""Seconds between two looks of Serve's whether a replica is well, and that a look waits; three in a row that nobody
answers end a replica."""
REACH = 5.0
"""Seconds in which a cluster must answer."""
MOST_CALLS = 10_000
WRONG = 5
"""Times that a call is sent again which came to another replica, although its own is there."""
LATER = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    TimeoutError,
)
"""What a call ends with whose replica is gone."""


@dataclass(frozen=True)
class Wanted:
    """The values that replicas are started with; one with other values replaces those that run, one by one.

    config, limits, snapshots: of each `Studio`; the folder is one that all see. replicas, most: as few and as many as
    there are; more come as soon as one has more than `viewers`. cpus, gpus: that each has; None: one GPU, where the
    cluster has any. threads: of torch's, None: as many as CPUs.
    """

    config: InferenceConfig
    limits: Limits
    snapshots: Path
    replicas: int
    most: int
    viewers: int
    cpus: float
    gpus: float | None
    threads: int | None


class _ByName(RequestRouter):
    """Sends a call to the replica that its first argument names; where that is gone, to any, which says so."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        arguments = [] if pending_request is None else pending_request.args
        own = [one for one in candidate_replicas if one.replica_id.unique_id in arguments[:1]]
        return [own or candidate_replicas]


class _Replica:
    """A `Replica`, as Serve runs it. Answers are pairs, of what kind they are and what they say."""

    def __init__(self, wanted: Wanted) -> None:
        logging.getLogger("longsana").setLevel(logging.INFO)
        self._name, self._digest = serve.get_replica_context().replica_id.unique_id, digest(wanted)
        world = World()
        set_threads(wanted.threads or max(1, int(wanted.cpus)), world)
        keep_freed_memory()
        with ExitStack() as undo:
            folder = wanted.snapshots / self._name
            studio = Studio(wanted.config, world.device(), wanted.limits, folder, fleet=True)
            undo.callback(studio.close)
            self._replica = undo.enter_context(Replica(studio))
            most = wanted.limits.sessions + wanted.limits.queue + SPARE_CALLS
            self._calls = undo.enter_context(ThreadPoolExecutor(most, "calls"))
            self._undo = undo.pop_all()

    async def call(self, name: str, method: str, *arguments: Any) -> tuple[str, Any]:
        if name != self._name:
            return "other", None
        try:
            work = asyncio.get_running_loop().run_in_executor(self._calls, getattr(self._replica, method), *arguments)
            return "answer", await work
        except Elsewhere:
            return "lost", None
        except Full as error:
            return "full", str(error)
        except InputError as error:
            return "input", str(error)
        except OSError as error:
            return "disk", (error.errno, str(error))

    async def digest(self) -> str:
        return self._digest

    async def figures(self) -> tuple[str, Figures]:
        return self._name, await asyncio.get_running_loop().run_in_executor(self._calls, self._replica.figures)

    async def __del__(self) -> None:
        await asyncio.to_thread(self._undo.close)


class RayReplicas:
    """The replicas of a cluster; see `longsana.serving.fleet.Replicas`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """Call a method of a `Replica`; see there, and `Replicas`."""
        within = ANSWER + CATCH_UP * (method == "begin")
        for _ in range(WRONG):
            try:
                kind, said = self._handle.call.remote(name, method, *arguments).result(timeout_s=within)
            except LATER as error:
                raise Lost(f"{name}: {type(error).__name__}") from error
            if kind == "answer":
                return said
            if kind == "lost":
                raise Lost(name)
            if kind == "full":
                raise Full(said)
            if kind == "input":
                raise InputError(said)
            if kind == "disk":
                raise OSError(*said)
            if name not in self.figures():  # it came to another one
                break
        raise Lost(name)

    def figures(self) -> dict[str, Figures]:
        """Measure all that answer."""
        try:
            found = self._handle.broadcast("figures").results(timeout_s=LOOK, return_exceptions=True)
        except LATER:
            return {}
        return dict(one for one in found if not isinstance(one, Exception))

    def close(self) -> None:
        """Be done with them; they stay, or go with the cluster."""
        self._handle.shutdown()


@contextlib.contextmanager
def replicas(wanted: Wanted, address: str | None) -> Iterator[RayReplicas]:
    """Have replicas inside the block, started where they are not there as wanted.

    address: of a cluster, "auto" for this machine's, where they stay afterwards; None: of one that is started here and
    stopped afterwards.

    Raises:
        InputError: nobody is at the address, or the cluster has no room, or the replicas do not start.
    """
    for name in ("ray", "ray.serve"):  # which say, at whatever level they set themselves, what they do anyway
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    own: dict[str, Any] = {"address": address}
    if address is None:  # and none that happens to be here, which is somebody else's
        own = {"address": "local", "include_dashboard": False}
    with ExitStack() as undo:
        undo.callback(ray.shutdown)
        try:
            if address and (host := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)) is not None:
                socket.create_connection((host[1], int(host[2])), REACH).close()  # Ray would try for ever
            with _signals_kept():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--ray {address}: no cluster answers there ({_line(error)}); ray start --head, or RAY_AUTH_MODE=token "
                "where one asks for its token"
            ) from error
        _front = _stand(address)  # it lives as long as this handle of it
        wanted = fitted(wanted, ray.cluster_resources())
        serve.start(proxy_location="Disabled")  # the front has its own port
        stop.catch_again()
        if address is None:
            undo.callback(_delete)
        yield RayReplicas(deploy(wanted))


@ray.remote(num_cpus=0)
class _Front:
    """Stands in a cluster for the process that has replicas there, for as long as that lives."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name


def _stand(address: str | None) -> Any:
    """Be the cluster's front. One that has just ended may still be known for a moment.

    Raises:
        InputError: there is another one, whose replicas would be replaced.
    """
    front: Any = _Front
    end, other = time.monotonic() + REACH, "somewhere"
    while True:
        try:
            return front.options(name=FRONT, namespace=APP).remote(f"process {os.getpid()} on {socket.gethostname()}")
        except ValueError as error:  # the name is taken
            with contextlib.suppress(ValueError, exceptions.RayError):
                other = ray.get(ray.get_actor(FRONT, namespace=APP).name.remote(), timeout=REACH)
            if time.monotonic() > end:
                raise InputError(
                    f"--ray {address}: another front is there, {other}; stop it, or choose another cluster"
                ) from error
        time.sleep(0.5)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Have SIGTERM stop this command, as it does elsewhere, while and after Ray begins, which would take it."""
    utils: Any = importlib.import_module("ray._private.utils")
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before
        stop.catch_again()


def _delete() -> None:
    """Let the replicas finish what they save, and end them."""
    try:
        serve.delete(APP)
    except Exception as error:  # there are none, or no longer
        log.debug("the replicas: %s", error)


def deploy(wanted: Wanted) -> DeploymentHandle[Any]:
    """Have the replicas of this machine's cluster be as wanted; returns when they are.

    Those that run are replaced one by one where they were started with other values or other code, and are left alone
    otherwise.

    Raises:
        InputError: they do not start.
    """
    if (running := _running(digest(wanted))) is not None:
        return running
    try:
        return serve.run(_application(wanted), name=APP, route_prefix=None)
    except RuntimeError as error:
        raise InputError(f"the replicas did not start: {_line(error)}; Ray's logs have more") from error


def digest(wanted: Wanted) -> str:
    """Name all that decides what a replica is: the values, and this package's code."""
    parts = [repr(wanted).encode()]
    root = Path(__file__).parents[1]
    parts += [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _running(wanted: str) -> DeploymentHandle[Any] | None:
    """The replicas that run, if all are of this digest."""
    try:
        handle = serve.get_app_handle(APP)
        found = handle.broadcast("digest").results(timeout_s=LOOK, return_exceptions=True)
    except (RayServeException, *LATER):
        return None
    return handle if found and set(found) == {wanted} else None


def fitted(wanted: Wanted, there: Mapping[str, float]) -> Wanted:
    """Settle what each replica has in a cluster that has so many CPUs and GPUs.

    Raises:
        InputError: they are too few for as many replicas as there are to be at least.
    """
    gpus = float(there.get("GPU", 0) > 0) if wanted.gpus is None else wanted.gpus
    for kind, each in (("CPU", wanted.cpus), ("GPU", gpus)):
        has = there.get(kind, 0.0)
        if each * wanted.replicas > has:
            raise InputError(
                f"--replicas {wanted.replicas}: each needs {each:g} {kind}, and the cluster has {has:g}; choose fewer, "
                f"or less by --{kind.lower()}s_per_replica"
            )
    return replace(wanted, gpus=gpus)


def _application(wanted: Wanted) -> Any:
    scale: dict[str, Any] = {"num_replicas": wanted.replicas}
    if wanted.most > wanted.replicas:  # a viewer's session waits in one call nearly all of the time
        bounds = {"min_replicas": wanted.replicas, "max_replicas": wanted.most}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": wanted.viewers}}
    router: Any = {"request_router_class": _ByName}
    deployment: Any = serve.deployment(
        _Replica,
        name=APP,
        max_ongoing_requests=MOST_CALLS,
        request_router_config=RequestRouterConfig(**router),
        graceful_shutdown_timeout_s=20.0,
        health_check_period_s=LOOK_EVERY,
        health_check_timeout_s=HUNG,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": wanted.gpus},
        **scale,
    )
    return deployment.bind(wanted)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
