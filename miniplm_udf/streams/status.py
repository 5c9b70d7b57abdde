"""The status of a running query: a record `<root>/_status/<lease>.json`, log lines, Prometheus metrics. Driver only.

Input: the finished micro-batches of a query. Output: a `QueryStatus` for each query; the runner writes it, and
`miniplm status` reads it from any machine. Rates belong to the newest micro-batch with rows. A record is replaced
as a whole and outlives its driver: only the lease tells whether the query runs now (lease.py). Owns no query.
"""

import dataclasses
import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import DamagedRecordError
from miniplm_udf.layout import Root
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

LOGGER = logging.getLogger("miniplm.streams")


@dataclasses.dataclass(kw_only=True)
class QueryStatus:
    """One query as its driver last saw it.

    Attributes:
        query: the query's name.
        lease: the name of the query's lease, and of this record.
        run_id: the command that runs the query.
        state: running, stopped (all input was read, a signal came, or another query failed) or failed.
        batch_id: the newest finished micro-batch; None before the first is finished.
        batch_rows: rows of that micro-batch.
        batch_seconds: its duration.
        rows_per_second: `batch_rows / batch_seconds` of the newest micro-batch that had rows.
        rows: rows since the command began.
        tokens: tokens scored since the command began, by model alias.
        tokens_per_second: rate of the newest micro-batch that scored, by model alias.
        backlog: what was still waiting at `seen_at`, in `backlog_unit`; None if it was never counted.
        committed_at: when the newest micro-batch with rows was finished (UTC, ISO 8601).
        seen_at: when the record was written (UTC, ISO 8601).
        stalled_seconds: time without progress in the running micro-batch, if above `stream.stalled_seconds`; else 0.
        error: first line of the failure.
    """

    query: str
    lease: str
    run_id: str
    state: str = "running"
    batch_id: int | None = None
    batch_rows: int = 0
    batch_seconds: float = 0.0
    rows_per_second: float = 0.0
    rows: int = 0
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    backlog: int | None = None
    backlog_unit: str = "rows"
    started_at: str = ""
    committed_at: str | None = None
    seen_at: str = ""
    stalled_seconds: float = 0.0
    error: str | None = None

    def add_batch(self, batch_id: int, rows: int, seconds: float, tokens: dict[str, int]) -> None:
        """Updates the status with a finished micro-batch.

        Args:
            batch_id: number of the micro-batch.
            rows: its input rows.
            seconds: its duration.
            tokens: tokens scored since the command began, by model alias.
        """
        self.batch_id, self.batch_rows, self.batch_seconds = batch_id, rows, seconds
        self.rows += rows
        if rows:
            self.rows_per_second = round(rows / max(seconds, 1e-3), 2)
            self.committed_at = now()
        scored = {alias: n - self.tokens.get(alias, 0) for alias, n in tokens.items()}
        if any(scored.values()):
            self.tokens_per_second = {alias: round(n / max(seconds, 1e-3), 1) for alias, n in scored.items()}
        self.tokens = tokens

    def line(self) -> str:
        """The newest micro-batch as a line for the log."""
        rates = "".join(f", {alias} {rate:,.0f} tokens/s" for alias, rate in sorted(self.tokens_per_second.items()))
        return (
            f"{self.query}: micro-batch {self.batch_id}: {self.batch_rows:,} rows in {self.batch_seconds:.1f} s "
            f"({self.rows_per_second:,.1f} rows/s{rates})"
        )


