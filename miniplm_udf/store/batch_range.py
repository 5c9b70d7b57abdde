"""A condition that limits a search for instances in another table to the micro-batches that they came with.

Input: ids with their `instance_batch_id`; output: a condition on that column. By its statistics Delta then opens only
the files of these micro-batches, so that the cost of finding a micro-batch's ids does not grow with the table. Rows of
`scores`, `score_matrix` and `generations` carry the number that their instance has in `instances`. If `instances` was
created again after the table, the numbers are wrong and the condition is true for all rows: slower, with the same
result. Driver only.
"""

from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.store import delta_log, tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# Property of the tables `scores` and `generations`: the id that Delta gave to the table of instances.
_INSTANCES = "miniplm.instances"


def create(spark: "SparkSession", uri: str, table: schemas.Table, instances_uri: str) -> None:
    """Creates an empty table if there is none; its properties hold the id of the table `instances`.

    Args:
        spark: any session.
        uri: location of the table.
        table: its declaration, SCORES or GENERATIONS.
        instances_uri: location of the table `instances`; if there is none yet, the property is left out.

    Raises:
        CorpusError: the folder at `uri` holds files, but no log.
    """
    instances = delta_log.identity(instances_uri)
    properties = {} if instances is None else {_INSTANCES: instances.id}
    tables.create(spark, uri, table, properties)


def holds(uri: str, instances_uri: str) -> bool:
    """Whether a table was created for this table of instances, so that its `instance_batch_id` are valid.

    Args:
        uri: location of the table `scores` or `generations`.
        instances_uri: location of the table `instances`.

    Returns:
        False if either table does not exist.
    """
    table, instances = delta_log.identity(uri), delta_log.identity(instances_uri)
    return table is not None and instances is not None and table.properties.get(_INSTANCES) == instances.id


def condition(ids: "DataFrame", uri: str, instances_uri: str) -> "Column":
    """Returns a condition that holds for every row with one of the ids, in a table that has their numbers.

    The ids are read once.

    Args:
        ids: rows with the column `instance_batch_id`.
        uri: the table `scores`, also for rows of `score_matrix`; or `generations`.
        instances_uri: the table `instances`.
    """
    from pyspark.sql import functions as F

    if not holds(uri, instances_uri):
        return F.lit(True)
    batch = F.col(schemas.INSTANCE_BATCH_ID.name)
    first, last = ids.agg(F.min(batch), F.max(batch)).collect()[0]
    return F.lit(False) if first is None else batch.between(first, last)
