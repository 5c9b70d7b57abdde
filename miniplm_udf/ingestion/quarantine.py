"""Files that cannot be read: each becomes one row of `rejects`, and the query continues without it. Driver only.

Input: the files that wait, the files of a micro-batch that begins, and failures of the query. Output: rows of
`rejects`, and the files that the stream leaves out. Files are checked before the query reads them: compressed files
that wait when the query starts, all other files when their micro-batch begins. A micro-batch with damaged files starts
the query again, once for all of them. A query fails only at a file that could not be checked, or that changed after the
check. The row of a file keeps the number of its rows (`UnreadableFile.n_rows`). A retry checks again and finds the
same.
"""

import dataclasses
import datetime
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.documents import RAW_BYTES, STAGE, reject_id
from miniplm_udf.ingestion.footers import Damage
from miniplm_udf.ingestion.inputs import Inputs, list_files, same_file
from miniplm_udf.ingestion.listing import InputFile, plain_path
from miniplm_udf.ingestion.parquet_columns import reads_all
from miniplm_udf.ingestion.readability import damaged_files
from miniplm_udf.ingestion.survey import survey_parquet
from miniplm_udf.ingestion.taken import TakenFile, batch_files, finished_batch, record_sizes, taken_files
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.store import tables
from miniplm_udf.streams.query import checkpoint_query_id

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.ingest")

REASON = "unreadable_file"
# batch_id of a row that no micro-batch wrote, and its query_id if the query has not started yet.
OUTSIDE_BATCHES = -1
OUTSIDE_QUERIES = "0" * 32
_UNREADABLE = re.compile(r"\[(FAILED_READ_FILE[.\w]*)\] Encountered error while reading file (.+?)\.(?:\s|$)")
_ROWS = re.compile(r"; rows: (\d+)$")
# The number of files that warnings name.
_SHOWN = 20


