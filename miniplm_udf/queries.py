"""Running a `foreachBatch` query: its trigger, the id under which its rows stand, and its errors as they were raised.

Input: a streaming DataFrame and a function of (micro-batch, query_id, batch_id). Output: a `RunningQuery` to wait for.
Owns no table. Driver only. A restart on the same checkpoint has the same query id and replays the micro-batch that was
not finished, under the same batch id.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from miniplm_udf.config import ScoreConfig
from miniplm_udf.errors import MiniplmError
from miniplm_udf.streaming import checkpoint_query_id

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery

_POLL_SECONDS = 1

MicroBatch = Callable[["DataFrame", str, int], None]


def query_id_of(spark: "SparkSession", checkpoint_uri: str) -> str:
    """The checkpoint's query id as 32 hexadecimal digits.

    Without its dashes, because Delta cuts the strings of its file statistics at 32 characters: of a longer id it cannot
    tell that a file holds no other, and `query_id != this one` would open every file.
    """
    return checkpoint_query_id(spark, checkpoint_uri).replace("-", "")


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
            if self.failures:
                raise self.failures[0] from error
            raise


def start_query(stream: "DataFrame", micro_batch: MicroBatch, checkpoint_uri: str, config: ScoreConfig) -> RunningQuery:
    """Starts the query, to the end of what is there or for ever (`config.trigger`)."""
    failures: list[MiniplmError] = []

    def guarded(batch: "DataFrame", batch_id: int) -> None:
        try:
            micro_batch(batch, query_id_of(batch.sparkSession, checkpoint_uri), batch_id)
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
