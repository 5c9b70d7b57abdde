"""Reads the beginnings of the first files of an input on executors: JSON arrays or lines, keys, Arrow schemas.

Input: files. Output: facts by which the driver decides the format and checks the fields. A file that cannot be opened
gives no fact; quarantine.py reports it. Writes nothing; a retry reads again.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

from miniplm_udf.ingestion.documents import field_names
from miniplm_udf.ingestion.json_arrays import is_array, json_rows
from miniplm_udf.ingestion.parquet_columns import open_file
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks
from miniplm_udf.ingestion.whole_files import arrow_schema
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

_FILES, _ROWS = 5, 100
_RESULT_DDL = "result binary"


def holds_arrays(spark: "SparkSession", files: "Sequence[InputFile]") -> bool:
    """Whether one of the first files is a JSON array.

    Args:
        spark: a session.
        files: files with names of JSON.
    """
    return any(_results(spark, files, _array_mark))


def array_keys(spark: "SparkSession", files: "Sequence[InputFile]") -> list[list[str]]:
    """Lists the names of fields in the first elements of the first JSON arrays.

    Args:
        spark: a session.
        files: JSON files.

    Returns:
        Names for each file; names in nested objects have dots.
    """
    return [json.loads(names) for names in _results(spark, files, _names_in_array)]


def arrow_types(spark: "SparkSession", files: "Sequence[InputFile]") -> dict[str, str]:
    """Returns the types of the columns of the first Arrow files, as Spark names them.

    Args:
        spark: a session.
        files: Arrow files.

    Returns:
        Types by column name, the type of a text if one of the files has one; empty if none of the files can be read.
    """
    import pyarrow as pa

    types: dict[str, str] = {}
    for data in _results(spark, files, _schema_bytes):
        for field in pa.ipc.read_schema(pa.py_buffer(data)):
            kind = _spark_type(field.type)
            types[field.name] = kind if kind in ("string", "binary") else types.get(field.name, kind)
    return types


def field_names_in(line: bytes) -> list[str]:
    """Returns the names of the fields of a JSON object; empty if the bytes are no object.

    Args:
        line: the bytes of an object as JSON.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        return [key for key in field_names(row) if key.isprintable()] if isinstance(row, dict) else []
    except (ValueError, RecursionError):
        return []


def _spark_type(kind: "pa.DataType") -> str:
    import pyarrow as pa
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import from_arrow_type

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return "string"
    try:
        return from_arrow_type(kind).simpleString()
    except PySparkException:  # a type that Spark does not have
        return str(kind)


def _results(
    spark: "SparkSession", files: "Sequence[InputFile]", read: Callable[[str, IO[bytes]], bytes]
) -> list[bytes]:
    """Returns the results of a function for the first files, without empty results and files that cannot be read."""

    def read_batches(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        for batch in batches:
            results = [_result(path, read) for path in batch.column(0).to_pylist()]
            yield pa.RecordBatch.from_pydict({"result": results}, schema=schema_of(_RESULT_DDL))

    paths = [(file.path,) for file in files if file.n_bytes][:_FILES]
    if not paths:
        return []
    frame = spark.createDataFrame(paths, "path string").coalesce(1)
    rows = frame.mapInArrow(read_batches, _RESULT_DDL).collect()
    return [bytes(row[0]) for row in rows if row[0]]


def _result(path: str, read: Callable[[str, IO[bytes]], bytes]) -> bytes:
    import pyarrow as pa

    try:
        with open_file(path) as handle:
            return read(path, handle)
    except (ImportError, ValueError, OSError, DamagedDataError, pa.ArrowException):
        return b""


def _array_mark(path: str, handle: IO[bytes]) -> bytes:
    return b"[" if is_array(unpacked_chunks(path, handle)) else b""


def _names_in_array(path: str, handle: IO[bytes]) -> bytes:
    rows = itertools.islice(json_rows(unpacked_chunks(path, handle)), _ROWS)
    return json.dumps(sorted({name for row in rows for name in field_names_in(row)})).encode()


def _schema_bytes(path: str, handle: IO[bytes]) -> bytes:
    return bytes(arrow_schema(handle).serialize())
