"""Reads the files that Spark lists but cannot read itself, on executors: text, JSON arrays and Arrow.

    text    a file is one document; its id is its name below the input's folder, without `.txt`, and its source is the
            first folder of that name
    json    the elements of an array are the rows (json_arrays.py)
    arrow   Arrow IPC, as a file or a stream: Feather version 2, and what `datasets.save_to_disk` writes

Input: the URI of a file. Output: record batches of `line` (json), or of `text`, `id`, `source` (bytes) and `metadata`
(text, arrow), as Spark's reader gives them for other formats. A file is one input split. Memory: a batch of at most
about 16 MiB, or one document. Writes nothing; a retry gives the same rows. On a remote storage, executors need its
fsspec package.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.formats import SUFFIXES
from miniplm_udf.ingestion.json_arrays import json_rows
from miniplm_udf.ingestion.listing import folder_source, name_below
from miniplm_udf.ingestion.nested import same_name
from miniplm_udf.ingestion.parquet_columns import converted, open_file, wanted_columns, with_place
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks

if TYPE_CHECKING:
    import pyarrow as pa

# Arrow's binary columns hold 2 GiB, and a text is copied several times.
MOST_TEXT_BYTES = 2**30
_ROWS, _BATCH_BYTES = 1000, 16 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads files of one format; called, it is the function for `mapInArrow`.

    Attributes:
        format: text, json or arrow.
        fields: names of the columns; text files have none.
        bases: folders that the input names (`listing.base_folders`).
    """

    format: str
    fields: FieldsConfig
    bases: tuple[str, ...] = ()

    def __call__(self, batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        """Reads the files of some rows.

        Args:
            batches: a row for each file, with `source_file` and further columns.

        Yields:
            The rows of the files, each with the columns of its file's row.

        Raises:
            OSError: a file cannot be read; the message is of the form that `quarantine.py` knows.
        """
        for batch in batches:
            for place in batch.to_pylist():
                path = place["source_file"]
                try:
                    with open_file(path) as handle:
                        for rows in self.rows(path, handle):
                            yield with_place(rows, place)
                except (DamagedDataError, OSError, ValueError, ImportError) as error:
                    message = f"[FAILED_READ_FILE.PYTHON] Encountered error while reading file {path}. {error}"
                    raise OSError(message) from error

    def rows(self, path: str, handle: IO[bytes]) -> Iterator["pa.RecordBatch"]:
        """Reads one file.

        Args:
            path: URI of the file, percent-encoded.
            handle: the file, at its start.

        Yields:
            Its rows, without the file's name.

        Raises:
            DamagedDataError: the bytes do not fit the format.
        """
        if self.format == "arrow":
            yield from self._arrow_rows(handle)
        elif self.format == "json":
            yield from _in_batches(json_rows(unpacked_chunks(path, handle)))
        else:
            yield self._document(path, handle)

    def _document(self, path: str, handle: IO[bytes]) -> "pa.RecordBatch":
        import pyarrow as pa

        text = b"".join(unpacked_chunks(path, handle)).removeprefix(_BYTE_ORDER_MARK)
        names = {"id": self.document_id(path), "source": folder_source(path, self.bases)}
        row = {"text": text, **{key: name and name.encode("utf-8", "surrogateescape") for key, name in names.items()}}
        types = {**dict.fromkeys(row, pa.binary()), "metadata": pa.string()}
        return pa.RecordBatch.from_pylist([{**row, "metadata": None}], schema=pa.schema(list(types.items())))

    def document_id(self, path: str) -> str:
        """Returns the id of a text file: its name below the input's folder, without the ending.

        Args:
            path: URI of the file, percent-encoded.
        """
        name = name_below(path, self.bases)
        suffix = next((suffix for suffix in SUFFIXES["text"] if name.lower().endswith(suffix)), "")
        return name.removesuffix(name[-len(suffix) :]) if suffix and len(name) > len(suffix) else name

    def _arrow_rows(self, handle: IO[bytes]) -> Iterator["pa.RecordBatch"]:
        wanted = wanted_columns(self.fields)
        for batch in arrow_batches(handle, wanted):
            names = batch.schema.names
            columns = {name: stored for name in wanted if (stored := same_name(name, names)) is not None}
            yield converted(batch, columns, self.fields)


def arrow_batches(handle: IO[bytes], wanted: Sequence[str]) -> Iterator["pa.RecordBatch"]:
    """Reads an Arrow file or stream to its end.

    Args:
        handle: the file, at its start.
        wanted: names of the columns to read, perhaps in other case.

    Yields:
        Parts of its record batches, of at most 1,000 rows and about 16 MiB, with the wanted columns; strings as bytes,
        because a string that is not UTF-8 is one bad row.

    Raises:
        DamagedDataError: the bytes are no Arrow data, or end too early.
    """
    import pyarrow as pa

    try:
        for stored in _stored_batches(handle):
            batch = _selected(stored, wanted)
            batch.validate(full=True)
            n_rows = max(1, min(_ROWS, batch.num_rows * _BATCH_BYTES // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, n_rows):
                yield batch.slice(start, n_rows)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise DamagedDataError(f"damaged Arrow data: {str(error).splitlines()[0] or 'no message'}") from error


def _selected(batch: "pa.RecordBatch", wanted: Sequence[str]) -> "pa.RecordBatch":
    import pyarrow as pa

    bytes_types = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    names = [stored for name in wanted if (stored := same_name(name, batch.schema.names)) is not None]
    columns = {name: batch.column(name) for name in dict.fromkeys(names)}
    plain = [column.view(bytes_types.get(column.type, column.type)) for column in columns.values()]
    # A struct array keeps the number of rows, also without a column.
    return pa.RecordBatch.from_arrays(plain, names=list(columns)) if plain else batch.select([])


def arrow_schema(handle: IO[bytes]) -> "pa.Schema":
    """Returns the schema of an Arrow file or stream.

    Args:
        handle: the file, at its start.
    """
    import pyarrow as pa

    is_file = handle.read(6) == b"ARROW1"
    handle.seek(0)
    return pa.ipc.open_file(handle).schema if is_file else pa.ipc.open_stream(handle).schema


def _stored_batches(handle: IO[bytes]) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    magic = handle.read(6)
    if magic.startswith(b"FEA1"):
        raise DamagedDataError("it is Feather version 1; write it again with pyarrow.feather.write_feather")
    n_bytes = handle.seek(0, 2)
    handle.seek(max(0, n_bytes - len(_END_OF_STREAM)))
    end = handle.read()
    handle.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(handle)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
        return
    # A stream that was cut between two batches would look whole.
    if end != _END_OF_STREAM:
        raise DamagedDataError("the Arrow stream has no end mark (a file that was cut)")
    yield from pa.ipc.open_stream(handle)


def _in_batches(rows: Iterable[bytes]) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    def batch_of(lines: list[bytes]) -> Any:
        return pa.RecordBatch.from_arrays([pa.array(lines, pa.binary())], names=["line"])

    waiting: list[bytes] = []
    n_bytes = 0
    for row in rows:
        waiting.append(row)
        n_bytes += len(row)
        if len(waiting) >= _ROWS or n_bytes >= _BATCH_BYTES:
            yield batch_of(waiting)
            waiting, n_bytes = [], 0
    if waiting:
        yield batch_of(waiting)
