"""Checks before the stream starts that the input has the fields that the config names. Driver only.

Input: the types of a table's columns, or files; and `FieldsConfig`. Output: nothing, or a ConfigError with the nearest
name. Executors read the first rows of the first files. `column_problems` and `line_problems` need no Spark: the checks
before a command starts use them. Writes nothing; a retry checks again.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote

from miniplm_udf import storage
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.column_kinds import ColumnKind, kind_at
from miniplm_udf.ingestion.first_rows import array_keys, field_names_in
from miniplm_udf.ingestion.listing import escape_glob
from miniplm_udf.ingestion.nested import NestedSql, place_of, sql_of
from miniplm_udf.streams.spark_log import TASK_LOGGERS, silenced
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

_FILES, _LINES = 5, 100
_KEYS_DDL = "keys array<string>"
_FIRST_LINES = "the input's first lines"


def check_columns(path: str, types: dict[str, str], fields: FieldsConfig) -> None:
    """Checks that the text column exists and holds text, and that other columns that the config names exist.

    Args:
        path: path of the table or files, for messages.
        types: Spark types by column name. Empty if no file has a footer: then the stream finds every file unreadable.
        fields: names of the columns.

    Raises:
        ConfigError: a column is missing, or the text column holds no text.
    """
    if not types:
        return
    for key, name in _required(fields):
        if _type_of(name, types) is None:
            raise ConfigError(_no_field(key, name, types, storage.redact(path)))
    kind = _type_of(fields.text, types) or ""
    if not kind.startswith(("string", "varchar", "char", "binary")):
        raise ConfigError(_no_text(fields, kind))


def column_problems(place: str, columns: Mapping[str, ColumnKind], fields: FieldsConfig) -> Iterator[str]:
    """Yields what `check_columns` would refuse, as far as it can be said without Spark.

    Args:
        place: where the columns are, in words.
        columns: the kinds of the columns by name; empty if they are not known.
        fields: names of the columns.
    """
    if not columns:
        return
    for key, name in _required(fields):
        kind = kind_at(name, columns)
        if kind is None:
            yield _no_field(key, name, columns, place)
        elif key == "text" and not kind.is_text:
            yield _no_text(fields, kind.name)


def line_problems(names: Collection[str], fields: FieldsConfig) -> Iterator[str]:
    """Yields what `check_lines` would refuse.

    Args:
        names: the names of the fields in the first rows; empty if they are not known.
        fields: names of the fields.
    """
    for key, name in _required(fields):
        # Metadata fields may be rare, so that the first lines have none of them.
        if names and key != "metadata" and name not in names:
            yield _no_field(key, name, names, _FIRST_LINES)


def _no_text(fields: FieldsConfig, kind: str) -> str:
    return (
        f"ingest.fields.text: expected a column of text, found {fields.text!r} of {kind}; name another column with "
        "ingest.fields.text"
    )


def _type_of(name: str, types: dict[str, str]) -> str | None:
    """The type of a column, or of a field inside a column; None if there is none."""
    from pyspark.sql.types import DataType

    place = place_of(name, list(types))
    if place is None or not place.path:
        return None if place is None else types[place.column]
    if not types[place.column].startswith(("struct", "map", "string", "varchar", "char")):
        return None
    column = NestedSql(place.column, DataType.fromDDL(types[place.column]))
    sql = sql_of(place.path, column)
    return None if sql is None else sql.type.simpleString()


def check_text_fields(fields: FieldsConfig) -> None:
    """Refuses names of fields for text files, which have none.

    Args:
        fields: names of the fields.

    Raises:
        ConfigError: a name is not a default.
    """
    default = FieldsConfig()
    for key, name in _required(fields):
        if key == "metadata" or name != getattr(default, key):
            raise ConfigError(
                f"ingest.fields.{key}: expected no name for text files, each of which is one document without fields, "
                f"found {name!r}; remove the key"
            )


def check_lines(spark: "SparkSession", files: "Sequence[InputFile]", fields: FieldsConfig, kind: str) -> None:
    """Checks that some object in the first lines, or in the first elements of arrays, has each field of the config.

    Args:
        spark: a session.
        files: files of JSON lines, or of JSON arrays.
        fields: names of the fields.
        kind: jsonl or json.

    Raises:
        ConfigError: no object there has one of the fields.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    keys: set[str] = set()
    needed = [name for key, name in _required(fields) if key != "metadata"]
    for row_keys in array_keys(spark, files) if kind == "json" else []:
        keys.update(row_keys)
    for file in [file for file in files if file.n_bytes and kind == "jsonl"][:_FILES]:
        frame = spark.read.text(escape_glob(unquote(file.path))).selectExpr("CAST(value AS BINARY) AS line")
        try:
            with silenced(spark, TASK_LOGGERS):
                rows = frame.limit(_LINES).mapInArrow(_line_keys, _KEYS_DDL).collect()
        except (Py4JJavaError, PySparkException):
            continue  # an unreadable file, which quarantine.py reports
        keys.update(key for row in rows for key in row[0])
        if keys.issuperset(needed):
            return
    for problem in line_problems(keys, fields):
        raise ConfigError(problem)


def _required(fields: FieldsConfig) -> list[tuple[str, str]]:
    """The fields that must exist (the text, and names that are not defaults), as (key of the config, name)."""
    default = FieldsConfig()
    names = [("text", fields.text)]
    names += [(key, getattr(fields, key)) for key in ("id", "source") if getattr(fields, key) != getattr(default, key)]
    return names + [("metadata", name) for name in fields.metadata]


def _no_field(key: str, name: str, names: Collection[str], place: str) -> str:
    nearest = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.3)
    hint = f"; did you mean ingest.fields.{key}={nearest[0]}?" if nearest else f"; set ingest.fields.{key}"
    return f"ingest.fields.{key}: expected a column or field {name!r} in {place}, found {sorted(names)[:30]}{hint}"


def _line_keys(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """The keys of each line that is a JSON object; keys of nested objects have dots."""
    import pyarrow as pa

    for batch in batches:
        keys = [field_names_in(line) for line in batch.column(0).to_pylist()]
        yield pa.RecordBatch.from_pydict({"keys": keys}, schema=schema_of(_KEYS_DDL))
