"""What a streaming query is to this project, and the id of its checkpoint. Driver only.

A `Query` says where rows come from, what is done with a micro-batch under (query_id, batch_id), and what can be told
of it; `runner.QueryRunner` starts it, watches it and stops it. Owns no table. A restart on the same checkpoint has the
same query id and replays the micro-batch that was not finished, under the same batch id; a new checkpoint has a new id,
and rows of a lost one are told by their `query_id`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf import errors, storage
from miniplm_udf.errors import CorpusError, MiniplmError

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession

MicroBatch = Callable[["DataFrame", str, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """A streaming query that writes through `foreachBatch`.

    Attributes:
        name: of the stage, for people: ingest, score, score_matrix.
        lease: what one driver at a time may do: a table that has one writer, or this one checkpoint.
        also: further leases that it needs, of what queries with other checkpoints may not do at the same time.
        waits: a driver that finds the lease taken waits until it is free, where it runs to the end of what is there.
        source: makes the streaming frame; called at each start, and again after a failure that `recover` mended.
        micro_batch: called with (micro-batch, query_id, batch_id).
        recover: called with the failure of the query; whether it is to be started again.
        tokens: tokens scored since the command began, by model alias.
        backlog: what waits behind the newest finished micro-batch, in `backlog_unit`, given the end offset of that
            micro-batch (parsed JSON; None where there is none).
    """

    name: str
    lease: str
    also: tuple[str, ...] = ()
    waits: bool = False
    checkpoint_uri: str
    source: Callable[[], "DataFrame"]
    micro_batch: MicroBatch
    recover: Callable[["StreamingQueryException"], bool] = lambda error: False
    tokens: Callable[[], Mapping[str, int]] = dict
    backlog: Callable[[Any], int]
    backlog_unit: str = "rows"


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
