"""Live videos in a browser, which whoever watches them steers; and videos by HTTP.

    longsana serve                                          # the small default, on any machine: http://127.0.0.1:8000
    LONGSANA_API_KEY=... longsana serve --host 0.0.0.0 --config=configs/... --model_path=...

    longsana serve --replicas 8                             # on eight GPUs, or machines: docs/serving.md

Needs the extra: pip install -e '.[serve]', for --replicas '.[serve,ray]'. Config, settings and flags are those of
inference_sana_video.py. Clients need the API key in LONGSANA_API_KEY, where it is set. Snapshots, from which sessions
go on after a restart, and finished videos lie in --work_dir. docs/live.md says what clients speak.
Exit status: 1 the disk is full or broken, 2 bad input, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import math
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from longsana.commands.generate import DEFAULT_CONFIG
from longsana.config import InferenceConfig, load_config
from longsana.encoders.geometry import geometry
from longsana.inference.flags import check_settings, parse_flags
from longsana.published import DISTILLED
from longsana.runtime import stop
from longsana.runtime.commandline import Parser, number, run_command, typed_path, whole
from longsana.runtime.distributed import World, keep_freed_memory, set_threads
from longsana.runtime.errors import InputError
from longsana.runtime.files import check_writable, hold_folder
from longsana.runtime.hub import locate
from longsana.sampling.checks import check_config, check_weights, seeded_sources
from longsana.serving.guard import API_KEY, read_key
from longsana.serving.protocol import MOST_START, Served
from longsana.serving.values import Limits

if TYPE_CHECKING:
    from longsana.serving.fleet import AnyStudio

log = logging.getLogger("longsana")

NEEDED = {
    **{name: name for name in ("fastapi", "uvicorn", "websockets")},
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}
NEEDED_BY_A_FLEET = {"ray": "ray[serve]"}
"""Modules that the extras bring, and their packages."""
VIEWERS = 4
"""Viewers of a replica beyond which another one is started."""
MOST_CONNECTIONS = 1000
FAREWELL = 5
"""Seconds that open connections have to end when the server is stopped."""


@dataclass(frozen=True)
class Request:
    """A command line that has been checked. listening: the open socket."""

    config: InferenceConfig
    served: Served
    listening: socket.socket
    work_dir: Path
    origins: tuple[str, ...]
    key: str | None
    threads: int | None
    fleet: FleetRequest | None


class FleetRequest(NamedTuple):
    """Wishes about replicas; see `longsana.serving.on_ray.Wanted`. address: of a cluster of Ray's, if there is one."""

    replicas: int
    most: int
    viewers: int
    cpus: float
    gpus: float | None
    address: str | None


