"""Checks a root: nothing lost, nothing twice, every sum. Reads tables and checkpoints, writes nothing. Driver only.

Input: a Spark session and a root; output: `Check`s, each with what was expected, what was found, and examples. It may
run while queries run: how far each query has come is read first, then the tables from the last to the first, so a row
that stands in a table has its origin in the ones read later. A row that a query has not reached yet is *behind*; one
that it has reached and that is nowhere is lost. Sums and joins are Spark's: the driver holds counts and examples alone.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import expressions, nearby, storage, tables
from miniplm_udf.documents import STAGE as INGEST_STAGE
from miniplm_udf.errors import CorpusError
from miniplm_udf.refine import fingerprint_of, sums_of
from miniplm_udf.schemas import CORPORA, INSTANCES, REJECTS, SCORES
from miniplm_udf.streams.offsets import end_offset

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_N_EXAMPLES = 5
_SCORE_STAGE = "score:"
# From the last to the first: each was written after the ones behind it.
_TABLES = ("corpora", "score_matrix", "scores", "rejects", "instances")


@dataclasses.dataclass(frozen=True)
class Check:
    """One sum.

    Attributes:
        name: what is checked.
        expected, found: rows, or what else is compared.
        ok: whether they agree, rows behind apart.
        behind: rows that no query has reached yet.
        note: why it could not be checked whole; or what is wrong.
        examples: ids that are wrong.
    """

    name: str
    expected: int | str
    found: int | str
    ok: bool
    behind: int = 0
    note: str = ""
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Query:
    """How far a streaming query has come: its newest finished micro-batch, and its offset. `id` is as in the tables."""

    name: str
    id: str
    batch_id: int | None
    offset: dict[str, Any] | None


class _Root:
    """The tables of a root as they were when this was made, and before that: how far the queries had come."""

    def __init__(self, spark: "SparkSession", root: str) -> None:
        self.spark, self.root = spark, storage.to_uri(root)
        self.queries = list(_queries(self.root))
        self.versions = {name: tables.version(spark, self.uri(name)) for name in _TABLES}

    def uri(self, name: str) -> str:
        return storage.join(self.root, "tables", name)

    def has(self, name: str) -> bool:
        return self.versions[name] is not None

    def table(self, name: str) -> "DataFrame":
        return tables.read(self.spark, self.uri(name), self.versions[name])

    def reached(self, query: _Query, name: str) -> "DataFrame | None":
        """The rows of a table that a query has surely read; None where it has read none, or the version is gone."""
        offset = query.offset
        if offset is None or offset["isStartingVersion"]:
            return None
        # Version v itself may be half read.
        try:
            frame = tables.read(self.spark, self.uri(name), int(offset["reservoirVersion"]) - 1)
            frame.schema  # noqa: B018  (Delta refuses a version that is gone here)
        except Exception as error:
            if "VERSION" in str(error).upper():
                return None
            raise
        return frame


def verify(spark: "SparkSession", root: str) -> list[Check]:
    """All checks of a root.

    Raises:
        CorpusError: there is no table of instances.
    """
    at = _Root(spark, root)
    if not at.has("instances"):
        raise CorpusError(
            f"root {storage.redact(at.root)}: expected a table of instances, found none; nothing to verify"
        )
    checks: list[Callable[[_Root], Iterator[Check]]] = [_instances, _rejects]
    checks += [_scores] if at.has("scores") else []
    checks += [_matrix] if at.has("score_matrix") and at.has("scores") else []
    checks += [_corpora] if at.has("corpora") else []
    return [found for check in checks for found in check(at)]


def _queries(root: str) -> Iterator[_Query]:
    filesystem, path = fsspec.core.url_to_fs(storage.join(root, "_checkpoints"))
    if not filesystem.exists(path):
        return
    for folder in sorted(filesystem.ls(path, detail=False)):
        name = str(folder).rstrip("/").rsplit("/", 1)[-1]
        uri = storage.join(root, "_checkpoints", name)
        metadata = storage.read_json(storage.join(uri, "metadata"))
        if metadata is None:
            continue  # the trainer's checkpoints, or a query that was never begun
        batch_id = _newest_finished(filesystem, f"{folder}/commits")
        offset = None if batch_id is None else end_offset(uri, batch_id)
        yield _Query(name, metadata["id"].replace("-", ""), batch_id, offset)


def _newest_finished(filesystem: Any, folder: str) -> int | None:
    if not filesystem.exists(folder):
        return None
    numbers = [str(name).rsplit("/", 1)[-1] for name in filesystem.ls(folder, detail=False)]
    return max((int(number) for number in numbers if number.isdigit()), default=None)


def _examples(frame: "DataFrame", key: str) -> tuple[str, ...]:
    return tuple(str(row[0]) for row in frame.select(key).limit(_N_EXAMPLES).collect())


def _unique(frame: "DataFrame", name: str, key: tuple[str, ...]) -> Check:
    from pyspark.sql import functions as F

    counted = frame.groupBy(*key).agg(F.count("*").alias("n_rows"))
    n_keys, n_rows = counted.agg(F.count("*"), F.sum("n_rows")).collect()[0]
    wrong = n_keys != (n_rows or 0)
    examples = _examples(counted.where("n_rows > 1"), key[0]) if wrong else ()
    return Check(f"{name}: keys are unique", n_rows or 0, n_keys, not wrong, examples=examples)


def _none(name: str, frame: "DataFrame", key: str, of: int | str = 0, note: str = "") -> Check:
    """That a frame of offending rows is empty."""
    n_rows = frame.count()
    return Check(name, of, n_rows, n_rows == 0, note=note, examples=_examples(frame, key) if n_rows else ())


def _instances(at: _Root) -> Iterator[Check]:
    instances = at.table("instances")
    yield _unique(instances, "instances", INSTANCES.key)
    known = instances.select("instance_id")
    if at.has("rejects"):
        rejects = at.table("rejects").where(f"stage = '{INGEST_STAGE}'")
        known = known.unionAll(rejects.select("reject_id"))
    for query in at.queries:
        if query.name.startswith("ingest-") and query.offset is not None:
            yield _ingested(at, query, known)


def _ingested(at: _Root, query: _Query, known: "DataFrame") -> Check:
    """read = instances + rejected: every key that the deduplication has let through stands in a table."""
    # Whoever opens a state store tells a coordinator, which is there once an application has looked at its streams.
    at.spark.streams.active  # noqa: B018
    with _plain_place(storage.join(at.root, "_checkpoints", query.name)) as checkpoint:
        # As of that micro-batch: a later one's rows may have come after the tables were looked at.
        state = at.spark.read.format("statestore").option("batchId", query.batch_id).load(checkpoint)
        keys = state.selectExpr("key.key AS id")
        lost = keys.join(known.withColumnRenamed("instance_id", "id"), "id", "left_anti")
        n_read, n_lost = keys.count(), lost.count()
        examples = _examples(lost, "id") if n_lost else ()
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


def _rejects(at: _Root) -> Iterator[Check]:
    if not at.has("rejects"):
        return
    rejects = at.table("rejects")
    yield _unique(rejects, "rejects", REJECTS.key)
    if at.has("scores"):
        scored = at.table("scores").selectExpr("instance_id", f"concat('{_SCORE_STAGE}', model_revision) AS stage")
        both = rejects.where(f"stage LIKE '{_SCORE_STAGE}%'").join(scored, ["instance_id", "stage"], "left_semi")
        yield _none("rejects: a rejected instance is nowhere else", both, "instance_id")


def _scores(at: _Root) -> Iterator[Check]:
    scores, instances = at.table("scores"), at.table("instances")
    yield _unique(scores, "scores", SCORES.key)
    yield _none("scores: each is of an instance", tables.missing_from(scores, instances), "instance_id")
    yield _none("scores: each repeats its instance", _unlike(at, scores, instances), "instance_id")
    from pyspark.sql import functions as F

    finite = F.abs("nll_sum_nats") < F.lit(float("inf"))
    yield _none("scores: each is a finite number", scores.where(~finite | F.isnan("nll_sum_nats")), "instance_id")
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
        yield _pool(at, aliases.get(revision, revision[:8]), pool, of_revision, queries)


def _unlike(at: _Root, scores: "DataFrame", instances: "DataFrame") -> "DataFrame":
    """Scores whose source, split, text or place is not their instance's."""
    from pyspark.sql import functions as F

    pairs = {"source": "source", "split": "split", "content_hash": "content_hash", "text_bytes": "n_bytes"}
    if nearby.holds(at.spark, at.uri("scores"), at.uri("instances")):
        pairs["instance_batch_id"] = "batch_id"
    theirs = instances.select("instance_id", *(F.col(name).alias(f"of_{copy}") for copy, name in pairs.items()))
    unlike = reduce(lambda one, other: one | other, (F.col(copy) != F.col(f"of_{copy}") for copy in pairs))
    return scores.select("instance_id", *pairs).join(theirs, "instance_id").where(unlike)


