"""Reads the beginnings of input files on this machine, without Spark: the first rows, or the columns. Driver only.

Input: a `ListedFile` and its format. Output: its first rows as objects, or the kinds of its columns. Used by `miniplm
init` and by the checks before a command starts. JSON lines and text need the base install alone; Parquet and Arrow need
pyarrow, `.zst` needs zstandard. Writes nothing; a retry reads the same.
"""

import codecs
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from miniplm_udf.ingestion.column_kinds import ColumnKind, kinds_of_arrow
from miniplm_udf.ingestion.encodings import encoding_hint, encoding_of
from miniplm_udf.ingestion.input_files import ListedFile
from miniplm_udf.ingestion.json_arrays import is_array, json_rows
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks
from miniplm_udf.storage import Json

# How many of the first files ingest reads for the same questions (first_rows.py).
N_FIRST = 5
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The name of the field under which the content of a text file is a row.
TEXT = "text"


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of a file is read.

    Attributes:
        rows: most rows.
        n_bytes: size of the rows after which no further row is read.
    """

    rows: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The first rows of one file.

    Attributes:
        rows: the rows as objects; a row that is no object is None.
        n_bytes: bytes of the file that hold these rows, as stored.
        is_whole: whether they are all of its rows.
        hint: what to do about a file that is not UTF-8.
    """

    rows: list[Json | None]
    n_bytes: int
    is_whole: bool
    hint: str = ""


def read_beginning(kind: str, file: ListedFile, limits: Limits) -> Beginning:
    """Reads the first rows of a file.

    Args:
        kind: jsonl, json, text, parquet or arrow.
        file: the file.
        limits: where to stop; a text file is one row.

    Returns:
        The rows; none for a damaged file, which ingest reports.

    Raises:
        ImportError: a package is missing that reads the file.
    """
    readers: dict[str, Callable[[ListedFile, IO[bytes], Limits], Beginning]] = {
        "jsonl": _json_beginning, "json": _json_beginning, "text": _text_beginning,
        "parquet": _parquet_beginning, "arrow": _arrow_beginning,
    }  # fmt: skip
    with file.open() as handle:
        try:
            return readers[kind](file, handle, limits)
        except (DamagedDataError, OSError):
            return Beginning([], file.n_bytes, is_whole=True)


def first_holds_array(files: Sequence[ListedFile]) -> bool:
    """Whether one of the first files is a JSON array, by its first bytes.

    Args:
        files: files with names of JSON; those that are not on this machine, or are damaged, count as no array.

    Raises:
        ImportError: a package is missing that reads the files.
    """
    return any(_holds_array(file) for file in [file for file in files if file.n_bytes and file.is_here][:N_FIRST])


def _holds_array(file: ListedFile) -> bool:
    try:
        with file.open() as handle:
            return is_array(unpacked_chunks(file.place, handle))
    except (DamagedDataError, OSError):
        return False


def columns_of(kind: str, file: ListedFile) -> dict[str, ColumnKind]:
    """Returns the kinds of the columns of a file.

    Args:
        kind: parquet or arrow.
        file: the file.

    Raises:
        ImportError: pyarrow is missing.
        Exception: the file is damaged.
    """
    with file.open() as handle:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return kinds_of_arrow(pq.read_schema(handle))
        from miniplm_udf.ingestion.whole_files import arrow_schema

        return kinds_of_arrow(arrow_schema(handle))


def _json_beginning(file: ListedFile, handle: IO[bytes], limits: Limits) -> Beginning:
    rows: list[Json | None] = []
    hint, n_bytes = "", 0
    for line in json_rows(_until_limit(file, handle)):
        if len(rows) >= limits.rows or n_bytes >= limits.n_bytes:
            return Beginning(rows, _stored(file, handle, n_bytes), is_whole=False, hint=hint)
        n_bytes += len(line) + 1
        if not line.strip():
            continue
        rows.append(_parsed(line))
        if rows[-1] is None and not hint:
            hint = encoding_hint(line)
    return Beginning(rows, file.n_bytes, is_whole=True, hint=hint)


def _until_limit(file: ListedFile, handle: IO[bytes]) -> Iterator[bytes]:
    """The content of a file; UTF-16 lines are no lines of bytes, and the whole file is shown as one of them."""
    chunks = unpacked_chunks(file.place, handle)
    first = next(chunks, b"")
    if first.startswith(_WIDE_MARKS):
        yield first.replace(b"\n", b" ")
        return
    yield from itertools.chain([first], chunks)


def _stored(file: ListedFile, handle: IO[bytes], n_bytes: int) -> int:
    """The stored bytes of the rows that were read: of a plain file the rows' own, of a packed file what was read."""
    is_packed = file.place.lower().endswith((".gz", ".zst", ".bz2"))
    return min(file.n_bytes, handle.tell() if is_packed else n_bytes)


def _parsed(line: bytes) -> Json | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _text_beginning(file: ListedFile, handle: IO[bytes], limits: Limits) -> Beginning:
    content = b"".join(itertools.islice(unpacked_chunks(file.place, handle), 200))
    name = encoding_of(content)
    text = content.decode("utf-8-sig", "ignore") if name is None else None
    row: Json | None = None if text is None else {TEXT: text}
    return Beginning([row], file.n_bytes, is_whole=True, hint=encoding_hint(content))


def _parquet_beginning(file: ListedFile, handle: IO[bytes], limits: Limits) -> Beginning:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(handle)
    n_rows = table.metadata.num_rows
    batch = next(table.iter_batches(batch_size=limits.rows), None)
    rows: list[Json | None] = [] if batch is None else list(batch.to_pylist())
    return Beginning(rows, file.n_bytes * len(rows) // max(1, n_rows), is_whole=len(rows) == n_rows)


def _arrow_beginning(file: ListedFile, handle: IO[bytes], limits: Limits) -> Beginning:
    from miniplm_udf.ingestion.whole_files import arrow_batches, arrow_schema

    names = arrow_schema(handle).names
    handle.seek(0)
    rows: list[Json | None] = []
    n_bytes = 0
    for batch in arrow_batches(handle, names):
        rows += [_with_strings(row) for row in batch.to_pylist()]
        n_bytes += batch.nbytes
        if len(rows) >= limits.rows or n_bytes >= limits.n_bytes:
            return Beginning(rows, min(n_bytes, file.n_bytes), is_whole=False)
    return Beginning(rows, file.n_bytes, is_whole=True)


def _with_strings(row: Json) -> Json:
    """A row of an Arrow file, whose strings were read as bytes."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value for name, value in row.items()
    }
