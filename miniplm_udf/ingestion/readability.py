"""Checks on executors that files can be read to their ends, before the query reads them; counts rows of damaged files.

Input: files. Output: a `Damage` for each file that cannot be read to its end. Compressed files (.gz, .zst, .bz2) are
decompressed once; the wanted columns of Parquet files, whose footers are checked in footers.py, and of Arrow files are
decoded once; JSON arrays are read to their ends. All are cheap compared with tokenizing. Plain lines can always be
read, unless a `.json` file turns out to be an array. A file that Python cannot open here (a storage without its fsspec
package) is not checked; the query then fails if it is damaged. Writes nothing; a retry finds the same.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.footers import Damage
from miniplm_udf.ingestion.formats import COMPRESSED
from miniplm_udf.ingestion.json_arrays import is_array, json_rows
from miniplm_udf.ingestion.listing import is_datasets_cache
from miniplm_udf.ingestion.nested import place_of, same_name
from miniplm_udf.ingestion.parquet_columns import open_file, wanted_columns
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks
from miniplm_udf.ingestion.whole_files import MOST_TEXT_BYTES, arrow_batches, arrow_schema
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

LOGGER = logging.getLogger("miniplm.ingest")

_MAX_TASKS = 1000
_PARQUET_ROWS = 1000
_JSON = re.compile(r"\.(?i:json)(\.\w+)?$")
_CHECK_DDL = "path string, problem string, n_rows bigint, unchecked string"


class FileCheck(NamedTuple):
    """The result of the check of one file.

    Attributes:
        path: URI of the file, percent-encoded.
        problem: what is wrong with it; None if it can be read to its end, or was not checked.
        n_rows: about how many rows a damaged file holds; None if that is unknown.
        unchecked: why it cannot be checked; None if it was.
    """

    path: str
    problem: str | None = None
    n_rows: int | None = None
    unchecked: str | None = None


def damaged_files(spark: "SparkSession", files: Sequence["InputFile"], kind: str, fields: FieldsConfig) -> list[Damage]:
    """Reads files to their ends, each in a task of its own.

    Args:
        spark: a session.
        files: files of one format.
        kind: the format.
        fields: names of the columns, of which Parquet and Arrow files are checked.

    Returns:
        The damaged files, in the order of their paths.
    """
    chosen = {file.path: file for file in files if _can_be_damaged(file, kind)}
    if not chosen:
        return []

    def check_batches(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        import pyarrow as pa

        for batch in batches:
            checks = [check_file(path, kind, fields)._asdict() for path in batch.column(0).to_pylist()]
            yield pa.RecordBatch.from_pylist(checks, schema=schema_of(_CHECK_DDL))

    paths = spark.createDataFrame([(path,) for path in chosen], "path string")
    rows = paths.repartition(min(len(chosen), _MAX_TASKS)).mapInArrow(check_batches, _CHECK_DDL).collect()
    unchecked = [row for row in rows if row.unchecked]
    if unchecked:
        LOGGER.warning(
            "ingest: %d files cannot be checked before they are read; for example %s: %s",
            len(unchecked), unchecked[0].path, unchecked[0].unchecked,
        )  # fmt: skip
    return [Damage(chosen[row.path], row.problem, row.n_rows) for row in sorted(rows) if row.problem]


def _can_be_damaged(file: "InputFile", kind: str) -> bool:
    if kind in ("parquet", "arrow", "json"):
        return not (kind == "arrow" and is_datasets_cache(file.path))
    is_large_text = kind == "text" and file.n_bytes > MOST_TEXT_BYTES
    return is_large_text or file.path.endswith(COMPRESSED) or (kind == "jsonl" and bool(_JSON.search(file.path)))


def check_file(path: str, kind: str, fields: FieldsConfig) -> FileCheck:
    """Returns the result of the check of one file; runs on an executor.

    Args:
        path: URI of the file, percent-encoded.
        kind: format of the file.
        fields: names of the columns.
    """
    try:
        handle = open_file(path)
    except (ImportError, ValueError, OSError) as error:
        return FileCheck(path, unchecked=f"{type(error).__name__}: {error}")
    with handle:
        if kind == "parquet":
            return FileCheck(path, *_check_parquet(handle, wanted_columns(fields)))
        if kind == "arrow":
            return FileCheck(path, *_check_arrow(handle, fields))
        if kind == "jsonl":
            return FileCheck(path, *_check_lines(path, handle))
        return FileCheck(path, *(_check_text if kind == "text" else _check_json)(path, handle))


def _check_lines(path: str, handle: IO[bytes]) -> tuple[str | None, int | None]:
    """Decompresses a file of lines; returns what is wrong with it and about how many lines it holds.

    A damaged file is taken to hold as many lines per byte after the damage as before it; None if there is no line
    before the damage.
    """
    n_lines, n_good, size = 0, 0, _size(handle)
    try:
        if _JSON.search(path) and is_array(unpacked_chunks(path, handle)):
            return "it holds a JSON array, and other files hold JSON lines; ingest them one after the other", None
        handle.seek(0)
        for chunk in unpacked_chunks(path, handle) if path.endswith(COMPRESSED) else ():
            n_lines, n_good = n_lines + chunk.count(b"\n"), handle.tell()
    except DamagedDataError as error:
        return f"{error}, at about byte {handle.tell()} of {size}", round(n_lines * size / max(1, n_good)) or None
    return None, None


def _check_json(path: str, handle: IO[bytes]) -> tuple[str | None, int | None]:
    n_rows, n_good, size = 0, 0, _size(handle)
    try:
        for _ in json_rows(unpacked_chunks(path, handle)):
            n_rows, n_good = n_rows + 1, handle.tell()
    except DamagedDataError as error:
        return f"{error}, at about byte {handle.tell()} of {size}", round(n_rows * size / max(1, n_good)) or None
    return None, None


def _check_text(path: str, handle: IO[bytes]) -> tuple[str | None, int | None]:
    n_bytes = 0
    try:
        for chunk in unpacked_chunks(path, handle):
            n_bytes += len(chunk)
            if n_bytes > MOST_TEXT_BYTES:
                return "a text file is one document, and this one has more than 1 GiB; split it", 1
    except DamagedDataError as error:
        return str(error), 1
    return None, None


def _check_arrow(handle: IO[bytes], fields: FieldsConfig) -> tuple[str | None, int | None, str | None]:
    """Decodes the wanted columns; returns what is wrong and the number of rows."""
    import pyarrow as pa

    n_rows, problem = 0, None
    try:
        schema = arrow_schema(handle)
        place = place_of(fields.text, schema.names)
        if place is not None and not place.path and not _holds_text(schema.field(place.column).type):
            problem = f"its column {fields.text!r} holds no text: {schema.field(place.column).type}"
        handle.seek(0)
        for batch in arrow_batches(handle, wanted_columns(fields)):
            n_rows += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        return None, None, f"pyarrow cannot read it: {error}"
    except (pa.ArrowException, OSError, DamagedDataError) as error:
        return f"it cannot be read as Arrow data: {str(error).splitlines()[0]}", n_rows or None, None
    return problem, n_rows if problem else None, None


def _holds_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
             pa.types.is_large_binary, pa.types.is_null)  # fmt: skip
    return any(test(kind) for test in tests)


def _size(handle: IO[bytes]) -> int:
    size = handle.seek(0, 2)
    handle.seek(0)
    return size


def _check_parquet(handle: IO[bytes], wanted: Sequence[str]) -> tuple[str | None, int | None, str | None]:
    """Decodes the wanted columns; returns what is wrong, the rows in the footer, and why the file cannot be checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_rows = None
    try:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        n_rows, names = file.metadata.num_rows, file.schema_arrow.names
        columns = [name for name in (same_name(name, names) for name in wanted) if name is not None]
        for _ in file.iter_batches(_PARQUET_ROWS, columns=columns):
            pass
    except pa.ArrowNotImplementedError as error:
        return None, None, f"pyarrow cannot read it: {error}"
    except (pa.ArrowException, OSError) as error:
        return f"its pages cannot be read: {str(error).splitlines()[0]}", n_rows, None
    return None, None, None
