"""Checks that no file of a root contains what was taken down, whether a table lists the file or not. Driver only.

Input: a `CheckedRoot`; output: `Check`s. The newest version of a table can hide rows that its files still contain: in a
file with a deletion vector, a replaced file, a change feed, or a copy that somebody put there. So every Parquet file
below `tables` and `exports` is opened, and its ids are compared with the record of take-downs; packed sequences have no
ids and are compared by time. docs/versions.md lists what is not opened. Writes nothing.
"""

import datetime
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fsspec

from miniplm_udf import storage
from miniplm_udf.layout import Root
from miniplm_udf.schemas import table_names
from miniplm_udf.store import tables, takedowns
from miniplm_udf.upkeep.checks import Check, CheckedRoot, examples_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# The record of take-downs, and the hashes that keep a document of a removed instance from being packed again. They have
# neither texts nor ids of documents.
_WITHOUT_TEXTS = ("takedowns", "document_keys")
_IDS = "instance_id STRING, document_ids ARRAY<STRING>"


def files_without_taken_down_rows(checked: CheckedRoot) -> Iterator[Check]:
    """Checks that no Parquet file below the root has a row of an instance or a document that was taken down.

    Args:
        checked: a root where something was taken down.

    Yields:
        One check per folder that holds Parquet files with ids or tokens.
    """
    gone = takedowns.instance_ids(checked.spark, checked.root)
    assert gone is not None
    documents = takedowns.document_ids(checked.spark, checked.root)
    session = checked.spark.newSession()
    # Delta refuses to read single files of its tables, which is what this check does.
    session.conf.set("spark.databricks.delta.formatCheck.enabled", "false")
    ids = session.createDataFrame(gone.collect(), gone.schema).persist()
    try:
        layout = Root(checked.root)
        for uri, files in sorted(_parquet_files(layout).items()):
            folder, table = layout.relative(uri), layout.table_name(uri)
            kind = None if table is None else table_names.kind_of(table)
            if table is not None and kind == table_names.PACKED:
                yield _packed(checked, folder, table, files)
            elif kind not in _WITHOUT_TEXTS:
                yield _by_ids(session, folder, files, ids, documents)
    finally:
        ids.unpersist()


def _parquet_files(layout: Root) -> dict[str, list[str]]:
    """URIs of the Parquet files of tables and exports by the URI of their folder; without files in logs of tables."""
    files = defaultdict(list)
    for base in (layout.table(), layout.exports()):
        filesystem, path = fsspec.core.url_to_fs(base)
        for name in filesystem.find(path) if filesystem.exists(path) else []:
            inner = str(name).removeprefix(path).lstrip("/")
            if inner.endswith(".parquet") and "_delta_log" not in inner.split("/"):
                uri = storage.join(base, inner)
                files[uri.rpartition("/")[0]].append(uri)
    return files


def _by_ids(
    spark: "SparkSession", folder: str, files: list[str], gone: "DataFrame", documents: list[str]
) -> Check:  # fmt: skip
    """Checks that no row is of an instance in `gone` or of one of the documents; a file may lack these columns."""
    from pyspark.sql import functions as F

    rows = spark.read.schema(_IDS).option("__globPaths__", "false").parquet(*files)
    rows = rows.select("*", F.col("_metadata.file_name").alias("file"))
    has_document = F.coalesce(F.arrays_overlap("document_ids", F.lit(documents)), F.lit(False))
    marked = rows.join(gone.withColumn("is_gone", F.lit(True)), "instance_id", "left")
    left = marked.where(F.coalesce("is_gone", F.lit(False)) | has_document).select("file").persist()
    try:
        n_rows = left.count()
        examples = examples_of(left.distinct(), "file") if n_rows else ()
    finally:
        left.unpersist()
    note = (
        "take the same ids down again, which removes the files of tables; remove files of exports by hand"
        if n_rows
        else ""
    )
    return Check(f"{folder}: no file holds what was taken down", 0, n_rows, n_rows == 0, note=note, examples=examples)


def _packed(checked: CheckedRoot, folder: str, table: str, files: list[str]) -> Check:
    """Checks that no file is older than the newest take-down that emptied the table."""
    record = tables.read(checked.spark, Root(checked.root).table("takedowns"))
    emptied = record.where((record["table"] == table) & (record["key"] == takedowns.WHOLE))
    moments = [row[0] for row in emptied.selectExpr("CAST(unix_micros(taken_down_at) AS DOUBLE) / 1e6").collect()]
    old = [file for file in files if moments and _modified(file) < max(moments)]
    names = tuple(file.rsplit("/", 1)[-1] for file in old[:5])
    return Check(f"{folder}: no file is older than its take-down", 0, len(old), not old, examples=names)


def _modified(uri: str) -> float:
    filesystem, path = fsspec.core.url_to_fs(uri)
    modified: datetime.datetime = filesystem.modified(path)
    return (modified if modified.tzinfo else modified.replace(tzinfo=datetime.UTC)).timestamp()