def _pool(at: _Root, alias: str, pool: "DataFrame", done: "DataFrame", queries: list[_Query]) -> Check:
    """pool = scored + rejected for one model: of what its queries have reached, nothing is missing."""
    missing = tables.missing_from(pool, done).persist()
    try:
        n_pool, n_missing = pool.count(), missing.count()
        reached = [frame for query in queries if (frame := at.reached(query, "instances")) is not None]
        lost = reduce(
            lambda left, right: left.unionAll(right),
            [missing.join(frame.select("instance_id"), "instance_id", "left_semi") for frame in reached],
            missing.where("false"),
        ).distinct()
        n_lost = lost.count() if n_missing else 0
        examples = _examples(lost, "instance_id") if n_lost else ()
    finally:
        missing.unpersist()
    note = "" if reached or not n_missing else "how far its query has come cannot be told"
    behind = n_missing - n_lost
    return Check(f"{alias}: pool = scored + rejected", n_pool, n_pool - n_missing, n_lost == 0, behind, note, examples)


def _matrix(at: _Root) -> Iterator[Check]:
    matrix, scores = at.table("score_matrix"), at.table("scores")
    yield _unique(matrix, "score_matrix", ("instance_id",))
    orphans = tables.missing_from(matrix, at.table("instances"))
    yield _none("score_matrix: each is of an instance", orphans, "instance_id")
    aliases = [name.removesuffix("_revision") for name in matrix.columns if name.endswith("_revision")]
    found = matrix.select(*(f"{alias}_revision" for alias in aliases)).distinct().limit(2).collect()
    if len(found) != 1:
        if found:
            yield Check("score_matrix: one set of models", 1, len(found), False)
        return
    revisions = dict(zip(aliases, found[0], strict=True))
    yield from _complete(at, matrix, scores, revisions)
    yield _none("score_matrix: equals its scores", _differing(matrix, scores, revisions), "instance_id")


