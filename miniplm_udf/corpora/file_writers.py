"""Writing rows to files on executors: one file per task, JSON lines or Parquet. Knows no corpus.

    Arrow batches of the columns (for JSON lines: one column `line`) and COUNTED -> a file, and one row of WRITTEN_DDL

One batch is in memory; for Parquet, one row group. The name of a file contains its task attempt, so a task that runs
again writes another file, and only the files that finished tasks report belong to an export. A task without rows writes
no file. Only executors load numpy, pyarrow and zstandard.
"""

import contextlib
import dataclasses
import gzip
import itertools
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, Protocol

import fsspec

from miniplm_udf import storage

if TYPE_CHECKING:
    import pyarrow as pa

# Columns that are counted and not written: the hash for fingerprints, the tokens, the bytes of the text.
COUNTED = ("counted_hash", "counted_tokens", "counted_bytes")
_ROW_GROUP_BYTES = 64 * 2**20
_ZSTD_LEVEL = 3
_GZIP_LEVEL = 6
_LOW_BITS = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One file of an export.

    Attributes:
        name: without the folder.
        n_bytes: size of the file.
        n_rows: rows in it; `n_tokens` are their tokens, `text_bytes` the UTF-8 bytes of their texts.
    """

    name: str
    n_bytes: int
    n_rows: int
    n_tokens: int
    text_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenFile(ExportedFile):
    """A task's report about its file.

    Attributes:
        hash_xor: exclusive or of the hashes of the file's rows.
        hash_sum: sum of the low 32 bits of these hashes.
    """

    hash_xor: int
    hash_sum: int


_WRITTEN = [field.name for field in dataclasses.fields(WrittenFile)]
WRITTEN_DDL = ", ".join(f"{name} {'string' if name == 'name' else 'bigint'}" for name in _WRITTEN)


def write_function(folder: str, to: str) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """Makes the function that each task runs (`mapInArrow`).

    Args:
        folder: URI of an existing folder.
        to: one of FORMATS; also the extension of the files.

    Returns:
        A function from batches to at most one row of `WRITTEN_DDL`.
    """

    def write(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        name = f"part-{context.partitionId():05d}-{context.taskAttemptId()}.{to}"
        sums = write_file(storage.join(folder, name), to, batches)
        if sums is not None:
            values = {"name": name, **sums}
            yield pa.RecordBatch.from_arrays([pa.array([values[key]]) for key in _WRITTEN], names=_WRITTEN)

    return write


def write_file(uri: str, to: str, batches: Iterator["pa.RecordBatch"]) -> dict[str, int] | None:
    """Writes one file.

    Args:
        uri: URI of the new file.
        to: one of FORMATS.
        batches: rows to write, with the columns COUNTED.

    Returns:
        The fields of `WrittenFile` without the name; None, and no file, if there are no rows.
    """
    filled = (batch for batch in batches if batch.num_rows)
    first = next(filled, None)
    if first is None:
        return None
    columns = [name for name in first.schema.names if name not in COUNTED]
    sums = dict.fromkeys(_WRITTEN[2:], 0)
    with fsspec.open(uri, "wb") as handle:
        with contextlib.closing(_SINKS[to](handle, first.select(columns).schema.remove_metadata())) as sink:
            for batch in itertools.chain([first], filled):
                _count(sums, batch)
                sink.write(batch.select(columns))
        return {"n_bytes": handle.tell(), **sums}


def _count(sums: dict[str, int], batch: "pa.RecordBatch") -> None:
    import numpy as np

    hashes, tokens, text_bytes = (batch.column(name).to_numpy(zero_copy_only=False) for name in COUNTED)
    sums["n_rows"] += batch.num_rows
    sums["n_tokens"] += int(tokens.sum())
    sums["text_bytes"] += int(text_bytes.sum())
    sums["hash_xor"] ^= int(np.bitwise_xor.reduce(hashes))
    sums["hash_sum"] += int((hashes & _LOW_BITS).sum())


class _Sink(Protocol):
    def write(self, batch: "pa.RecordBatch") -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """Lines without compression."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        self._stream: Any = handle

    def write(self, batch: "pa.RecordBatch") -> None:
        for line in batch.column("line").to_pylist():
            self._stream.write(line.encode("utf-8"))
            self._stream.write(b"\n")

    def close(self) -> None:
        """Ends the compression; the caller closes the file."""


class _GzipJsonLines(_JsonLines):
    """One gzip member, without a name or a time."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        self._stream = gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=handle, mtime=0)

    def close(self) -> None:
        self._stream.close()


class _ZstandardJsonLines(_JsonLines):
    """One zstandard frame, with a checksum."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
        self._stream = compressor.stream_writer(handle, closefd=False)

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    """Row groups of about 64 MiB before compression."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        import pyarrow.parquet as pq

        narrow = [name for name in schema.names if name != "text"]
        self._writer = pq.ParquetWriter(handle, schema, compression="zstd", write_statistics=narrow)
        self._batches: list[pa.RecordBatch] = []
        self._schema = schema

    def write(self, batch: "pa.RecordBatch") -> None:
        self._batches.append(batch)
        if sum(kept.nbytes for kept in self._batches) >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            table = pa.Table.from_batches(
                [batch.replace_schema_metadata(None) for batch in self._batches], self._schema
            )
            self._writer.write_table(table)
            self._batches = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


_SINKS: dict[str, Callable[[IO[bytes], "pa.Schema"], _Sink]] = {
    "jsonl.zst": _ZstandardJsonLines,
    "jsonl.gz": _GzipJsonLines,
    "jsonl": _JsonLines,
    "parquet": _Parquet,
}
FORMATS = tuple(_SINKS)
