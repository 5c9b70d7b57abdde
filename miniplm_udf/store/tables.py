"""The only writer of Delta tables: creates them, checks every write, merges and removes files. Driver only.

Inputs: DataFrames; outputs: commits to `<root>/tables/...`. A frame whose columns, types or nullability differ from the
declaration (`schemas`) is refused. An append takes (query_id, batch_id) as Delta's transaction id, so a replayed
micro-batch writes nothing a second time. `compact` merges small files every few micro-batches. Owns no query, no model.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import fsspec

from miniplm_udf import schemas, storage
from miniplm_udf.errors import CorpusError, SchemaMismatchError
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_files
from miniplm_udf.store.delta_features import FILE_READER_PROPERTIES, TYPE_WIDENING, needs_repair
from miniplm_udf.store.delta_log import has_commits, newest_version

if TYPE_CHECKING:
    from delta.tables import DeltaTableBuilder
    from pyspark.sql import DataFrame, DataFrameWriter, Row, SparkSession

LOGGER = logging.getLogger("miniplm.tables")

_APPEND_TRIES = 5
_FILES_WITHOUT_LOG = ("DELTA_CREATE_TABLE_WITH_NON_EMPTY_LOCATION", "DELTA_MISSING_DELTA_TABLE")
_TABLE_DEFAULTS = "spark.databricks.delta.properties.defaults."
# Pairs (micro-batches, bytes): every so many micro-batches, files smaller than so many bytes are merged to that size.
# Where both pairs are due, only the first is done.
_COMPACTION = ((1024, 128 * 2**20), (32, 4 * 2**20))


def exists(spark: "SparkSession", uri: str) -> bool:
    """Whether there is a Delta log at `uri`, with or without a commit."""
    from delta.tables import DeltaTable

    return bool(DeltaTable.isDeltaTable(spark, uri))


def create(spark: "SparkSession", uri: str, table: schemas.Table, properties: Mapping[str, str] | None = None) -> None:
    """Creates the empty table with its declared schema and properties, if there is no table.

    The table has none of the features in `delta_features`, whatever the session's defaults are.

    Args:
        uri: location of the table.
        table: its declaration.
        properties: further table properties.

    Raises:
        CorpusError: the folder holds files, but no log.
    """
    from delta.tables import DeltaTable
    from pyspark.errors import AnalysisException

    if exists(spark, uri) and has_commits(uri):
        return
    session = _without_defaults(spark)
    try:
        try:
            _build(DeltaTable.createIfNotExists(session), uri, table, properties or {})
        except AnalysisException as error:
            if error.getCondition() != "DELTA_TABLE_NOT_FOUND":
                raise
            _remove_log_without_commits(uri)
            _build(DeltaTable.createIfNotExists(session), uri, table, properties or {})
    except AnalysisException as error:
        if error.getCondition() not in _FILES_WITHOUT_LOG:
            raise
        raise CorpusError(
            f"table {storage.redact(uri)}: expected a Delta table or no folder, found files without the log that lists "
            "them; restore `_delta_log` from a copy, or move the folder away and run again"
        ) from error


def _without_defaults(spark: "SparkSession") -> "SparkSession":
    """A new session without defaults for the properties of new tables, because a table's own properties cannot
    override a default `feature.NAME`."""
    session = spark.newSession()
    for key in session.conf.getAll:
        if key.startswith(_TABLE_DEFAULTS):
            session.conf.unset(key)
    return session


def _remove_log_without_commits(uri: str) -> None:
    """Removes the log of a table whose first commit a kill or a full disk prevented: Delta creates no table over it."""
    filesystem, path = fsspec.core.url_to_fs(storage.join(uri, "_delta_log"))
    if filesystem.exists(path) and not any(name.endswith((".json", ".parquet")) for name in filesystem.find(path)):
        filesystem.rm(path, recursive=True)


def detail(spark: "SparkSession", uri: str) -> "Row | None":
    """Delta's description of the table at `uri` (`id`, `numFiles`, `properties`, ...); None if there is no table."""
    from delta.tables import DeltaTable

    return DeltaTable.forPath(spark, uri).detail().collect()[0] if exists(spark, uri) else None


def _build(builder: "DeltaTableBuilder", uri: str, table: schemas.Table, properties: Mapping[str, str]) -> None:
    # Delta compares the location with the form that Hadoop writes, which has one slash after `file:`.
    builder = builder.location(uri.replace("file:///", "file:/", 1)).addColumns(table.spark_schema())
    for key, value in {**FILE_READER_PROPERTIES, **table.delta_properties(), **properties}.items():
        builder = builder.property(key, value)
    builder.execute()


def _set_columns(spark: "SparkSession", uri: str, table: schemas.Table) -> None:
    """Creates the table; replaces a table that has other columns by an empty table with the declared columns
    (`overwriteSchema` would make every column nullable)."""
    from delta.tables import DeltaTable

    create(spark, uri, table)
    if spark.read.format("delta").load(uri).columns != table.column_names:
        _build(DeltaTable.replace(_without_defaults(spark)), uri, table, {})


