"""Cuts input splits into instances and rejects: ingest's function for `mapInArrow`, on executors.

An input split is a part of a file that Spark gives to one task, or a whole file. Owns the conversion from Arrow to
`documents.py` and `chunking.py` and back, and `ChunkingSpec`, which is part of every instance's id. Input: record
batches of the columns that `inputs.stream` selects, in file order, splits one after the other. Output: batches of
`output_arrow_schema`: `kind` (`instance` or `reject`), `key` (its id), and the columns of both tables except those that
name the micro-batch. Memory is limited by the largest document, not by the split. The output depends on the rows alone,
so a retried task gives the same rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import IngestConfig, ModelConfig
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
# Columns that `foreachBatch` adds.
BATCH_COLUMNS = ("ingested_at", "rejected_at", "stage", "query_id", "batch_id")
_FLUSH_ROWS = 1000
_FLUSH_BYTES = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ChunkingSpec:
    """Everything that decides where documents are cut. Part of every instance's id.

    Attributes:
        mode: `document` or `packed`.
        max_tokens: largest number of tokens in a chunk.
        tokenizer_hash: hash of the chunking tokenizer, 32 hexadecimal digits.
        separator: document separator; None in document mode, where it changes nothing.
        split_bytes: size of an input split; None in document mode, where it changes nothing.
        rule_version: version of the rule (`chunking.RULE_VERSION`).
    """

    mode: str
    max_tokens: int
    tokenizer_hash: str
    separator: str | None
    split_bytes: int | None
    rule_version: int = RULE_VERSION

    @classmethod
    def of(cls, ingest: IngestConfig, model: ModelConfig, tokenizer_hash: str) -> "ChunkingSpec":
        """Returns the spec of a config.

        Args:
            ingest: the section `ingest`.
            model: the model whose tokenizer counts tokens.
            tokenizer_hash: hash of that tokenizer.
        """
        chunking = ingest.chunking
        packed = chunking.mode == "packed"
        return cls(
            mode=chunking.mode,
            max_tokens=chunking.max_tokens,
            tokenizer_hash=tokenizer_hash,
            separator=model.document_separator if packed else None,
            split_bytes=chunking.split_bytes if packed else None,
        )


def output_columns() -> list[schemas.Column]:
    """The columns `kind` and `key`, and the columns of instances and rejects that no micro-batch adds, all nullable."""
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
    return schemas.Table(name="ingest", columns=tuple(output_columns()), key=("key",))


def output_arrow_schema() -> "pa.Schema":
    """The Arrow schema of `output_columns`."""
    return _output_table().arrow_schema()


def output_spark_schema() -> "StructType":
    """The Spark schema of `output_columns`."""
    return _output_table().spark_schema()


def tokenizer_folder(model: ModelConfig) -> Path:
    """Returns the folder of the chunking tokenizer on this node. On executors only: it may load torch.

    Args:
        model: the model whose tokenizer counts tokens.
    """
    from miniplm_udf.scoring.model_files import model_folder

    return model_folder(model)


def load_encode(folder: Path) -> Encode:
    """Returns the tokenizer in a folder as an `Encode`.

    Args:
        folder: a local folder with a tokenizer.json.
    """
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def encode(texts: list[str]) -> list[list[tuple[int, int]]]:
        return [encoding.offsets for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode


def make_ingest_function(
    ingest: IngestConfig, model: ModelConfig, spec: ChunkingSpec
) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """Returns the function for `mapInArrow` that reads and cuts input splits.

    Args:
        ingest: fields, default source, splits, chunking.
        model: the model whose tokenizer counts tokens.
        spec: the spec that the driver made; a node with another tokenizer raises a CorpusError.
    """

    def ingest_split(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        reader = DocumentReader(ingest.fields, ingest.default_source, ingest.split)
        yield from ingest_batches(batches, node_encode(model, spec), reader, spec)

    return ingest_split


def node_encode(model: ModelConfig, spec: ChunkingSpec) -> Encode:
    """Returns the chunking tokenizer, loaded on this node (an executor).

    Args:
        model: the model whose tokenizer counts tokens.
        spec: the spec that the driver made.

    Raises:
        CorpusError: the node has another tokenizer than the spec.
    """
    from miniplm_udf.scoring.tokenizer import tokenizer_hash

    folder = tokenizer_folder(model)
    if (node_hash := tokenizer_hash(folder)) != spec.tokenizer_hash:
        raise CorpusError(
            f"tokenizer {folder}: expected hash {spec.tokenizer_hash}, as on the node where ingest began, found "
            f"{node_hash}; give every node the same model files"
        )
    return load_encode(folder)


def ingest_batches(
    batches: Iterator["pa.RecordBatch"], encode: Encode, reader: DocumentReader, spec: ChunkingSpec
) -> Iterator["pa.RecordBatch"]:
    """Cuts input splits. Consecutive rows with the same file and block start are one split.

    Args:
        batches: rows as `inputs.stream` selects them.
        encode: the chunking tokenizer.
        reader: turns rows into documents.
        spec: the chunking spec.

    Yields:
        Batches of `output_arrow_schema`.
    """
    out = Output(output_arrow_schema(), fingerprint(spec))
    rows = (row for batch in batches for row in read_rows(batch, reader))
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


def read_rows(batch: "pa.RecordBatch", reader: DocumentReader) -> Iterator[tuple[str, int, Document | Reject | None]]:
    """Reads the rows of a batch.

    Args:
        batch: rows with `source_file`, `block_start`, and either `line` or the columns of `row_sql.batch_columns`.
        reader: turns a row into a document.

    Yields:
        The file, the start of the input split in it, and a document, a reject, or None for a blank line.
    """
    columns = {name: batch.column(name) for name in batch.schema.names}
    for i in range(batch.num_rows):
        place = columns["source_file"][i].as_py(), columns["block_start"][i].as_py()
        if "line" in columns:
            yield *place, reader.read_line(columns["line"][i].as_py())
        else:
            values = {name: columns[name][i].as_py() for name in ("text", "id", "source", "metadata")}
            yield *place, reader.read_columns(**values)


class Output:
    """Collects rows until a batch is full.

    Args:
        schema: schema of the batches; a column that a row does not have is null.
        spec_hash: fingerprint of the chunking spec, part of the ids of instances.

    Attributes:
        rows: rows that are not in a batch yet.
    """

    def __init__(self, schema: "pa.Schema", spec_hash: str) -> None:
        self._schema, self._spec_hash = schema, spec_hash
        self._stream_ids: dict[tuple[str, str], str] = {}
        self._n_bytes = 0
        self.rows: list[dict[str, object]] = []

    @property
    def is_full(self) -> bool:
        """Whether the rows are enough for a batch."""
        return len(self.rows) >= _FLUSH_ROWS or self._n_bytes >= _FLUSH_BYTES

    def flush(self) -> "pa.RecordBatch":
        """Removes the rows and returns them as a batch."""
        import pyarrow as pa

        columns = [pa.array([row.get(field.name) for row in self.rows], type=field.type) for field in self._schema]
        self.rows, self._n_bytes = [], 0
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def add(self, n_bytes: int, **row: Any) -> None:
        """Adds a row of about `n_bytes` bytes.

        Args:
            n_bytes: about the size of the row, which counts towards a full batch.
            row: values by column; a column that is left out is null.
        """
        self._n_bytes += n_bytes
        self.rows.append(row)

    def add_reject(self, reject: Reject, source_file: str, block_start: int, row: int) -> None:
        """Adds a reject.

        Args:
            reject: the reject; at most RAW_BYTES of its bytes are kept.
            source_file: URI of the file.
            block_start: byte of the file at which the input split starts.
            row: number of the row in the input split, from 0.
        """
        key = reject_id(reject.reason, source_file, reject.raw, block_start, row)
        raw = None if reject.raw is None else reject.raw[:RAW_BYTES]
        self._n_bytes += len(raw or b"")
        self.rows.append(
            {
                "kind": REJECT,
                "key": key,
                "reason": reject.reason,
                "detail": f"{_place_in_file(block_start, row)}: {reject.detail}"[:RAW_BYTES],
                "source_file": source_file,
                "raw": raw,
                "n_bytes": None if reject.raw is None else len(reject.raw),
            }
        )

    def add_chunk(self, chunk: Chunk) -> str:
        """Adds an instance.

        Args:
            chunk: the text of the instance. The chunks of a stream come in order, from ordinal 0.

        Returns:
            The instance's id.
        """
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
        return key

    def _stream_id(self, chunk: Chunk, key: str) -> str:
        """The id of a chunk's stream: a hash of the content of its first instance and its first document."""
        document = chunk.slices[0].document
        stream = (document.source, document.split)
        if chunk.ordinal == 0:
            self._stream_ids[stream] = hash_parts("stream", *stream, key, document.document_id, document.text)
        return self._stream_ids[stream]


def _place_in_file(block_start: int, row: int) -> str:
    """The place of a row, for a reject: its number in the file, or its number after the byte where its split starts."""
    return f"row {row + 1}" + (f" after byte {block_start}" if block_start else "")
