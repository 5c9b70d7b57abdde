"""Checks a root: no row is lost, none occurs twice, and all sums agree. Driver only; writes nothing.

Input: a Spark session and a root. Output: `Check`s, each with the expected and the found value, and examples. It may
run while queries run: the progress of each query is read first (checks.py). A row that a query has not reached yet is
*behind*; a row that the query has reached and that is in no table is lost. Spark computes sums and joins; the driver
holds counts and examples. verify_versions.py checks corpora, pins and take-downs, verify_annotations.py annotations;
verify_files.py opens the files and searches them for what was taken down.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.rules import in_sample
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.batches import REFUSED_PREFIX
from miniplm_udf.ingestion.documents import STAGE as INGEST_STAGE
from miniplm_udf.layout import Root
from miniplm_udf.schemas import (
    DOCUMENT_KEYS,
    GENERATE_STAGE,
    GENERATIONS,
    INSTANCES,
    PROXY_SCORES,
    REJECTS,
    SCORE_STAGE,
    SCORES,
    table_names,
)
from miniplm_udf.store import batch_range, tables, takedowns
from miniplm_udf.streams.checkpoints import Checkpoint
from miniplm_udf.upkeep import preflight, verify_annotations, verify_files, verify_versions
from miniplm_udf.upkeep.checks import Check, CheckedRoot, examples_of, none, unique

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["Check", "verify"]


def verify(spark: "SparkSession", root: str) -> list[Check]:
    """Runs all checks of a root.

    Args:
        spark: any session.
        root: path or URI of the root.

    Returns:
        The checks; some depend on which tables exist.

    Raises:
        CorpusError: there is no table of instances.
    """
    checked = CheckedRoot(spark, root)
    if not checked.has("instances"):
        raise CorpusError(
            f"root {storage.redact(checked.root)}: expected a table of instances, found none; nothing to verify"
        )
    checks: list[Callable[[CheckedRoot], Iterator[Check]]] = [_instances, _rejects]
    checks += [verify_annotations.annotated] if checked.has("annotations") else []
    checks += [_scores] if checked.has("scores") else []
    checks += [_matrix] if checked.has("score_matrix") and checked.has("scores") else []
    checks += [_proxy] if checked.has("proxy_scores") else []
    checks += [_generations] if checked.has("generations") else []
    checks += [verify_versions.corpora_of] if checked.has("corpora") else []
    checks += [verify_versions.pinned] if tables.exists(spark, Root(checked.root).table("pins")) else []
    if tables.exists(spark, Root(checked.root).table("takedowns")):
        checks += [verify_versions.taken_down, verify_files.files_without_taken_down_rows]
    return [*_lost(checked), *(result for check in checks for result in check(checked))]


def _lost(checked: CheckedRoot) -> Iterator[Check]:
    """Lost tables, except corpora and pinned copies, which verify_versions.py checks."""
    for table in preflight.lost_tables(checked.spark, checked.root):
        if table.kind.name not in (table_names.REFINED, table_names.PINNED):
            yield Check(f"{table.name}: the table is there", "a table", "none", False, note=str(table))


def _instances(checked: CheckedRoot) -> Iterator[Check]:
    instances = checked.table("instances")
    yield unique(instances, "instances", INSTANCES.key)
    accounted = instances.select("instance_id")
    if checked.has("rejects"):
        rejects = checked.table("rejects").where(f"stage = '{INGEST_STAGE}'")
        accounted = accounted.unionAll(rejects.select("reject_id"))
    if (taken_down := takedowns.instance_ids(checked.spark, checked.root)) is not None:
        accounted = accounted.unionAll(taken_down)
    if tables.exists(checked.spark, checked.uri(DOCUMENT_KEYS.name)):
        accounted = accounted.unionAll(_documents(checked, accounted))
    for query in checked.queries:
        if query.stage == "ingest" and query.offset is not None:
            yield _ingested(checked, query, accounted)


def _documents(checked: CheckedRoot, accounted: "DataFrame") -> "DataFrame":
    """The keys of documents whose instance is accounted for; packed chunking removes duplicates before it packs."""
    from pyspark.sql import functions as F

    keys = tables.read(checked.spark, checked.uri(DOCUMENT_KEYS.name))
    refused = F.md5(F.concat(F.lit(REFUSED_PREFIX), "instance_id").cast("binary"))
    instances = keys.select("document_key", F.explode(F.array("instance_id", refused)).alias("instance_id"))
    return instances.join(accounted, "instance_id", "left_semi").select("document_key")


def _ingested(checked: CheckedRoot, query: Checkpoint, accounted: "DataFrame") -> Check:
    """Checks read = instances + rejected: every key that deduplication let through is in a table or was taken down."""
    # A reader of a state store needs a coordinator, which Spark makes when the application first asks for its streams.
    checked.spark.streams.active  # noqa: B018
    with _simple_path(Root(checked.root).checkpoint(query.name)) as checkpoint:
        # The state after that micro-batch: rows of a later one may have come after the tables were read.
        state = checked.spark.read.format("statestore").option("batchId", query.batch_id).load(checkpoint)
        keys = state.selectExpr("key.key AS id")
        lost = keys.join(accounted.withColumnRenamed("instance_id", "id"), "id", "left_anti")
        n_read, n_lost = keys.count(), lost.count()
        examples = examples_of(lost, "id") if n_lost else ()
    return Check(f"{query.name}: read = instances + rejected", n_read, n_read - n_lost, n_lost == 0, examples=examples)


@contextlib.contextmanager
def _simple_path(checkpoint: str) -> Iterator[str]:
    """A path of the checkpoint without spaces and other special characters, for which Spark's state reader fails.

    It is a symbolic link, so only for a local checkpoint; another is returned as it is.
    """
    if not storage.is_local(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="miniplm-") as folder:
        link = Path(folder, "checkpoint")
        link.symlink_to(storage.local_path(checkpoint))
        yield storage.to_uri(str(link))


def _rejects(checked: CheckedRoot) -> Iterator[Check]:
    if not checked.has("rejects"):
        return
    rejects = checked.table("rejects")
    yield unique(rejects, "rejects", REJECTS.key)
    if checked.has("scores"):
        scored = checked.table("scores").selectExpr("instance_id", f"concat('{SCORE_STAGE}', model_revision) AS stage")
        both = rejects.where(f"stage LIKE '{SCORE_STAGE}%'").join(scored, ["instance_id", "stage"], "left_semi")
        yield none("rejects: a rejected instance is nowhere else", both, "instance_id")


def _scores(checked: CheckedRoot) -> Iterator[Check]:
    scores, instances = checked.table("scores"), checked.table("instances")
    yield unique(scores, "scores", SCORES.key)
    yield none("scores: each is of an instance", tables.missing_from(scores, instances), "instance_id")
    yield none("scores: each repeats its instance", _unlike(checked, scores, instances), "instance_id")
    from pyspark.sql import functions as F

    finite = F.abs("nll_sum_nats") < F.lit(float("inf"))
    yield none("scores: each is a finite number", scores.where(~finite | F.isnan("nll_sum_nats")), "instance_id")
    done = scores.select("instance_id", "model_revision", "query_id")
    if checked.has("rejects"):
        rejects = checked.table("rejects").where(f"stage LIKE '{SCORE_STAGE}%'")
        stage = f"substring(stage, {len(SCORE_STAGE) + 1}) AS model_revision"
        done = done.unionAll(rejects.selectExpr("instance_id", stage, "query_id"))
    aliases = dict(scores.groupBy("model_revision").agg(F.max("model_id")).collect())
    wrote = [tuple(row) for row in done.select("model_revision", "query_id").distinct().collect()]
    pool = instances.where("split = 'pool'").select("instance_id")
    for revision in sorted({revision for revision, _ in wrote}):
        queries = [query for query in checked.queries if (revision, query.id) in wrote]
        of_revision = done.where(F.col("model_revision") == revision)
        # The largest sample contains the others. If no query is known, all instances without a score count as behind.
        share = max((query.sample for query in queries), default=1.0)
        wanted = pool.where(in_sample(share))
        alias = aliases.get(revision, revision[:8])
        name = f"{alias}: {_of_pool(share)} = scored + rejected"
        yield _pool(checked, name, wanted, of_revision, queries)


def _unlike(checked: CheckedRoot, scores: "DataFrame", instances: "DataFrame") -> "DataFrame":
    """Scores whose source, split, text, size or micro-batch differs from their instance's."""
    from pyspark.sql import functions as F

    pairs = {"source": "source", "split": "split", "content_hash": "content_hash", "text_bytes": "n_bytes"}
    if batch_range.holds(checked.uri("scores"), checked.uri("instances")):
        pairs["instance_batch_id"] = "batch_id"
    originals = instances.select("instance_id", *(F.col(name).alias(f"of_{copy}") for copy, name in pairs.items()))
    differs = reduce(lambda left, right: left | right, (F.col(copy) != F.col(f"of_{copy}") for copy in pairs))
    return scores.select("instance_id", *pairs).join(originals, "instance_id").where(differs)


