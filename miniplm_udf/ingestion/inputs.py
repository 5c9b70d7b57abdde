"""Finds the input of ingest (files or a Delta table, format, columns) and makes the stream over it. Driver only.

Input: `IngestConfig`. Output: an `Inputs`, and a streaming frame with `source_file`, `block_start`, `modified_micros`
and either `line` (the bytes of a JSON object) or `text`, `id`, `source` (bytes) and `metadata` (a JSON object). A
config that does not fit the input is refused before the stream starts; bad rows are found on executors. Writes nothing;
a retry lists again.

Spark itself lists the files, and reads JSON lines and Parquet, so every storage that Spark supports works; Python on
executors reads the other formats (whole_files.py). A Delta table is read as append-only: commits that change rows are
skipped. Data sets of a hub are downloaded first (hub.py).
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.config.sections import FieldsConfig, IngestConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import hub
from miniplm_udf.ingestion.field_checks import check_columns, check_lines, check_text_fields
from miniplm_udf.ingestion.file_format import csv_hint, file_format, is_of_format
from miniplm_udf.ingestion.first_rows import arrow_types
from miniplm_udf.ingestion.footers import Damage
from miniplm_udf.ingestion.formats import PACKED, WHOLE_FILES
from miniplm_udf.ingestion.listing import (
    GLOB_FILTERS,
    INPUT,
    InputFile,
    all_files,
    base_folders,
    check_names,
    check_tables,
    existing_or_glob,
    glob_filter,
    is_datasets_record,
    left_out,
    one_path,
    plain_path,
)
from miniplm_udf.ingestion.parquet_columns import make_reader
from miniplm_udf.ingestion.path_hints import path_hint
from miniplm_udf.ingestion.row_sql import batch_columns, read_schema
from miniplm_udf.ingestion.survey import Survey, survey_parquet
from miniplm_udf.ingestion.whole_files import FileReader

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import StructType

LOGGER = logging.getLogger("miniplm.ingest")

_NAMES_SHOWN = 5
# The text form of Hadoop's FileStatus.
_STATUS = re.compile(r"isDirectory=false; length=(\d+); replication=\d+; blocksize=\d+; modification_time=(\d+);")
# Files that Spark lists and does not read: `_metadata` and `_common_metadata` of Parquet.
_BOOKKEEPING = re.compile(r"/_[^/=]*$")
_BINARY_FILE = "path string, modificationTime timestamp, length bigint, content binary"
_GLOB_FILTERS = {**GLOB_FILTERS, "json": glob_filter(("json",), PACKED["jsonl"])}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The input of ingest.

    Attributes:
        format: jsonl, parquet, text, json (arrays), arrow or delta.
        path: one path, glob or table.
        by_name: whether only files are read whose names end in a suffix of the format.
        files: the files that exist now; empty for a table.
        schema: schema of the table, or of the Parquet files' wanted columns.
        left_out: names of files that lie in the input's folders and are not read (`listing.left_out`).
        odd: Parquet files whose column types Spark cannot read under `schema`.
        damaged: Parquet files that cannot be read.
        rows_per_byte: mean of the readable Parquet files; 0 if there is none.
        bases: folders that the input names; ids and sources of text files are parts of the names below them.
    """

    format: str
    path: str
    by_name: bool = False
    files: tuple[InputFile, ...] = ()
    schema: "StructType | None" = None
    left_out: tuple[str, ...] = ()
    odd: tuple[InputFile, ...] = ()
    damaged: tuple[Damage, ...] = ()
    rows_per_byte: float = 0.0
    bases: tuple[str, ...] = ()

    def file_reader(self, fields: FieldsConfig) -> FileReader:
        """Returns the reader of files that Spark itself cannot read.

        Args:
            fields: names of the columns.
        """
        return FileReader(self.format, fields, self.bases)

    def surveyed(self, survey: Survey) -> "Inputs":
        """Returns the same input with the results of a newer survey of its Parquet files.

        Args:
            survey: the newer survey; a schema or rate that it does not have stays as it is.
        """
        return dataclasses.replace(
            self, schema=survey.schema or self.schema, odd=survey.odd, damaged=survey.damaged,
            rows_per_byte=survey.rows_per_byte or self.rows_per_byte,
        )  # fmt: skip


