"""Looking at a version of a corpus: texts that it kept, or dropped, with the scores that decided. Driver only.

    kept: the version's rows; dropped: its candidates without them -> source, condition -> the first n -> their texts

Owns which rows are shown and in which order; how they are printed is the command's. Dropped are the pool rows that
passed the recorded `where` and were not kept, with the score that the recorded config gives them: they are made again
from the matrix, so not where it was built anew since. Everything but the texts of the shown rows is narrow. Reads only;
the same question gets the same rows.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from miniplm_udf import corpora, schemas, storage, tables
from miniplm_udf.config_sections import check
from miniplm_udf.errors import CorpusError
from miniplm_udf.refinement import expressions
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.texts import texts_of
from miniplm_udf.upkeep import versions

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

SIDES = ("kept", "dropped")
# They come to the driver.
MOST_ROWS = 1000
_BESIDE_TEXT = ("document_ids", "start_byte", "metadata")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Which rows to show.

    Attributes:
        source: None is all.
        sql: a condition over the columns of the version, `cut_distance`, and those of `annotations` and `instances`.
        near_cut: those nearest to the cut, on their side of it, in place of a random sample.
        n_rows: at most so many.
        n_characters: of each text, from its beginning.
        seed: of the sample.
    """

    side: Literal["kept", "dropped"] = "kept"
    source: str | None = None
    sql: str | None = None
    near_cut: bool = False
    n_rows: int = 10
    n_characters: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.side in SIDES, f"--side: expected one of {', '.join(SIDES)}, found {self.side!r}")
        check(1 <= self.n_rows <= MOST_ROWS, f"-n: expected 1 to {MOST_ROWS} rows, found {self.n_rows}")
        check(self.n_characters >= 1, f"--chars: expected at least 1 character, found {self.n_characters}")


def inspect(spark: "SparkSession", root: str, address: str, asked: Question) -> dict[str, Any]:
    """Some rows of a version, with their texts.

    Args:
        address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.

    Returns:
        `version`, `side`, `threshold`, `order`, `n_matching` (rows that the question fits), and `rows`: the columns of
        schemas.refined, `cut_distance` (the score less that of the nearest cut; None where there is none), and of their
        instance document_ids, start_byte, metadata, `text` (its beginning) and `is_cut` (there is more of it).

    Raises:
        ConfigError: the condition is refused.
        CorpusError: there is no such version; its rows, or the matrix it was made of, are gone; no row fits.
    """
    name, version = versions.find(spark, root, address)
    look = _Look(spark, root, name, version, corpora.provenance_of(spark, root, name, version), asked)
    with corpora.readable(name, version), look.matching() as matching:
        chosen = matching.orderBy(*_order(asked)).limit(asked.n_rows).collect()
        n_matching = matching.count()
        if not chosen:
            raise look.nothing()
    rows = [{key: _finite(value) for key, value in row.asDict().items()} for row in chosen]
    texts = _texts(spark, root, [row["instance_id"] for row in rows], asked.n_characters)
    return {
        "version": f"{name}@{version}",
        "side": asked.side,
        "threshold": look.known.threshold,
        "order": "nearest to the cut" if asked.near_cut else f"a random sample, seed {asked.seed}",
        "n_matching": n_matching,
        "rows": [{**row, **texts.get(row["instance_id"], {"text": None, "is_cut": False})} for row in rows],
    }