def read(spark: "SparkSession", uri: str, version: int | None = None) -> "DataFrame":
    """The rows of a table.

    Args:
        uri: location of the table.
        version: Delta version; None reads the newest.

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
    """Reads files in parts of 128 MB, Spark's default, while the block runs; use it for passes over narrow columns.

    Sessions of this project read smaller parts, which spread texts evenly over the scorers (`jobs.session`).
    """
    key = "spark.sql.files.maxPartitionBytes"
    before = str(spark.conf.get(key))
    spark.conf.set(key, "128m")
    try:
        yield
    finally:
        spark.conf.set(key, before)


def conform(frame: "DataFrame", table: schemas.Table) -> "DataFrame":
    """Selects the columns of `frame` that `table` declares, and checks their types; Delta checks their nullability.

    Raises:
        SchemaMismatchError: a column is missing, is not declared, or has another type.
    """
    from pyspark.sql.types import ArrayType, DataType

    def bare(data_type: DataType) -> DataType:
        return ArrayType(data_type.elementType, True) if isinstance(data_type, ArrayType) else data_type

    declared = {field.name: bare(field.dataType) for field in table.spark_schema().fields}
    given = {field.name: bare(field.dataType) for field in frame.schema.fields}
    if declared != given:
        missing, extra = sorted(declared.keys() - given.keys()), sorted(given.keys() - declared.keys())
        types = [
            f"{name}: expected {declared[name].simpleString()}, found {given[name].simpleString()}"
            for name in declared.keys() & given.keys()
            if declared[name] != given[name]
        ]
        raise SchemaMismatchError(
            f"table {table.name}: expected the columns declared in miniplm_udf/schemas; missing {missing}, "
            f"extra {extra}, types {types}"
        )
    return frame.select(*table.column_names)


def append(
    frame: "DataFrame", uri: str, table: schemas.Table, query_id: str | None = None, batch_id: int | None = None,
    metadata: Json | None = None,
) -> None:  # fmt: skip
    """Appends a frame; with (query_id, batch_id), Delta drops a second write under the same pair.

    A frame that reads the table which it is written to conflicts with commits that other drivers make meanwhile (for
    example a compaction). It is then computed and written again, up to five times in all.

    Args:
        frame: rows with the declared columns.
        uri: location of the table, which is created if there is none.
        table: its declaration.
        query_id: id of the writing query; becomes Delta's transaction id.
        batch_id: the micro-batch; becomes the transaction's version.
        metadata: becomes the commit's `userMetadata`.

    Raises:
        SchemaMismatchError: the columns do not fit the table (see `conform`).
    """
    from delta.exceptions import ConcurrentAppendException, ConcurrentDeleteReadException

    spark = frame.sparkSession
    create(spark, uri, table)
    writer = _writer(frame, table, metadata, query_id, batch_id).mode("append")
    for tries_left in reversed(range(_APPEND_TRIES)):
        try:
            return writer.save(uri)
        except (ConcurrentAppendException, ConcurrentDeleteReadException):
            if not tries_left:
                raise


def _writer(
    frame: "DataFrame", table: schemas.Table, metadata: Json | None, query_id: str | None,
    batch_id: int | None,
) -> "DataFrameWriter":  # fmt: skip
    """A writer of the declared columns. With (query_id, batch_id), Delta drops a second write under the same pair."""
    writer = conform(frame, table).write.format("delta")
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata, sort_keys=True))
    if query_id is not None and batch_id is not None:
        writer = writer.option("txnAppId", query_id).option("txnVersion", batch_id)
    return writer


def overwrite(
    frame: "DataFrame", uri: str, table: schemas.Table, metadata: Json | None = None,
    query_id: str | None = None, batch_id: int | None = None,
) -> int:  # fmt: skip
    """Replaces the table's rows in one commit.

    A table with other columns is emptied by a separate commit first; `frame` must not read that table then.

    Args:
        frame, uri, table, metadata, query_id, batch_id: see `append`.

    Returns:
        The version of the commit.
    """
    _set_columns(frame.sparkSession, uri, table)
    writer = _writer(frame, table, metadata, query_id, batch_id).mode("overwrite")
    writer.save(uri)
    return newest_version(uri) or 0


def conflicts() -> tuple[type[Exception], ...]:
    """The errors that Delta raises if another writer committed first; in Python they have no common base class."""
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
    """Merges the table's small files, after some of the micro-batches of the query that calls it.

    Two rounds keep down how often a row is rewritten: every 32 micro-batches, files below 4 MiB are merged to files of
    that size; every 1,024, files below 128 MiB. Rows keep their order in time, so that statistics still tell files
    apart. Streams that read the table do not notice a merge, and it does not conflict with appends. If two drivers
    merge at once, one of them gives up.

    Args:
        uri: location of the table.
        batch_id: the micro-batch that was just written.
    """
    for every, size_bytes in _COMPACTION:
        if (batch_id + 1) % every == 0:
            return merge_small_files(spark, uri, size_bytes)


def merge_small_files(spark: "SparkSession", uri: str, size_bytes: int = _COMPACTION[0][1]) -> None:
    """Merges the table's files below a size to files of that size, in one commit that changes no row.

    Args:
        spark: any session; its settings stay as they are.
        uri: location of the table.
        size_bytes: files below this size are merged.
    """
    from delta.tables import DeltaTable

    # A new session, because the settings are for this merge only.
    session = spark.newSession()
    session.conf.set("spark.databricks.delta.optimize.minFileSize", size_bytes)
    session.conf.set("spark.databricks.delta.optimize.maxFileSize", size_bytes)
    try:
        DeltaTable.forPath(session, uri).optimize().executeCompaction()
    except conflicts():
        LOGGER.info("table %s: another writer has merged its small files", storage.redact(uri))


def vacuum(spark: "SparkSession", uri: str, retain_hours: float, is_logged: bool, dry_run: bool = False) -> int:
    """Removes the files that no version of the last `retain_hours` hours needs.

    Older versions that need them cannot be read any more, whatever the table's own retention is.

    Args:
        uri: location of the table.
        retain_hours: how far back versions stay readable.
        is_logged: whether the vacuum is recorded by a commit. Leave it out while a query writes the table on a storage
            without atomic commits.
        dry_run: whether the files are only counted.

    Returns:
        The number of removed files.
    """
    before = _files_on_disk(uri)
    if _has_only_listed_files(uri, before):
        return 0
    session = spark.newSession()
    session.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    session.conf.set("spark.databricks.delta.vacuum.logging.enabled", str(is_logged).lower())
    # Number of tasks that list the files: 10,000 by default, but each of our tables is one folder.
    session.conf.set("spark.sql.sources.parallelPartitionDiscovery.parallelism", spark.sparkContext.defaultParallelism)
    statement = f"VACUUM delta.`{uri}` RETAIN {retain_hours:.6f} HOURS"
    # A logged vacuum adds two commits to the table even if it removes nothing, so the files are counted first.
    if dry_run or is_logged:
        n_files = session.sql(f"{statement} DRY RUN").count()
        if dry_run or not n_files:
            return n_files
    session.sql(statement).collect()
    return len(before - _files_on_disk(uri))


def _files_on_disk(uri: str) -> set[str]:
    """The names of a table's data files, listed by its log or not; as pyarrow opens them."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    names = filesystem.find(path)
    # Vacuum leaves the log alone, and what is hidden, such as the checksums that Hadoop writes on a local disk.
    return {name for name in names if "/_delta_log/" not in name and not name.rpartition("/")[2].startswith(".")}


