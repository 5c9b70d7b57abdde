"""Checks of `annotations`: one row for each pool instance, and the instances that it names exist and came first.

Input: a `CheckedRoot`; output: `Check`s. The columns of a text are not computed again. Instances that are not annotated
yet count as behind, which is no failure. Writes nothing. Driver only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniplm_udf.schemas import annotations
from miniplm_udf.store import tables
from miniplm_udf.upkeep.checks import Check, CheckedRoot, none, unique

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def annotated(checked: CheckedRoot) -> Iterator[Check]:
    """Checks the table `annotations`.

    Args:
        checked: a root with the tables `annotations` and `instances`.

    Yields:
        One check at a time; each runs Spark jobs.
    """
    rows, pool = checked.table("annotations"), checked.table("instances").where("split = 'pool'")
    yield unique(rows, "annotations", annotations([]).key)
    yield none("annotations: each is of an instance of the pool", tables.missing_from(rows, pool), "instance_id")
    n_pool, n_missing = pool.count(), tables.missing_from(pool.select("instance_id"), rows).count()
    yield Check("annotations: pool = annotated", n_pool, n_pool - n_missing, True, behind=n_missing)
    n_settings = rows.select("annotated_by").distinct().count()
    yield Check("annotations: made by one section", min(n_settings, 1), n_settings, n_settings <= 1)
    for name in ("duplicate_of", "near_duplicate_of"):
        if name in rows.columns:
            wrong = _wrongly_named(rows, pool, name)
            yield none(f"annotations: {name} names an instance that came first", wrong, "instance_id")


def _wrongly_named(rows: "DataFrame", pool: "DataFrame", name: str) -> "DataFrame":
    """Rows that name an instance which does not exist, did not come first or, for an exact copy, has another text."""
    from pyspark.sql import functions as F

    order = F.struct("ingested_at", "instance_id")
    texts = pool.select("instance_id", "content_hash", order.alias("place"))
    named = texts.select(*(F.col(column).alias(f"named_{column}") for column in texts.columns))
    pairs = rows.where(F.col(name).isNotNull()).select("instance_id", name).join(texts, "instance_id")
    joined = pairs.join(named, F.col(name) == F.col("named_instance_id"), "left")
    is_right = F.col("named_place") < F.col("place")
    if name == "duplicate_of":
        is_right &= F.col("named_content_hash") == F.col("content_hash")
    return joined.where(~F.coalesce(is_right, F.lit(False)))
