"""Checks before the stream starts that the input has the fields that the config names. Driver only.

Input: the types of a table's columns, or files of JSON lines; and `FieldsConfig`. Output: nothing, or a ConfigError
with the nearest name. Spark reads the first lines of the first JSONL files. Writes nothing; a retry checks again.
"""

import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from miniplm_udf import storage
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.documents import field_names
from miniplm_udf.ingestion.listing import escape_glob
from miniplm_udf.streams.spark_log import TASK_LOGGERS, silenced
from miniplm_udf.workers.messages import ddl

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

_FILES, _LINES = 5, 100
_KEYS_SCHEMA = pa.schema([("keys", pa.list_(pa.string()))])


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
        if name not in types:
            raise ConfigError(_no_field(key, name, types, storage.redact(path)))
    if not types[fields.text].startswith(("string", "varchar", "char", "binary")):
        raise ConfigError(
            f"ingest.fields.text: expected a column of text, found {fields.text!r} of {types[fields.text]}"
        )


def check_lines(spark: "SparkSession", files: "Sequence[InputFile]", fields: FieldsConfig) -> None:
    """Checks that some object in the first lines has each field that the config names.

    Args:
        spark: a session.
        files: files of JSON lines.
        fields: names of the fields.

    Raises:
        ConfigError: no object there has one of the fields.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    keys: set[str] = set()
    # Metadata fields may be rare, so that the first lines have none of them.
    required = [(key, name) for key, name in _required(fields) if key != "metadata"]
    for file in [file for file in files if file.n_bytes][:_FILES]:
        frame = spark.read.text(escape_glob(unquote(file.path))).selectExpr("CAST(value AS BINARY) AS line")
        try:
            with silenced(spark, TASK_LOGGERS):
                rows = frame.limit(_LINES).mapInArrow(_line_keys, ddl(_KEYS_SCHEMA)).collect()
        except (Py4JJavaError, PySparkException):
            continue  # an unreadable file, which quarantine.py reports
        keys.update(key for row in rows for key in row[0])
        if all(name in keys for _, name in required):
            return
    for key, name in required:
        if keys and name not in keys:
            raise ConfigError(_no_field(key, name, keys, "the input's first lines"))


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


def _line_keys(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The keys of each line that is a JSON object; keys of nested objects have dots."""
    for batch in batches:
        keys = []
        for line in batch.column(0).to_pylist():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                keys.append([key for key in field_names(row) if key.isprintable()] if isinstance(row, dict) else [])
            except (ValueError, RecursionError):
                keys.append([])
        yield pa.RecordBatch.from_pydict({"keys": keys}, schema=_KEYS_SCHEMA)
