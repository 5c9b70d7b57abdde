"""Checks a root: nothing lost, nothing twice, every sum. Reads tables and checkpoints, writes nothing. Driver only.

Input: a Spark session and a root; output: `Check`s, each with what was expected, what was found, and examples. It may
run while queries run: how far each query has come is read first (checks.py). A row that a query has not reached yet is
*behind*; one that it has reached and that is nowhere is lost. Sums and joins are Spark's: the driver holds counts and
examples alone. Versions of corpora, pins and take-downs are verify_versions.py's, annotations verify_annotations.py's.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf import nearby, pins, removals, storage, tables
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.documents import STAGE as INGEST_STAGE
from miniplm_udf.rules import in_sample
from miniplm_udf.schemas import INSTANCES, PROXY_SCORES, REJECTS, SCORES
from miniplm_udf.streams.checkpoints import Checkpoint
from miniplm_udf.upkeep import verify_annotations, verify_versions
from miniplm_udf.upkeep.checks import Check, Root, examples_of, none, unique

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["Check", "verify"]

_SCORE_STAGE = "score:"


def verify(spark: "SparkSession", root: str) -> list[Check]:
    """All checks of a root.

    Raises:
        CorpusError: there is no table of instances.
    """
    at = Root(spark, root)
    if not at.has("instances"):
        raise CorpusError(
            f"root {storage.redact(at.root)}: expected a table of instances, found none; nothing to verify"
        )
    checks: list[Callable[[Root], Iterator[Check]]] = [_instances, _rejects]
    checks += [verify_annotations.annotated] if at.has("annotations") else []
    checks += [_scores] if at.has("scores") else []
    checks += [_matrix] if at.has("score_matrix") and at.has("scores") else []
    checks += [_proxy] if at.has("proxy_scores") else []
    checks += [verify_versions.corpora_of] if at.has("corpora") else []
    checks += [verify_versions.pinned] if tables.exists(spark, pins.pins_uri(at.root)) else []
    checks += [verify_versions.taken_down] if tables.exists(spark, removals.takedowns_uri(at.root)) else []
    return [found for check in checks for found in check(at)]


def _instances(at: Root) -> Iterator[Check]:
    instances = at.table("instances")
    yield unique(instances, "instances", INSTANCES.key)
    known = instances.select("instance_id")
    if at.has("rejects"):
        rejects = at.table("rejects").where(f"stage = '{INGEST_STAGE}'")
        known = known.unionAll(rejects.select("reject_id"))
    if (taken_down := removals.instance_ids(at.spark, at.root)) is not None:
        known = known.unionAll(taken_down)
    for query in at.queries:
        if query.name.startswith("ingest-") and query.offset is not None:
            yield _ingested(at, query, known)


def _ingested(at: Root, query: Checkpoint, known: "DataFrame") -> Check:
    """read = instances + rejected: every key that the deduplication has let through stands in a table, or in the
    record of take-downs."""
    # Whoever opens a state store tells a coordinator, which is there once an application has looked at its streams.
    at.spark.streams.active  # noqa: B018
    with _plain_place(storage.join(at.root, "_checkpoints", query.name)) as checkpoint:
        # As of that micro-batch: a later one's rows may have come after the tables were looked at.
        state = at.spark.read.format("statestore").option("batchId", query.batch_id).load(checkpoint)
        keys = state.selectExpr("key.key AS id")
        lost = keys.join(known.withColumnRenamed("instance_id", "id"), "id", "left_anti")
        n_read, n_lost = keys.count(), lost.count()
        examples = examples_of(lost, "id") if n_lost else ()
    return Check(f"{query.name}: read = instances + rejected", n_read, n_read - n_lost, n_lost == 0, examples=examples)


@contextlib.contextmanager
def _plain_place(checkpoint: str) -> Iterator[str]:
    """The checkpoint under a name without spaces and the like: Spark's reader of states takes those percent-encoded
    and finds nothing. A link, so of a local one alone."""
    if not storage.is_local(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="miniplm-") as folder:
        link = Path(folder, "checkpoint")
        link.symlink_to(storage.local_path(checkpoint))
        yield storage.to_uri(str(link))


def _rejects(at: Root) -> Iterator[Check]:
    if not at.has("rejects"):
        return
    rejects = at.table("rejects")
    yield unique(rejects, "rejects", REJECTS.key)
    if at.has("scores"):
        scored = at.table("scores").selectExpr("instance_id", f"concat('{_SCORE_STAGE}', model_revision) AS stage")
        both = rejects.where(f"stage LIKE '{_SCORE_STAGE}%'").join(scored, ["instance_id", "stage"], "left_semi")
        yield none("rejects: a rejected instance is nowhere else", both, "instance_id")


def _scores(at: Root) -> Iterator[Check]:
    scores, instances = at.table("scores"), at.table("instances")
    yield unique(scores, "scores", SCORES.key)
    yield none("scores: each is of an instance", tables.missing_from(scores, instances), "instance_id")
    yield none("scores: each repeats its instance", _unlike(at, scores, instances), "instance_id")
    from pyspark.sql import functions as F

    finite = F.abs("nll_sum_nats") < F.lit(float("inf"))
    yield none("scores: each is a finite number", scores.where(~finite | F.isnan("nll_sum_nats")), "instance_id")
    done = scores.select("instance_id", "model_revision", "query_id")
    if at.has("rejects"):
        rejects = at.table("rejects").where(f"stage LIKE '{_SCORE_STAGE}%'")
        stage = f"substring(stage, {len(_SCORE_STAGE) + 1}) AS model_revision"
        done = done.unionAll(rejects.selectExpr("instance_id", stage, "query_id"))
    aliases = dict(scores.groupBy("model_revision").agg(F.max("model_id")).collect())
    wrote = [tuple(row) for row in done.select("model_revision", "query_id").distinct().collect()]
    pool = instances.where("split = 'pool'").select("instance_id")
    for revision in sorted({revision for revision, _ in wrote}):
        queries = [query for query in at.queries if (revision, query.id) in wrote]
        of_revision = done.where(F.col("model_revision") == revision)
        # The largest holds the others. Where no query can be asked, all that is not scored counts as behind.
        share = max((query.sample for query in queries), default=1.0)
        wanted = pool.where(in_sample(share))
        alias = aliases.get(revision, revision[:8])
        name = f"{alias}: {'pool' if share >= 1 else f'{share:g} of the pool'} = scored + rejected"
        yield _pool(at, name, wanted, of_revision, queries)


def _unlike(at: Root, scores: "DataFrame", instances: "DataFrame") -> "DataFrame":
    """Scores whose source, split, text or place is not their instance's."""
    from pyspark.sql import functions as F

    pairs = {"source": "source", "split": "split", "content_hash": "content_hash", "text_bytes": "n_bytes"}
    if nearby.holds(at.spark, at.uri("scores"), at.uri("instances")):
        pairs["instance_batch_id"] = "batch_id"
    theirs = instances.select("instance_id", *(F.col(name).alias(f"of_{copy}") for copy, name in pairs.items()))
    unlike = reduce(lambda one, other: one | other, (F.col(copy) != F.col(f"of_{copy}") for copy in pairs))
    return scores.select("instance_id", *pairs).join(theirs, "instance_id").where(unlike)


