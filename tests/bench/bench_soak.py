"""The service left running: `miniplm stream` with two small models while files arrive, and what it does to memory.

    python -m tests.bench.bench_soak [--minutes 20] [--every 5] [--gap 120]

A file arrives every few seconds; in the middle none does for two minutes, longer than Spark keeps idle Python workers.
Then SIGTERM. Prints latency from a file's arrival to the commit of its scores (median, p99), how often each model was
loaded, the driver's Java heap after a collection and the pages of each kind of process over time, and checks that every
document was scored once by each model. Writes `build/bench/soak.json`: `memory_growth`, the worst kind's memory in the
last quarter over that in the second; `loads_per_model`; `latency_p99_seconds`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from jobs import session, stream
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import (
    ChunkingConfig,
    IngestConfig,
    ScoreConfig,
    SplitConfig,
    StreamConfig,
)
from miniplm_udf.config.spark import SparkConfig
from tests.support import bench_results as results
from tests.support.score_tables import texts, two_models

_SAMPLE_SECONDS = 10.0
_DOCUMENTS_PER_FILE = 20
# As long as the last file may take, before the service is told to stop.
_LAST_FILE_SECONDS = 60.0


def experiment(folder: Path, interval_seconds: float) -> ExperimentConfig:
    return ExperimentConfig(
        root=str(folder / "root"),
        models=two_models(folder),
        ingest=IngestConfig(
            input=f"{folder}/inbox/*.jsonl",
            # A document is one instance.
            chunking=ChunkingConfig(mode="document", max_tokens=512),
            split=SplitConfig(reference=0, heldout=0),
            state_partitions=2,
        ),
        score=ScoreConfig(),
        stream=StreamConfig(interval_seconds=interval_seconds),
        spark=SparkConfig(conf={"spark.driver.memory": "1g"}),
    )


class Deliveries(threading.Thread):
    """Puts files into the inbox, and remembers when; then asks the service to stop.

    The first file is for the service's start, and counts in no latency.
    """

    def __init__(self, folder: Path, minutes: float, every: float, gap: float) -> None:
        super().__init__(daemon=True)
        self._inbox, self._scores = folder / "inbox", folder / "root/tables/scores"
        self._seconds, self._every, self._gap = minutes * 60, every, gap
        self.arrived: dict[str, float] = {}
        self.gaps = 0

    def run(self) -> None:
        self._deliver()
        while not any(self._scores.glob("*.parquet")):
            time.sleep(1)
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < self._seconds:
            self._deliver()
            if not self.gaps and elapsed >= self._seconds / 2:
                self.gaps = 1
                time.sleep(self._gap)
            time.sleep(self._every)
        time.sleep(_LAST_FILE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    def _deliver(self) -> None:
        number = len(self.arrived)
        name = f"file{number:05d}"
        documents = texts(_DOCUMENTS_PER_FILE, start=number * _DOCUMENTS_PER_FILE)
        rows = [{"id": text[:20], "text": text, "source": name} for text in documents]
        hidden = self._inbox / f".{name}"
        hidden.write_text("".join(json.dumps(row) + "\n" for row in rows))
        hidden.rename(self._inbox / f"{name}.jsonl")
        self.arrived[name] = time.time()


class Samples(threading.Thread):
    """The driver's Java heap after a collection and pages by kind of process, in MiB; which scorers there are."""

    def __init__(self, spark: Any) -> None:
        super().__init__(daemon=True)
        self._jvm = spark._jvm
        self._end = threading.Event()
        self.rows: list[dict[str, float]] = []
        self.scorers: set[int] = set()

    def run(self) -> None:
        start = time.monotonic()
        while not self._end.wait(_SAMPLE_SECONDS):
            self._jvm.java.lang.System.gc()
            runtime = self._jvm.java.lang.Runtime.getRuntime()
            heap = (runtime.totalMemory() - runtime.freeMemory()) / 2**20
            self.rows.append({"seconds": time.monotonic() - start, "java heap": heap, **self._pages()})

    def stop(self) -> None:
        self._end.set()
        self.join()

    def _pages(self) -> dict[str, float]:
        found: dict[str, list[float]] = {"driver python": [psutil.Process().memory_info().rss / 2**20]}
        for process in psutil.process_iter():
            try:
                kind, pages = self._kind(process.cmdline()), process.memory_info().rss / 2**20
            except psutil.Error:
                continue
            if kind is not None:
                found.setdefault(kind, []).append(pages)
                if kind == "scorer process":
                    self.scorers.add(process.pid)
        # The largest of a kind: a leak is of one process.
        return {kind: max(pages) for kind, pages in found.items()}

    @staticmethod
    def _kind(command: Sequence[str]) -> str | None:
        line = " ".join(command)
        if "miniplm_udf.workers.scorer_process" in line:
            return "scorer process"
        return "python worker" if "pyspark.daemon" in line else None


