"""The sets of texts that models are evaluated on: the experiment's held-out instances, and the external sets.

Inputs: rows of `instances` with `split = heldout`, read with delta-rs and Arrow; and `evaluate.inputs`
(miniplm_udf/ingestion/text_sets.py). Output: an `EvaluationSet` for each, whose rows can be read as often as there are
models; and the instances that the official code would make of external documents. Owns the limit of rows per source,
and the fingerprints by which a repeated evaluation is skipped. Writes nothing.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.chunking import Chunk, Chunker, Encode
from miniplm_udf.ingestion.documents import Document
from miniplm_udf.ingestion.text_sets import BadRow, TextSet, open_text_set
from miniplm_udf.store import delta_files
from trainer.loader.data import open_delta

_Row = TypeVar("_Row")


class HeldOutRow(TypedDict):
    """A held-out instance: the columns of `instances` that are read."""

    instance_id: str
    source: str
    text: str
    segment_ends: list[int]
    ends_document: bool
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class TextRow:
    """One text of a set: a held-out instance, or an external document.

    Attributes:
        text: the text.
        source: its source.
        segment_ends: UTF-8 byte offsets where a document ends and the next one begins.
        ends_document: whether the text ends at a document's end.
    """

    text: str
    source: str
    segment_ends: list[int]
    ends_document: bool

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode("utf-8"))


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A set of texts.

    Attributes:
        name: `heldout`, or the set's name in `evaluate.inputs`.
        location: path or URI, without secrets.
        version: version of a Delta table; None for files.
        fingerprint: hash of what is in the set, 32 hexadecimal digits.
        rows: reads the set from its start.
        n_bytes: bytes of all texts; None if they are not known before the set is read.
        is_cut: whether the texts are instances, as ingestion cuts them; else they are whole documents.
    """

    name: str
    location: str
    version: int | None
    fingerprint: str
    rows: Callable[[], Iterator[TextRow | BadRow]]
    n_bytes: int | None
    is_cut: bool


class InstanceCutter:
    """Makes the official instances of a set's texts.

    Documents of one source are joined with separators and cut as ingestion does it with `chunking.mode: packed`, in the
    model's own tokens. Instances stay as they are.

    Args:
        texts: the set.
        encode: the model's tokenizer, as `miniplm_udf.ingestion.chunking` takes it.
        max_tokens: largest number of tokens of an instance.
    """

    def __init__(self, texts: EvaluationSet, encode: Encode, max_tokens: int):
        self._chunker = None if texts.is_cut else Chunker(encode, "packed", max_tokens)

    def feed(self, rows: Sequence[TextRow]) -> list[TextRow]:
        """Returns the instances that are complete after the next texts of the set.

        Args:
            rows: the texts.
        """
        chunker = self._chunker
        if chunker is None:
            return list(rows)
        documents = (Document("", row.source, row.text, "pool") for row in rows)
        return [_instance(chunk) for document in documents for chunk in chunker.feed(document)]

    def close(self) -> list[TextRow]:
        """Returns the last instances."""
        return [] if self._chunker is None else [_instance(chunk) for chunk in self._chunker.close()]


def _instance(chunk: Chunk) -> TextRow:
    last = chunk.slices[-1]
    return TextRow(chunk.text, last.document.source, chunk.segment_ends, last.ends)


def evaluation_sets(config: ExperimentConfig) -> list[EvaluationSet]:
    """Opens every set of an experiment.

    Args:
        config: the experiment.

    Returns:
        The held-out instances first, if `ingest.split.heldout` is above 0; then the external sets, in the config's
        order.

    Raises:
        ConfigError: an external set is missing, or lacks the text column.
        CorpusError: there is no held-out instance, or a file of an external set cannot be read.
    """
    heldout = [heldout_set(config)] if config.ingest.split.heldout > 0 else []
    return [*heldout, *(_external(config, text_set) for text_set in external_sets(config))]


def external_sets(config: ExperimentConfig) -> list[TextSet]:
    """Finds the files of the external sets, and checks their columns.

    Args:
        config: the experiment.

    Returns:
        The sets, in the config's order.

    Raises:
        ConfigError: a set is missing, or lacks the text column.
        CorpusError: the first file of a set cannot be read.
    """
    sets = [open_text_set(name, section) for name, section in config.evaluate.inputs.items()]
    for text_set in sets:
        text_set.check_columns()
    return sets


def heldout_set(config: ExperimentConfig) -> EvaluationSet:
    """Reads the held-out instances.

    Args:
        config: the experiment. `evaluate.max_instances_per_source` limits the instances per source; the instances with
            the lowest ids are taken.

    Returns:
        The instances, sorted by id, in memory.

    Raises:
        CorpusError: there is no `instances` table, or it has no held-out row.
    """
    import pyarrow.dataset as ds

    uri = config.layout.table("instances")
    table = open_delta(uri, None, "ingest")
    paths = delta_files.files_of(table, uri)
    columns = list(HeldOutRow.__annotations__)
    heldout = _dataset(paths).to_table(columns=columns, filter=ds.field("split") == "heldout") if paths else None
    if heldout is None or heldout.num_rows == 0:
        raise CorpusError(
            f"{storage.redact(uri)} has no held-out row: raise ingest.split.heldout (now "
            f"{config.ingest.split.heldout}) and ingest into a new root, or ingest more text"
        )
    sorted_rows: list[HeldOutRow] = heldout.sort_by("instance_id").to_pylist()
    rows = list(_bounded(sorted_rows, lambda row: row["source"], config.evaluate.max_instances_per_source))
    ids = "\n".join(row["instance_id"] for row in rows)
    return EvaluationSet(
        name=HELDOUT,
        location=storage.redact(uri),
        version=int(table.version()),
        fingerprint=hashlib.sha256(ids.encode()).hexdigest()[:32],
        rows=lambda: (TextRow(row["text"], row["source"], row["segment_ends"], row["ends_document"]) for row in rows),
        n_bytes=sum(row["n_bytes"] for row in rows),
        is_cut=True,
    )


def _external(config: ExperimentConfig, text_set: TextSet) -> EvaluationSet:
    """An external set of documents."""
    limit, section = config.evaluate.max_instances_per_source, text_set.config

    def rows() -> Iterator[TextRow | BadRow]:
        read = (
            row if isinstance(row, BadRow) else TextRow(row.text, row.source, [], ends_document=True)
            for row in text_set.rows()
        )
        return _bounded(read, lambda row: None if isinstance(row, BadRow) else row.source, limit)

    return EvaluationSet(
        name=text_set.name,
        location=text_set.location,
        version=text_set.version,
        fingerprint=fingerprint(text_set.state, section.text_column, section.source_column, limit),
        rows=rows,
        n_bytes=None,
        is_cut=False,
    )


def _bounded(rows: Iterable[_Row], source: Callable[[_Row], str | None], limit: int) -> Iterator[_Row]:
    """The first `limit` rows of each source; all rows if the limit is not above 0; bad rows have no source and stay."""
    counts: collections.Counter[str | None] = collections.Counter()
    for row in rows:
        name = source(row)
        counts[name] += 1
        if limit <= 0 or name is None or counts[name] <= limit:
            yield row


def _dataset(paths: list[str]) -> Any:
    import fsspec
    import pyarrow.dataset as ds

    filesystem, _ = fsspec.core.url_to_fs(paths[0])
    inner = [fsspec.core.url_to_fs(path)[1] for path in paths]
    return ds.dataset(inner, format="parquet", filesystem=filesystem)
