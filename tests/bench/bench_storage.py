"""A root on S3 against a local root: seconds and requests of each command, and whether requests grow with the root.

Runs the same small experiment (tests/support/storage_runs.py: fake scorers, files of ten documents) on a local root and
on a root on an S3 server on loopback, in one session; each command has run once before it is measured. Then it adds
files, each a micro-batch of its own, and counts the requests of the commands that take one further file. Prints two
tables and writes `build/bench/storage.json`: `seconds_ratio`, the S3 root's seconds over the local root's, and
`requests_growth`, the requests for one file with the most micro-batches before it over those with the fewest. The
server is a Python program on the same machine, so the seconds say little of a real service; the requests do.

    python -m tests.bench.bench_storage [--batches 4,16,48]
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.session import make_session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from tests.support import bench_results as results
from tests.support import s3_server
from tests.support.s3_server import BUCKET, S3Server
from tests.support.storage_runs import at, commands, make_config, put_file

KINDS = ("put", "get", "head", "list", "delete", "post")
_FOR_ONE_FILE = ("ingest", "score", "refine")


def by_kind(server: S3Server) -> Counter[str]:
    """Requests since the last reset, by kind."""
    counts: Counter[str] = Counter()
    for what, number in server.requests().items():
        counts[what.split()[0]] += number
    return counts


def timed(server: S3Server, run: Callable[[], Any]) -> tuple[float, Counter[str]]:
    """Seconds and requests of a command."""
    server.reset()
    start = time.monotonic()
    run()
    return time.monotonic() - start, by_kind(server)


def compare(
    spark: Any, server: S3Server, local: ExperimentConfig, remote: ExperimentConfig, folder: Path
) -> list[dict[str, Any]]:
    """A row for each command, each at its second run and for one new file."""
    rows: dict[str, dict[str, Any]] = {}
    for name, config in (("local", local), ("s3", remote)):
        runs = commands(spark, config, folder)
        for number in range(2):
            put_file(config, number)
            for command, run in runs.items():
                seconds, requests = timed(server, run)
                row = rows.setdefault(command, {"command": command})
                row[name] = seconds
                if config is remote:
                    row |= {kind: requests[kind] for kind in KINDS}
    return [{**row, "ratio": row["s3"] / row["local"]} for row in rows.values()]


def growth(
    spark: Any, server: S3Server, config: ExperimentConfig, folder: Path, marks: list[int]
) -> list[dict[str, Any]]:
    """Requests of the commands that take one file, after numbers of micro-batches."""
    runs = commands(spark, config, folder)
    rows, n_files = [], 2
    for mark in marks:
        for number in range(n_files, mark):
            put_file(config, number)
        for command in _FOR_ONE_FILE:
            runs[command]()
        put_file(config, mark)
        total: Counter[str] = Counter()
        row: dict[str, Any] = {"micro-batches before": mark}
        for command in _FOR_ONE_FILE:
            _, requests = timed(server, runs[command])
            row[command] = requests.total()
            total += requests
        rows.append({**row, **{kind: total[kind] for kind in KINDS}, "all": total.total()})
        n_files = mark + 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="4,16,48", help="micro-batches before a measurement, ascending, from 3 on")
    marks = [int(mark) for mark in parser.parse_args().batches.split(",")]
    with tempfile.TemporaryDirectory() as name, s3_server.running() as server:
        folder = Path(name)
        local = make_config(folder)
        remote = at(local, f"s3a://{BUCKET}/run", f"s3a://{BUCKET}/in")
        session = ExperimentConfig(root=remote.root, spark=SparkConfig(master="local[2]"))
        spark = make_session(session, "bench_storage")
        try:
            rows = compare(spark, server, local, remote, folder)
            grown = growth(spark, server, remote, folder, marks)
        finally:
            spark.stop()
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    print(results.table(list(grown[0]), [list(row.values()) for row in grown]))
    ratios = {
        "seconds_ratio": round(sum(row["s3"] for row in rows) / sum(row["local"] for row in rows), 2),
        "requests_growth": round(grown[-1]["all"] / grown[0]["all"], 3),
    }
    results.record("storage", ratios, grown, key="growth")
    print(f"ratios: {ratios}; written to {results.record('storage', ratios, rows)}")


if __name__ == "__main__":
    main()