def _complete(at: _Root, matrix: "DataFrame", scores: "DataFrame", revisions: dict[str, str]) -> Iterator[Check]:
    """matrix = complete scores: those of all models, and no others."""
    complete = _complete_ids(scores, revisions)
    yield _none("score_matrix: each is scored by every model", tables.missing_from(matrix, complete), "instance_id")
    missing = tables.missing_from(complete, matrix).persist()
    try:
        n_complete, n_missing = complete.count(), missing.count()
        ids = [row[0] for row in matrix.select("query_id").distinct().limit(2).collect()]
        reached = [f for q in at.queries if q.id in ids and (f := at.reached(q, "scores")) is not None]
        lost = missing.where("false")
        if reached:
            lost = missing.join(_complete_ids(reached[0], revisions), "instance_id", "left_semi")
        n_lost = lost.count() if n_missing else 0
        examples = _examples(lost, "instance_id") if n_lost else ()
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


def _corpora(at: _Root) -> Iterator[Check]:
    recorded = at.table("corpora")
    yield _unique(recorded, "corpora", CORPORA.key)
    rows = recorded.orderBy("name", "version").collect()
    newest = {row["name"]: row["version"] for row in rows}
    for row in rows:
        yield from _version(at, row, is_newest=newest[row["name"]] == row["version"])


def _version(at: _Root, row: Any, is_newest: bool) -> Iterator[Check]:
    """A version of a corpus: its rows are those that `corpora` records; the newest one's are the matrix's, too."""
    from pyspark.sql import functions as F

    name = f"corpus {row['name']}, version {row['version']}"
    try:
        corpus = tables.read(at.spark, at.uri(f"refined/{row['name']}"), row["version"])
        sums = corpus.agg(F.count_distinct("instance_id").alias("n_ids"), *sums_of(F.lit(True))).collect()[0]
    except Exception as error:
        first = str(error).splitlines()[0]
        if not re.search(r"VERSION|FileNotFound|FILE_NOT_EXIST|does not exist|READ_FILE", str(error), re.IGNORECASE):
            raise
        yield Check(f"{name}: its files are there", row["n_instances"], 0, False, note=first)
        return
    n_rows = sums["n_kept"]
    yield Check(f"{name}: rows", row["n_instances"], n_rows, n_rows == sums["n_ids"] == row["n_instances"])
    found = fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], n_rows)
    yield Check(f"{name}: fingerprint", row["fingerprint"], found, found == row["fingerprint"])
    if is_newest and at.has("score_matrix"):
        yield _in_matrix(at, name, corpus, row)


def _in_matrix(at: _Root, name: str, corpus: "DataFrame", row: Any) -> Check:
    """Every kept row stands in the matrix, with the score that the recorded expression gives it there."""
    from pyspark.sql import functions as F

    matrix = at.table("score_matrix")
    made_of = set(json.loads(row["inputs"]).get("last_batches", {}))
    if made_of.isdisjoint(found[0] for found in matrix.select("query_id").distinct().collect()):
        note = "the matrix was built anew since, of other models"
        return Check(f"{name}: rows are the matrix's", row["n_instances"], row["n_instances"], True, note=note)
    text = json.loads(row["config"])["score"]
    if not expressions.resolves(matrix, text):
        matrix = expressions.joined(matrix, at.table("instances"))
    score: Column = F.expr(text).cast("double")
    wrong = corpus.join(matrix.select("instance_id", score.alias("again")), "instance_id", "left").where(
        ~F.col("score").eqNullSafe(F.col("again"))
    )
    n_wrong = wrong.count()
    examples = _examples(wrong, "instance_id") if n_wrong else ()
    n_rows = int(row["n_instances"])
    return Check(f"{name}: rows are the matrix's", n_rows, n_rows - n_wrong, n_wrong == 0, examples=examples)
