"""Rows to files on executors: a task writes one file, JSON lines under zstandard or Parquet. Knows no corpus.

    Arrow batches of the columns (of JSON lines: one column `line`) and COUNTED -> a file; one row of WRITTEN_DDL of it

One batch is in memory, of Parquet one row group. A file has the attempt of its task in its name: where a task is run
again, another file is written, and only those that finished tasks tell of are any export's. A task without rows writes
no file. numpy, pyarrow and zstandard are loaded by executors alone.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, Protocol

import fsspec

from miniplm_udf import storage

if TYPE_CHECKING:
    import pyarrow as pa

# Of each row, beside what is written: the hash that fingerprints are made of, its tokens, its text's bytes.
COUNTED = ("counted_hash", "counted_tokens", "counted_bytes")
WRITTEN_DDL = (
    "name string, n_bytes bigint, n_rows bigint, n_tokens bigint, text_bytes bigint, hash_xor bigint, hash_sum bigint"
)
_WRITTEN = [field.split()[0] for field in WRITTEN_DDL.split(", ")]
_ROW_GROUP_BYTES = 64 * 2**20
_ZSTD_LEVEL = 3
_LOW_BITS = 0xFFFFFFFF


def write_function(folder: str, to: str) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """The task's function.

    Args:
        folder: URI of one that is there.
        to: `jsonl.zst` or `parquet`, and the end of the files' names.
    """

    def write(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        name = f"part-{context.partitionId():05d}-{context.taskAttemptId()}.{to}"
        found = write_file(storage.join(folder, name), to, batches)
        if found is not None:
            values = {"name": name, **found}
            yield pa.RecordBatch.from_arrays([pa.array([values[key]]) for key in _WRITTEN], names=_WRITTEN)

    return write


def write_file(uri: str, to: str, batches: Iterator["pa.RecordBatch"]) -> dict[str, int] | None:
    """Writes one file; returns what stands in it, as in WRITTEN_DDL, or None where there are no rows."""
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
    """One zstandard frame, with a checksum."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
        self._stream: Any = compressor.stream_writer(handle, closefd=False)

    def write(self, batch: "pa.RecordBatch") -> None:
        for line in batch.column("line").to_pylist():
            self._stream.write(line.encode("utf-8"))
            self._stream.write(b"\n")

    def close(self) -> None:
        self._stream.close()


class _Parquet:
    """Row groups of some 64 MiB before compression."""

    def __init__(self, handle: IO[bytes], schema: "pa.Schema") -> None:
        import pyarrow.parquet as pq

        narrow = [name for name in schema.names if name != "text"]
        self._writer = pq.ParquetWriter(handle, schema, compression="zstd", write_statistics=narrow)
        self._batches: list[pa.RecordBatch] = []
        self._schema = schema

    def write(self, batch: "pa.RecordBatch") -> None:
        self._batches.append(batch)
        if sum(one.nbytes for one in self._batches) >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batches:
            table = pa.Table.from_batches([one.replace_schema_metadata(None) for one in self._batches], self._schema)
            self._writer.write_table(table)
            self._batches = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


_SINKS: dict[str, Callable[[IO[bytes], "pa.Schema"], _Sink]] = {"jsonl.zst": _JsonLines, "parquet": _Parquet}
FORMATS = tuple(_SINKS)