def commits(root: Path) -> dict[int, float]:
    """When each micro-batch of `scores` was committed, in seconds of the epoch."""
    found = {}
    for file in sorted((root / "tables/scores/_delta_log").glob("*.json")):
        actions = [json.loads(line) for line in file.read_text().splitlines()]
        moments = [action["commitInfo"]["timestamp"] / 1000 for action in actions if "commitInfo" in action]
        for action in actions:
            if "txn" in action:
                found[int(action["txn"]["version"])] = moments[0]
    return found


def latencies(spark: Any, config: ExperimentConfig, arrived: dict[str, float]) -> list[float]:
    """Seconds from a file's arrival to the commit of its last score, by file and model.

    Raises:
        RuntimeError: a document was not scored once by each model.
    """
    scores = spark.read.format("delta").load(config.layout.table("scores"))
    counts = scores.groupBy("source", "model_id").agg({"batch_id": "max", "instance_id": "count"}).collect()
    expected = {(name, alias): _DOCUMENTS_PER_FILE for name in arrived for alias in config.models}
    found = {(row["source"], row["model_id"]): row["count(instance_id)"] for row in counts}
    if found != expected:
        raise RuntimeError(f"{len(expected)} files and models expected, {len(found)} found, or with other counts")
    at = commits(Path(config.root.removeprefix("file://")))
    first = min(arrived)
    return [at[row["max(batch_id)"]] - arrived[row["source"]] for row in counts if row["source"] != first]


def growth(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """By kind: the median of the last quarter's samples over that of the second's."""
    quarter = len(rows) // 4
    kinds = sorted({kind for row in rows for kind in row} - {"seconds"})
    found = {}
    for kind in kinds:
        early = [row[kind] for row in rows[quarter : 2 * quarter] if kind in row]
        late = [row[kind] for row in rows[3 * quarter :] if kind in row]
        if early and late:
            found[kind] = round(statistics.median(late) / statistics.median(early), 3)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long files arrive")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between files")
    parser.add_argument("--gap", type=float, default=120.0, help="seconds without a file, once")
    parser.add_argument("--interval", type=float, default=1.0, help="stream.interval_seconds")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "soak", help="where the tables go")
    given = parser.parse_args(argv)
    shutil.rmtree(given.folder, ignore_errors=True)
    (given.folder / "inbox").mkdir(parents=True)
    config = experiment(given.folder, given.interval)
    spark = session.make_session(config, "soak")
    try:
        samples = Samples(spark)
        deliveries = Deliveries(given.folder, given.minutes, given.every, given.gap)
        samples.start()
        deliveries.start()
        stream.run(spark, config)
        samples.stop()
        grown = growth(samples.rows)
        shown = samples.rows[:: max(1, len(samples.rows) // 10)]
        kinds = ["seconds", *grown]
        print(results.table(kinds, [[row.get(kind, float("nan")) for kind in kinds] for row in shown]), flush=True)
        seconds = sorted(latencies(spark, config, deliveries.arrived))
    finally:
        spark.stop()
    ratios = {
        "memory_growth": max(grown.values()),
        "loads_per_model": len(samples.scorers),
        "latency_median_seconds": round(statistics.median(seconds), 2),
        "latency_p99_seconds": round(seconds[int(len(seconds) * 0.99)], 2),
    }
    print(f"growth {grown}; {len(deliveries.arrived)} files, each document scored once by each model")
    print(ratios)
    results.record("soak", ratios, samples.rows, folder=results.FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
