"""Small files are merged as micro-batches go: rows stay, streams see nothing, statistics still tell batches apart."""

import datetime
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import schemas, storage
from miniplm_udf.store import tables

QUERY = "q" * 32


def append(spark: Any, uri: str, batch_id: int) -> None:
    """One row of `rejects`, as a micro-batch writes it."""
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    row = (f"{batch_id:032x}", "ingest", "invalid_json", None, "file", None, b"x", 1, now, QUERY, batch_id)
    frame = spark.createDataFrame([row], schemas.REJECTS.spark_schema())
    tables.append(frame, uri, schemas.REJECTS, QUERY, batch_id)


def test_files_stay_few_and_a_stream_reads_each_row_once(spark: Any, tmp_path: Path) -> None:
    uri, seen = storage.to_uri(str(tmp_path / "rejects")), []

    def read() -> Any:
        return spark.read.format("delta").load(uri)

    def run() -> None:
        stream = spark.readStream.format("delta").option("maxFilesPerTrigger", 5).load(uri)
        writer = stream.writeStream.foreachBatch(
            lambda batch, _: seen.extend(row["batch_id"] for row in batch.collect())
        )
        writer.option("checkpointLocation", str(tmp_path / "c")).trigger(availableNow=True).start().awaitTermination()

    for batch_id in range(22, 32):
        append(spark, uri, batch_id)
        if batch_id in (26, 30):
            run()
        tables.compact(spark, uri, batch_id)
    assert len(read().inputFiles()) == 1
    append(spark, uri, 32)
    # A replay of a micro-batch whose file is gone from the table: Delta still knows that it was written.
    append(spark, uri, 23)
    run()
    assert sorted(seen) == sorted(row["batch_id"] for row in read().collect()) == list(range(22, 33))
    assert len(read().where(f"query_id = '{QUERY}' AND batch_id = 32").inputFiles()) == 1
    # The settings of a compaction stay with it.
    assert spark.conf.get("spark.databricks.delta.optimize.maxFileSize", "1") == "1"


@pytest.mark.long
def test_an_append_that_reads_its_table_outlives_a_compaction(spark: Any, tmp_path: Path) -> None:
    """The compaction comes between the plan of the write and its commit, as another driver's would."""
    from pyspark.sql import functions as F

    uri, merged = storage.to_uri(str(tmp_path / "rejects")), []
    for batch_id in range(3):
        append(spark, uri, batch_id)

    @F.udf("string")
    def slowly(text: str) -> str:
        time.sleep(3)
        return text

    def compact() -> None:
        time.sleep(1.5)
        tables.compact(spark, uri, 31)
        merged.append(len(spark.read.format("delta").load(uri).inputFiles()))

    known = spark.read.format("delta").load(uri).where("batch_id < 2")
    rows = known.withColumns(
        {"reject_id": slowly(F.concat("reject_id", F.lit("x"))), "batch_id": F.lit(9).cast("bigint")}
    )
    other = threading.Thread(target=compact)
    other.start()
    tables.append(rows.coalesce(1), uri, schemas.REJECTS, QUERY, 9)
    other.join()
    assert merged == [1]
    assert spark.read.format("delta").load(uri).count() == 5
