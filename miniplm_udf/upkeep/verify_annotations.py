"""Checks of `annotations`: of instances of the pool, each once, and what they name is there and came first.

Input: a `checks.Root`; output: `Check`s. The columns of a text are not computed again. Instances that are not annotated
yet are behind, which is no failure. Writes nothing. Driver only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniplm_udf import tables
from miniplm_udf.schemas import annotations
from miniplm_udf.upkeep.checks import Check, Root, none, unique

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def annotated(at: Root) -> Iterator[Check]:
    rows, pool = at.table("annotations"), at.table("instances").where("split = 'pool'")
    yield unique(rows, "annotations", annotations([]).key)
    yield none("annotations: each is of an instance of the pool", tables.missing_from(rows, pool), "instance_id")
    n_pool, n_missing = pool.count(), tables.missing_from(pool.select("instance_id"), rows).count()
    yield Check("annotations: pool = annotated", n_pool, n_pool - n_missing, True, behind=n_missing)
    n_marks = rows.select("annotated_by").distinct().count()
    yield Check("annotations: made by one section", min(n_marks, 1), n_marks, n_marks <= 1)
    for name in ("duplicate_of", "near_duplicate_of"):
        if name in rows.columns:
            wrong = _wrongly_named(rows, pool, name)
            yield none(f"annotations: {name} names an instance that came first", wrong, "instance_id")


def _wrongly_named(rows: "DataFrame", pool: "DataFrame", name: str) -> "DataFrame":
    """Rows that name an instance which is not there, or did not come before; or, as a copy, has another text."""
    from pyspark.sql import functions as F

    order = F.struct("ingested_at", "instance_id")
    texts = pool.select("instance_id", "content_hash", order.alias("place"))
    named = texts.select(*(F.col(column).alias(f"named_{column}") for column in texts.columns))
    pairs = rows.where(F.col(name).isNotNull()).select("instance_id", name).join(texts, "instance_id")
    found = pairs.join(named, F.col(name) == F.col("named_instance_id"), "left")
    right = F.col("named_place") < F.col("place")
    if name == "duplicate_of":
        right &= F.col("named_content_hash") == F.col("content_hash")
    return found.where(~F.coalesce(right, F.lit(False)))
