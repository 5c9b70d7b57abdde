"""The table of instances as a streaming source of the queries that run models over it. Driver only; writes nothing."""

from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.rules import in_sample
from miniplm_udf.errors import CorpusError
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def require_instances(spark: "SparkSession", uri: str, verb: str) -> None:
    """Checks that there is a table of instances.

    Args:
        spark: a session.
        uri: location of the table `instances`.
        verb: what the query does with instances, for the message.

    Raises:
        CorpusError: there is none.
    """
    if not tables.exists(spark, uri):
        raise CorpusError(
            f"table {storage.redact(uri)}: expected instances to {verb}, found no table; run `miniplm ingest` first"
        )


def stream_sample(spark: "SparkSession", uri: str, sample: float, max_bytes: str) -> "DataFrame":
    """Returns a share of the instances as a streaming frame.

    Args:
        spark: a session.
        uri: location of the table `instances`.
        sample: share of the instances, chosen by a hash of their ids.
        max_bytes: size of a micro-batch, for example `64m`.
    """
    reader = spark.readStream.format("delta").option("maxBytesPerTrigger", max_bytes)
    # Only a take-down changes existing rows.
    return reader.option("skipChangeCommits", "true").load(uri).where(in_sample(sample))