def prepare(arguments: Sequence[str], world: World) -> Request:
    """Read the command line, check it as far as that goes without loading anything large, and open the port."""
    if world.size > 1:
        raise InputError(f"a server is one process, and here are {world.size}; start it without a launcher")
    usual = Limits()
    parser = Parser(__doc__)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=whole, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--origin", action="append", default=[], help="a page's origin, https://HOST, that may use it")
    parser.add_argument("--work_dir", type=typed_path, default=Path("output/serve"), help="(default: %(default)s)")
    parser.add_argument(
        "--snapshot_every",
        type=whole,
        default=2,
        help="save a session after so many chunks; 0: when asked; -1: there are no snapshots (default: %(default)s)",
    )
    parser.add_argument("--sessions", type=whole, default=usual.sessions, help="at a time (default: %(default)s)")
    parser.add_argument("--queue", type=whole, default=usual.queue, help="that wait, at most (default: %(default)s)")
    parser.add_argument(
        "--load", type=number, default=usual.load, help="share of the time for paced sessions (default: %(default)s)"
    )
    parser.add_argument("--replicas", type=whole, help="processes that make videos, by Ray Serve; without it this one")
    parser.add_argument("--most_replicas", type=whole, help="as many, when there are viewers (default: --replicas)")
    parser.add_argument("--viewers_per_replica", type=whole, help=f"beyond which more are started (default: {VIEWERS})")
    parser.add_argument("--cpus_per_replica", type=number, help="(default: 1)")
    parser.add_argument("--gpus_per_replica", type=number, help="(default: 1, where the cluster has any)")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="of a cluster; auto: this machine's. Without it one is started"
    )
    parser.add_threads()
    options, settings = parse_flags(parser, arguments)
    bounds = {
        "sessions": (1, 10_000),
        "queue": (0, 100_000),
        "snapshot_every": (-1, 10**6),
        "load": (0.01, 100),
        "replicas": (1, 10_000),
        "most_replicas": (options.replicas or 1, 10_000),
        "viewers_per_replica": (1, 10_000),
        "cpus_per_replica": (0, 10_000),
        "gpus_per_replica": (0, 64),
    }
    for name, (least, most) in bounds.items():
        given = getattr(options, name)
        if given is not None and not least <= given <= most:
            raise InputError(f"--{name} {given}: must be from {least} to {most}")
    fleet = _fleet(options)
    needed, extra = (NEEDED, "serve") if fleet is None else (NEEDED | NEEDED_BY_A_FLEET, "serve,ray")
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"a server needs {', '.join(missing)}: pip install -e '.[{extra}]'")
    for origin in options.origin:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise InputError(f"--origin {origin}: must be http:// or https://, a host and perhaps a port, no path")
    config_path = locate(options.config, "the config")
    config: InferenceConfig = load_config(config_path, settings)
    check_settings(settings, config)
    check_config(config)
    if config.scheduler.sampling_algo != DISTILLED:
        raise InputError(
            f"scheduler.sampling_algo={config.scheduler.sampling_algo}: makes whole clips; live videos need {DISTILLED}"
        )
    check_weights(config, encodes=False)
    check_writable(options.work_dir)
    limits = replace(usual, sessions=options.sessions, queue=options.queue, load=options.load)
    if fleet is not None:  # whoever goes back by chunks must find a snapshot from before them
        limits = replace(limits, own_snapshots=2 + math.ceil(limits.kept / options.snapshot_every))
    served = served_by(config, config_path.stem, limits, options.snapshot_every)
    served = replace(served, fleet=fleet is not None, replicas=1 if fleet is None else fleet.most)
    key = read_key()
    listening = listen(options.host, options.port)
    return Request(config, served, listening, options.work_dir, tuple(options.origin), key, options.threads, fleet)


def _fleet(options: argparse.Namespace) -> FleetRequest | None:
    """Read what is said of replicas; None where the server is this process alone."""
    parts = ("most_replicas", "viewers_per_replica", "cpus_per_replica", "gpus_per_replica", "ray")
    if options.replicas is None:
        for name in parts:
            if getattr(options, name) is not None:
                raise InputError(f"--{name}: is of replicas; say how many: --replicas 2")
        return None
    if options.snapshot_every < 1:
        raise InputError(
            f"--snapshot_every {options.snapshot_every}: with --replicas, sessions go on elsewhere from snapshots; "
            "choose 1 or more"
        )
    if options.ray == "":
        raise InputError("--ray: an empty address; auto is the cluster that this machine is in")
    most = options.replicas if options.most_replicas is None else options.most_replicas
    return FleetRequest(
        options.replicas,
        most,
        options.viewers_per_replica or VIEWERS,
        1.0 if options.cpus_per_replica is None else options.cpus_per_replica,
        options.gpus_per_replica,
        options.ray,
    )


