"""Checks on executors that files can be read to their ends, before the query reads them; counts rows of damaged files.

Input: files. Output: a `Damage` for each file that cannot be read to its end. Compressed files (.gz, .zst) are
decompressed once; the wanted columns of Parquet files, whose footers are checked in footers.py, are decoded once. Both
are cheap compared with tokenizing. Plain text can always be read. A file that Python cannot open here (a storage
without its fsspec package) is not checked; the query then fails if it is damaged. Writes nothing; a retry finds the
same.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

import pyarrow as pa

from miniplm_udf.ingestion.footers import Damage, same_name
from miniplm_udf.ingestion.parquet_columns import open_file
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks
from miniplm_udf.workers.messages import ddl

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from miniplm_udf.ingestion.listing import InputFile

LOGGER = logging.getLogger("miniplm.ingest")

_MAX_TASKS = 1000
_PARQUET_ROWS = 1000
_CHECK_SCHEMA = pa.schema(
    [("path", pa.string()), ("problem", pa.string()), ("n_rows", pa.int64()), ("unchecked", pa.string())]
)


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


def damaged_files(spark: "SparkSession", files: Sequence["InputFile"], columns: Sequence[str] | None) -> list[Damage]:
    """Reads files to their ends, each in a task of its own.

    Args:
        spark: a session.
        files: files of one format.
        columns: columns of Parquet files to decode; None if the files hold JSON lines, of which .gz and .zst files are
            checked.

    Returns:
        The damaged files, in the order of their paths.
    """
    chosen = {file.path: file for file in files if columns is not None or file.path.endswith((".gz", ".zst"))}
    if not chosen:
        return []

    def check_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            checks = [check_file(path, columns)._asdict() for path in batch.column(0).to_pylist()]
            yield pa.RecordBatch.from_pylist(checks, schema=_CHECK_SCHEMA)

    paths = spark.createDataFrame([(path,) for path in chosen], "path string")
    rows = paths.repartition(min(len(chosen), _MAX_TASKS)).mapInArrow(check_batches, ddl(_CHECK_SCHEMA)).collect()
    unchecked = [row for row in rows if row.unchecked]
    if unchecked:
        LOGGER.warning(
            "ingest: %d files cannot be checked before they are read; for example %s: %s",
            len(unchecked), unchecked[0].path, unchecked[0].unchecked,
        )  # fmt: skip
    return [Damage(chosen[row.path], row.problem, row.n_rows) for row in sorted(rows) if row.problem]


def check_file(path: str, columns: Sequence[str] | None) -> FileCheck:
    """Returns the result of the check of one file; runs on an executor.

    Args:
        path: URI of the file, percent-encoded.
        columns: as for `damaged_files`.
    """
    try:
        handle = open_file(path)
    except (ImportError, ValueError, OSError) as error:
        return FileCheck(path, unchecked=f"{type(error).__name__}: {error}")
    with handle:
        if columns is not None:
            return FileCheck(path, *_check_parquet(handle, columns))
        return FileCheck(path, *_check_packed(path, handle))


def _check_packed(path: str, handle: IO[bytes]) -> tuple[str | None, int | None]:
    """Decompresses a file; returns what is wrong with it and about how many lines it holds.

    A damaged file is taken to hold as many lines per byte after the damage as before it; None if there is no line
    before the damage.
    """
    n_lines, n_good, size = 0, 0, handle.seek(0, 2)
    handle.seek(0)
    try:
        for chunk in unpacked_chunks(path, handle):
            n_lines, n_good = n_lines + chunk.count(b"\n"), handle.tell()
    except DamagedDataError as error:
        return f"{error}, at about byte {handle.tell()} of {size}", round(n_lines * size / max(1, n_good)) or None
    return None, None


def _check_parquet(handle: IO[bytes], wanted: Sequence[str]) -> tuple[str | None, int | None, str | None]:
    """Decodes the wanted columns; returns what is wrong, the rows in the footer, and why the file cannot be checked."""
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
