"""A streaming query of this project: the base class of the stages' queries, and the id of a checkpoint. Driver only.

A `Query` says where rows come from, what is done with a micro-batch under (query_id, batch_id), and what waits behind
it; `runner.QueryRunner` starts it, watches it and stops it. Owns no table. A restart on the same checkpoint has the
same query id and replays the micro-batch that was not finished, under the same batch id. A new checkpoint has a new id,
so the `query_id` of a row tells whether a lost checkpoint's query wrote it.
"""

import abc
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.errors import CorpusError, MiniplmError
from miniplm_udf.store import tables
from miniplm_udf.streams.facts import QueryFacts

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession


class StartAgain(Exception):
    """Raised by a micro-batch before it reads or writes anything: the query has to be started again, from `source`."""


class Query(abc.ABC):
    """A streaming query that writes through `foreachBatch`. Each stage that streams has a subclass.

    Attributes:
        name: the query's name in logs, status records and Spark's pages: ingest, score, score_matrix, ...
        facts: stage, lease, source and more; recorded next to the checkpoint.
        checkpoint_uri: the checkpoint folder.
        also: names of further leases, which queries with other checkpoints need too and may not hold at the same time.
        waits: whether a driver that finds the lease taken waits until it is free (with the trigger available_now).
        backlog_unit: unit of `backlog`.
        outputs_per_row: about how many rows its Python workers return for each row that waits, to show the progress of
            a micro-batch; None shows it only after each micro-batch.
    """

    also: tuple[str, ...] = ()
    waits: bool = False
    backlog_unit: str = "rows"
    outputs_per_row: float | None = None

    def __init__(self, name: str, facts: QueryFacts, checkpoint_uri: str) -> None:
        self.name, self.facts, self.checkpoint_uri = name, facts, checkpoint_uri

    @abc.abstractmethod
    def source(self) -> "DataFrame":
        """Makes the streaming frame. Called at every start, with the leases in hand; a restart calls it again."""

    @abc.abstractmethod
    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        """Writes one micro-batch. A replay comes under the same (query_id, batch_id) and must change nothing.

        Args:
            batch: rows of `source`.
            query_id: the result of `checkpoint_query_id`.
            batch_id: number of the micro-batch, from 0.

        Raises:
            StartAgain: nothing was read or written, and the query has to be started again.
        """

    @abc.abstractmethod
    def backlog(self, offset: Any) -> int:
        """Returns how much waits behind the newest finished micro-batch, in `backlog_unit`.

        Args:
            offset: end offset of that micro-batch (parsed JSON); None before the first is finished.
        """

    def recover(self, error: "StreamingQueryException") -> bool:
        """Repairs what failed the query, if the stage knows how to.

        Args:
            error: the error that ended Spark's query.

        Returns:
            Whether the query is to be started again; False, and nothing repaired, unless a subclass overrides this.
        """
        return False

    def tokens(self) -> Mapping[str, int]:
        """Tokens scored since the command began, by model alias; empty for a query that scores nothing."""
        return {}


def checkpoint_query_id(spark: "SparkSession", checkpoint_uri: str) -> str:
    """The query id that Spark keeps in `<checkpoint>/metadata`; stable across restarts.

    Call it inside `foreachBatch`: Spark writes the file before the first micro-batch. Spark reads it here too, so that
    it works on every storage that can hold a checkpoint.

    Args:
        spark: any session, for example `batch.sparkSession`.
        checkpoint_uri: the value of Spark's option `checkpointLocation`.

    Returns:
        32 hexadecimal digits, without the dashes: Delta cuts strings in its file statistics at 32 characters, and with
        a longer id the condition `query_id != ...` would open every file.

    Raises:
        CorpusError: there is no `metadata` file, or it has no query id.
    """
    from pyspark.errors import PySparkException

    uri = storage.join(checkpoint_uri, "metadata")
    try:
        lines = [row[0] for row in spark.read.text(uri).collect()]
        return str(json.loads("".join(lines))["id"]).replace("-", "")
    except (PySparkException, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"checkpoint {storage.redact(checkpoint_uri)}: expected a file `metadata` with the query's id, found "
            f"{type(error).__name__}; every started checkpoint has one: delete the rest of this checkpoint, and the "
            "next run continues from the tables"
        ) from error


def belongs_to_checkpoint(spark: "SparkSession", uri: str, table: schemas.Table, checkpoint_uri: str) -> bool:
    """Whether a table has the declared columns, and its rows were written by the query of this checkpoint.

    Args:
        uri: a table that one query at a time writes; an empty table belongs to no checkpoint.
        table: its declaration.
        checkpoint_uri: the checkpoint folder of the query.
    """
    try:
        query_id, rows = checkpoint_query_id(spark, checkpoint_uri), tables.read(spark, uri)
    except MiniplmError:
        return False
    has_columns = rows.columns == table.column_names
    return has_columns and [row[0] for row in rows.select("query_id").limit(1).collect()] == [query_id]