def find_inputs(
    spark: "SparkSession", ingest: IngestConfig, taken: Callable[[str], Collection[str]] = lambda kind: ()
) -> Inputs:
    """Returns the input files and their format, after the check that they fit the config.

    Args:
        spark: a session.
        ingest: paths, format and fields.
        taken: returns, for a format, the plain paths of files that are ingested already; their footers are not read.

    Raises:
        ConfigError: no input is set, a path matches no file, formats are mixed or unknown, a column is missing, or
            Spark cannot read a file's name.
    """
    if any(map(hub.is_on_hub, ingest.inputs)) and not spark.sparkContext.master.startswith("local"):
        LOGGER.warning(
            "ingest: data of a hub are in %s, which all nodes must have; share it, or copy them", hub.folder()
        )
    if not ingest.inputs:
        raise ConfigError("ingest.input: expected paths, globs or a Delta table, found nothing; set ingest.input=PATH")
    paths = [_spark_path(path) for path in ingest.inputs]
    if ingest.format in ("auto", "delta") and (inputs := _find_table(spark, paths, ingest)):
        return inputs
    paths = [existing_or_glob(spark, path) for path in paths]
    every = [file for path in paths for file in all_files(spark, path)]
    check_tables(spark, every)
    check_names(one_path(paths), every)
    files = tuple(file for name, path in zip(ingest.inputs, paths, strict=True) for file in matching(spark, name, path))
    _check_together(spark, paths, files)
    kind = file_format(spark, ingest, files)
    kept = tuple(file for file in files if ingest.format != "auto" or is_of_format(file.path, kind))
    kept = tuple(sorted(dict.fromkeys(kept), key=lambda file: file.path))
    skipped = _left_out(kind, every, kept)
    bases = base_folders(paths, [file.path for file in kept])
    inputs = Inputs(kind, one_path(paths), ingest.format == "auto", kept, left_out=skipped, bases=bases)
    return _checked(spark, inputs, ingest.fields, taken)


def _left_out(kind: str, every: list[str], kept: tuple[InputFile, ...]) -> tuple[str, ...]:
    """Names the files that are not read, and warns of them."""
    if kind == "arrow":
        splits = sorted(file.rpartition("/")[0] for file in every if file.endswith("/dataset_dict.json"))
        if splits:
            LOGGER.warning("ingest: %s has several splits, and all are read; name one of its folders", splits[0])
        every = [file for file in every if not is_datasets_record(file)]
    skipped = left_out(every, (file.path for file in kept))
    warn_of_left_out(skipped, INPUT)
    if hint := csv_hint(skipped):
        LOGGER.warning("%s: %s", INPUT, hint)
    return skipped


def _checked(
    spark: "SparkSession", inputs: Inputs, fields: FieldsConfig, taken: Callable[[str], Collection[str]]
) -> Inputs:
    """Returns the input with the survey of its Parquet files, after the check that it has the config's fields."""
    kind, kept = inputs.format, inputs.files
    if kind == "parquet":
        ingested = taken(kind)
        new = [file for file in kept if not ingested or plain_path(file.path) not in ingested]
        survey = survey_parquet(spark, new or kept[-1:], fields)
        check_columns(inputs.path, survey.types, fields)
        return inputs.surveyed(survey)
    if kind == "arrow":
        check_columns(inputs.path, arrow_types(spark, kept), fields)
    elif kind == "text":
        check_text_fields(fields)
    else:
        check_lines(spark, kept, fields, kind)
    return inputs


def input_state(spark: "SparkSession", ingest: IngestConfig) -> list[Any]:
    """The state of the input: names, times and sizes. Equal states mean that nothing was added or changed.

    Args:
        spark: a session.
        ingest: the paths.

    Returns:
        [path, time, size] for each file; [path, table id, version] for a Delta table.
    """
    from delta.tables import DeltaTable

    state: list[Any] = []
    for path in map(_spark_path, ingest.inputs):
        if DeltaTable.isDeltaTable(spark, path):
            table = DeltaTable.forPath(spark, path)
            latest = table.history(1).select("version").collect()[0][0]
            # With the id, because a table that was made again may have the same number of versions.
            state.append([path, table.detail().select("id").collect()[0][0], int(latest)])
        else:
            files = list_files(spark, existing_or_glob(spark, path))
            state += sorted(map(dataclasses.astuple, files))
    return state


