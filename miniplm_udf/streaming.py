"""Structured Streaming queries that write through `foreachBatch`: start, wait, and the id of a checkpoint. Driver only.

Input: a streaming DataFrame and a function of (micro-batch, query_id, batch_id). Output: a `RunningQuery` to wait for.
Owns no table. A restart on the same checkpoint has the same query id and replays the micro-batch that was not finished,
under the same batch id; a new checkpoint has a new id, and rows of a lost one are told by their `query_id`.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from miniplm_udf import errors, storage
from miniplm_udf.config import ScoreConfig
from miniplm_udf.errors import CorpusError, MiniplmError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery

_POLL_SECONDS = 1

MicroBatch = Callable[["DataFrame", str, int], None]


def checkpoint_query_id(spark: "SparkSession", checkpoint_uri: str) -> str:
    """The query id that Spark keeps in `<checkpoint>/metadata`, as 32 hexadecimal digits; stable across restarts.

    Without its dashes, because Delta cuts the strings of its file statistics at 32 characters: of a longer id it cannot
    tell that a file holds no other, and `query_id != this one` would open every file.

    Call it inside `foreachBatch`: Spark writes the file before the first batch. Spark itself reads it, so that every
    storage that a checkpoint can be on works.

    Args:
        spark: any session, also a batch's own.
        checkpoint_uri: as given to `checkpointLocation`.

    Raises:
        CorpusError: there is no such file, or it names no query.
    """
    from pyspark.errors import PySparkException

    place = storage.join(checkpoint_uri, "metadata")
    try:
        lines = [row[0] for row in spark.read.text(place).collect()]
        return str(json.loads("".join(lines))["id"]).replace("-", "")
    except (PySparkException, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"checkpoint {storage.redact(checkpoint_uri)}: expected a file `metadata` with the query's id, found "
            f"{type(error).__name__}; a checkpoint that was started has one: delete what is left of this one, and the "
            "next run takes up again from the tables"
        ) from error


def executor_error(error: BaseException) -> MiniplmError | None:
    """The error of ours that an executor raised and that Spark carried to the driver in its own, as text; or None."""
    for name, message in re.findall(r"miniplm_udf\.errors\.(\w+): (.+)", str(error)):
        found = getattr(errors, name, None)
        if isinstance(found, type) and issubclass(found, MiniplmError):
            return found(message.strip())
    return None


@dataclasses.dataclass(frozen=True)
class RunningQuery:
    """A started query. `failures` is what its micro-batches raised."""

    query: "StreamingQuery"
    failures: list[MiniplmError]

    def has_ended(self, seconds: int) -> bool:
        """Waits so long for the end. An error of ours in a micro-batch is raised as it was, not in Spark's wrapping."""
        from pyspark.errors import StreamingQueryException

        try:
            return bool(self.query.awaitTermination(seconds))
        except StreamingQueryException as error:
            ours = self.failures[0] if self.failures else executor_error(error)
            if ours is not None:
                raise ours from error
            raise


def start_query(stream: "DataFrame", micro_batch: MicroBatch, checkpoint_uri: str, config: ScoreConfig) -> RunningQuery:
    """Starts the query, to the end of what is there or for ever (`config.trigger`)."""
    failures: list[MiniplmError] = []

    def guarded(batch: "DataFrame", batch_id: int) -> None:
        try:
            micro_batch(batch, checkpoint_query_id(batch.sparkSession, checkpoint_uri), batch_id)
        except MiniplmError as error:
            failures.append(error)
            raise

    writer = stream.writeStream.foreachBatch(guarded).option("checkpointLocation", checkpoint_uri)
    if config.trigger == "available_now":
        writer = writer.trigger(availableNow=True)
    else:
        writer = writer.trigger(processingTime=f"{config.interval_seconds} seconds")
    return RunningQuery(writer.start(), failures)


def wait_for_all(running: list[RunningQuery]) -> None:
    """Waits until all have ended; where one fails, or we are interrupted, the others are stopped."""
    try:
        ended = [False]
        while not all(ended):
            ended = [one.has_ended(_POLL_SECONDS) for one in running]
    finally:
        for one in running:
            one.query.stop()
