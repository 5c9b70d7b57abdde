"""Delta tables at their places: made with properties, checked before every write, registered by name. Driver only.

Inputs: DataFrames; outputs: commits to `<root>/tables/...`. A writer refuses a frame whose columns, types or
nullability are not the declared ones (schemas.py). An append takes (query_id, batch_id) as Delta's transaction id, so a
replayed micro-batch writes nothing a second time. Small files are merged as micro-batches go. Owns no query, no model.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import schemas, storage
from miniplm_udf.errors import CorpusError, MiniplmError, SchemaMismatchError
from miniplm_udf.streams.query import checkpoint_query_id

if TYPE_CHECKING:
    from delta.tables import DeltaTableBuilder
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.tables")

_APPEND_TRIES = 5
# After how many micro-batches files smaller than so many bytes are merged to that size; the first that fits is done.
_COMPACTION = ((1024, 128 * 2**20), (32, 4 * 2**20))


def exists(spark: "SparkSession", uri: str) -> bool:
    from delta.tables import DeltaTable

    return bool(DeltaTable.isDeltaTable(spark, uri))


def create(spark: "SparkSession", uri: str, table: schemas.Table, properties: Mapping[str, str] | None = None) -> None:
    """Makes the empty table with its declared schema and properties, and further ones, where there is none."""
    from delta.tables import DeltaTable
    from pyspark.errors import AnalysisException

    try:
        _build(DeltaTable.createIfNotExists(spark), uri, table, properties or {})
    except AnalysisException as error:
        if error.getCondition() != "DELTA_TABLE_NOT_FOUND":
            raise
        _remove_log_without_commits(uri)
        _build(DeltaTable.createIfNotExists(spark), uri, table, properties or {})


def _remove_log_without_commits(uri: str) -> None:
    """Removes what a kill or a full disk left of a table before its first commit: Delta makes no table on top of it."""
    filesystem, path = fsspec.core.url_to_fs(storage.join(uri, "_delta_log"))
    if filesystem.exists(path) and not any(name.endswith((".json", ".parquet")) for name in filesystem.find(path)):
        filesystem.rm(path, recursive=True)


def detail(spark: "SparkSession", uri: str) -> "Row | None":
    """What Delta tells of a table as a whole (`id`, `numFiles`, `sizeInBytes`, `properties`); None without one."""
    from delta.tables import DeltaTable

    return DeltaTable.forPath(spark, uri).detail().collect()[0] if exists(spark, uri) else None


def _build(builder: "DeltaTableBuilder", uri: str, table: schemas.Table, properties: Mapping[str, str]) -> None:
    # Delta compares the location with Hadoop's own form of it, which has one slash.
    builder = builder.location(uri.replace("file:///", "file:/", 1)).addColumns(table.spark_schema())
    for key, value in {**table.delta_properties(), **properties}.items():
        builder = builder.property(key, value)
    builder.execute()


def _set_columns(spark: "SparkSession", uri: str, table: schemas.Table) -> None:
    """Makes the table, or empties it and gives it the declared columns where it has others (`overwriteSchema` would
    make every column nullable)."""
    from delta.tables import DeltaTable

    create(spark, uri, table)
    if spark.read.format("delta").load(uri).columns != table.column_names:
        _build(DeltaTable.replace(spark), uri, table, {})


def read(spark: "SparkSession", uri: str, version: int | None = None) -> "DataFrame":
    """The table, at a version or the newest.

    Raises:
        CorpusError: there is no table.
    """
    if not exists(spark, uri):
        raise CorpusError(
            f"table {storage.redact(uri)}: expected a Delta table, found none; run the stage that writes it first"
        )
    reader = spark.read.format("delta")
    return (reader if version is None else reader.option("versionAsOf", version)).load(uri)


@contextlib.contextmanager
def long_scans(spark: "SparkSession") -> Iterator[None]:
    """While the block runs, reads go in parts of 128 MB, Spark's own default, for passes over narrow columns.

    Sessions of this project have smaller ones, which share texts out evenly to scorers (`jobs.session`).
    """
    key = "spark.sql.files.maxPartitionBytes"
    before = str(spark.conf.get(key))
    spark.conf.set(key, "128m")
    try:
        yield
    finally:
        spark.conf.set(key, before)


def is_work_of(spark: "SparkSession", uri: str, table: schemas.Table, checkpoint_uri: str) -> bool:
    """Whether the table has the declared columns and its rows, which are all of one query, are this checkpoint's."""
    try:
        query_id, found = checkpoint_query_id(spark, checkpoint_uri), read(spark, uri)
    except MiniplmError:
        return False
    has_columns = found.columns == table.column_names
    return has_columns and [row[0] for row in found.select("query_id").limit(1).collect()] == [query_id]