def stream(spark: "SparkSession", inputs: Inputs, ingest: IngestConfig, excluded: list[InputFile]) -> "DataFrame":
    """Makes the streaming frame over the input.

    Args:
        spark: the session of the query.
        inputs: the input.
        ingest: fields and files of a micro-batch.
        excluded: files to leave out; Spark does not open them.

    Returns:
        A frame with the columns that the module header names.
    """
    # Spark opens no file of the format `binaryFile` whose content is not selected.
    source = "text" if inputs.format == "jsonl" else "binaryFile" if inputs.format in WHOLE_FILES else inputs.format
    reader = spark.readStream.format(source)
    reader = reader.option("maxFilesPerTrigger", ingest.max_files_per_trigger)
    if inputs.format == "delta":
        frame = reader.option("skipChangeCommits", "true").load(inputs.path)
        return frame.selectExpr(
            *batch_columns(inputs.schema, ingest.fields),
            "input_file_name() AS source_file",
            "input_file_block_start() AS block_start",
            "CAST(0 AS BIGINT) AS modified_micros",
        )
    # By default, Spark skips files that are a week older than the newest one, without a message.
    reader = reader.option("maxFileAge", "36500d").option("recursiveFileLookup", "true")
    if inputs.by_name:
        reader = reader.option("pathGlobFilter", _GLOB_FILTERS[inputs.format])
    if inputs.format in WHOLE_FILES:
        reader = reader.schema(_BINARY_FILE)
    if inputs.format == "parquet":
        reader = reader.schema(read_schema(inputs.schema, ingest.fields))
    frame = reader.load(inputs.path)
    if excluded:
        frame = frame.where(~_is_one_of(excluded))
    places = ["_metadata.file_path AS source_file", "_metadata.file_block_start AS block_start"]
    places += ["unix_micros(_metadata.file_modification_time) AS modified_micros"]
    if inputs.format in WHOLE_FILES:
        if inputs.by_name and inputs.format == "arrow":
            frame = frame.where("_metadata.file_name NOT LIKE 'cache-%'")  # as `listing.is_datasets_cache` says
        places[1] = "CAST(0 AS BIGINT) AS block_start"
        return _whole_rows(frame.selectExpr(*places), inputs.file_reader(ingest.fields))
    if inputs.format == "jsonl":
        return frame.selectExpr("CAST(value AS BINARY) AS line", *places)
    columns = batch_columns(inputs.schema, ingest.fields)
    if not inputs.odd:
        return frame.selectExpr(*columns, *places)
    is_odd = _is_one_of(inputs.odd)
    rows = frame.where(~is_odd).selectExpr(*columns, *places)
    # The same source twice is one source to Spark, so the checkpoint stays valid. Spark reads no column of these files.
    odd = frame.where(is_odd).selectExpr(*places, "_metadata.file_block_length AS block_length")
    return rows.unionByName(odd.mapInArrow(make_reader(ingest.fields), rows.schema))


def _whole_rows(files: "DataFrame", reader: FileReader) -> "DataFrame":
    """The rows of files that Python reads, each with the columns of its file."""
    from pyspark.sql.types import BinaryType, StringType, StructField, StructType

    columns = (
        [StructField("line", BinaryType())]
        if reader.format == "json"
        else [StructField(name, BinaryType()) for name in ("text", "id", "source")]
        + [StructField("metadata", StringType())]
    )
    return files.mapInArrow(reader, StructType(columns + files.schema.fields))


def _is_one_of(files: "Collection[InputFile]") -> "Column":
    """Whether a row is from one of the files, unchanged. Spark does not open files that the condition excludes."""
    from pyspark.sql import functions as F

    modified = F.expr("unix_micros(_metadata.file_modification_time)")
    state = F.concat(F.col("_metadata.file_path"), F.lit(" "), modified.cast("string"))
    return state.isin([f"{file.path} {file.modified_micros}" for file in files])


