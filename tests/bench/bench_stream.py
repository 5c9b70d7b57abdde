"""The cost of a micro-batch as the tables grow: ingest, score and the matrix over 10^5, 10^6 and 10^7 instances.

    python -m tests.bench.bench_stream [--rows 100000 1000000 10000000]

Each size has a root of its own. Its tables are generated, as if ingested and scored before (two models, the real
queries' ids), and the deduplication state is filled by a query over the same checkpoint that makes the keys. Then the
real queries run over new files, a micro-batch a file; a model refuses every hundredth text. Prints the median
seconds of a micro-batch of each stage, and of one whose instances another query has scored already; writes
`build/bench/stream.json`: `batch_growth`, the worst stage's seconds at the largest size over those at the smallest.
Then 1,000 micro-batches of a few rows: files and a reader's seconds, where small files are merged and where not.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import ingest, score, session
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import (
    ChunkingConfig,
    IngestConfig,
    ScoreConfig,
    SplitConfig,
    StreamConfig,
)
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.ingestion import inputs
from miniplm_udf.ingestion.query import IngestQuery
from miniplm_udf.scores import query as scores
from miniplm_udf.scores.run import Scoring, prepare
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.store import tables
from miniplm_udf.streams.query import Query, checkpoint_query_id
from miniplm_udf.streams.runner import QueryRunner
from tests.support import bench_results as results
from tests.support.score_tables import two_models
from tests.support.stream_tables import instance_values, matrix_values, row_id, score_values

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

STAGES = ("ingest", "score", "score_known", "score_matrix")
# The first micro-batches of each run load state and classes.
_WARM_UP = 2
_FILES_PER_FILL = 100
# Narrow rows: a file large enough that compaction leaves it alone.
_ROWS_PER_FILE = 1_000_000
_FILLER = " and so the text goes on, with words that repeat themselves as words do"


class RefusingScorer:
    """A number made of the text's first 12 digits. Refuses texts whose number ends with `refused`."""

    def __init__(self, refused: str) -> None:
        self._refused = refused

    def score(self, texts: Sequence[str | None], *_: Any) -> list[Any]:
        return [self._one(text) for text in texts if text]

    def _one(self, text: str) -> Any:
        if self._refused and text[:12].endswith(self._refused):
            return Failure("no_tokens", "the benchmark's")
        return Score(float(int(text[:12]) % 997), len(text) // 4, len(text))


@dataclasses.dataclass(frozen=True)
class GrowingRoot:
    """A root whose tables hold `rows` instances when its queries go on."""

    spark: "SparkSession"
    folder: Path
    rows: int
    rows_per_batch: int

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    @functools.cached_property
    def config(self) -> ExperimentConfig:
        return ExperimentConfig(
            root=str(self.folder / "root"),
            models=two_models(self.folder),
            ingest=IngestConfig(
                input=f"{self.inbox}/*.jsonl",
                chunking=ChunkingConfig(mode="document", max_tokens=1025),
                split=SplitConfig(reference=0, heldout=0),
                max_files_per_trigger=1,
            ),
        )

    def with_batches_of(self, table: str) -> ExperimentConfig:
        """The config whose micro-batches are the last commit of a table each: half a file less ends with its last."""
        from delta.tables import DeltaTable

        history = DeltaTable.forPath(self.spark, self.config.layout.table(table)).history().where("operation = 'WRITE'")
        newest = history.orderBy("version", ascending=False).first()["operationMetrics"]
        n_files, n_bytes = int(newest["numFiles"]), int(newest["numOutputBytes"])
        limit = f"{n_bytes * (2 * n_files - 1) // (2 * n_files)}b"
        return dataclasses.replace(self.config, score=ScoreConfig(workers=2, max_bytes_per_trigger=limit))

    def deliver(self, number: int) -> None:
        """Puts a file of new documents into the inbox."""
        self.inbox.mkdir(parents=True, exist_ok=True)
        first = number * self.rows_per_batch
        rows = (
            {"id": f"new {i}", "text": f"{i:012d}{_FILLER * 6}", "source": "web"}
            for i in range(first, first + self.rows_per_batch)
        )
        hidden = self.inbox / ".new"
        hidden.write_text("".join(json.dumps(row) + "\n" for row in rows))
        hidden.rename(self.inbox / f"new-{number:06d}.jsonl")

    # Filling

    def fill(self) -> float:
        """Makes what is not there from an earlier run; returns seconds."""
        start, begun = time.monotonic(), self.folder / "begun"
        if not begun.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.deliver(0)
            # Makes the tables and the checkpoints.
            ingest.run(self.spark, self.config)
            score.run(self.spark, self.config, self.scorers())
            begun.touch()
        filled = self.folder / "filled"
        if not filled.exists():
            self._fill_state()
            self._fill_tables()
            filled.touch()
        return time.monotonic() - start

    @staticmethod
    def scorers() -> dict[str, Callable[[], RefusingScorer]]:
        return {"teacher": lambda: RefusingScorer(""), "reference": lambda: RefusingScorer("00")}

    def _fill_state(self) -> None:
        """Lets the ids of all instances through the deduplication of the ingest query: a line a file, so many ids."""
        from pyspark.sql import functions as F

        for first in range(0, self.rows, self.rows_per_batch):
            line = {"id": f"{first}", "text": "stands for the documents of a file"}
            (self.inbox / f"old-{first:012d}.jsonl").write_text(json.dumps(line) + "\n")
        own, config = self.spark.newSession(), self.config
        settings = dataclasses.replace(config.ingest, max_files_per_trigger=_FILES_PER_FILL)
        lines = inputs.stream(own, inputs.find_inputs(own, settings), settings, [])
        first_id = F.get_json_object(F.col("line").cast("string"), "$.id").cast("bigint")
        ids = lines.select(F.explode(F.sequence(first_id, first_id + self.rows_per_batch - 1)).alias("id"))
        keys = ids.select(F.coalesce(row_id("instance"), F.lit("")).alias("key")).dropDuplicates(["key"])
        writer = keys.writeStream.foreachBatch(lambda batch, _: batch.count())
        writer = writer.option("checkpointLocation", config.layout.checkpoint("ingest-jsonl"))
        writer.trigger(availableNow=True).start().awaitTermination()

    def _fill_tables(self) -> None:
        config = self.config
        prepared = prepare(self.spark, config, "bench", self.scorers())
        models = {alias: model.model_revision for alias, model in prepared.descriptions.items()}
        made = (
            (schemas.INSTANCES, config.layout.checkpoint("ingest-jsonl"), [""], instance_values()),
            (schemas.SCORES, prepared.scoring.checkpoint_uri, list(models), score_values(models)),
            (schemas.score_matrix(list(models)), prepared.keeping.checkpoint_uri, [""], matrix_values(models)),
        )
        for table, checkpoint, aliases, values in made:
            self._append(table, checkpoint_query_id(self.spark, checkpoint), aliases, values)

    def _append(self, table: schemas.Table, query_id: str, aliases: list[str], values: dict[str, "Column"]) -> None:
        """One commit such as maintenance makes: the streams that read the table do not see it as news."""
        from pyspark.sql import functions as F

        # Before micro-batch 0, so that the numbers are no later one's.
        batch = (F.floor(F.col("id") / self.rows_per_batch) - self.rows // self.rows_per_batch).cast("bigint")
        columns = {**values, "query_id": F.lit(query_id), "batch_id": batch, "instance_batch_id": batch}
        rows = self.spark.range(0, self.rows, 1, max(2, self.rows // _ROWS_PER_FILE))
        rows = rows.withColumn("alias", F.explode(F.array(*map(F.lit, aliases))))
        frame = tables.conform(rows.select(*(columns[name].alias(name) for name in table.column_names)), table)
        writer = frame.write.format("delta").mode("append").option("dataChange", "false")
        # A run that was interrupted and continues writes it once.
        writer = writer.option("txnAppId", "fill").option("txnVersion", 0)
        writer.save(self.config.layout.table(table.name))

    # Measuring

    def measure(self, batches: int) -> dict[str, Any]:
        """Seconds of a micro-batch by stage: medians over `batches`."""
        n_before = len(list(self.inbox.glob("new-*")))
        for number in range(n_before, n_before + batches + _WARM_UP):
            self.deliver(number)
        files = inputs.find_inputs(self.spark, self.config.ingest)
        found = {"ingest": self._run(IngestQuery(self.spark, self.config, files, []))}
        found["score"] = self._run(self._prepare("instances").scoring)
        found["score_matrix"] = self._run(self._prepare("scores").keeping)
        found["score_known"] = self._known(batches)
        return {stage: statistics.median(seconds) for stage, seconds in found.items()}

    def _prepare(self, table: str) -> Scoring:
        return prepare(self.spark, self.with_batches_of(table), "bench", self.scorers())

    def _run(self, query: Query) -> list[float]:
        """Runs a query to the end of what is there; seconds of its micro-batches, less those that warm up."""
        from pyspark.sql.streaming import StreamingQueryListener

        seconds: list[float] = []

        class Listener(StreamingQueryListener):
            def onQueryProgress(self, event: Any) -> None:
                if event.progress.numInputRows:
                    seconds.append(event.progress.durationMs["triggerExecution"] / 1000)

            def onQueryStarted(self, event: Any) -> None: ...

            def onQueryIdle(self, event: Any) -> None: ...

            def onQueryTerminated(self, event: Any) -> None: ...

        make = query.source

        def source() -> "DataFrame":
            frame = make()
            frame.sparkSession.streams.addListener(Listener())
            return frame

        query.source = source
        QueryRunner(self.spark, self.config.root, StreamConfig()).run([query])
        return seconds[_WARM_UP:]

    def _known(self, batches: int) -> list[float]:
        """As after a lost checkpoint: a new query finds that an old micro-batch's instances are scored already."""
        prepared = self._prepare("instances")
        instances = self.spark.read.format("delta").load(self.config.layout.table("instances"))
        total, seconds = scores.new_score_counts(self.spark), []
        for number in range(batches + _WARM_UP):
            batch = scores.pool(instances.where(f"batch_id = {-1 - number % (self.rows // self.rows_per_batch)}"))
            start = time.monotonic()
            counts = scores.score_batch(prepared.plan, "k" * 32, batch, number, total).models
            seconds.append(time.monotonic() - start)
            if counts:
                raise RuntimeError(f"expected nothing to score, found {counts}")
        return seconds[_WARM_UP:]

    def check(self) -> None:
        """That the real queries went on from what was generated, and took every new file."""
        n_new = len(list(self.inbox.glob("new-*"))) * self.rows_per_batch
        n_refused = n_new // 100
        wanted = {
            "instances": self.rows + n_new,
            "scores": 2 * (self.rows + n_new) - n_refused,
            "score_matrix": self.rows + n_new - n_refused,
        }
        found = {n: self.spark.read.format("delta").load(self.config.layout.table(n)).count() for n in wanted}
        if found != wanted:
            raise RuntimeError(f"expected rows {wanted}, found {found}")


def small_files(spark: "SparkSession", folder: Path, batches: int) -> list[dict[str, Any]]:
    """The files of `scores` after many micro-batches of 20 rows, with and without merging, as a reader finds them.

    The table without merging is made by one commit of as many files; a reader replays either log from its last
    checkpoint.
    """
    from pyspark.sql import functions as F

    found = []
    values = score_values({"teacher": "r" * 32}) | {"query_id": F.lit("s" * 32)}
    for merged in (True, False):
        uri = storage.to_uri(str(folder / f"small-{merged}"))
        shutil.rmtree(storage.local_path(uri), ignore_errors=True)
        start = time.monotonic()
        for batch in range(batches if merged else 1):
            n_rows, parts = (20, 2) if merged else (20 * batches, 2 * batches)
            batch_id = F.lit(batch).cast("bigint")
            columns = {**values, "batch_id": batch_id, "instance_batch_id": batch_id}
            rows = spark.range(20 * batch, 20 * batch + n_rows, 1, parts).withColumn("alias", F.lit("teacher"))
            frame = rows.select(*(columns[name].alias(name) for name in schemas.SCORES.column_names))
            tables.append(frame, uri, schemas.SCORES, "s" * 32, batch)
            if merged:
                tables.compact(spark, uri, batch)
        seconds = (time.monotonic() - start) / (batches if merged else 1)
        found.append({"merged": merged, "batches": batches, "append_seconds": seconds, **_read(spark, uri)})
    return found


def _read(spark: "SparkSession", uri: str) -> dict[str, Any]:
    """Files of a table, and the seconds of a reader that sums a column, of three; the log is read again each time."""
    seconds = []
    for _ in range(3):
        jvm: Any = spark._jvm
        jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()
        start = time.monotonic()
        spark.read.format("delta").load(uri).agg({"nll_sum_nats": "sum"}).collect()
        seconds.append(time.monotonic() - start)
    n_files = len(spark.read.format("delta").load(uri).inputFiles())
    return {"files": n_files, "read_seconds": statistics.median(seconds)}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The ratio of the last size to the first."""
    return {"batch_growth": round(max(rows[-1][stage] / rows[0][stage] for stage in STAGES), 3)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="sizes, ascending")
    parser.add_argument("--rows-per-batch", type=int, default=10_000, help="rows of a micro-batch")
    parser.add_argument("--batches", type=int, default=7, help="micro-batches of each stage and size")
    parser.add_argument("--small-batches", type=int, default=1000, help="micro-batches of 20 rows; 0: none")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "stream", help="where the roots go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where stream.json goes")
    parser.add_argument("--keep", action="store_true", help="leave the roots, for a next run")
    given = parser.parse_args(argv)
    base = ExperimentConfig(root=str(given.folder), spark=SparkConfig(conf={"spark.driver.memory": "3g"}))
    spark = session.make_session(base, "bench stream")
    found = []
    try:
        for rows in given.rows:
            sized = GrowingRoot(spark, given.folder / str(rows), rows, given.rows_per_batch)
            fill_seconds = sized.fill()
            found.append({"rows": rows, "fill": fill_seconds, **sized.measure(given.batches)})
            sized.check()
            print(found[-1], flush=True)
        small = small_files(spark, given.folder, given.small_batches) if given.small_batches else []
    finally:
        spark.stop()
    header = ("rows", "fill", *STAGES)
    print(results.table(header, [[row[name] for name in header] for row in found]))
    print(ratios(found))
    results.record("stream", ratios(found), found, key="growth", folder=given.results)
    if small:
        header = ("merged", "batches", "files", "read_seconds", "append_seconds")
        print(results.table(header, [[row[name] for name in header] for row in small]))
        results.record("stream", {}, small, key="small_files", folder=given.results)
    if not given.keep:
        shutil.rmtree(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