def version(spark: "SparkSession", uri: str) -> int | None:
    """The newest version of the table, or None where there is none."""
    from delta.tables import DeltaTable

    if not exists(spark, uri):
        return None
    return int(DeltaTable.forPath(spark, uri).history(1).select("version").collect()[0][0])


def conform(frame: "DataFrame", table: schemas.Table) -> "DataFrame":
    """Selects the declared columns in order and checks types. Nullability is checked by the table itself on write.

    Raises:
        SchemaMismatchError: a column is missing, is too much, or has another type.
    """
    from pyspark.sql.types import ArrayType, DataType

    def bare(data_type: DataType) -> DataType:
        return ArrayType(data_type.elementType, True) if isinstance(data_type, ArrayType) else data_type

    declared = {field.name: bare(field.dataType) for field in table.spark_schema().fields}
    found = {field.name: bare(field.dataType) for field in frame.schema.fields}
    if declared != found:
        missing, extra = sorted(declared.keys() - found.keys()), sorted(found.keys() - declared.keys())
        types = [
            f"{name}: expected {declared[name].simpleString()}, found {found[name].simpleString()}"
            for name in declared.keys() & found.keys()
            if declared[name] != found[name]
        ]
        raise SchemaMismatchError(
            f"table {table.name}: expected the columns of schemas.py; missing {missing}, extra {extra}, types {types}"
        )
    return frame.select(*table.column_names)


