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
        sql: a condition over the columns of the version, `cut_distance`, and the instances' own columns.
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
    known = corpora.provenance_of(spark, root, name, version)
    with corpora.readable(name, version), _matching(spark, root, name, version, known, asked) as matching:
        chosen = _ordered(matching, asked).limit(asked.n_rows).collect()
        rows = [{name: _finite(value) for name, value in row.asDict().items()} for row in chosen]
        n_matching = matching.count()
        if not rows:
            raise _nothing(spark, root, name, version, known, asked)
    texts = _texts(spark, root, [row["instance_id"] for row in rows], asked.n_characters)
    return {
        "version": f"{name}@{version}",
        "side": asked.side,
        "threshold": known.threshold,
        "order": "nearest to the cut" if asked.near_cut else f"a random sample, seed {asked.seed}",
        "n_matching": n_matching,
        "rows": [{**row, **texts.get(row["instance_id"], {"text": None, "is_cut": False})} for row in rows],
    }


def _finite(value: Any) -> Any:
    """The value; None for a number that is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ordered(rows: "DataFrame", asked: Question) -> "DataFrame":
    from pyspark.sql import functions as F

    if asked.near_cut:
        return rows.orderBy(F.abs("cut_distance").asc_nulls_last(), "instance_id")
    return rows.orderBy(F.xxhash64("instance_id", F.lit(asked.seed)), "instance_id")


@contextlib.contextmanager
def _matching(
    spark: "SparkSession", root: str, name: str, version: int, known: corpora.Provenance, asked: Question
) -> Iterator["DataFrame"]:
    """The rows that a question fits: the version's columns and `cut_distance`."""
    from pyspark import StorageLevel
    from pyspark.sql import functions as F
    from pyspark.sql.types import BooleanType

    rows = _side(spark, root, name, version, known, asked.side).withColumn("cut_distance", cut_distance(known))
    shown = rows.columns
    if asked.source is not None:
        rows = rows.where(F.col("source") == asked.source)
    if asked.near_cut:
        rows = rows.where(is_finite())
    if asked.sql is None:
        yield rows
        return
    has_all = expressions.resolves(rows, asked.sql)
    if not has_all:
        instances = tables.read(spark, _instances_uri(root))
        n_rows = known.n_instances if asked.side == "kept" else known.n_candidates - known.n_instances
        rows = texts_of(rows, instances, expressions.instance_columns(rows), n_rows)
    what = "the columns shown and the instances' own"
    condition = expressions.expression(rows, asked.sql, "--sql", BooleanType, "a condition", what)
    rows = rows.where(condition).select(*shown)
    if has_all:
        yield rows
        return
    # All texts are read for it: once.
    rows = rows.persist(StorageLevel.DISK_ONLY)
    try:
        yield rows
    finally:
        rows.unpersist()


def _side(
    spark: "SparkSession", root: str, name: str, version: int, known: corpora.Provenance, side: str
) -> "DataFrame":
    columns = schemas.refined(name, known.config["models"]).column_names
    kept = corpora.read_corpus(spark, root, name, version)
    if side == "kept":
        return kept.select(*columns)
    _, _, rows = versions.candidates(spark, root, name, version, known)
    return tables.missing_from(rows, kept).select(*columns)


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


def _nothing(
    spark: "SparkSession", root: str, name: str, version: int, known: corpora.Provenance, asked: Question
) -> CorpusError:
    side = _side(spark, root, name, version, known, asked.side)
    sources = sorted(row[0] for row in side.select("source").distinct().collect())
    limits = [f"of source {asked.source!r}"] if asked.source is not None else []
    limits += [f"where {asked.sql}"] if asked.sql is not None else []
    limits += ["with a finite score"] if asked.near_cut else []
    return CorpusError(
        f"{name}@{version}: expected {asked.side} rows {' and '.join(limits)}, found none; the sources of what it "
        f"{asked.side} are {sources}"
    )