def _pool(checked: CheckedRoot, name: str, pool: "DataFrame", done: "DataFrame", queries: list[Checkpoint]) -> Check:
    """Checks that `done` has all instances of `pool` that the queries have reached."""
    missing = tables.missing_from(pool, done).persist()
    try:
        n_pool, n_missing = pool.count(), missing.count()
        reached = [
            frame.where(in_sample(query.sample))
            for query in queries
            if (frame := checked.reached(query, "instances")) is not None
        ]
        lost = reduce(
            lambda left, right: left.unionAll(right),
            [missing.join(frame.select("instance_id"), "instance_id", "left_semi") for frame in reached],
            missing.where("false"),
        ).distinct()
        n_lost = lost.count() if n_missing else 0
        examples = examples_of(lost, "instance_id") if n_lost else ()
    finally:
        missing.unpersist()
    note = "" if reached or not n_missing else "the progress of its query is not known"
    behind = n_missing - n_lost
    return Check(name, n_pool, n_pool - n_missing, n_lost == 0, behind, note, examples)


def _proxy(checked: CheckedRoot) -> Iterator[Check]:
    """Checks that every instance of the pool, and no other, has one prediction."""
    rows = checked.table("proxy_scores")
    pool = checked.table("instances").where("split = 'pool'").select("instance_id")
    yield unique(rows, "proxy_scores", PROXY_SCORES.key)
    yield none("proxy_scores: each is of an instance", tables.missing_from(rows, pool), "instance_id")
    wrote = {row[0] for row in rows.select("query_id").distinct().collect()}
    queries = [query for query in checked.queries if query.id in wrote]
    yield _pool(checked, "proxy_scores: pool = predicted", pool, rows, queries)


