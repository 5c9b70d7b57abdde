"""The engine's cost per instance: the score job with a fake scorer, no model, at several sizes, next to a bare copy.

    python -m tests.bench.bench_engine [--rows 1000000 10000000]

Makes `instances` (1 KiB of text a row), runs `jobs.score.run` over it with all its tables, and a bare Spark job that
reads the same rows and writes ids and one number. Prints one table; writes `build/bench/score.json`: `engine_growth`,
microseconds an instance at the largest size over those at the smallest, and `engine_vs_copy`, the engine over the copy
at the largest. The fake's own time is taken off: it stands for the model's. Micro-batches are of one size; a run of one
micro-batch comes first and is not timed. What describes the model (it loads transformers) is timed apart. Driver
memory: Java heap after a collection, and this process's pages.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from jobs import score, session
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.scores import run as scores_run
from miniplm_udf.scoring.results import Score
from miniplm_udf.store import tables
from tests.support import bench_results as results
from tests.support.score_tables import model_config
from tests.support.tiny_models import make_model_folder

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_FILES_PER_BATCH = 2
_TEXT_BYTES = 1024
_FILLER = " and so the text goes on with words that repeat themselves, as words do, for a while yet; "
_MODULUS = 997
_MEMORY_SECONDS = 3.0


class NumberScorer:
    """A score that is a function of the text, and costs next to nothing (its own cost is printed)."""

    def score(self, texts: Sequence[str | None], *_: Any) -> list[Score]:
        return [Score(float(int(text[:12]) % _MODULUS), len(text) // 4, len(text)) for text in texts if text]


def expected_nll() -> "Column":
    """The same in SQL."""
    from pyspark.sql import functions as F

    return (F.substring("text", 1, 12).cast("bigint") % _MODULUS).cast("double")


def instances(spark: "SparkSession", rows: int, files: int) -> "DataFrame":
    """Rows of `instances`: distinct texts of 1 KiB that a codec makes about a quarter of."""
    from pyspark.sql import functions as F

    def digest(salt: str) -> "Column":
        return F.md5(F.concat(F.col("id").cast("string"), F.lit(salt)).cast("binary"))

    words = [F.format_string("%012d", "id"), *(digest(str(i)) for i in range(6))]
    values = {
        "instance_id": digest(""),
        "stream_id": digest("stream"),
        "ordinal": F.lit(0).cast("bigint"),
        "document_ids": F.array(F.col("id").cast("string")),
        "start_byte": F.lit(0).cast("bigint"),
        "source": F.concat(F.lit("source-"), (F.col("id") % 8).cast("string")),
        "text": F.rpad(F.concat_ws(_FILLER, *words), _TEXT_BYTES, _FILLER),
        "segment_ends": F.array().cast("array<int>"),
        "starts_document": F.lit(True),
        "ends_document": F.lit(True),
        "n_bytes": F.lit(_TEXT_BYTES).cast("bigint"),
        "content_hash": digest("content"),
        "split": F.lit("pool"),
        "metadata": F.lit(None).cast("string"),
        "ingested_at": F.current_timestamp(),
        "query_id": F.lit("0" * 32),
        "batch_id": F.lit(0).cast("bigint"),
    }
    return spark.range(0, rows, 1, files).select(*(value.alias(name) for name, value in values.items()))


@dataclasses.dataclass(frozen=True)
class InstancesRoot:
    """A root with so many instances."""

    spark: "SparkSession"
    folder: Path
    rows: int
    rows_per_batch: int
    model: Path
    workers: int

    @property
    def config(self) -> ExperimentConfig:
        files = sorted((self.folder / "tables/instances").glob("*.parquet"))
        # The stream takes files until the bound is passed: half a file less than a micro-batch ends with its last.
        bound = (_FILES_PER_BATCH - 0.5) * sum(file.stat().st_size for file in files) / max(len(files), 1)
        return ExperimentConfig(
            root=str(self.folder),
            models={"teacher": model_config(self.model)},
            score=ScoreConfig(workers=self.workers, max_bytes_per_trigger=f"{max(int(bound), 1)}b"),
        )

    def generate(self) -> None:
        """Makes `instances` unless an earlier run made them, and removes what the earlier run wrote."""
        for name in ("tables/scores", "tables/score_matrix", "tables/rejects", "tables/copy", "_checkpoints"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        uri = storage.to_uri(str(self.folder / "tables/instances"))
        if not tables.exists(self.spark, uri):
            files = max(1, _FILES_PER_BATCH * self.rows // self.rows_per_batch)
            tables.append(instances(self.spark, self.rows, files), uri, schemas.INSTANCES)

    def copy(self) -> float:
        """Seconds of a bare job: the same rows in, ids and one number out."""
        from pyspark.sql import functions as F

        start = time.monotonic()
        rows = self.spark.read.format("delta").load(self.config.layout.table("instances"))
        number = F.length("text").alias("number")
        rows.select("instance_id", number).write.format("delta").save(self.config.layout.table("copy"))
        return time.monotonic() - start

    def score(self) -> dict[str, Any]:
        """Runs the job; returns its seconds without describing the model, those of describing, and driver memory."""
        described: list[float] = []

        def timed(*arguments: Any) -> Any:
            start = time.monotonic()
            found = describe(*arguments)
            described.append(time.monotonic() - start)
            return found

        describe = scores_run.describe_models
        with mock.patch.object(scores_run, "describe_models", timed), Memory(self.spark) as memory:
            start = time.monotonic()
            summary = score.run(self.spark, self.config, {"teacher": NumberScorer})
            seconds = time.monotonic() - start - described[0]
        if summary.scored["teacher"] != self.rows or summary.matrix_rows != self.rows or summary.rejected:
            raise RuntimeError(f"expected {self.rows} scores and matrix rows and no rejects, found {summary}")
        return {"seconds": seconds, "describe_seconds": described[0], **memory.quarters()}

    def n_wrong(self) -> int:
        """Scores that do not belong to their instance's text."""
        found = self.spark.read.format("delta").load(self.config.layout.table("scores"))
        texts = self.spark.read.format("delta").load(self.config.layout.table("instances"))
        pairs = found.select("instance_id", "nll_sum_nats").join(texts.select("instance_id", "text"), "instance_id")
        return int(pairs.where(expected_nll() != pairs["nll_sum_nats"]).count())


