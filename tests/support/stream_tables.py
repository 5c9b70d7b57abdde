"""Columns of generated tables for `bench_stream`: rows made of a number `id` by Spark alone, ten million in a minute.

Input: frames with `id` (and `alias`, for scores). Output: a value for each declared column, those that name a query and
a micro-batch apart. An instance's id is the same in all tables. Driver only; writes nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column


def row_id(name: str) -> "Column":
    from pyspark.sql import functions as F

    return F.md5(F.concat(F.lit(name), F.col("id").cast("string")).cast("binary"))


def instance_values() -> dict[str, "Column"]:
    """Columns of generated instances, without `query_id` and `batch_id`. Their text is short: nothing reads it."""
    from pyspark.sql import functions as F

    return {
        "instance_id": row_id("instance"),
        "stream_id": row_id("stream"),
        "ordinal": F.lit(0).cast("bigint"),
        "document_ids": F.array(F.col("id").cast("string")),
        "start_byte": F.lit(0).cast("bigint"),
        "source": F.lit("web"),
        "text": F.format_string("%012d", "id"),
        "segment_ends": F.array().cast("array<int>"),
        "starts_document": F.lit(True),
        "ends_document": F.lit(True),
        "n_bytes": F.lit(12).cast("bigint"),
        "content_hash": row_id("content"),
        "split": F.lit("pool"),
        "metadata": F.lit(None).cast("string"),
        "ingested_at": F.current_timestamp(),
    }


def score_values(models: dict[str, str]) -> dict[str, "Column"]:
    from pyspark.sql import functions as F

    revisions = F.create_map(*(F.lit(value) for pair in models.items() for value in pair))
    return {
        "instance_id": row_id("instance"),
        "model_id": F.col("alias"),
        "model_revision": revisions[F.col("alias")],
        "tokenizer_hash": F.lit("t" * 32),
        "nll_sum_nats": (F.col("id") % 997).cast("double"),
        "n_tokens": F.lit(3).cast("bigint"),
        "n_bytes": F.lit(12).cast("bigint"),
        "source": F.lit("web"),
        "split": F.lit("pool"),
        "content_hash": row_id("content"),
        "text_bytes": F.lit(12).cast("bigint"),
        "dtype": F.lit("float32"),
        "context_tokens": F.lit(64).cast("bigint"),
        "run_id": F.lit("generated"),
        "scored_at": F.current_timestamp(),
    }


def matrix_values(models: dict[str, str]) -> dict[str, "Column"]:
    from pyspark.sql import functions as F

    nats = (F.col("id") % 997).cast("double")
    values = {name: value for name, value in score_values(models).items() if name in ("instance_id", "source", "split")}
    values |= {"n_bytes": F.lit(12).cast("bigint"), "content_hash": row_id("content")}
    for alias, revision in models.items():
        values |= {
            f"{alias}_nll_mean": nats / 3,
            f"{alias}_nll_sum_nats": nats,
            f"{alias}_n_tokens": F.lit(3).cast("bigint"),
            f"{alias}_bits_per_byte": nats,
            f"{alias}_revision": F.lit(revision),
        }
    return values
