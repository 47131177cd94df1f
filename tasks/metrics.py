"""Prometheus metrics of one replica, read when they are scraped: nothing is counted twice for them.

A scrape endpoint (on loopback unless told otherwise) and a text file for node_exporter, both off until
`metrics` is set in the job.
"""

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tasks.gpu_sample import sample
from tasks.job_machine import MetricsConfig
from tasks.latency import Latencies
from tasks.progress import Progress

log = logging.getLogger("nightjar.metrics")

_TEXTFILE_EVERY_S = 15.0
_NUM_PORTS = 16  # replicas of one machine share it: each takes the next free port


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """What an engine is doing now; zeros before it is loaded."""

    num_running: int = 0
    num_waiting: int = 0
    kv_occupancy: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_preemptions: int = 0
    num_failed_attempts: int = 0


class Source(Protocol):
    """A replica, as far as metrics are concerned."""

    @property
    def latencies(self) -> Latencies:
        """How long rows took."""

    def reading(self) -> EngineReading:
        """What its engine is doing now; called from another thread."""


class ReplicaCollector:
    """Turns a replica's own counters into metric families at each scrape."""

    def __init__(
        self,
        source: Source,
        progress: Progress,
        *,
        labels: dict[str, str],
        staging_gb_per_s: Callable[[], float | None] = lambda: None,
        gpu: Any | None = None,
    ) -> None:
        self._source = source
        self._progress = progress
        self._labels = labels
        self._staging_gb_per_s = staging_gb_per_s
        self._gpu = gpu

    def collect(self) -> Iterator[Any]:
        """Yield every family."""
        found, seen = self._source.reading(), self._progress.snapshot()
        yield self._gauge("sequences_running", "Sequences in the batch.", found.num_running)
        yield self._gauge("sequences_waiting", "Sequences not yet started.", found.num_waiting)
        yield self._gauge(
            "kv_occupancy_ratio", "Highest share of KV blocks in use.", found.kv_occupancy
        )
        yield self._counter("prompt_tokens", "Prompt tokens taken in.", found.num_prompt_tokens)
        yield self._counter("cached_prompt_tokens", "Of them, reused.", found.num_cached_tokens)
        yield self._counter(
            "completion_tokens", "Completion tokens generated.", found.num_completion_tokens
        )
        yield self._counter("preemptions", "Sequences put back.", found.num_preemptions)
        yield self._counter(
            "shard_attempts_failed",
            "Attempts that failed and may be retried.",
            found.num_failed_attempts,
        )
        yield self._by("shards", "Shards by state.", seen.shards)
        yield self._by("rows", "Output rows by state, committed before included.", seen.states)
        yield self._gauge("rows_planned", "Output rows of the whole run.", seen.num_rows)
        yield self._latency()
        for name, moment in (
            ("forecast_finish_p50", seen.finish_p50),
            ("forecast_finish_p90", seen.finish_p90),
            ("deadline", seen.deadline),
        ):
            if moment is not None:
                at = datetime.fromisoformat(moment).timestamp()
                yield self._gauge(f"{name}_timestamp_seconds", "Seconds since the epoch.", at)
        staging_gb_per_s = self._staging_gb_per_s()
        if staging_gb_per_s is not None:
            yield self._gauge(
                "staging_gigabytes_per_second", "Speed of the last staging.", staging_gb_per_s
            )
        yield from self._gpu_families()

    def _gpu_families(self) -> Iterator[Any]:
        told = None if self._gpu is None else sample(self._gpu)
        if told is None:
            return
        for name, text, value in (
            ("gpu_utilisation_ratio", "Time with a kernel at work.", told.utilisation),
            ("gpu_memory_bytes", "Device memory in use.", told.memory_bytes),
            ("gpu_power_watts", "Power drawn.", told.power_w),
        ):
            if value is not None:
                yield self._gauge(name, text, value)

    def _gauge(self, name: str, text: str, value: float) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"nightjar_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Any:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(f"nightjar_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _by(self, name: str, text: str, values: dict[str, int]) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"nightjar_{name}", text, labels=[*self._labels, "state"])
        for state, value in values.items():
            family.add_metric([*self._labels.values(), state], value)
        return family

    def _latency(self) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(
            "nightjar_row_latency_seconds",
            "From submission to completion.",
            labels=list(self._labels),
        )
        latencies = self._source.latencies
        family.add_metric(
            list(self._labels.values()), latencies.cumulative(), sum_value=latencies.sum_s
        )
        return family


@contextmanager
def exported(
    config: MetricsConfig, make: Callable[[], ReplicaCollector], name: str
) -> Iterator[None]:
    """Serve and write a replica's metrics while the body runs, as far as `config` asks for it.

    Args:
        config: Where.
        make: Makes the collector; not called when nothing is asked for.
        name: Of this replica; names its text file.
    """
    if config.port is None and config.textfile_dir is None:
        yield
        return
    from prometheus_client import CollectorRegistry  # only for those who want metrics

    registry = CollectorRegistry(auto_describe=False)
    registry.register(make())
    server = None if config.port is None else _serve(config.host, config.port, registry)
    done = threading.Event()
    writer = None
    if config.textfile_dir is not None:
        path = Path(config.textfile_dir) / f"nightjar-{name}.prom"
        writer = threading.Thread(
            target=_write, args=(path, registry, done), name="nightjar-textfile", daemon=True
        )
        writer.start()
    try:
        yield
    finally:
        done.set()
        if writer is not None:
            writer.join()
        if server is not None:
            server.shutdown()
            server.server_close()


def _serve(host: str, first_port: int, registry: Any) -> Any | None:
    from prometheus_client import start_http_server

    for port in range(first_port, first_port + _NUM_PORTS):
        try:
            server, _ = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            log.warning("no metrics on %s:%d: %s", host, port, error.strerror)
            return None
        log.info("metrics on http://%s:%d/metrics", host, server.server_port)
        return server
    log.warning("no metrics: ports %d to %d are in use", first_port, first_port + _NUM_PORTS - 1)
    return None


def _write(path: Path, registry: Any, done: threading.Event) -> None:
    """Write at once, now and then, and once more at the end: a short run is seen too."""
    from prometheus_client import write_to_textfile

    while True:
        is_last = done.is_set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(path), registry)
        except OSError as error:
            log.warning("%s: not written: %s", path, error.strerror)
        if is_last:
            return
        done.wait(_TEXTFILE_EVERY_S)