def _pool(at: Root, name: str, pool: "DataFrame", done: "DataFrame", queries: list[Checkpoint]) -> Check:
    """pool = done: of the instances that are to be done and that the queries have reached, nothing is missing."""
    missing = tables.missing_from(pool, done).persist()
    try:
        n_pool, n_missing = pool.count(), missing.count()
        reached = [
            frame.where(in_sample(query.sample))
            for query in queries
            if (frame := at.reached(query, "instances")) is not None
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
    note = "" if reached or not n_missing else "how far its query has come cannot be told"
    behind = n_missing - n_lost
    return Check(name, n_pool, n_pool - n_missing, n_lost == 0, behind, note, examples)


def _proxy(at: Root) -> Iterator[Check]:
    """Every instance of the pool has one prediction, and nothing else has."""
    rows = at.table("proxy_scores")
    pool = at.table("instances").where("split = 'pool'").select("instance_id")
    yield unique(rows, "proxy_scores", PROXY_SCORES.key)
    yield none("proxy_scores: each is of an instance", tables.missing_from(rows, pool), "instance_id")
    wrote = {row[0] for row in rows.select("query_id").distinct().collect()}
    queries = [query for query in at.queries if query.id in wrote]
    yield _pool(at, "proxy_scores: pool = predicted", pool, rows, queries)


def _matrix(at: Root) -> Iterator[Check]:
    matrix, scores = at.table("score_matrix"), at.table("scores")
    yield unique(matrix, "score_matrix", ("instance_id",))
    orphans = tables.missing_from(matrix, at.table("instances"))
    yield none("score_matrix: each is of an instance", orphans, "instance_id")
    aliases = [name.removesuffix("_revision") for name in matrix.columns if name.endswith("_revision")]
    found = matrix.select(*(f"{alias}_revision" for alias in aliases)).distinct().limit(2).collect()
    if len(found) != 1:
        if found:
            yield Check("score_matrix: one set of models", 1, len(found), False)
        return
    revisions = dict(zip(aliases, found[0], strict=True))
    yield from _complete(at, matrix, scores, revisions)
    yield none("score_matrix: equals its scores", _differing(matrix, scores, revisions), "instance_id")


def _complete(at: Root, matrix: "DataFrame", scores: "DataFrame", revisions: dict[str, str]) -> Iterator[Check]:
    """matrix = complete scores: those of all models, and no others."""
    complete = _complete_ids(scores, revisions)
    yield none("score_matrix: each is scored by every model", tables.missing_from(matrix, complete), "instance_id")
    missing = tables.missing_from(complete, matrix).persist()
    try:
        n_complete, n_missing = complete.count(), missing.count()
        ids = [row[0] for row in matrix.select("query_id").distinct().limit(2).collect()]
        reached = [f for q in at.queries if q.id in ids and (f := at.reached(q, "scores")) is not None]
        lost = missing.where("false")
        if reached:
            lost = missing.join(_complete_ids(reached[0], revisions), "instance_id", "left_semi")
        n_lost = lost.count() if n_missing else 0
        examples = examples_of(lost, "instance_id") if n_lost else ()
    finally:
        missing.unpersist()
    note = "" if reached or not n_missing else "how far its query has come cannot be told"
    name = "score_matrix: holds all complete scores"
    yield Check(name, n_complete, n_complete - n_missing, n_lost == 0, n_missing - n_lost, note, examples)


def _complete_ids(scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    from pyspark.sql import functions as F

    wanted = sorted(set(revisions.values()))
    counted = scores.where(F.col("model_revision").isin(wanted)).groupBy("instance_id")
    return counted.agg(F.count_distinct("model_revision").alias("n")).where(F.col("n") == len(wanted)).drop("n")


def _differing(matrix: "DataFrame", scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    """Matrix rows with another sum, count or revision than the committed score."""
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
