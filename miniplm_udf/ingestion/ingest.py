"""The executor side of ingest: rows of an input split to instances and rejects, as a function for `mapInArrow`.

Owns nothing but the way from Arrow to `documents` and `chunking` and back. Input: record batches of the columns that
`inputs.stream` selects, in file order, splits one after the other. Output: batches of `output_arrow_schema`: `kind` is
`instance` or `reject`, `key` its id, and the columns of both tables that do not name the micro-batch. Memory is bounded
by the largest document, not by the split. A function of the rows alone, so a retried task gives the same rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config import IngestConfig, ModelConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.chunking import RULE_VERSION, Chunk, Chunker, Encode
from miniplm_udf.ingestion.documents import (
    RAW_BYTES,
    Document,
    DocumentReader,
    Reject,
    content_hash,
    hash_parts,
    instance_id,
    reject_id,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql.types import StructType

INSTANCE, REJECT = "instance", "reject"
# Columns that foreachBatch adds.
BATCH_COLUMNS = ("ingested_at", "rejected_at", "stage", "query_id", "batch_id")
_FLUSH_ROWS = 1000
_FLUSH_BYTES = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ChunkingSpec:
    """All that decides where documents are cut. Part of every instance's id.

    `separator` and `split_bytes` are null in document mode, where neither changes anything.
    """

    mode: str
    max_tokens: int
    tokenizer_hash: str
    separator: str | None
    split_bytes: int | None
    rule_version: int = RULE_VERSION

    @classmethod
    def of(cls, ingest: IngestConfig, model: ModelConfig, tokenizer_hash: str) -> "ChunkingSpec":
        chunking = ingest.chunking
        packed = chunking.mode == "packed"
        return cls(
            mode=chunking.mode,
            max_tokens=chunking.max_tokens,
            tokenizer_hash=tokenizer_hash,
            separator=model.document_separator if packed else None,
            split_bytes=chunking.split_bytes if packed else None,
        )


def _output_columns() -> list[schemas.Column]:
    """`kind`, `key`, and, nullable, the columns of instances and rejects that a row has by itself."""
    columns = {column.name: column for table in (schemas.INSTANCES, schemas.REJECTS) for column in table.columns}
    own = [
        dataclasses.replace(c, nullable=True) for c in columns.values() if c.name not in (*BATCH_COLUMNS, "reject_id")
    ]
    return [
        schemas.Column("kind", "string", "instance or reject"),
        schemas.Column("key", "string", "instance_id or reject_id"),
        *own,
    ]


def _output_table() -> schemas.Table:
    return schemas.Table(name="ingest", columns=tuple(_output_columns()), key=("key",))


def output_arrow_schema() -> "pa.Schema":
    return _output_table().arrow_schema()


def output_spark_schema() -> "StructType":
    return _output_table().spark_schema()


def tokenizer_folder(model: ModelConfig) -> Path:
    """The folder of the chunking tokenizer on this node. On executors only: it may load torch."""
    from miniplm_udf.scoring.models import resolve

    return resolve(model)


def load_encode(folder: Path) -> Encode:
    """The `Encode` of a tokenizer's folder."""
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def encode(texts: list[str]) -> list[list[tuple[int, int]]]:
        return [encoding.offsets for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode


def make_ingest_function(
    ingest: IngestConfig, model: ModelConfig, spec: ChunkingSpec
) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """The function for `mapInArrow`.

    Args:
        ingest: fields, default source, splits, chunking.
        model: the model whose tokenizer counts.
        spec: the driver's; a node whose tokenizer is another one refuses to work.
    """

    def ingest_split(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        from miniplm_udf.scoring.tokenizer import tokenizer_hash

        folder = tokenizer_folder(model)
        if (found := tokenizer_hash(folder)) != spec.tokenizer_hash:
            raise CorpusError(
                f"tokenizer {folder}: expected hash {spec.tokenizer_hash}, as on the node that began, found {found}; "
                "give every node the same model files"
            )
        encode = load_encode(folder)
        reader = DocumentReader(ingest.fields, ingest.default_source, ingest.split)
        yield from ingest_batches(batches, encode, reader, spec)

    return ingest_split


def ingest_batches(
    batches: Iterator["pa.RecordBatch"], encode: Encode, reader: DocumentReader, spec: ChunkingSpec
) -> Iterator["pa.RecordBatch"]:
    """Cuts input splits: rows that follow one another with the same file and block start are one split."""
    out = _Output(fingerprint(spec))
    rows = (row for batch in batches for row in _rows(batch, reader))
    for (source_file, block_start), split_rows in itertools.groupby(rows, key=lambda row: row[:2]):
        chunker = Chunker(encode, "packed" if spec.mode == "packed" else "document", spec.max_tokens)
        for row, (_, _, read) in enumerate(split_rows):
            if isinstance(read, Reject):
                out.add_reject(read, source_file, block_start, row)
            elif read is not None:
                for chunk in chunker.feed(read):
                    out.add_chunk(chunk)
                    if out.is_full:
                        yield out.flush()
            if out.is_full:
                yield out.flush()
        for chunk in chunker.close():
            out.add_chunk(chunk)
            if out.is_full:
                yield out.flush()
    if out.rows:
        yield out.flush()


def _rows(batch: "pa.RecordBatch", reader: DocumentReader) -> Iterator[tuple[str, int, Document | Reject | None]]:
    """(file, start of its block, what the row says)."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    for i in range(batch.num_rows):
        place = columns["source_file"][i].as_py(), columns["block_start"][i].as_py()
        if "line" in columns:
            yield *place, reader.read_line(columns["line"][i].as_py())
        else:
            values = {name: columns[name][i].as_py() for name in ("text", "id", "source", "metadata")}
            yield *place, reader.read_columns(**values)


class _Output:
    """Rows that are not yet yielded, and the ids of the streams that are being cut."""

    def __init__(self, spec_hash: str) -> None:
        self._spec_hash = spec_hash
        self._schema = output_arrow_schema()
        self._stream_ids: dict[tuple[str, str], str] = {}
        self._n_bytes = 0
        self.rows: list[dict[str, Any]] = []

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= _FLUSH_ROWS or self._n_bytes >= _FLUSH_BYTES

    def flush(self) -> "pa.RecordBatch":
        import pyarrow as pa

        columns = [pa.array([row.get(field.name) for row in self.rows], type=field.type) for field in self._schema]
        self.rows, self._n_bytes = [], 0
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def add_reject(self, reject: Reject, source_file: str, block_start: int, row: int) -> None:
        key = reject_id(reject.reason, source_file, reject.raw, block_start, row)
        raw = None if reject.raw is None else reject.raw[:RAW_BYTES]
        self._n_bytes += len(raw or b"")
        self.rows.append(
            {
                "kind": REJECT,
                "key": key,
                "reason": reject.reason,
                "detail": reject.detail[:RAW_BYTES],
                "source_file": source_file,
                "raw": raw,
                "n_bytes": None if reject.raw is None else len(reject.raw),
            }
        )

    def add_chunk(self, chunk: Chunk) -> None:
        first, last = chunk.slices[0], chunk.slices[-1]
        document_ids = [part.document.document_id for part in chunk.slices]
        text, n_bytes = chunk.text, chunk.n_bytes
        key = instance_id(document_ids, chunk.ordinal, text, self._spec_hash)
        metadata = [part.document.metadata or "{}" for part in chunk.slices]
        self._n_bytes += n_bytes
        self.rows.append(
            {
                "kind": INSTANCE,
                "key": key,
                "instance_id": key,
                "stream_id": self._stream_id(chunk, key),
                "ordinal": chunk.ordinal,
                "document_ids": document_ids,
                "start_byte": first.start_byte,
                "source": first.document.source,
                "text": text,
                "segment_ends": chunk.segment_ends,
                "starts_document": first.starts,
                "ends_document": last.ends,
                "n_bytes": n_bytes,
                "content_hash": content_hash(text),
                "split": first.document.split,
                "metadata": None if first.document.metadata is None else f"[{', '.join(metadata)}]",
            }
        )

    def _stream_id(self, chunk: Chunk, key: str) -> str:
        """Names a stream after all that its first instance is made of, and its first document: content alone."""
        document = chunk.slices[0].document
        stream = (document.source, document.split)
        if chunk.ordinal == 0:
            self._stream_ids[stream] = hash_parts("stream", *stream, key, document.document_id, document.text)
        return self._stream_ids[stream]
