"""`miniplm status`: where the queries of a root stand. Reads the records under `<root>/_status/`; starts no Spark.

miniplm status -c conf/demo.yaml
miniplm status --root s3://bucket/run1 --prometheus
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from jobs.session import guarded
from miniplm_udf import storage
from miniplm_udf.config import load_config
from miniplm_udf.errors import EXIT_DONE, ConfigError, CorpusError
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.lease import is_held, lease_uri
from miniplm_udf.streams.status import QueryStatus

_HEAD = ("query", "state", "micro-batch", "rows", "rows/s", "tokens/s", "behind", "last commit (UTC)", "seen (UTC)")


def read(root: str) -> list[QueryStatus]:
    """The records of a root. One that says running, without a driver that holds its lease, is `gone`.

    Raises:
        CorpusError: no query ever ran there.
    """
    found = statuses.read_all(root)
    if not found:
        raise CorpusError(f"root {storage.redact(root)}: expected records of queries, found none; nothing ran here yet")
    for status in found:
        if status.state == "running" and not is_held(lease_uri(root, status.lease)):
            status.state = "gone"
    return found


def text(found: Sequence[QueryStatus]) -> str:
    """The records as a table, and below it what is wrong."""
    rows = [_HEAD, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for status in found:
        if status.error:
            lines.append(f"{status.query}: {status.error}")
        if status.stalled_seconds:
            lines.append(f"{status.query}: nothing has moved for {status.stalled_seconds:.0f} s")
        if status.state == "gone":
            lines.append(f"{status.query}: its driver ended without a word; run it again to go on")
    return "\n".join(lines)


def _row(status: QueryStatus) -> tuple[str, ...]:
    rates = ", ".join(f"{alias} {rate:,.0f}" for alias, rate in sorted(status.tokens_per_second.items()))
    return (
        status.query,
        "stalled" if status.stalled_seconds else status.state,
        "-" if status.batch_id is None else str(status.batch_id),
        f"{status.rows:,}",
        f"{status.rows_per_second:,.1f}",
        rates or "-",
        "-" if status.backlog is None else f"{status.backlog:,} {status.backlog_unit}",
        (status.committed_at or "-").removesuffix("+00:00"),
        status.seen_at.removesuffix("+00:00"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="miniplm status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", help="experiment file, for its root")
    parser.add_argument("--root", help="the root itself")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--prometheus", action="store_true", help="print Prometheus text")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")

    def body() -> int:
        arguments = parser.parse_intermixed_args(argv)
        if (arguments.config is None) == (arguments.root is None):
            raise ConfigError("status: expected either -c CONFIG or --root ROOT")
        root = (
            load_config(arguments.config, arguments.overrides).root
            if arguments.config
            else storage.to_uri(arguments.root)
        )
        found = read(root)
        if arguments.prometheus:
            from prometheus_client import generate_latest

            print(generate_latest(statuses.prometheus_registry(lambda: found)).decode(), end="")
        elif arguments.json:
            print(json.dumps([dataclasses.asdict(status) for status in found], indent=2))
        else:
            print(text(found))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