def now() -> str:
    """The time (UTC, ISO 8601, to the second)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(root: str, status: QueryStatus) -> None:
    """Replaces the status record of a query, and sets its `seen_at` to now.

    An unreachable storage does not stop the query: a warning is logged, and the next record has the same counts.

    Args:
        root: URI of the root.
        status: the status; its lease names the record.
    """
    status.seen_at = now()
    try:
        storage.write_json(Root(root).status(status.lease), dataclasses.asdict(status))
    except OSError as error:
        LOGGER.warning("%s: its status cannot be written: %s", status.query, error)


def remove(root: str, lease: str) -> None:
    """Removes the status record of a query; does nothing if there is none.

    Args:
        root: URI of the root.
        lease: name of the query's lease, which names the record.
    """
    storage.remove_folder(Root(root).status(lease))


def read_all(root: str) -> list[QueryStatus]:
    """Reads the status records of a root.

    Args:
        root: URI of the root.

    Returns:
        The records, sorted by the names of their files; empty if no query ever ran.

    Raises:
        DamagedRecordError: a record is not JSON, or is not the status of a query.
    """
    filesystem, path = fsspec.core.url_to_fs(Root(root).status())
    if not filesystem.exists(path):
        return []
    fields = {field.name for field in dataclasses.fields(QueryStatus)}
    records = []
    for name in sorted(filesystem.ls(path, detail=False)):
        if str(name).endswith(".json") and not str(name).rsplit("/", 1)[-1].startswith("."):
            plain: Json = storage.read_json(storage.join(Root(root).status(), str(name).rsplit("/", 1)[-1])) or {}
            try:
                records.append(QueryStatus(**{key: value for key, value in dict(plain).items() if key in fields}))
            except TypeError as error:
                raise DamagedRecordError(
                    f"record {storage.redact(str(name))}: expected the status of a query, found something else; remove "
                    "the file: the query's next run writes it again"
                ) from error
    return records


_GAUGES: dict[str, tuple[str, Callable[[QueryStatus], float | None]]] = {
    "miniplm_query_running": ("1 while the query runs", lambda s: float(s.state == "running")),
    "miniplm_query_failed": ("1 after it failed", lambda s: float(s.state == "failed")),
    "miniplm_batch_id": ("newest finished micro-batch", lambda s: s.batch_id),
    "miniplm_batch_seconds": ("seconds that the newest micro-batch took", lambda s: s.batch_seconds),
    "miniplm_rows": ("rows since the command began", lambda s: s.rows),
    "miniplm_rows_per_second": ("rows per second of the newest micro-batch with rows", lambda s: s.rows_per_second),
    "miniplm_backlog": ("rows or files that wait", lambda s: s.backlog),
    "miniplm_last_commit_timestamp_seconds": ("when rows were last committed", lambda s: _epoch(s.committed_at)),
    "miniplm_last_seen_timestamp_seconds": ("when the driver last wrote the status", lambda s: _epoch(s.seen_at)),
    "miniplm_stalled_seconds": ("seconds without progress in the running micro-batch", lambda s: s.stalled_seconds),
}
_MODEL_GAUGES: dict[str, tuple[str, Callable[[QueryStatus], Mapping[str, float]]]] = {
    "miniplm_tokens": ("tokens scored since the command began", lambda s: s.tokens),
    "miniplm_tokens_per_second": (
        "tokens per second of the newest micro-batch that scored",
        lambda s: s.tokens_per_second,
    ),
}


def _epoch(moment: str | None) -> float | None:
    return datetime.datetime.fromisoformat(moment).timestamp() if moment else None


def prometheus_registry(read: Callable[[], Iterable[QueryStatus]]) -> "CollectorRegistry":
    """Returns a registry for prometheus_client: for its HTTP endpoint, or for `generate_latest`.

    Args:
        read: returns the status of each query; called at each scrape.
    """
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(read))
    return registry


class _Collector:
    def __init__(self, read: Callable[[], Iterable[QueryStatus]]) -> None:
        self._read = read

    def collect(self) -> Iterator["GaugeMetricFamily"]:
        from prometheus_client.core import GaugeMetricFamily

        statuses = list(self._read())
        for name, (text, value_of) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["query", "lease"])
            for status in statuses:
                if (value := value_of(status)) is not None:
                    gauge.add_metric([status.query, status.lease], value)
            yield gauge
        for name, (text, values_of) in _MODEL_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["query", "lease", "model"])
            for status in statuses:
                for alias, value in values_of(status).items():
                    gauge.add_metric([status.query, status.lease, alias], float(value))
            yield gauge