def _has_only_listed_files(uri: str, on_disk: set[str]) -> bool:
    """Whether every data file on disk is one of the newest version, so that a vacuum has nothing to remove."""
    try:
        listed = delta_files.parquet_files(uri)
    except CorpusError:  # files of deletion vectors are not listed
        return False
    filesystem, _ = fsspec.core.url_to_fs(uri)
    return on_disk <= {filesystem._strip_protocol(name) for name in listed}


def make_readable(spark: "SparkSession", uri: str) -> bool:
    """Switches off the features in `delta_features`, and rewrites the files so that they hold exactly the table's rows.

    No row of the table at `uri` changes, and streams that read it do not notice. The old files stay until a vacuum.

    Returns:
        Whether files were rewritten or properties changed.
    """
    table = detail(spark, uri)
    if table is None or not needs_repair(table["tableFeatures"] or (), table["properties"]):
        return False
    before = newest_version(uri)
    # Only properties that differ: setting the mode of column mapping makes Delta rewrite all files.
    changed = {key for key, value in FILE_READER_PROPERTIES.items() if table["properties"].get(key, value) != value}
    if changed:
        properties = ", ".join(f"'{key}' = '{FILE_READER_PROPERTIES[key]}'" for key in sorted(changed))
        spark.sql(f"ALTER TABLE delta.`{uri}` SET TBLPROPERTIES ({properties})")
    if TYPE_WIDENING in (table["tableFeatures"] or ()):
        spark.sql(f"ALTER TABLE delta.`{uri}` DROP FEATURE {TYPE_WIDENING}")
    spark.sql(f"REORG TABLE delta.`{uri}` APPLY (PURGE)")
    return newest_version(uri) != before


def delete_matching(spark: "SparkSession", uri: str, ids: "DataFrame", key: str = "instance_id") -> None:
    """Removes the rows whose `key` is in `ids`, in one commit; the old files stay until a vacuum.

    Streams that read the table must skip the commit (`skipChangeCommits`).

    Args:
        uri: location of the table.
        ids: one column, `key`.
        key: name of the column.
    """
    from delta.tables import DeltaTable

    target = DeltaTable.forPath(spark, uri).alias("t")
    target.merge(ids.alias("s"), f"t.{key} = s.{key}").whenMatchedDelete().execute()


def missing_from(frame: "DataFrame", others: "DataFrame", key: str | list[str] = "instance_id") -> "DataFrame":
    """The rows of `frame` whose key is not in `others`.

    Args:
        frame: the rows to choose from; a row with a null key stays.
        others: the rows that are left out, with the key's columns.
        key: name of the key's column, or names of its columns.
    """
    return frame.join(others.select(key), on=key, how="left_anti")