class Quarantine:
    """Finds the unreadable files of a query's input and keeps them out of the stream.

    Args:
        spark: a session.
        config: the experiment.
        checkpoint_uri: checkpoint of the query.
        inputs: the input.
        taken: the files that the query has taken.

    Attributes:
        inputs: the input, as it was last listed.
        excluded: files that the stream leaves out.
    """

    def __init__(
        self, spark: "SparkSession", config: ExperimentConfig, checkpoint_uri: str, inputs: Inputs,
        taken: Sequence[TakenFile],
    ) -> None:  # fmt: skip
        self._spark, self._config, self._checkpoint_uri = spark, config, checkpoint_uri
        self.inputs, self._taken = inputs, taken
        # A file that was read to its end is not checked again when the stream is made again.
        self._checked: set[InputFile] = set()
        self.excluded = self._recorded(inputs.files)

    def check(self) -> None:
        """Checks the files that no finished micro-batch has taken, and writes a reject for each that cannot be read."""
        if self.inputs.format == "delta":
            return
        waiting = self._waiting(self.inputs.files)
        damaged = [damage for damage in self.inputs.damaged if damage.file in waiting]
        # The rows of other formats are decoded when their micro-batch begins.
        self._add([*damaged, *(self._damaged(waiting) if self.inputs.format in ("jsonl", "text") else [])])

    def check_batch(self, batch_id: int) -> bool:
        """Checks the files of a micro-batch before it reads them, and records their sizes.

        Args:
            batch_id: number of the micro-batch, from 0.

        Returns:
            Whether the query has to be started again, because a file is damaged or its columns need another schema.
        """
        if self.inputs.format == "delta":
            return False
        files = batch_files(self._spark, self._checkpoint_uri, batch_id)
        record_sizes(self._checkpoint_uri, batch_id, {plain_path(file.path): file.n_bytes for file in files})
        n_before = len(self.excluded)
        needs_restart = self._has_new_columns(files) and self._survey_again()
        self._add(self._damaged(files))
        return needs_restart or len(self.excluded) > n_before

    def recover(self, message: str) -> bool:
        """Excludes the file that failed the query.

        Args:
            message: the text of Spark's error.

        Returns:
            Whether the query can start again: a file was excluded, or the stream has another schema now.

        Raises:
            CorpusError: a file disappeared while it was read.
        """
        if self.inputs.format == "delta":
            return False
        if self.inputs.format == "parquet" and self._survey_again():
            return True
        match = _UNREADABLE.search(message)
        if match is None:
            return False
        files = list_files(self._spark, self.inputs.path)
        file = next((file for file in files if same_file(file.path, match.group(2))), None)
        if file is None:
            raise CorpusError(f"{match.group(2)}: the file disappeared while it was read; run again")
        if file in self.excluded:
            return False
        self._add([Damage(file, _cause(match.group(1), message))])
        return True

    def _survey_again(self) -> bool:
        """Reads the footers of new files; returns whether the stream has to be made again for them."""
        self._taken = taken_files(self._checkpoint_uri)
        listed = tuple(list_files(self._spark, self.inputs.path))
        files = tuple(file for file in listed if not self.inputs.by_name or file.path.lower().endswith(".parquet"))
        survey = survey_parquet(self._spark, self._waiting(files), self._config.ingest.fields)
        before, self.inputs = self.inputs, dataclasses.replace(self.inputs.surveyed(survey), files=files)
        self._add(survey.damaged)
        has_changed = self.inputs.schema != before.schema or not set(survey.odd) <= set(before.odd)
        return has_changed or bool(survey.damaged)

    def _has_new_columns(self, files: Sequence[InputFile]) -> bool:
        """Whether Parquet files that are new since the last listing are damaged or do not fit the schema."""
        if self.inputs.format != "parquet":
            return False
        surveyed = self._checked.union(self.inputs.files)
        new = [file for file in files if file not in surveyed]
        if not new:
            return False
        survey = survey_parquet(self._spark, new, self._config.ingest.fields)
        return bool(survey.damaged or survey.odd) or not reads_all(self.inputs.schema, survey.schema)

    def _damaged(self, files: Sequence[InputFile]) -> list[Damage]:
        """Reads to their ends the files that were not checked before and are not excluded; returns damaged ones."""
        new = [file for file in files if file not in self._checked and file not in self.excluded]
        self._checked.update(new)
        return damaged_files(self._spark, new, self.inputs.format, self._config.ingest.fields)

    def _waiting(self, files: Sequence[InputFile]) -> list[InputFile]:
        """The files that no finished micro-batch has taken and that are not excluded."""
        finished, excluded = finished_batch(self._checkpoint_uri), set(self.excluded)
        taken = {plain_path(taken.path) for taken in self._taken if taken.batch_id <= finished}
        return [file for file in files if plain_path(file.path) not in taken and file not in excluded]

    def _recorded(self, files: Iterable[InputFile]) -> list[InputFile]:
        """The files that were recorded as unreadable and have not changed; a new checkpoint would read them again."""
        recorded = {file.reject_id for file in unreadable_files(self._spark, self._config)}
        return [file for file in files if recorded and quarantine_id(file) in recorded]

    def _add(self, damaged: Sequence[Damage]) -> None:
        if not damaged:
            return
        for damage in damaged:
            LOGGER.warning(
                "ingest: %s is left out (a repaired file needs another name): %s", damage.file.path, damage.detail
            )
        rows = [self._row(damage) for damage in self._with_rows(damaged)]
        frame = self._spark.createDataFrame(rows, schemas.REJECTS.spark_schema())
        tables.append(frame, self._config.layout.table("rejects"), schemas.REJECTS)
        self.excluded += [damage.file for damage in damaged]

    def _with_rows(self, damaged: Sequence[Damage]) -> list[Damage]:
        """Estimates the rows of files whose rows are not known, from the rows per byte of the readable files."""
        rate = self.inputs.rows_per_byte
        return [
            dataclasses.replace(d, n_rows=max(1, round(d.file.n_bytes * rate))) if d.n_rows is None and rate else d
            for d in damaged
        ]

    def _row(self, damage: Damage) -> TableRow:
        rows = "" if damage.n_rows is None else f"; rows: {max(1, damage.n_rows)}"
        has_started = storage.exists(storage.join(self._checkpoint_uri, "metadata"))
        return {
            "reject_id": quarantine_id(damage.file),
            "stage": STAGE,
            "reason": REASON,
            "detail": damage.detail[: RAW_BYTES - len(rows)] + rows,
            "source_file": damage.file.path,
            "instance_id": None,
            "raw": None,
            "n_bytes": damage.file.n_bytes,
            "rejected_at": datetime.datetime.now(datetime.UTC),
            "query_id": checkpoint_query_id(self._spark, self._checkpoint_uri) if has_started else OUTSIDE_QUERIES,
            "batch_id": OUTSIDE_BATCHES,
        }


