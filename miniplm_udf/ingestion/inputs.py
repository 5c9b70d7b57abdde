"""The input of ingest: which files or which table, in which format, with which columns; and the stream over it. Driver.

Input: `IngestConfig`; output: an `Inputs`, and a streaming frame with `source_file`, `block_start` and either `line`
(the bytes of a JSONL line) or `text`, `id`, `source` (bytes) and `metadata` (a JSON object). Owns no row: what is wrong
with a row is found on executors. Refuses a config that fits nothing, before the stream starts. Writes nothing.

Spark itself lists and reads, so every storage it knows works. A Delta table is taken as append-only: commits that
change rows are passed over.
"""

import dataclasses
import difflib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from miniplm_udf import storage
from miniplm_udf.config import FieldsConfig, IngestConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.documents import field_names

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

LOGGER = logging.getLogger("miniplm.ingest")

_SUFFIXES = {
    "jsonl": tuple(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")),
    "parquet": (".parquet",),
}
_GLOB_FILTERS = {"jsonl": "*.{jsonl,ndjson,json}{,.gz,.zst}", "parquet": "*.parquet"}
_PEEK_FILES, _PEEK_LINES = 5, 100


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file as Spark's `_metadata` names it: the path is percent-encoded."""

    path: str
    modified_micros: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is ingested. `path` is one path, glob or table; `files` are those seen now (none for a table).

    `by_name`: only files whose names say the format are taken. `schema`: of a Parquet file or table.
    """

    format: str
    path: str
    by_name: bool = False
    files: tuple[InputFile, ...] = ()
    schema: "StructType | None" = None


def find_inputs(spark: "SparkSession", ingest: IngestConfig) -> Inputs:
    """Finds the input and checks that it can be what the config says.

    Raises:
        ConfigError: no input is set, a path matches nothing, formats are mixed or unknown, a column is not there.
    """
    if not ingest.inputs:
        raise ConfigError("ingest.input: expected paths, globs or a Delta table, found nothing; set ingest.input=PATH")
    paths = [_spark_path(path) for path in ingest.inputs]
    if ingest.format in ("auto", "delta") and (inputs := _find_table(spark, paths, ingest)):
        return inputs
    files = tuple(
        file for given, path in zip(ingest.inputs, paths, strict=True) for file in _matching(spark, given, path)
    )
    found = _format(ingest, files)
    kept = tuple(file for file in files if ingest.format != "auto" or _format_of(file.path) == found)
    kept = tuple(sorted(dict.fromkeys(kept), key=lambda file: file.path))
    if len(kept) < len(set(files)):
        LOGGER.warning(
            "ingest: %d files whose names are not of format %s are left out", len(set(files)) - len(kept), found
        )
    inputs = Inputs(found, _one_path(paths), ingest.format == "auto", kept)
    if found == "parquet":
        inputs = dataclasses.replace(inputs, schema=_parquet_schema(spark, kept))
        _check_columns(inputs, ingest.fields)
    else:
        _check_lines(spark, kept, ingest.fields)
    return inputs


def input_state(spark: "SparkSession", ingest: IngestConfig) -> list[Any]:
    """What is there to be ingested, by names, times and sizes: the same twice means that nothing came or changed."""
    from delta.tables import DeltaTable

    state: list[Any] = []
    for path in map(_spark_path, ingest.inputs):
        if DeltaTable.isDeltaTable(spark, path):
            latest = DeltaTable.forPath(spark, path).history(1).select("version").collect()[0][0]
            state.append([path, int(latest)])
        else:
            state += sorted(dataclasses.astuple(file) for file in list_files(spark, path))
    return state


def stream(spark: "SparkSession", inputs: Inputs, ingest: IngestConfig, excluded: list[InputFile]) -> "DataFrame":
    """The streaming frame over the input, without the excluded files, which are not opened."""
    reader = spark.readStream.format({"jsonl": "text"}.get(inputs.format, inputs.format))
    reader = reader.option("maxFilesPerTrigger", ingest.max_files_per_trigger)
    if inputs.format == "delta":
        frame = reader.option("skipChangeCommits", "true").load(inputs.path)
        return frame.selectExpr(
            *batch_columns(inputs, ingest.fields),
            "input_file_name() AS source_file",
            "input_file_block_start() AS block_start",
        )
    # Without it, files that are a week older than the newest one are passed over in silence.
    reader = reader.option("maxFileAge", "36500d").option("recursiveFileLookup", "true")
    if inputs.by_name:
        reader = reader.option("pathGlobFilter", _GLOB_FILTERS[inputs.format])
    if inputs.format == "parquet":
        reader = reader.schema(_schema(inputs, ingest.fields))
    frame = reader.load(inputs.path)
    for file in excluded:
        frame = frame.where(
            f"NOT (_metadata.file_path = {_literal(file.path)} "
            f"AND unix_micros(_metadata.file_modification_time) = {file.modified_micros})"
        )
    columns = ["CAST(value AS BINARY) AS line"] if inputs.format == "jsonl" else batch_columns(inputs, ingest.fields)
    return frame.selectExpr(*columns, "_metadata.file_path AS source_file", "_metadata.file_block_start AS block_start")


def list_files(spark: "SparkSession", path: str) -> list[InputFile]:
    """The files of a path, folder (with all below it) or glob; none where nothing matches."""
    from pyspark.errors import AnalysisException

    try:
        frame = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(path)
    except AnalysisException as error:
        if error.getCondition() == "PATH_NOT_FOUND":
            return []
        raise
    rows = frame.selectExpr(
        "_metadata.file_path", "unix_micros(_metadata.file_modification_time)", "_metadata.file_size"
    ).collect()
    return [InputFile(*row) for row in rows]


def plain_path(uri: str) -> str:
    """One name for a file, whatever a URI's slashes and percent signs."""
    return unquote(re.sub(r"^file:/+", "file:/", uri))


def same_file(left: str, right: str) -> bool:
    """Whether two URIs name one file."""
    return left == right or plain_path(left) == plain_path(right)


def escape_glob(path: str) -> str:
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def _spark_path(path: str) -> str:
    """The path as Hadoop takes it: a URI whose path is not percent-encoded, for it may be a glob."""
    if not storage.is_local(path):
        return path
    bare = storage.local_path(path) if path.startswith("file:") else str(Path(path).expanduser().absolute())
    return "file://" + bare


def _one_path(paths: list[str]) -> str:
    """One glob for all: a file stream takes one path."""
    if len(paths) == 1:
        return paths[0]
    parted = [re.match(r"^([^:/]+://[^/]*/)(.*)$", path) for path in paths]
    heads = {match.group(1) for match in parted if match}
    if None in parted or len(heads) != 1:
        raise ConfigError(
            f"ingest.input: expected paths on one file system, found {[storage.redact(p) for p in paths]}; "
            "copy them to one place"
        )
    return heads.pop() + "{" + ",".join(match.group(2) for match in parted if match) + "}"


def _matching(spark: "SparkSession", given: str, path: str) -> list[InputFile]:
    files = list_files(spark, path)
    if not files:
        hint = "" if not storage.is_local(given) else f"; relative paths are taken from {Path.cwd()}"
        raise ConfigError(f"ingest.input: {storage.redact(given)} matches no file{hint}")
    return files


def _format_of(path: str) -> str | None:
    return next((name for name, suffixes in _SUFFIXES.items() if path.endswith(suffixes)), None)


def _format(ingest: IngestConfig, files: tuple[InputFile, ...]) -> str:
    if ingest.format == "delta":
        raise ConfigError(
            f"ingest.input: expected a Delta table (a folder with _delta_log), found files: {ingest.inputs}"
        )
    if ingest.format != "auto":
        return ingest.format
    found = {kind for file in files if (kind := _format_of(file.path))}
    if len(found) > 1:
        raise ConfigError(
            f"ingest.input: expected files of one format, found {sorted(found)} among {ingest.inputs}; "
            "ingest one format, for example ingest.input='texts/*.jsonl.gz'"
        )
    if not found:
        raise ConfigError(
            f"ingest.input: expected names that end in {' '.join(s for v in _SUFFIXES.values() for s in v)}, found "
            f"{Path(unquote(files[0].path)).name!r} and the like; set ingest.format=jsonl or ingest.format=parquet"
        )
    return found.pop()


def _find_table(spark: "SparkSession", paths: list[str], ingest: IngestConfig) -> Inputs | None:
    from delta.tables import DeltaTable

    tables = [path for path in paths if DeltaTable.isDeltaTable(spark, path)]
    if not tables:
        return None
    if len(paths) > 1:
        raise ConfigError(f"ingest.input: expected one Delta table alone, found {ingest.inputs}; ingest it by itself")
    inputs = Inputs("delta", paths[0], schema=spark.read.format("delta").load(paths[0]).schema)
    _check_columns(inputs, ingest.fields)
    return inputs


def _parquet_schema(spark: "SparkSession", files: tuple[InputFile, ...]) -> "StructType | None":
    """The schema of the first file that has one. None: the stream will find every file unreadable."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    for file in files:
        try:
            return spark.read.parquet(escape_glob(unquote(file.path))).schema
        except (Py4JJavaError, PySparkException) as error:
            LOGGER.warning("ingest: the schema of %s cannot be read: %s", file.path, str(error).splitlines()[0])
    return None


def _check_columns(inputs: Inputs, fields: FieldsConfig) -> None:
    """The text column must be there and hold text; so must the others that the config names itself."""
    if inputs.schema is None:
        return
    types = {field.name: field.dataType.simpleString() for field in inputs.schema.fields}
    for key, name in _named(fields):
        if name not in types:
            raise ConfigError(_no_column(key, name, list(types), storage.redact(inputs.path)))
    if not types[fields.text].startswith(("string", "varchar", "char", "binary")):
        raise ConfigError(
            f"ingest.fields.text: expected a column of text, found {fields.text!r} of {types[fields.text]}"
        )


def _named(fields: FieldsConfig) -> list[tuple[str, str]]:
    """(key of the config, name in the input) of all that must be there: the text, and what the config names itself."""
    default = FieldsConfig()
    named = [("text", fields.text)]
    named += [(key, getattr(fields, key)) for key in ("id", "source") if getattr(fields, key) != getattr(default, key)]
    return named + [("metadata", name) for name in fields.metadata]


def _no_column(key: str, name: str, known: list[str], place: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"; did you mean ingest.fields.{key}={nearest[0]}?" if nearest else f"; set ingest.fields.{key}"
    return f"ingest.fields.{key}: expected a column or field {name!r} in {place}, found {sorted(known)[:30]}{hint}"


def _check_lines(spark: "SparkSession", files: tuple[InputFile, ...], fields: FieldsConfig) -> None:
    """Looks at the first lines: a field that none of the objects there has is one that the config names wrongly."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    keys: set[str] = set()
    # A field that is only carried along may be in few objects.
    wanted = [(key, name) for key, name in _named(fields) if key != "metadata"]
    for file in [file for file in files if file.n_bytes][:_PEEK_FILES]:
        frame = spark.read.text(escape_glob(unquote(file.path))).selectExpr("CAST(value AS BINARY) AS line")
        try:
            rows = frame.limit(_PEEK_LINES).mapInArrow(_line_keys, "keys array<string>").collect()
        except (Py4JJavaError, PySparkException):
            continue  # an unreadable file: the stream says so
        keys.update(key for row in rows for key in row[0])
        if all(name in keys for _, name in wanted):
            return
    for key, name in wanted:
        if keys and name not in keys:
            raise ConfigError(_no_column(key, name, sorted(keys), "the input's first lines"))


def _line_keys(batches: Any) -> Any:
    """The keys of each line that is a JSON object; those of nested objects with dots."""
    import json

    import pyarrow as pa

    for batch in batches:
        found = []
        for line in batch.column(0).to_pylist():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                found.append([key for key in field_names(row) if key.isprintable()] if isinstance(row, dict) else [])
            except (ValueError, RecursionError):
                found.append([])
        yield pa.RecordBatch.from_arrays([pa.array(found, pa.list_(pa.string()))], names=["keys"])


def batch_columns(inputs: Inputs, fields: FieldsConfig) -> list[str]:
    """Expressions for text, id, source (bytes) and metadata (a JSON object); null for what the input does not have."""
    schema = _schema(inputs, fields)

    def as_bytes(column: str, name: str) -> str:
        if column not in schema.names:
            return f"CAST(NULL AS BINARY) AS {name}"
        data_type = schema[column].dataType.simpleString()
        if data_type == "binary":
            return f"{_quoted(column)} AS {name}"
        plain = "to_json" if data_type.startswith(("struct", "array", "map")) else ""
        return f"CAST(CAST({plain}({_quoted(column)}) AS STRING) AS BINARY) AS {name}"

    carried = ", ".join(_quoted(name) for name in fields.metadata if name in schema.names)
    return [
        as_bytes(fields.text, "text"),
        as_bytes(fields.id, "id"),
        as_bytes(fields.source, "source"),
        f"{f'to_json(struct({carried}))' if carried else 'CAST(NULL AS STRING)'} AS metadata",
    ]


def _schema(inputs: Inputs, fields: FieldsConfig) -> "StructType":
    """The input's schema; the least that reading needs where no file has one."""
    from pyspark.sql.types import StringType, StructField, StructType

    return inputs.schema or StructType([StructField(fields.text, StringType())])


def _quoted(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