def _generations(checked: CheckedRoot) -> Iterator[Check]:
    """Checks that every instance of the pool, or of its sample, has one generation of each revision, or a reject."""
    from pyspark.sql import functions as F

    rows, instances = checked.table("generations"), checked.table("instances")
    pool = instances.where("split = 'pool'").select("instance_id")
    yield unique(rows, "generations", GENERATIONS.key)
    yield none("generations: each is of an instance", tables.missing_from(rows, pool), "instance_id")
    wrong = rows.where("length(token_ids) <> 4 * (n_prompt_tokens + n_tokens)")
    yield none("generations: each has as many ids as it says", wrong, "instance_id")
    done = rows.select("instance_id", "generation_revision", "query_id")
    if checked.has("rejects"):
        rejects = checked.table("rejects").where(f"stage LIKE '{GENERATE_STAGE}%'")
        revision = f"substring(stage, {len(GENERATE_STAGE) + 1}) AS generation_revision"
        rejects = rejects.selectExpr("instance_id", revision, "query_id")
        both = rejects.join(rows, ["instance_id", "generation_revision"], "left_semi")
        yield none("generations: a rejected instance has none", both, "instance_id")
        done = done.unionAll(rejects)
    wrote = [tuple(row) for row in done.select("generation_revision", "query_id").distinct().collect()]
    for revision in sorted({revision for revision, _ in wrote}):
        queries = [query for query in checked.queries if (revision, query.id) in wrote]
        share = max((query.sample for query in queries), default=1.0)
        of_revision = done.where(F.col("generation_revision") == revision)
        name = f"generation {revision[:8]}: {_of_pool(share)} = generated + rejected"
        yield _pool(checked, name, pool.where(in_sample(share)), of_revision, queries)