def served_by(config: InferenceConfig, name: str, limits: Limits, snapshot_every: int) -> Served:
    """Describe the model of a config. snapshot_every: as the option says."""
    sampling, steps = config.sampling, [step for step in config.scheduler.denoising_step_list if step]
    fixed = {
        "num_inference_steps": float(len(steps)),
        "guidance_scale": sampling.cfg_scale,
        "flow_shift": config.scheduler.inference_flow_shift,
    }
    return Served(
        name,
        sampling.height,
        sampling.width,
        sampling.fps,
        sampling.num_frames,
        geometry(config.vae).time_stride,
        fixed,
        limits,
        snapshots=snapshot_every >= 0,
        snapshot_every=max(snapshot_every, 0),
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a port.

    Raises:
        InputError: there is no such address here, or the port is in use.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: must be from 0 to {(1 << 16) - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error
    return listening


def is_local(host: str) -> bool:
    """Tell whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def uvicorn_settings(most_message: int = MOST_START) -> dict[str, Any]:
    """Settings of uvicorn that a live server needs: small queues, bounded messages, no compression of media."""
    return {
        "log_config": None,
        "log_level": "error",  # its warnings are of what clients do
        "access_log": False,
        "server_header": False,
        "ws_max_size": most_message,
        "ws_max_queue": 2,
        "ws_per_message_deflate": False,
        "limit_concurrency": MOST_CONNECTIONS,
        "timeout_graceful_shutdown": FAREWELL,
    }


def run(request: Request, world: World) -> int:
    import uvicorn

    from longsana.serving.app import create_app  # brings diffusers and transformers, which take seconds
    from longsana.serving.jobs import Jobs

    config, served = request.config, request.served
    if seeded := seeded_sources(config):
        log.warning("RANDOM WEIGHTS (%s): the videos show noise, not what the prompts say", ", ".join(seeded))
    host, port = request.listening.getsockname()[:2]
    local = is_local(host)
    if not local and request.key is None:
        log.warning("anyone who reaches %s can use this server; set %s to ask for a key", host, API_KEY)

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or bool(asked())

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            where = f"[{host}]" if ":" in host else host
            log.info("%s on %s: http://%s:%d", served.name, made_by, where, port)

    with ExitStack() as stack:
        stack.enter_context(request.listening)
        folder = request.work_dir / "videos"
        if request.fleet is not None:  # each machine's own, of those that have the snapshots in common
            folder /= socket.gethostname()
        check_writable(folder)
        stack.enter_context(hold_folder(folder, "--work_dir"))
        studio, made_by = _studio(request, world, stack)
        jobs = Jobs(studio, served, folder)
        stack.callback(jobs.close)
        app = create_app(studio, served, jobs, key=request.key, origins=request.origins, local=local)
        with stop.deferred() as asked:  # SIGHUP too ends what is open first, as the others, which are uvicorn's
            Server(uvicorn.Config(app, **uvicorn_settings())).run([request.listening])
        stop.check()
    return 0


def _studio(request: Request, world: World, stack: ExitStack) -> tuple[AnyStudio, str]:
    """Have what makes the videos until the stack is left: this process, or replicas; and say where that is."""
    snapshots, served = request.work_dir.absolute() / "snapshots", request.served
    if request.fleet is None:
        from longsana.serving.studio import Studio

        set_threads(request.threads, world)
        keep_freed_memory()
        device = world.device()
        own = Studio(request.config, device, served.limits, snapshots if served.snapshots else None)
        return stack.enter_context(own), str(device)
    from longsana.serving.fleet import Fleet
    from longsana.serving.on_ray import Wanted, replicas

    said = request.fleet
    wanted = Wanted(
        request.config,
        served.limits,
        snapshots,
        replicas=said.replicas,
        most=said.most,
        viewers=said.viewers,
        cpus=said.cpus,
        gpus=said.gpus,
        threads=request.threads,
    )
    fleet = Fleet(stack.enter_context(replicas(wanted, said.address)))
    stack.callback(fleet.close)
    return fleet, f"{fleet.figures().replicas} replicas"


def main(arguments: Sequence[str]) -> int:
    return run_command(
        lambda world: prepare(arguments, world), run, after_stop="sessions go on from their last snapshots"
    )
