"""`miniplm status`: whether a run works on a root, the progress of its queries, and the stages that have finished.

Reads the records under `<root>/_status/`, `_stages/` and `_leases/`; starts no Spark and writes nothing.

miniplm status -c conf/demo.yaml
miniplm status --root s3://bucket/run1 --prometheus
spark-submit --properties-file conf/spark/local.conf jobs/status.py -c conf/demo.yaml
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command
from jobs.records import FinishedStage, finished_stages
from jobs.text import table
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.lease import holder, is_held
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.status import QueryStatus

_HEAD = ("query", "state", "micro-batch", "rows", "rows/s", "tokens/s", "behind", "last commit (UTC)", "seen (UTC)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootStatus:
    """The run that works on a root, the queries of the root, and its finished stages.

    Attributes:
        run: the process in which `miniplm run` works on the root; None if there is none.
        queries: a record for each query. A query recorded as running whose lease nobody holds is `gone`.
        stages: the stages that have finished, in the order in which they did.
    """

    run: str | None
    queries: list[QueryStatus]
    stages: list[FinishedStage]


def read(root: str) -> RootStatus:
    """Reads the records of a root.

    Args:
        root: URI of the root.

    Returns:
        Its status.

    Raises:
        CorpusError: nothing has run there yet.
        DamagedRecordError: a file is not a record.
    """
    layout = Root(root)
    queries, stages = statuses.read_all(root), finished_stages(layout)
    run = holder(layout.lease("run"))
    if not queries and not stages and run is None:
        raise CorpusError(f"root {storage.redact(root)}: expected records of stages, found none; nothing ran here yet")
    for record in queries:
        if record.state == "running" and not is_held(layout.lease(record.lease)):
            record.state = "gone"
    return RootStatus(run=run, queries=queries, stages=stages)


def text(status: RootStatus) -> str:
    """Returns the status as tables of text, with the problems below the queries.

    Args:
        status: the result of `read`.
    """
    stages = [(each.stage, each.finished_at, f"{each.seconds:,.1f} s") for each in status.stages]
    parts = [
        f"miniplm run works here: {status.run}" if status.run else "",
        _queries_text(status.queries) if status.queries else "",
        table(("stage", "finished (UTC)", "took"), stages) if stages else "",
    ]
    return "\n\n".join(filter(None, parts))


def _queries_text(records: Sequence[QueryStatus]) -> str:
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


def _prometheus(status: RootStatus) -> str:
    from prometheus_client import generate_latest

    return generate_latest(statuses.prometheus_registry(lambda: status.queries)).decode().removesuffix("\n")


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> RootStatus:
    return read(config.root)


COMMAND = Command(
    name="status", description=__doc__, run=_run, text=text, takes_root=True, formats={"prometheus": _prometheus}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm status` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
