"""The summary of `miniplm ingest`: rows that were read, refused, left out and found twice.

Input: counts of the tables before and after the run, the input's files, and the query's progress. Output: an
`IngestSummary`. For the share of rejects, an unreadable file counts as the rows that it holds, as long as it lies in
the input unchanged; any other reject counts as one row. Driver only. Writes nothing; a rerun counts again.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.copies import DOCUMENT
from miniplm_udf.ingestion.documents import STAGE
from miniplm_udf.ingestion.inputs import Inputs
from miniplm_udf.ingestion.quarantine import REASON, UnreadableFile, quarantine_id, unreadable_files
from miniplm_udf.ingestion.splits import INSTANCE
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.ingest")

_NAMES_SHOWN = 5
# Name of the count in the progress of a micro-batch. It stands before the state store: a count behind it came out
# doubled with two state partitions (measured).
OBSERVED = "documents_read"


@dataclasses.dataclass(frozen=True)
class TableCounts:
    """Counts of ingest's tables.

    Attributes:
        instances: instances by split.
        rejects: rejects of ingest by reason.
        documents: documents that begin in an instance.
        text_bytes: UTF-8 bytes of the instances.
        unreadable: the rejects that stand for whole files.
        keys: rows of `document_keys`, one for each packed document; 0 with chunking by document, which has no
            table.
        example: the detail of a reject; None if there is none.
    """

    instances: dict[str, int]
    rejects: dict[str, int]
    documents: int
    text_bytes: int
    unreadable: list[UnreadableFile]
    keys: int
    example: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """The result of `miniplm ingest`.

    Attributes:
        documents: documents that begin in an instance.
        instances: rows of the table `instances`.
        new_instances: rows that this run has added.
        rejected: rows of the table `rejects` from ingest.
        new_rejected: rows that this run has added.
        files: files of the input; 0 for a Delta table.
        by_split: instances by split.
        too_many_rejects: whether rejects exceed `ingest.max_reject_share`; an unreadable file counts as its rows.
        new_documents: documents that this run has added.
        duplicates: documents that this run has read and that were there already.
        rejects_by_reason: rejects of ingest by reason.
        unreadable_files: rows (estimated, if they cannot be counted) of each unreadable file of the input, by path.
        left_out: names of files that lie in the input's folders and are not read.
        changed_files: paths of files that changed after they were taken, and are not read again.
        said: all this in a sentence.
        seconds: duration of the run.
    """

    documents: int
    instances: int
    new_instances: int
    rejected: int
    new_rejected: int
    files: int
    by_split: dict[str, int]
    too_many_rejects: bool
    new_documents: int
    duplicates: int
    rejects_by_reason: dict[str, int]
    unreadable_files: dict[str, int]
    left_out: list[str]
    changed_files: list[str]
    said: str
    seconds: float


def count_tables(spark: "SparkSession", config: ExperimentConfig) -> TableCounts:
    """Returns the numbers of rows of ingest's tables, which must exist.

    Args:
        spark: any session.
        config: the experiment.
    """
    from pyspark.sql import functions as F

    # A document begins at the start of its instance, or at the end of another document in the instance.
    begun = F.sum(F.col("starts_document").cast("int") + F.size("segment_ends"))
    frame = tables.read(spark, config.layout.table("instances"))
    instances = frame.groupBy("split").agg(F.count("*"), begun, F.sum("n_bytes")).collect()
    uri, is_own = config.layout.table("rejects"), f"stage = '{STAGE}'"
    rejects = tables.read(spark, uri).where(is_own).groupBy("reason").count()
    by_reason = dict(rejects.collect())
    keys = config.layout.table(schemas.DOCUMENT_KEYS.name)
    # Only the message about an empty corpus shows it.
    examples = tables.read(spark, uri).where(is_own).select("detail").take(1) if by_reason and not instances else []
    return TableCounts(
        instances={row[0]: row[1] for row in instances},
        rejects=by_reason,
        documents=sum(row[2] for row in instances),
        text_bytes=sum(row[3] for row in instances),
        unreadable=unreadable_files(spark, config) if by_reason.get(REASON) else [],
        keys=tables.read(spark, keys).count() if tables.exists(spark, keys) else 0,
        example=examples[0][0] if examples else None,
    )


def observed(rows: "DataFrame") -> "DataFrame":
    """Returns the frame with a count of the documents that it reads, before duplicates are dropped.

    The count is `observedMetrics.documents_read.documents` in the query's progress (`documents_seen`). A document is a
    row of kind `document` (packed chunking), or begins in an instance.

    Args:
        rows: rows with the columns of `splits.output_columns`.
    """
    from pyspark.sql import functions as F

    begun = F.col("starts_document").cast("int") + F.size("segment_ends")
    documents = F.sum(F.when(F.col("kind") == DOCUMENT, 1).when(F.col("kind") == INSTANCE, begun))
    return rows.observe(OBSERVED, F.coalesce(documents, F.lit(0)).alias("documents"))


@contextmanager
def documents_seen(sessions: "Collection[SparkSession]") -> Iterator[Callable[[], int]]:
    """Counts the documents that the micro-batches of some sessions read while the block runs.

    Args:
        sessions: sessions that run an observed query (`observed`).

    Yields:
        A function that returns the number so far.
    """
    from pyspark.sql.streaming import StreamingQueryListener

    numbers: dict[tuple[str, int], int] = {}

    class DocumentCounter(StreamingQueryListener):
        def onQueryStarted(self, event: Any) -> None:
            pass

        def onQueryProgress(self, event: Any) -> None:
            progress = json.loads(event.progress.json)
            seen = progress.get("observedMetrics", {}).get(OBSERVED, {}).get("documents")
            if seen is not None:
                numbers[progress["id"], progress["batchId"]] = int(seen)

        def onQueryIdle(self, event: Any) -> None:
            pass

        def onQueryTerminated(self, event: Any) -> None:
            pass

    listener = DocumentCounter()
    for session in sessions:
        session.streams.addListener(listener)
    try:
        yield lambda: sum(numbers.values())
    finally:
        for session in sessions:
            session.streams.removeListener(listener)


def summarize(
    config: ExperimentConfig, inputs: Inputs, before: TableCounts, after: TableCounts, n_seen: int, changed: list[str]
) -> IngestSummary:
    """Summarizes a run of the ingest query.

    Args:
        config: the experiment.
        inputs: the input at the start of the run.
        before: the tables before the run.
        after: the tables after the run.
        n_seen: documents that this run has read.
        changed: paths of files that changed after they were taken.

    Returns:
        The summary, with `seconds` 0.

    Raises:
        CorpusError: the table `instances` is empty.
    """
    total, rejected = sum(after.instances.values()), sum(after.rejects.values())
    if total == 0:
        raise CorpusError(
            f"nothing was ingested: expected at least one document in {config.ingest.inputs}, found "
            f"{len(inputs.files)} files and rejects {after.rejects or 'none'}"
            f"{f', for example: {after.example!r}' if after.example else ''}; "
            f"see the table {storage.redact(config.layout.table('rejects'))}"
        )
    unreadable = _rows_of_unreadable(inputs, after)
    n_bad = rejected + sum(unreadable.values()) - len(unreadable)
    summary = IngestSummary(
        documents=after.documents,
        instances=total,
        new_instances=total - sum(before.instances.values()),
        rejected=rejected,
        new_rejected=rejected - sum(before.rejects.values()),
        files=len(inputs.files),
        by_split={split: after.instances.get(split, 0) for split in schemas.SPLITS},
        too_many_rejects=n_bad > config.ingest.max_reject_share * (after.documents + n_bad),
        new_documents=after.documents - before.documents,
        duplicates=max(0, n_seen - _n_first(before, after)),
        rejects_by_reason=after.rejects,
        unreadable_files=unreadable,
        left_out=list(inputs.left_out),
        changed_files=changed,
        said="",
        seconds=0.0,
    )
    return dataclasses.replace(summary, said=_sentence(summary, n_bad, config.ingest.max_reject_share))


def _n_first(before: TableCounts, after: TableCounts) -> int:
    """Counts the documents that this run has seen first, including documents refused because they were taken down."""
    if after.keys:
        return after.keys - before.keys
    refused = after.rejects.get("taken_down", 0) - before.rejects.get("taken_down", 0)
    return after.documents - before.documents + refused


def _rows_of_unreadable(inputs: Inputs, after: TableCounts) -> dict[str, int]:
    """Counts the rows of each unreadable file that is still in the input, by path."""
    current = {quarantine_id(file) for file in inputs.files} if after.unreadable else set()
    mean_bytes = after.text_bytes / max(1, after.documents)
    return {file.path: file.n_rows(mean_bytes) for file in after.unreadable if file.reject_id in current}


def _sentence(summary: IngestSummary, n_bad: int, limit: float) -> str:
    """Tells in a sentence what was read, refused, found twice and left out."""
    share = n_bad / (summary.documents + n_bad)
    parts = [
        f"{summary.files} files read" if summary.files else "table read",
        f"{summary.documents:,} documents ({summary.new_documents:,} new) in {summary.instances:,} instances "
        f"({summary.new_instances:,} new)",
        f"{summary.duplicates:,} documents were duplicates",
    ]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(summary.rejects_by_reason.items()))
    parts.append(f"{summary.rejected:,} rejects ({reasons})" if reasons else "no rejects")
    if unreadable := summary.unreadable_files:
        parts.append(f"unreadable files, with about {sum(unreadable.values()):,} rows: {_names(list(unreadable))}")
    if summary.left_out:
        parts.append(f"{len(summary.left_out)} names left out: {_names(summary.left_out)}")
    if summary.changed_files:
        parts.append(f"changed after they were taken, not read again: {_names(summary.changed_files)}")
    if summary.too_many_rejects:
        parts.append(f"{share:.1%} of the rows were refused, more than ingest.max_reject_share={limit:g} allows")
    return "ingest: " + "; ".join(parts)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    shown = (re.sub(r"^.*/(?=[^/]+)", "", name.replace("/ (", " (")) for name in names[:_NAMES_SHOWN])
    return ", ".join(shown) + more


def warn_of_empty_splits(config: ExperimentConfig, summary: IngestSummary) -> None:
    """Warns of a split that a small input left empty by chance, because the stage that reads it runs much later.

    Args:
        config: the experiment.
        summary: the counts; a split whose share is 0 may be empty.
    """
    for split in ("heldout", "reference"):
        share = getattr(config.ingest.split, split)
        if share > 0 and not summary.by_split[split]:
            LOGGER.warning(
                "ingest: the split %s is empty: none of %d documents fell into its share of %g; ingest more text, or "
                "raise ingest.split.%s and ingest into a new root",
                split, summary.documents, share, split,
            )  # fmt: skip