class Memory:
    """Samples the driver's memory in a thread: Java heap in use after a collection, and this process's pages (MiB)."""

    def __init__(self, spark: "SparkSession") -> None:
        self._jvm: Any = spark._jvm
        self._samples: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._end.wait(_MEMORY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self._jvm.java.lang.System.gc()
        runtime = self._jvm.java.lang.Runtime.getRuntime()
        pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self._samples.append(((runtime.totalMemory() - runtime.freeMemory()) / 2**20, pages / 2**20))

    def quarters(self) -> dict[str, list[int]]:
        """Samples after each quarter of the run."""
        at = [max(0, len(self._samples) * quarter // 4 - 1) for quarter in (1, 2, 3, 4)]
        return {
            "heap_mib": [round(self._samples[index][0]) for index in at],
            "python_mib": [round(self._samples[index][1]) for index in at],
        }


def fake_microseconds(n: int = 100_000) -> float:
    """The fake's own cost a row."""
    texts = [f"{i:012d}" + "x" * (_TEXT_BYTES - 12) for i in range(n)]
    start = time.perf_counter()
    NumberScorer().score(texts)
    return (time.perf_counter() - start) / n * 1e6


def measure(sized: InstancesRoot) -> dict[str, Any]:
    """One row of the table. Of the engine alone: less what the fake takes of each worker's time."""
    copy_seconds = sized.copy()
    row = sized.score()
    fake_us = fake_microseconds() / sized.workers
    engine_us = row["seconds"] / sized.rows * 1e6 - fake_us
    return {
        "rows": sized.rows,
        **row,
        "us_per_instance": engine_us,
        "fake_us": fake_us,
        "copy_seconds": copy_seconds,
        "copy_us": copy_seconds / sized.rows * 1e6,
        "ratio": engine_us * sized.rows / 1e6 / copy_seconds,
    }


def run(make: Callable[[int], InstancesRoot], rows: Sequence[int], rows_per_batch: int) -> list[dict[str, Any]]:
    """Warms up, then measures each size; raises where a score stands at another row than its text's."""
    found = []
    for n in (rows_per_batch, *rows):
        sized = make(n)
        sized.generate()
        found.append(measure(sized))
        if n == rows_per_batch and (wrong := sized.n_wrong()):
            raise RuntimeError(f"{wrong} scores are not those of their instances")
    return found[1:]


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    first, last = rows[0], rows[-1]
    return {
        "engine_growth": round(last["us_per_instance"] / first["us_per_instance"], 3),
        "engine_vs_copy": round(last["ratio"], 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes, ascending")
    parser.add_argument("--rows-per-batch", type=int, default=1_000_000, help="rows of a micro-batch")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="score.workers")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "engine", help="where the tables go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where score.json goes")
    parser.add_argument("--keep", action="store_true", help="leave the instances, for a next run")
    given = parser.parse_args(argv)
    model = make_model_folder(given.folder, name="model")
    base = ExperimentConfig(root=str(given.folder), spark=SparkConfig(conf={"spark.driver.memory": "2g"}))
    spark = session.make_session(base, "bench engine")
    try:
        found = run(
            lambda n: InstancesRoot(spark, given.folder / str(n), n, given.rows_per_batch, model, given.workers),
            given.rows,
            given.rows_per_batch,
        )
    finally:
        spark.stop()
    header = ("rows", "seconds", "us_per_instance", "fake_us", "copy_us", "ratio", "heap_mib", "python_mib")
    print(results.table(header, [[row[name] for name in header] for row in found]))
    print(ratios(found), flush=True)
    results.record("score", ratios(found), found, key="engine", folder=given.results)
    if not given.keep:
        shutil.rmtree(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
