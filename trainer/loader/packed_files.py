"""Reads the Parquet files of a packed table: their row groups, and the token ids and masks of one row group.

Inputs: paths or URIs of files, as `delta_files` gives them. Outputs: the row groups of all files with their rows, and
numpy arrays of token_ids (n, L + 1) int32 and target_mask (n, L) uint8, which are views of Arrow's buffers. Footers are
read by several threads. A file that is missing, damaged or not of a packed table is an error that names it. Keeps some
files open, and no rows. Writes nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError

COLUMNS = ("token_ids", "target_mask")
_FOOTER_THREADS = 16  # a footer on an object store takes tens of milliseconds
_OPEN_FILES = 256
_OPEN_GROUPS = 16_384  # row groups of all open files; each takes about 3 KB of memory
REMEDY = "restore the file from a copy, or delete the table's folder and run the pack stage again"


@dataclasses.dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a Parquet file.

    Attributes:
        path: plain path or URI of the file.
        index: number of the row group in the file, from 0.
        n_rows: number of its rows.
    """

    path: str
    index: int
    n_rows: int


def list_row_groups(paths: Sequence[str]) -> list[RowGroup]:
    """Returns the row groups of files that have any rows, in the order of the files.

    Args:
        paths: plain paths or URIs.

    Raises:
        CorpusError: a file cannot be read, or has not the columns of a packed table.
    """
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        counts = list(threads.map(_rows_of_groups, paths))
    return [
        RowGroup(path, index, n_rows)
        for path, rows in zip(paths, counts, strict=True)
        for index, n_rows in enumerate(rows)
        if n_rows
    ]


def _rows_of_groups(path: str) -> list[int]:
    with _named_errors(path):
        file = _open(path)
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise CorpusError(
                f"{storage.redact(path)}: expected the columns of a packed table, found no {' and no '.join(missing)}: "
                "the folder holds another table; move it away and run the pack stage"
            )
        for name in COLUMNS:
            kind = file.schema_arrow.field(name).type
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
                raise CorpusError(
                    f"{storage.redact(path)}: expected the type binary of the column {name} of a packed table, found "
                    f"{kind}: the folder holds another table; move it away and run the pack stage"
                )
        metadata = file.metadata
        file.close(force=True)
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def manifest_hash(groups: Sequence[RowGroup]) -> str:
    """Returns a hash of the file names, row groups and row counts in stored order, 32 hexadecimal digits.

    Args:
        groups: the row groups of a table.
    """
    names = [[group.path.rsplit("/", 1)[-1], group.index, group.n_rows] for group in groups]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turns an error about a missing or damaged file into one that names the file.

    Raises:
        CorpusError: the block could not read the file.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise CorpusError(
            f"{storage.redact(path)}: expected a file of a packed table, found: {problem}; {REMEDY}"
        ) from error


def _open(path: str) -> pq.ParquetFile:
    """Opens a file; `close(force=True)` closes it."""
    if storage.is_local(path):  # pyarrow reads it without Python's lock
        return pq.ParquetFile(pa.OSFile(path))
    filesystem, inner = fsspec.core.url_to_fs(path)
    # Without a cache, which would read several row groups ahead in the file; the order asks for others. One request
    # reads the columns of a row group.
    return pq.ParquetFile(filesystem.open(inner, "rb", cache_type="none"), pre_buffer=True)


class RowGroupReader:
    """Decodes row groups. For one thread at a time.

    Args:
        sequence_length: L, tokens of one input.
        vocab_size: ids must be below it.
    """

    def __init__(self, sequence_length: int, vocab_size: int):
        self._length, self._vocab_size = sequence_length, vocab_size
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._open_groups = 0

    def read(self, group: RowGroup) -> tuple[np.ndarray, np.ndarray]:
        """Reads one row group.

        Args:
            group: the row group.

        Returns:
            (token_ids (n, L + 1) int32, target_mask (n, L) uint8); read-only.

        Raises:
            CorpusError: the file cannot be read, a row has another length or is null, or an id is outside the
                vocabulary.
        """
        with _named_errors(group.path):
            file = self._file(group.path)
            table = file.read_row_group(group.index, columns=list(COLUMNS), use_threads=False)
        tokens, mask = (self._matrix(group, table[name], name) for name in COLUMNS)
        self._check_ids(group, tokens)
        return tokens, mask

    def _file(self, path: str) -> pq.ParquetFile:
        """The open file. The files that were used last stay open, with their footers."""
        if path not in self._open:
            self._open[path] = _open(path)
            self._open_groups += self._open[path].num_row_groups
        self._open.move_to_end(path)
        while len(self._open) > 1 and (len(self._open) > _OPEN_FILES or self._open_groups > _OPEN_GROUPS):
            oldest = self._open.popitem(last=False)[1]
            self._open_groups -= oldest.num_row_groups
            oldest.close(force=True)
        return self._open[path]

    def _matrix(self, group: RowGroup, column: pa.ChunkedArray, name: str) -> np.ndarray:
        """A binary column as an array (rows, width), a view of Arrow's buffer.

        Raises:
            CorpusError: a row has another length or is null.
        """
        dtype, width = (np.dtype("<i4"), self._length + 1) if name == "token_ids" else (np.dtype("u1"), self._length)
        if not pa.types.is_binary(column.type):
            column = column.cast(pa.binary())  # a file may declare large or view types
        values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, offsets, content = values.buffers()
        ends = np.frombuffer(offsets, dtype=np.int32)[values.offset : values.offset + len(values) + 1]
        lengths = np.diff(ends)
        wrong = lengths != width * dtype.itemsize
        if values.null_count:
            wrong = values.is_null().to_numpy(zero_copy_only=False)
        if wrong.any():
            row = int(np.argmax(wrong))
            entries = "null" if values.null_count else f"{lengths[row] / dtype.itemsize:g}"
            raise CorpusError(
                f"{storage.redact(group.path)}: expected {width} entries of {name} a row (pack.sequence_length "
                f"{self._length}), found {entries} in row {row} of row group {group.index}: {REMEDY}"
            )
        return np.frombuffer(content, "u1")[ends[0] : ends[-1]].view(dtype).reshape(len(values), width)

    def _check_ids(self, group: RowGroup, tokens: np.ndarray) -> None:
        if int(tokens.view("<u4").max(initial=0)) >= self._vocab_size:  # a negative id is a large unsigned one
            raise CorpusError(
                f"{storage.redact(group.path)}: expected ids 0 to {self._vocab_size - 1}, its tokenizer's, found "
                f"{tokens.min()} to {tokens.max()} in row group {group.index}; the table was packed with another "
                f"tokenizer, or the file is damaged: {REMEDY}"
            )