def list_files(spark: "SparkSession", path: str) -> list[InputFile]:
    """Lists the files at a path, in a folder and all folders below it, or of a glob.

    Args:
        spark: any session.
        path: path, URI or glob.

    Returns:
        The files with times and sizes; empty if none matches.
    """
    from pyspark.errors import AnalysisException

    try:
        frame = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(path)
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            return []
        raise
    # Spark's index has listed the files. Its reader of `binaryFile` would ask the storage for each of them again.
    index = frame._jdf.queryExecution().analyzed().relation().location()
    uris = [re.sub(r"^file:/+", "file:/", uri) for uri in index.inputFiles()]
    states = _STATUS.findall(index.allFiles().mkString("\n"))
    files = [
        InputFile(uri, 1000 * int(millis), int(n_bytes)) for uri, (n_bytes, millis) in zip(uris, states, strict=True)
    ]
    return [file for file in files if file.n_bytes and not _BOOKKEEPING.search(file.path)]


def warn_of_left_out(names: tuple[str, ...], key: str) -> None:
    """Warns of files that lie under the paths of a key of the config and are not read.

    Args:
        names: names of the files; no warning if there are none.
        key: the key of the config, for the message.
    """
    if names:
        LOGGER.warning("%s: %d names are left out: %s", key, len(names), ", ".join(names[:_NAMES_SHOWN]))


def same_file(left: str, right: str) -> bool:
    """Whether two URIs name the same file, with or without percent-encoding.

    Args:
        left: a URI as Spark or Hadoop writes it.
        right: another.
    """
    return left == right or plain_path(left) == plain_path(right)


def _spark_path(path: str) -> str:
    """The path as Hadoop expects it: a URI whose path is not percent-encoded, because it may be a glob."""
    path = hub.local_copy(path) if hub.is_on_hub(path) else path
    return storage.to_uri(path) if storage.is_local(path) else path


def _check_together(spark: "SparkSession", paths: list[str], files: tuple[InputFile, ...]) -> None:
    """Refuses inputs that the stream's single glob does not find, because their rows would be missing."""
    if len(paths) > 1 and (lost := {f.path for f in files} - {f.path for f in list_files(spark, one_path(paths))}):
        raise ConfigError(
            f"ingest.input: {len(lost)} files cannot be read together with the other inputs: {sorted(lost)[0]}; ingest "
            "the folder that holds them all, or one glob"
        )


def matching(spark: "SparkSession", name: str, path: str, key: str = INPUT) -> list[InputFile]:
    """Returns the files of a path or glob.

    Args:
        spark: a session.
        name: the path as it stands in the config.
        path: the path as Hadoop expects it.
        key: the key of the config that holds the path.

    Raises:
        ConfigError: there is no file that Spark reads.
    """
    files = list_files(spark, path)
    if not files:
        hint = "" if not storage.is_local(name) else f"; relative paths are taken from {Path.cwd()}{path_hint(name)}"
        if hidden := left_out(all_files(spark, path, key), ()):
            names = ", ".join(hidden[:3])
            hint = f" that Spark reads; names that begin with _ or . are hidden from it: {names}; rename them"
        raise ConfigError(f"{key}: {storage.redact(name)} matches no file{hint}")
    return files


def _find_table(spark: "SparkSession", paths: list[str], ingest: IngestConfig) -> Inputs | None:
    from delta.tables import DeltaTable
    from pyspark.errors import AnalysisException

    tables = [path for path in paths if DeltaTable.isDeltaTable(spark, path)]
    if not tables:
        return None
    if len(paths) > 1:
        raise ConfigError(f"ingest.input: expected one Delta table alone, found {ingest.inputs}; ingest it by itself")
    try:
        schema = spark.read.format("delta").load(paths[0]).schema
    except AnalysisException as error:
        if error.getCondition() != "DELTA_INVALID_PARTITION_PATH":
            raise
        raise ConfigError(
            f"ingest.input: expected a Delta table, found files of one, {ingest.inputs[0]}, which also hold rows that "
            "the table removed; name the table's folder"
        ) from error
    types = {field.name: field.dataType.simpleString() for field in schema.fields}
    check_columns(paths[0], types, ingest.fields)
    return Inputs("delta", paths[0], schema=schema)
