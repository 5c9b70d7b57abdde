"""`miniplm status`: the progress of a root's queries. Reads the records under `<root>/_status/`; starts no Spark.

miniplm status -c conf/demo.yaml
miniplm status --root s3://bucket/run1 --prometheus
spark-submit --properties-file conf/spark/local.conf jobs/status.py -c conf/demo.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command
from jobs.text import table
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.lease import is_held
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.status import QueryStatus

_HEAD = ("query", "state", "micro-batch", "rows", "rows/s", "tokens/s", "behind", "last commit (UTC)", "seen (UTC)")


def read(root: str) -> list[QueryStatus]:
    """Reads the status records of a root.

    Args:
        root: URI of the root.

    Returns:
        One record a query. A query recorded as running whose lease nobody holds is reported as `gone`.

    Raises:
        CorpusError: no query has run there yet.
    """
    records = statuses.read_all(root)
    if not records:
        raise CorpusError(f"root {storage.redact(root)}: expected records of queries, found none; nothing ran here yet")
    for record in records:
        if record.state == "running" and not is_held(Root(root).lease(record.lease)):
            record.state = "gone"
    return records


def text(records: Sequence[QueryStatus]) -> str:
    """Returns the status records as a table of text, and below it the problems.

    Args:
        records: the result of `read`.
    """
    lines = [table(_HEAD, [_row(record) for record in records])]
    for record in records:
        if record.error:
            lines.append(f"{record.query}: {record.error}")
        if record.stalled_seconds:
            lines.append(f"{record.query}: nothing has moved for {record.stalled_seconds:.0f} s")
        if record.state == "gone":
            lines.append(f"{record.query}: its driver stopped unexpectedly; run it again to continue")
    return "\n".join(lines)


def _row(record: QueryStatus) -> tuple[Any, ...]:
    rates = ", ".join(f"{alias} {rate:,.0f}" for alias, rate in sorted(record.tokens_per_second.items()))
    return (
        record.query,
        "stalled" if record.stalled_seconds else record.state,
        None if record.batch_id is None else str(record.batch_id),
        record.rows,
        f"{record.rows_per_second:,.1f}",
        rates or None,
        None if record.backlog is None else f"{record.backlog:,} {record.backlog_unit}",
        (record.committed_at or "-").removesuffix("+00:00"),
        record.seen_at.removesuffix("+00:00"),
    )


def _prometheus(records: list[QueryStatus]) -> str:
    from prometheus_client import generate_latest

    return generate_latest(statuses.prometheus_registry(lambda: records)).decode().removesuffix("\n")


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> list[QueryStatus]:
    return read(config.root)


COMMAND = Command(
    name="status", description=__doc__, run=_run, text=text, takes_root=True, formats={"prometheus": _prometheus}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm status` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
