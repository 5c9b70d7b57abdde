"""Inspecting a version of a corpus: texts that it kept or dropped, with the scores that decided. Driver only.

    kept: the version's rows; dropped: its candidates without them -> source, condition -> the first n -> their texts

Owns which rows are shown and in which order; the command prints them. Dropped rows are the pool rows that passed the
recorded `where` and were not kept, with the score that the recorded config gives them. They are computed again from the
matrix, so they cannot be shown if it was built again since. Reads full texts only of the shown rows. Writes nothing;
the same question gets the same rows.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from miniplm_udf import schemas
from miniplm_udf.config.sections import check
from miniplm_udf.corpora import versions
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.refinement import expressions
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.store.provenance import Provenance
from miniplm_udf.store.text_join import texts_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

SIDES = ("kept", "dropped")
# The words of each order in the answer. Only a random sample has rows without a finite score.
ORDERS = {
    "sample": "a random sample, seed {seed}",
    "near_cut": "nearest to the cut",
    "highest": "highest score first",
    "lowest": "lowest score first",
}
# The most rows that may be shown: they come to the driver.
MOST_ROWS = 1000
_TEXT_COLUMNS = ("document_ids", "start_byte", "metadata")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Which rows to show.

    Attributes:
        side: rows that were kept, or candidates that were not.
        source: only rows of this source; None: all sources.
        sql: a condition over `cut_distance` and the columns of the version, of `annotations` and of `instances`.
        order: a key of `ORDERS`: which rows of the side come first.
        n_rows: largest number of rows.
        n_characters: largest number of characters of each text, from its beginning.
        seed: seed of the random sample.
    """

    side: Literal["kept", "dropped"] = "kept"
    source: str | None = None
    sql: str | None = None
    order: str = "sample"
    n_rows: int = 10
    n_characters: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.side in SIDES, f"--side: expected one of {', '.join(SIDES)}, found {self.side!r}")
        check(self.order in ORDERS, f"order: expected one of {', '.join(ORDERS)}, found {self.order!r}")
        check(1 <= self.n_rows <= MOST_ROWS, f"-n: expected 1 to {MOST_ROWS} rows, found {self.n_rows}")
        check(self.n_characters >= 1, f"--chars: expected at least 1 character, found {self.n_characters}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The answer to a question.

    Attributes:
        version: `NAME@NUMBER`.
        side: kept or dropped.
        threshold: the lowest kept score.
        order: how the rows were chosen, in words.
        n_matching: rows that match the question.
        rows: each with the columns of `schemas.refined_as`; `cut_distance`, the score minus the score of the nearest
            cut, None without a cut; and from its instance `document_ids`, `start_byte`, `metadata`, the beginning of
            the `text`, and `is_cut`, whether the text is longer.
    """

    version: str
    side: str
    threshold: float
    order: str
    n_matching: int
    rows: list[TableRow]


def inspect(spark: "SparkSession", root: str, address: str, question: Question) -> Inspection:
    """Reads some rows of a version, with their texts.

    Args:
        spark: any session.
        root: URI of the root.
        address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.
        question: which rows.

    Returns:
        The rows.

    Raises:
        ConfigError: the condition is refused.
        CorpusError: there is no such version; its rows, or the matrix that it was made from, are gone; no row matches.
    """
    name, version = versions.find(spark, root, address)
    provenance = corpus_records.provenance_of(spark, root, name, version)
    search = _Search(spark, root, name, version, provenance, question)
    with corpus_records.readable(name, version), search.matching() as matching:
        chosen = matching.orderBy(*_order(question)).limit(question.n_rows).collect()
        n_matching = matching.count()
        if not chosen:
            raise search.no_match()
    rows = [{key: _finite(value) for key, value in row.asDict().items()} for row in chosen]
    texts = _texts(spark, root, [row["instance_id"] for row in rows], question.n_characters)
    return Inspection(
        version=f"{name}@{version}",
        side=question.side,
        threshold=provenance.threshold,
        order=ORDERS[question.order].format(seed=question.seed),
        n_matching=n_matching,
        rows=[{**row, **texts.get(row["instance_id"], {"text": None, "is_cut": False})} for row in rows],
    )


def _finite(value: Any) -> Any:
    """The value; None for a float that is not finite, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(question: Question) -> "list[Column]":
    from pyspark.sql import functions as F

    first = {
        "sample": F.xxhash64("instance_id", F.lit(question.seed)),
        "near_cut": F.abs("cut_distance").asc_nulls_last(),
        "highest": F.desc("score"),
        "lowest": F.asc("score"),
    }
    return [first[question.order], F.col("instance_id")]


@dataclasses.dataclass(frozen=True)
class _Search:
    """A question about a version."""

    spark: "SparkSession"
    root: str
    name: str
    version: int
    provenance: Provenance
    question: Question

    def side(self) -> "DataFrame":
        """All rows of the side that is asked for: columns of `schemas.refined_as`."""
        columns = schemas.refined_as(self.name, self.provenance.config).column_names
        kept = corpus_records.read_corpus(self.spark, self.root, self.name, self.version)
        if self.question.side == "kept":
            return kept.select(*columns)
        _, _, rows = versions.recorded_candidates(self.spark, self.root, self.name, self.version, self.provenance)
        return tables.missing_from(rows, kept).select(*columns)

    @contextlib.contextmanager
    def matching(self) -> Iterator["DataFrame"]:
        """The rows that match the question, with `cut_distance`."""
        from pyspark import StorageLevel
        from pyspark.sql import functions as F

        rows = self.side().withColumn("cut_distance", cut_distance(self.provenance))
        if self.question.source is not None:
            rows = rows.where(F.col("source") == self.question.source)
        if self.question.order != "sample":
            rows = rows.where(is_finite())
        annotated = self._annotated(rows)
        if self.question.sql is None:
            yield rows
        elif expressions.resolves(rows, self.question.sql):
            yield self._where(rows)
        elif expressions.resolves(annotated, self.question.sql):
            yield self._where(annotated).select(*rows.columns)
        else:
            # The condition reads all texts, so its result is stored, and they are read once.
            matching = (
                self._where(self._with_instances(annotated)).select(*rows.columns).persist(StorageLevel.DISK_ONLY)
            )
            try:
                yield matching
            finally:
                matching.unpersist()

    def _annotated(self, rows: "DataFrame") -> "DataFrame":
        """The rows with the columns of `annotations`, if the table exists; null for an instance that has none."""
        uri = Root(self.root).table("annotations")
        if not tables.exists(self.spark, uri):
            return rows
        annotations = tables.read(self.spark, uri)
        own = expressions.own_columns(annotations, rows)
        return rows.join(annotations.select("instance_id", *own), "instance_id", "left")

    def _with_instances(self, rows: "DataFrame") -> "DataFrame":
        n_kept, n_all = self.provenance.n_instances, self.provenance.n_candidates
        n_rows = n_kept if self.question.side == "kept" else n_all - n_kept
        instances = tables.read(self.spark, Root(self.root).table("instances"))
        return texts_of(rows, instances, expressions.own_columns(instances, rows), n_rows)

    def _where(self, rows: "DataFrame") -> "DataFrame":
        from pyspark.sql.types import BooleanType

        over = "the columns shown, the annotations and the instances' own"
        return rows.where(
            expressions.expression(rows, str(self.question.sql), "--sql", BooleanType, "a condition", over)
        )

    def no_match(self) -> CorpusError:
        """The error that no row matches the question."""
        question = self.question
        sources = sorted(row[0] for row in self.side().select("source").distinct().collect())
        limits = [f"of source {question.source!r}"] if question.source is not None else []
        limits += [f"where {question.sql}"] if question.sql is not None else []
        limits += ["with a finite score"] if question.order != "sample" else []
        wanted = f"{question.side} rows {' and '.join(limits)}".strip()
        of_side = f"the sources of the {question.side} rows are {sources}"
        return CorpusError(f"{self.name}@{self.version}: expected {wanted}, found none; {of_side}")


def cuts_of(provenance: Provenance) -> dict[str | None, list[float]]:
    """The scores of a version's cuts.

    Args:
        provenance: provenance of the version. A followed version has one cut; without recorded cuts, the
            threshold is used.

    Returns:
        By source, or under None for all sources together: one score, or two for a band.
    """
    if not provenance.cuts:
        score = provenance.followed["cut"]["score"] if provenance.followed else provenance.threshold
        return {None: [float(score)]}
    by_source = provenance.config["select"].get("per_source") is not None
    return {
        source if by_source else None: [float(cuts[key][0]) for key in ("down_to", "below") if key in cuts]
        for source, cuts in provenance.cuts.items()
    }


def cut_distance(provenance: Provenance) -> "Column":
    """Makes the column that tells how far a row is from the cut.

    Args:
        provenance: provenance of the version, with its cuts.

    Returns:
        The score minus the score of the nearest cut of the row's source, from the columns `score` and `source`; null if
        the source has no cut.
    """
    from pyspark.sql import functions as F

    cuts = cuts_of(provenance)
    distances = []
    for number in range(max(map(len, cuts.values()))):
        scores_by_source = {source: scores[number] for source, scores in cuts.items() if number < len(scores)}
        cut = F.lit(scores_by_source[None]) if None in scores_by_source else _value_of_source(scores_by_source)
        distances.append(F.col("score") - cut)
    nearest = distances[0]
    for other in distances[1:]:
        nearest = F.when(F.abs(other) < F.abs(nearest), other).otherwise(nearest)
    return nearest


def _value_of_source(by_source: dict[Any, float]) -> "Column":
    from pyspark.sql import functions as F

    return F.create_map(*(F.lit(value) for pair in by_source.items() for value in pair))[F.col("source")]


def _texts(spark: "SparkSession", root: str, ids: list[str], n_characters: int) -> dict[str, TableRow]:
    """By id, the beginning of an instance's text and its origin; an instance that does not exist is left out."""
    from pyspark.sql import functions as F

    wanted = spark.createDataFrame([(instance_id,) for instance_id in ids], "instance_id string")
    instances = tables.read(spark, Root(root).table("instances"))
    texts = texts_of(wanted, instances, (*_TEXT_COLUMNS, "text"), len(ids), 1).select(
        "instance_id",
        *_TEXT_COLUMNS,
        F.substring("text", 1, n_characters).alias("text"),
        (F.length("text") > n_characters).alias("is_cut"),
    )
    rows = [row.asDict() for row in texts.collect()]
    return {row.pop("instance_id"): row for row in rows}
