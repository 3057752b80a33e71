"""Measurements of a server in Prometheus' text format: its studio's, and what its viewers got when."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from longsana.serving.fleet import AnyStudio
from longsana.serving.pace import IN_TIME
from longsana.serving.values import Chunk

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 15, 30, 60)
"""Bounds of the histograms."""


class Measurements:
    """Counts what is sent; `text` is what /metrics answers, from any thread."""

    def __init__(self, studio: AnyStudio) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._registry.register(_Studio(studio))

        def histogram(name: str, purpose: str) -> Histogram:
            return Histogram(f"longsana_{name}_seconds", purpose, buckets=SECONDS, registry=self._registry)

        def counter(name: str, purpose: str, *labels: str) -> Counter:
            return Counter(f"longsana_{name}", purpose, labels, registry=self._registry)

        self.first = histogram("first_chunk", "From the order to the first chunk")
        self.arrival = histogram("inter_arrival", "Between two chunks of a viewer")
        self.change = histogram("interaction", "From a change of prompt to its chunk")
        self.sent = counter("chunks_sent", "Chunks that viewers were sent")
        self.in_time = counter("chunks_in_time", "Chunks that were sent by the time of their presentation")
        self.sent_bytes = counter("sent_bytes", "Bytes of these chunks")
        self.refused = counter("refused", "Connections and requests that were refused", "code")

    def text(self) -> bytes:
        """Measure now."""
        return bytes(generate_latest(self._registry))


class Viewing:
    """Measures one viewer, whose clock starts with his first chunk and stands still while he waits for a late one."""

    def __init__(self, measurements: Measurements, ordered: float | None) -> None:
        """ordered: when the session was, if the next chunk is its first (`time.monotonic`)."""
        self._measurements = measurements
        self._ordered = ordered
        self._zero: float | None = None
        self._last: float | None = None
        self._changes: dict[str, float] = {}

    def changed(self, event_id: str, most: int) -> None:
        """Note that a change of prompt was asked for; of more than `most` none is noted."""
        if len(self._changes) < most:
            self._changes[event_id] = time.monotonic()

    def interrupted(self) -> None:
        """Begin a new clock with the next chunk, as after a pause."""
        self._zero = self._last = None

    def sent(self, chunk: Chunk, length: int) -> None:
        """Note that a chunk, `length` bytes with its init segment, has just been sent."""
        now, measurements = time.monotonic(), self._measurements
        if self._ordered is not None:
            measurements.first.observe(now - self._ordered)
            self._ordered = None
        if self._last is not None:
            measurements.arrival.observe(now - self._last)
        if self._zero is None:
            self._zero = now - chunk.pts_seconds
        late = now - self._zero - chunk.pts_seconds
        measurements.sent.inc()
        measurements.sent_bytes.inc(length)
        if late <= IN_TIME:
            measurements.in_time.inc()
        self._zero += max(late, 0.0)
        self._last = now
        for event_id in (*chunk.started, *chunk.completed):
            asked = self._changes.pop(event_id, None)
            if asked is not None:
                measurements.change.observe(now - asked)


class _Studio(Collector):
    """The studio's own figures, taken when somebody asks."""

    def __init__(self, studio: AnyStudio) -> None:
        self._studio = studio

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        figures = self._studio.figures()
        sessions = GaugeMetricFamily("longsana_sessions", "Sessions by state", labels=["state"])
        states = ("waiting", "running", "paused", "finished", "closed", "failed")
        for state in states:
            sessions.add_metric([state], sum(session.state == state for session in figures.sessions))
        yield sessions
        plain = {
            "queue": ("Sessions that wait for a place", figures.waiting),
            "running": ("Sessions that have a place", figures.running),
            "load": ("Share of the time that the paced sessions take together", figures.load),
            "memory_bytes": ("States of all sessions", figures.memory_bytes),
            "most_memory_bytes": ("States that are allowed", figures.most_memory_bytes),
            "snapshots": ("Files in the folder of snapshots", figures.snapshots),
            "snapshot_bytes": ("Their size", figures.snapshot_bytes),
            "ahead_seconds": ("Video that is made and not sent", sum(one.ahead_seconds for one in figures.sessions)),
            "stall_seconds": ("For which viewers ran dry", sum(one.stall_seconds for one in figures.sessions)),
            "underruns": ("Times that viewers ran dry", sum(one.underruns for one in figures.sessions)),
            "chunks_made_total": ("Chunks made so far", figures.chunks_made),
            "chunks_dropped_total": ("Chunks made and not sent, as after a change of prompt", figures.chunks_dropped),
            "failures_total": ("Sessions that failed", figures.failures),
            "replicas": ("Replicas that answer", figures.replicas),
            "moves_total": ("Sessions that went on with another replica", figures.moves),
        }
        for name, (purpose, value) in plain.items():
            yield GaugeMetricFamily(f"longsana_{name}", purpose, value=value)
        if figures.real_time_factor is not None:
            purpose = "Wall seconds that a second of video took; below 1 is real time"
            yield GaugeMetricFamily("longsana_real_time_factor", purpose, value=figures.real_time_factor)
        seconds = GaugeMetricFamily(
            "longsana_chunk_seconds", "Median wall seconds of a chunk", labels=["size", "latents"]
        )
        for (height, width, latents), median in figures.seconds_a_chunk.items():
            seconds.add_metric([f"{width}x{height}", str(latents)], median)
        yield seconds
