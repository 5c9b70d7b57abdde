"""Packed ingest on executors: keeps one copy of each document, however many rows of the input hold it.

Three functions for `mapInArrow`. `read_function`: rows of an input split to documents and rejects, each with a `key`
(of a document: the hash of its id and text) and a place. `first_copies`: from a partition that holds all rows of a key,
the row with the smallest place. `pack_function`: documents in the order of (place, row) to instances, and for each
document a row of kind `document` that names the instance in which it begins.

A place is (modification time of the file, file, start of the input split); with the number of the row it gives the
order in which the stream takes files. The copy that is kept, every cut and every id therefore depend on the input
alone: a retried task or a replayed micro-batch keeps the same copy. Memory: about 50 bytes a row of the partition, and
the largest document; the rows of a partition wait in a temporary file.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import IngestConfig, ModelConfig
from miniplm_udf.ingestion.chunking import Chunk, Chunker, Encode
from miniplm_udf.ingestion.documents import Document, DocumentReader, Reject, document_key
from miniplm_udf.ingestion.splits import (
    ChunkingSpec,
    Output,
    node_encode,
    output_arrow_schema,
    output_columns,
    read_rows,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql.types import StructType

    MapFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]

DOCUMENT = "document"
# Added to modification times, so that times before 1970 also become sixteen digits, which sort as text.
_SIGN = 2**63


def _rows_table() -> schemas.Table:
    """The columns between reading and packing: `splits.output_columns`, which rejects fill, and three more."""
    own = (
        schemas.Column("document_id", "string", "the document", nullable=True),
        schemas.Column("place", "string", "modification time, file and input split; sorts in the order of the stream"),
        schemas.Column("row", "int64", "number of the row in its input split"),
    )
    return schemas.Table(name="ingest rows", columns=(*output_columns(), *own), key=("key",))


def rows_spark_schema() -> "StructType":
    """The schema of documents and rejects before they are packed."""
    return _rows_table().spark_schema()


def read_function(ingest: IngestConfig) -> "MapFunction":
    """Returns the function that turns input rows into documents and rejects.

    Args:
        ingest: fields, default source and splits.
    """

    def read(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        yield from read_documents(batches, DocumentReader(ingest.fields, ingest.default_source, ingest.split))

    return read


def read_documents(batches: Iterator["pa.RecordBatch"], reader: DocumentReader) -> Iterator["pa.RecordBatch"]:
    """Turns rows of input splits into documents and rejects. Blank lines give no row, but count in the row numbers.

    Args:
        batches: rows as `inputs.stream` selects them.
        reader: turns rows into documents.

    Yields:
        Batches of `rows_spark_schema`.
    """
    out = Output(_rows_table().arrow_schema(), "")
    for (source_file, block_start, modified), rows in itertools.groupby(_placed(batches, reader), lambda row: row[:3]):
        place = f"{modified + _SIGN:016x}/{source_file}/{block_start:016x}"
        for number, (*_, read) in enumerate(rows):
            if isinstance(read, Reject):
                out.add_reject(read, source_file, block_start, number)
                out.rows[-1] |= {"place": place, "row": number}
            elif read is not None:
                _add_document(out, read, place, number)
            if out.is_full:
                yield out.flush()
    if out.rows:
        yield out.flush()


def _placed(
    batches: Iterator["pa.RecordBatch"], reader: DocumentReader
) -> Iterator[tuple[str, int, int, Document | Reject | None]]:
    """Yields the file, the start of the input split, the modification time in microseconds, and the row's content."""
    for batch in batches:
        times = batch.column("modified_micros").to_pylist()
        for modified, (source_file, block_start, read) in zip(times, read_rows(batch, reader), strict=True):
            yield source_file, block_start, modified, read


def _add_document(out: Output, document: Document, place: str, row: int) -> None:
    out.add(
        4 * len(document.text), kind=DOCUMENT, key=document_key(document.document_id, document.text),
        document_id=document.document_id, source=document.source, text=document.text, split=document.split,
        metadata=document.metadata, place=place, row=row,
    )  # fmt: skip


def first_copies(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    """Yields the row with the smallest (place, row) of each key.

    Args:
        batches: batches of `rows_spark_schema`, with all rows of each key that they hold.
    """
    import pyarrow as pa

    narrow = []
    with tempfile.TemporaryFile() as file:
        writer = None
        for batch in batches:
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
            columns = {"key": batch["key"], "place": batch["place"].dictionary_encode(), "row": batch["row"]}
            narrow.append(pa.table(columns))
        if writer is None:
            return
        writer.close()
        chosen, start = _are_first(pa.concat_tables(narrow)), 0
        file.seek(0)
        for batch in pa.ipc.open_stream(file):
            yield batch.filter(chosen[start : start + batch.num_rows])
            start += batch.num_rows


def _are_first(rows: "pa.Table") -> "pa.Array":
    """Whether each of the rows (key, place, row) has the smallest (place, row) of its key."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    places = pa.chunked_array(rows.unify_dictionaries()["place"].chunks).combine_chunks()
    ranks = pc.rank(places.dictionary).take(places.indices)
    table = pa.table({"key": rows["key"], "place": ranks, "row": rows["row"]})
    order = pc.sort_indices(table, [("key", "ascending"), ("place", "ascending"), ("row", "ascending")])
    keys = table["key"].take(order)
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy()
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order.to_numpy()[begins]] = True
    return pa.array(chosen)


def pack_function(ingest: IngestConfig, model: ModelConfig, spec: ChunkingSpec) -> "MapFunction":
    """Returns the function that packs documents, for partitions in the order of (place, row).

    Args:
        ingest: not used; the arguments are the same as for `splits.make_ingest_function`.
        model: the model whose tokenizer counts tokens.
        spec: the spec that the driver made; a node with another tokenizer raises a CorpusError.
    """

    def pack(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        # A partition without rows loads no tokenizer.
        for first in batches:
            yield from pack_documents(itertools.chain([first], batches), node_encode(model, spec), spec)

    return pack


def pack_documents(
    batches: Iterator["pa.RecordBatch"], encode: Encode, spec: ChunkingSpec
) -> Iterator["pa.RecordBatch"]:
    """Packs the documents of each place.

    Args:
        batches: documents in the order of (place, row).
        encode: the chunking tokenizer.
        spec: the chunking spec.

    Yields:
        Batches of `splits.output_arrow_schema`.
    """
    out = Output(output_arrow_schema(), fingerprint(spec))
    for _, documents in itertools.groupby(_documents(batches), lambda pair: pair[0]):
        chunker = Chunker(encode, "packed", spec.max_tokens)
        fed = (chunk for _, document in documents for chunk in chunker.feed(document))
        for chunk in itertools.chain(fed, _closed(chunker)):
            _add_chunk(out, chunk)
            if out.is_full:
                yield out.flush()
    if out.rows:
        yield out.flush()


def _closed(chunker: Chunker) -> Iterator[Chunk]:
    yield from chunker.close()


def _documents(batches: Iterator["pa.RecordBatch"]) -> Iterator[tuple[str, Document]]:
    names = ("place", "document_id", "source", "text", "split", "metadata")
    for batch in batches:
        columns = [batch.column(name) for name in names]
        for i in range(batch.num_rows):
            place, *values = (column[i].as_py() for column in columns)
            yield place, Document(*values)


def _add_chunk(out: Output, chunk: Chunk) -> None:
    instance_id = out.add_chunk(chunk)
    for part in chunk.slices:
        if part.starts:
            key = document_key(part.document.document_id, part.document.text)
            out.add(100, kind=DOCUMENT, key=key, instance_id=instance_id)