def _finite(value: Any) -> Any:
    """The value; None for a number that is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(asked: Question) -> "list[Column]":
    from pyspark.sql import functions as F

    by = F.abs("cut_distance").asc_nulls_last() if asked.near_cut else F.xxhash64("instance_id", F.lit(asked.seed))
    return [by, F.col("instance_id")]


@dataclasses.dataclass(frozen=True)
class _Look:
    """A question to a version."""

    spark: "SparkSession"
    root: str
    name: str
    version: int
    known: corpora.Provenance
    asked: Question

    def side(self) -> "DataFrame":
        """The rows of the asked side, all of them: columns of schemas.refined."""
        columns = schemas.refined(self.name, self.known.config["models"]).column_names
        kept = corpora.read_corpus(self.spark, self.root, self.name, self.version)
        if self.asked.side == "kept":
            return kept.select(*columns)
        _, _, rows = versions.chosen_from(self.spark, self.root, self.name, self.version, self.known)
        return tables.missing_from(rows, kept).select(*columns)

    @contextlib.contextmanager
    def matching(self) -> Iterator["DataFrame"]:
        """Those that fit the question, with `cut_distance`."""
        from pyspark import StorageLevel
        from pyspark.sql import functions as F

        rows = self.side().withColumn("cut_distance", cut_distance(self.known))
        if self.asked.source is not None:
            rows = rows.where(F.col("source") == self.asked.source)
        if self.asked.near_cut:
            rows = rows.where(is_finite())
        annotated = self._annotated(rows)
        if self.asked.sql is None:
            yield rows
        elif expressions.resolves(rows, self.asked.sql):
            yield self._where(rows)
        elif expressions.resolves(annotated, self.asked.sql):
            yield self._where(annotated).select(*rows.columns)
        else:
            # All texts are read for it: once.
            found = self._where(self._with_instances(annotated)).select(*rows.columns).persist(StorageLevel.DISK_ONLY)
            try:
                yield found
            finally:
                found.unpersist()

    def _annotated(self, rows: "DataFrame") -> "DataFrame":
        """With the columns of `annotations` where there are any; null for an instance that has none."""
        uri = storage.join(storage.to_uri(self.root), "tables", "annotations")
        if not tables.exists(self.spark, uri):
            return rows
        annotations = tables.read(self.spark, uri)
        own = expressions.own_columns(annotations, rows)
        return rows.join(annotations.select("instance_id", *own), "instance_id", "left")

    def _with_instances(self, rows: "DataFrame") -> "DataFrame":
        n_kept, n_all = self.known.n_instances, self.known.n_candidates
        n_rows = n_kept if self.asked.side == "kept" else n_all - n_kept
        instances = tables.read(self.spark, _instances_uri(self.root))
        return texts_of(rows, instances, expressions.own_columns(instances, rows), n_rows)

    def _where(self, rows: "DataFrame") -> "DataFrame":
        from pyspark.sql.types import BooleanType

        over = "the columns shown, the annotations and the instances' own"
        return rows.where(expressions.expression(rows, str(self.asked.sql), "--sql", BooleanType, "a condition", over))

    def nothing(self) -> CorpusError:
        """What to say where no row fits."""
        asked = self.asked
        sources = sorted(row[0] for row in self.side().select("source").distinct().collect())
        limits = [f"of source {asked.source!r}"] if asked.source is not None else []
        limits += [f"where {asked.sql}"] if asked.sql is not None else []
        limits += ["with a finite score"] if asked.near_cut else []
        wanted = f"{asked.side} rows {' and '.join(limits)}".strip()
        of_side = f"the sources of what it {asked.side} are {sources}"
        return CorpusError(f"{self.name}@{self.version}: expected {wanted}, found none; {of_side}")


def cuts_of(known: corpora.Provenance) -> dict[str | None, list[float]]:
    """The scores at which a version was cut, one or (of a band) two: by source, or under None of all sources alike."""
    if not known.cuts:
        score = known.followed["cut"]["score"] if known.followed else known.threshold
        return {None: [float(score)]}
    by_source = known.config["select"].get("per_source") is not None
    found: dict[str | None, list[float]] = {}
    for source, cuts in known.cuts.items():
        found[source if by_source else None] = [float(cuts[key][0]) for key in ("down_to", "below") if key in cuts]
    return found


def cut_distance(known: corpora.Provenance) -> "Column":
    """The score less that of the nearest cut of the row's source; null where its source has none."""
    from pyspark.sql import functions as F

    cuts = cuts_of(known)
    distances = []
    for number in range(max(map(len, cuts.values()))):
        of = {source: scores[number] for source, scores in cuts.items() if number < len(scores)}
        cut = F.lit(of[None]) if None in of else _looked_up(of)
        distances.append(F.col("score") - cut)
    nearest = distances[0]
    for other in distances[1:]:
        nearest = F.when(F.abs(other) < F.abs(nearest), other).otherwise(nearest)
    return nearest


def _looked_up(by_source: dict[Any, float]) -> "Column":
    from pyspark.sql import functions as F

    return F.create_map(*(F.lit(value) for pair in by_source.items() for value in pair))[F.col("source")]


def _texts(spark: "SparkSession", root: str, ids: list[str], n_characters: int) -> dict[str, dict[str, Any]]:
    """Of each instance that there is: the beginning of its text, and where it is from."""
    from pyspark.sql import functions as F

    wanted = spark.createDataFrame([(one,) for one in ids], "instance_id string")
    instances = tables.read(spark, _instances_uri(root))
    found = texts_of(wanted, instances, (*_BESIDE_TEXT, "text"), len(ids), 1).select(
        "instance_id",
        *_BESIDE_TEXT,
        F.substring("text", 1, n_characters).alias("text"),
        (F.length("text") > n_characters).alias("is_cut"),
    )
    rows = [row.asDict() for row in found.collect()]
    return {row.pop("instance_id"): row for row in rows}


def _instances_uri(root: str) -> str:
    return storage.join(storage.to_uri(root), "tables", "instances")
