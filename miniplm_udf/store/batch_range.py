"""A condition that limits a search for instances in `scores` and `score_matrix` to the micro-batches they came with.

Input: ids with their `instance_batch_id`; output: a condition on that column. By its statistics Delta then opens only
the files of those micro-batches, so that the cost of finding a micro-batch's ids does not grow with the table. Rows of
`scores` carry the number that their instance has in `instances`. If `instances` was created again after `scores`, the
numbers are wrong and the condition is true for all rows: slower, with the same result. Driver only.
"""

from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.store import delta_log, tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# Property of the table `scores`: the id that Delta gave to the table of instances.
_INSTANCES = "miniplm.instances"


def create_scores(spark: "SparkSession", scores_uri: str, instances_uri: str) -> None:
    """Creates the empty table `scores` if there is none; its properties hold the id of the table `instances`.

    Args:
        spark: any session.
        scores_uri: location of the table `scores`.
        instances_uri: location of the table `instances`; if there is none yet, the property is left out.

    Raises:
        CorpusError: the folder at `scores_uri` holds files, but no log.
    """
    instances = delta_log.identity(instances_uri)
    properties = {} if instances is None else {_INSTANCES: instances.id}
    tables.create(spark, scores_uri, schemas.SCORES, properties)


def holds(scores_uri: str, instances_uri: str) -> bool:
    """Whether `scores` was created for this table of instances, so that its `instance_batch_id` are valid.

    Args:
        spark: any session.
        scores_uri: location of the table `scores`.
        instances_uri: location of the table `instances`.

    Returns:
        False if either table does not exist.
    """
    scores, instances = delta_log.identity(scores_uri), delta_log.identity(instances_uri)
    return scores is not None and instances is not None and scores.properties.get(_INSTANCES) == instances.id


def condition(ids: "DataFrame", scores_uri: str, instances_uri: str) -> "Column":
    """A condition that holds for every row of `scores` and `score_matrix` with one of the ids. Reads the ids once.

    Args:
        ids: rows with the column `instance_batch_id`.
        scores_uri: the table `scores`.
        instances_uri: the table `instances`.
    """
    from pyspark.sql import functions as F

    if not holds(scores_uri, instances_uri):
        return F.lit(True)
    batch = F.col(schemas.INSTANCE_BATCH_ID.name)
    first, last = ids.agg(F.min(batch), F.max(batch)).collect()[0]
    return F.lit(False) if first is None else batch.between(first, last)