def _of_pool(share: float) -> str:
    return "pool" if share >= 1 else f"{share:g} of the pool"


def _matrix(checked: CheckedRoot) -> Iterator[Check]:
    matrix, scores = checked.table("score_matrix"), checked.table("scores")
    yield unique(matrix, "score_matrix", ("instance_id",))
    orphans = tables.missing_from(matrix, checked.table("instances"))
    yield none("score_matrix: each is of an instance", orphans, "instance_id")
    aliases = [name.removesuffix("_revision") for name in matrix.columns if name.endswith("_revision")]
    model_sets = matrix.select(*(f"{alias}_revision" for alias in aliases)).distinct().limit(2).collect()
    if len(model_sets) != 1:
        if model_sets:
            yield Check("score_matrix: one set of models", 1, len(model_sets), False)
        return
    revisions = dict(zip(aliases, model_sets[0], strict=True))
    yield from _complete(checked, matrix, scores, revisions)
    yield none("score_matrix: equals its scores", _differing(matrix, scores, revisions), "instance_id")


def _complete(
    checked: CheckedRoot, matrix: "DataFrame", scores: "DataFrame", revisions: dict[str, str]
) -> Iterator[Check]:
    """Checks that the matrix has exactly the instances that all models have scored."""
    complete = _complete_ids(scores, revisions)
    yield none("score_matrix: each is scored by every model", tables.missing_from(matrix, complete), "instance_id")
    missing = tables.missing_from(complete, matrix).persist()
    try:
        n_complete, n_missing = complete.count(), missing.count()
        ids = [row[0] for row in matrix.select("query_id").distinct().limit(2).collect()]
        reached = [
            frame
            for query in checked.queries
            if query.id in ids and (frame := checked.reached(query, "scores")) is not None
        ]
        lost = missing.where("false")
        if reached:
            lost = missing.join(_complete_ids(reached[0], revisions), "instance_id", "left_semi")
        n_lost = lost.count() if n_missing else 0
        examples = examples_of(lost, "instance_id") if n_lost else ()
    finally:
        missing.unpersist()
    note = "" if reached or not n_missing else "the progress of its query is not known"
    name = "score_matrix: holds all complete scores"
    yield Check(name, n_complete, n_complete - n_missing, n_lost == 0, n_missing - n_lost, note, examples)


def _complete_ids(scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    from pyspark.sql import functions as F

    wanted = sorted(set(revisions.values()))
    counted = scores.where(F.col("model_revision").isin(wanted)).groupBy("instance_id")
    return counted.agg(F.count_distinct("model_revision").alias("n")).where(F.col("n") == len(wanted)).drop("n")


def _differing(matrix: "DataFrame", scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    """Matrix rows whose sum, count, mean or revision differs from the committed score's."""
    from pyspark.sql import functions as F

    rows = [
        matrix.select(
            "instance_id",
            F.lit(revision).alias("model_revision"),
            F.col(f"{alias}_nll_sum_nats").alias("nats"),
            F.col(f"{alias}_n_tokens").alias("tokens"),
            F.col(f"{alias}_nll_mean").alias("mean"),
        )
        for alias, revision in revisions.items()
    ]
    wide = reduce(lambda left, right: left.unionAll(right), rows)
    own = scores.select("instance_id", "model_revision", "nll_sum_nats", "n_tokens")
    joined = wide.join(own, ["instance_id", "model_revision"])
    same = (
        F.col("nats").eqNullSafe(F.col("nll_sum_nats"))
        & F.col("tokens").eqNullSafe(F.col("n_tokens"))
        & F.col("mean").eqNullSafe(F.col("nll_sum_nats") / F.col("n_tokens"))
    )
    return joined.where(~same)
