"""Where rows of given instances can stand in `scores` and `score_matrix`: beside those that were ingested with them.

Input: ids with their `instance_batch_id`; output: a condition on that column. Delta's statistics then open the files of
those micro-batches alone, so that looking for a micro-batch's ids costs what it is worth and not what the table has
grown to. Rows carry the number that their instance has in `instances`; where that table was made anew since `scores`
was, the numbers do not hold, and the condition is none: slower, and as exact. Driver only.
"""

from typing import TYPE_CHECKING

from miniplm_udf import schemas, tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# A property of `scores`: the id that Delta gave to the table of instances.
_INSTANCES = "miniplm.instances"


def create_scores(spark: "SparkSession", scores_uri: str, instances_uri: str) -> None:
    """Makes the empty table `scores` where there is none, and keeps in it which `instances` it is of."""
    instances = tables.detail(spark, instances_uri)
    properties = {} if instances is None else {_INSTANCES: instances["id"]}
    tables.create(spark, scores_uri, schemas.SCORES, properties)


def holds(spark: "SparkSession", scores_uri: str, instances_uri: str) -> bool:
    """Whether the numbers in `scores` are those of this table of instances."""
    scores, instances = tables.detail(spark, scores_uri), tables.detail(spark, instances_uri)
    return scores is not None and instances is not None and scores["properties"].get(_INSTANCES) == instances["id"]


def condition(ids: "DataFrame", scores_uri: str, instances_uri: str) -> "Column":
    """What every row of `scores` and of `score_matrix` fulfils that is of one of the ids. Reads them once.

    Args:
        ids: with the column `instance_batch_id`.
    """
    from pyspark.sql import functions as F

    if not holds(ids.sparkSession, scores_uri, instances_uri):
        return F.lit(True)
    batch = F.col(schemas.INSTANCE_BATCH_ID.name)
    first, last = ids.agg(F.min(batch), F.max(batch)).collect()[0]
    return F.lit(False) if first is None else batch.between(first, last)
