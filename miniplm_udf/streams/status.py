"""What can be seen of a running query: a record `<root>/_status/<lease>.json`, log lines, Prometheus text. Driver only.

Input: Spark's progress events. Output: a `QueryStatus` a query, written after each event, read by `miniplm status` from
anywhere. Rates are of the newest micro-batch with rows. Owns no query; a record is replaced whole, and outlives its
driver: whether one runs is told by the lease (lease.py).
"""

import dataclasses
import datetime
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import storage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

LOGGER = logging.getLogger("miniplm.streams")


@dataclasses.dataclass(kw_only=True)
class QueryStatus:
    """One query as its driver last saw it.

    Attributes:
        lease: the name of its lease, and of this record.
        run_id: of the command.
        state: running, stopped (asked to, or the end of what is there) or failed.
        batch_id: of the newest finished micro-batch; None before the first.
        batch_rows: rows of it.
        batch_seconds: what it took.
        rows_per_second: `batch_rows / batch_seconds` of the newest one that had rows.
        tokens: scored since the command began, by model alias.
        tokens_per_second: of the newest micro-batch that scored, by model alias.
        backlog: what waits, in `backlog_unit`, as of `seen_at`.
        committed_at: when the newest micro-batch with rows was finished (UTC, ISO 8601).
        seen_at: when this was written.
        stalled_seconds: for so long nothing has moved in the running micro-batch, where that is worth telling; else 0.
        error: the failure's first line.
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
        """Takes a finished micro-batch in.

        Args:
            tokens: scored since the command began, by model alias.
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
        """For the log."""
        rates = "".join(f", {alias} {rate:,.0f} tokens/s" for alias, rate in sorted(self.tokens_per_second.items()))
        return (
            f"{self.query}: micro-batch {self.batch_id}: {self.batch_rows:,} rows in {self.batch_seconds:.1f} s "
            f"({self.rows_per_second:,.1f} rows/s{rates})"
        )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def status_uri(root: str, lease: str) -> str:
    return storage.join(root, "_status", f"{lease}.json")


def write(root: str, status: QueryStatus) -> None:
    """Replaces the record. A storage that is away for a moment does not stop a query: the next record tells as much."""
    status.seen_at = now()
    try:
        storage.write_json(status_uri(root, status.lease), dataclasses.asdict(status))
    except OSError as error:
        LOGGER.warning("%s: its status cannot be written: %s", status.query, error)


def remove(root: str, lease: str) -> None:
    """Removes the record of a query that is no more."""
    storage.remove_folder(status_uri(root, lease))


def read_all(root: str) -> list[QueryStatus]:
    """The records of a root, by name; none where nothing ever ran."""
    filesystem, path = fsspec.core.url_to_fs(storage.join(root, "_status"))
    if not filesystem.exists(path):
        return []
    known = {field.name for field in dataclasses.fields(QueryStatus)}
    found = []
    for name in sorted(filesystem.ls(path, detail=False)):
        if str(name).endswith(".json") and not str(name).rsplit("/", 1)[-1].startswith("."):
            plain: dict[str, Any] = storage.read_json(storage.join(root, "_status", str(name).rsplit("/", 1)[-1])) or {}
            found.append(QueryStatus(**{key: value for key, value in plain.items() if key in known}))
    return found


_GAUGES: dict[str, tuple[str, Callable[[QueryStatus], float | None]]] = {
    "miniplm_query_running": ("1 while the query runs", lambda s: float(s.state == "running")),
    "miniplm_query_failed": ("1 after it failed", lambda s: float(s.state == "failed")),
    "miniplm_batch_id": ("newest finished micro-batch", lambda s: s.batch_id),
    "miniplm_batch_seconds": ("what the newest micro-batch took", lambda s: s.batch_seconds),
    "miniplm_rows": ("rows since the command began", lambda s: s.rows),
    "miniplm_rows_per_second": ("of the newest micro-batch with rows", lambda s: s.rows_per_second),
    "miniplm_backlog": ("what waits, in rows or files", lambda s: s.backlog),
    "miniplm_last_commit_timestamp_seconds": ("when rows were last committed", lambda s: _epoch(s.committed_at)),
    "miniplm_last_seen_timestamp_seconds": ("when the driver last wrote this", lambda s: _epoch(s.seen_at)),
    "miniplm_stalled_seconds": ("for so long nothing moved", lambda s: s.stalled_seconds),
}
_MODEL_GAUGES: dict[str, tuple[str, Callable[[QueryStatus], dict[str, Any]]]] = {
    "miniplm_tokens": ("tokens scored since the command began", lambda s: s.tokens),
    "miniplm_tokens_per_second": ("of the newest micro-batch that scored", lambda s: s.tokens_per_second),
}


def _epoch(moment: str | None) -> float | None:
    return datetime.datetime.fromisoformat(moment).timestamp() if moment else None


def prometheus_registry(read: Callable[[], Iterable[QueryStatus]]) -> "CollectorRegistry":
    """A registry for prometheus_client (its endpoint, or `generate_latest`) that asks `read` at each look."""
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