def append(
    frame: "DataFrame", uri: str, table: schemas.Table, query_id: str | None = None, batch_id: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Appends a frame once: with (query_id, batch_id), a second write under the same pair is dropped by Delta.

    `metadata` becomes `userMetadata`. A frame that reads the table which it goes to is computed again where another
    driver's commit came between, a compaction perhaps; other frames are in no conflict.
    """
    from delta.exceptions import ConcurrentAppendException, ConcurrentDeleteReadException

    spark = frame.sparkSession
    create(spark, uri, table)
    writer = conform(frame, table).write.format("delta").mode("append")
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata, sort_keys=True))
    if query_id is not None and batch_id is not None:
        writer = writer.option("txnAppId", query_id).option("txnVersion", batch_id)
    for tries_left in reversed(range(_APPEND_TRIES)):
        try:
            return writer.save(uri)
        except (ConcurrentAppendException, ConcurrentDeleteReadException):
            if not tries_left:
                raise


def overwrite(
    frame: "DataFrame", uri: str, table: schemas.Table, metadata: dict[str, Any] | None = None,
    query_id: str | None = None, batch_id: int | None = None,
) -> int:  # fmt: skip
    """Replaces the table's rows in one commit and returns its version; `metadata` becomes `userMetadata`.

    A table with other columns is emptied by a commit of its own first; `frame` must not read that table then.
    """
    spark = frame.sparkSession
    _set_columns(spark, uri, table)
    writer = conform(frame, table).write.format("delta").mode("overwrite")
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata, sort_keys=True))
    if query_id is not None and batch_id is not None:
        writer = writer.option("txnAppId", query_id).option("txnVersion", batch_id)
    writer.save(uri)
    return int(version(spark, uri) or 0)


def conflicts() -> tuple[type[Exception], ...]:
    """What Delta raises where another writer was first: in Python these have no class in common."""
    from delta import exceptions

    return (
        exceptions.ConcurrentAppendException,
        exceptions.ConcurrentDeleteDeleteException,
        exceptions.ConcurrentDeleteReadException,
        exceptions.ConcurrentTransactionException,
        exceptions.ConcurrentWriteException,
        exceptions.DeltaConcurrentModificationException,
        exceptions.MetadataChangedException,
    )


def compact(spark: "SparkSession", uri: str, batch_id: int) -> None:
    """Merges the table's small files after every so many micro-batches of the query that calls it.

    In two rounds, so that a row is rewritten a few times and not over and over: often those below a few MiB to files of
    that size, rarely those to large ones. Rows keep their order in time, so that statistics go on telling files apart.
    Streams that read the table do not see it, nor does it conflict with appends; of two that compact at once, one does.
    """
    for every, size_bytes in _COMPACTION:
        if (batch_id + 1) % every == 0:
            return merge_small_files(spark, uri, size_bytes)


def merge_small_files(spark: "SparkSession", uri: str, size_bytes: int = _COMPACTION[0][1]) -> None:
    """Merges the table's files below a size to files of that size, in one commit that changes no row."""
    from delta.tables import DeltaTable

    # A session of its own: the settings are of this alone.
    own = spark.newSession()
    own.conf.set("spark.databricks.delta.optimize.minFileSize", size_bytes)
    own.conf.set("spark.databricks.delta.optimize.maxFileSize", size_bytes)
    try:
        DeltaTable.forPath(own, uri).optimize().executeCompaction()
    except conflicts():
        LOGGER.info("table %s: another writer has merged its small files", storage.redact(uri))


def vacuum(spark: "SparkSession", uri: str, retain_hours: float, is_logged: bool, dry_run: bool = False) -> int:
    """Removes the files that no version of the last so many hours has; returns their number.

    Versions that had them cannot be read any more, whatever the table's own retention is.

    Args:
        is_logged: leaves a commit in the log that says so. It is a commit like others: not where a query writes the
            table meanwhile and the storage has no atomic ones.
        dry_run: only counts.
    """
    own = spark.newSession()
    own.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    own.conf.set("spark.databricks.delta.vacuum.logging.enabled", str(is_logged).lower())
    # So many tasks list the files, 10,000 by default; a table of ours is one folder.
    own.conf.set("spark.sql.sources.parallelPartitionDiscovery.parallelism", spark.sparkContext.defaultParallelism)
    statement = f"VACUUM delta.`{uri}` RETAIN {retain_hours:.6f} HOURS"
    n_files = own.sql(f"{statement} DRY RUN").count()
    if n_files and not dry_run:
        own.sql(statement).collect()
    return n_files


def delete_matching(spark: "SparkSession", uri: str, ids: "DataFrame", key: str = "instance_id") -> None:
    """Removes the rows whose key is in `ids` (of one column, `key`), in one commit; the old files stay until a vacuum.

    Streams that read the table must skip the commit (`skipChangeCommits`).
    """
    from delta.tables import DeltaTable

    target = DeltaTable.forPath(spark, uri).alias("t")
    target.merge(ids.alias("s"), f"t.{key} = s.{key}").whenMatchedDelete().execute()


def user_metadata(spark: "SparkSession", uri: str, at: int | None = None) -> dict[str, Any] | None:
    """The parsed `userMetadata` of a version's commit (the newest by default), or None where it has none."""
    from delta.tables import DeltaTable

    history = DeltaTable.forPath(spark, uri).history().select("version", "userMetadata")
    wanted = version(spark, uri) if at is None else at
    rows = history.where(history.version == wanted).collect()
    return json.loads(rows[0][1]) if rows and rows[0][1] else None


def missing_from(frame: "DataFrame", others: "DataFrame", key: str = "instance_id") -> "DataFrame":
    """Rows of `frame` whose key is not in `others`."""
    return frame.join(others.select(key), on=key, how="left_anti")