def _cause(condition: str, message: str) -> str:
    causes = re.findall(r"^Caused by: (.+)$", message, re.MULTILINE)
    reading = [cause for cause in causes if not cause.startswith(("py4j.", "org.apache.spark."))]
    return f"{condition}: {reading[-1] if reading else 'see the log'}"


def quarantine_id(file: InputFile) -> str:
    """The id of the reject of an unreadable file; a file that was changed gets another id.

    Args:
        file: the unreadable file; its path, modification time and size are hashed.
    """
    return reject_id(REASON, file.path, f"{file.modified_micros} {file.n_bytes}")


@dataclasses.dataclass(frozen=True)
class UnreadableFile:
    """A row of `rejects` that stands for a whole file.

    Attributes:
        reject_id: the result of `quarantine_id`.
        path: the file's path, percent-encoded.
        n_bytes: the file's size.
        detail: what is wrong with the file; ends in the number of its rows if that was known.
    """

    reject_id: str
    path: str
    n_bytes: int | None
    detail: str | None

    def n_rows(self, mean_document_bytes: float) -> int:
        """Returns the counted rows of the file; if they were not counted, an estimate of at least 1.

        Args:
            mean_document_bytes: mean size of a document, by which the size of the file is divided.
        """
        match = _ROWS.search(self.detail or "")
        if match:
            return int(match.group(1))
        return max(1, round((self.n_bytes or 0) / max(1.0, mean_document_bytes)))


def unreadable_files(spark: "SparkSession", config: ExperimentConfig) -> list[UnreadableFile]:
    """Returns the rows of `rejects` that stand for whole files.

    Args:
        spark: any session.
        config: the experiment, which has a table `rejects`.
    """
    rejects = tables.read(spark, config.layout.table("rejects")).where(f"stage = '{STAGE}' AND reason = '{REASON}'")
    rows = rejects.select("reject_id", "source_file", "n_bytes", "detail").collect()
    return [UnreadableFile(*row) for row in rows]


def warn_of_changed(paths: Sequence[str], grown: Mapping[str, int]) -> None:
    """Warns of files that changed after they were taken: one line for each of the first few, then their number.

    Args:
        paths: URIs of the files.
        grown: bytes by which files have grown, by URI (`taken.growth`).
    """
    for path in paths[:_SHOWN]:
        if path in grown:
            LOGGER.warning(
                "ingest: %s has grown by %s bytes after it was read, and its new rows are not read; put new rows into "
                "new files, or copy the file to another name: its old rows count as duplicates",
                path, f"{grown[path]:,}",
            )  # fmt: skip
            continue
        LOGGER.warning(
            "ingest: %s changed after it was read and is not read again; give it another name: rows that are known "
            "count as duplicates",
            path,
        )
    if len(paths) > _SHOWN:
        LOGGER.warning("ingest: %d more files changed after they were taken", len(paths) - _SHOWN)
