"""Checks of the versions of refined corpora: as recorded, as pinned, and without what was taken down. Driver only.

Input: a `CheckedRoot`; output: `Check`s. The rows of a version must have the count and the fingerprint that `corpora`
records. The newest version must exist, an older version may have been removed on purpose, and a pinned copy must
exist at any time. No table may contain what the record of take-downs names. Writes nothing.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.refinement import candidates, expressions
from miniplm_udf.refinement.columns import ANNOTATIONS_VERSION
from miniplm_udf.refinement.fingerprints import fingerprint_of, sums_of
from miniplm_udf.schemas import CORPORA, PINS, table_names
from miniplm_udf.store import corpus_records, delta_log, pins, tables, takedowns
from miniplm_udf.store.provenance import VersionTables
from miniplm_udf.upkeep.checks import TABLES, Check, CheckedRoot, examples_of, none, unique

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame


def corpora_of(checked: CheckedRoot) -> Iterator[Check]:
    """Checks every version that `corpora` records.

    Args:
        checked: a root with the table `corpora`.

    Yields:
        The check of the table's keys, then the checks of each version.
    """
    recorded = checked.table("corpora")
    yield unique(recorded, "corpora", CORPORA.key)
    rows = recorded.orderBy("name", "version").collect()
    newest = {row["name"]: row["version"] for row in rows}
    pinned_versions = {(pin.name, pin.version) for pin in pins.find(checked.spark, checked.root)}
    for row in rows:
        is_newest = newest[row["name"]] == row["version"]
        yield from _version(
            checked, row, is_newest, may_be_gone=not is_newest or (row["name"], row["version"]) in pinned_versions
        )


def _version(checked: CheckedRoot, row: Any, is_newest: bool, may_be_gone: bool) -> Iterator[Check]:
    """Checks that a version has the rows that `corpora` records and, if it is the newest, that the matrix has them.

    Maintenance may have removed an older version; the copy of a pinned version is checked by `pinned`.
    """
    name = f"corpus {row['name']}, version {row['version']}"
    uri = Root(checked.root).refined(row["name"])
    if not tables.exists(checked.spark, uri):
        note = f"the table {Root(checked.root).relative(uri)} is gone; put it back from a copy"
        yield Check(f"{name}: its files are there", row["n_instances"], 0, False, note=note)
        return
    try:
        corpus = corpus_records.with_files(tables.read(checked.spark, uri, row["version"]))
        n_rows, n_ids, fingerprint = _sums(corpus)
    except Exception as error:
        if not corpus_records.is_gone(error):
            raise
        is_intended = may_be_gone and _was_vacuumed_later(uri, int(row["version"]))
        note = "removed by maintenance or a take-down" if is_intended else str(error).splitlines()[0]
        yield Check(f"{name}: its files are there", row["n_instances"], 0, is_intended, note=note)
        return
    yield Check(f"{name}: rows", row["n_instances"], n_rows, n_rows == n_ids == row["n_instances"])
    yield Check(f"{name}: fingerprint", row["fingerprint"], fingerprint, fingerprint == row["fingerprint"])
    if is_newest and checked.has("score_matrix"):
        yield _in_matrix(checked, name, corpus, row)


def _sums(corpus: "DataFrame") -> tuple[int, int, str]:
    """Rows, distinct ids and fingerprint of a version. Reads all its files."""
    from pyspark.sql import functions as F

    sums = corpus.agg(F.count_distinct("instance_id").alias("n_ids"), *sums_of(F.lit(True))).collect()[0]
    n_rows = int(sums["n_kept"])
    return n_rows, int(sums["n_ids"]), fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], n_rows)


def _was_vacuumed_later(uri: str, version: int) -> bool:
    """Whether files of a version may have been removed on purpose: the log has a later vacuum, or begins later."""
    commits = list(delta_log.commits(uri))
    vacuumed = any(commit.operation == "VACUUM START" and commit.version > version for commit in commits)
    return vacuumed or all(commit.version > version for commit in commits)


def pinned(checked: CheckedRoot) -> Iterator[Check]:
    """Checks that every file of every pinned version exists, with the rows that were pinned.

    Args:
        checked: a root with the table `pins`.

    Yields:
        The check of the table's keys, then one check per pin.
    """
    yield unique(tables.read(checked.spark, Root(checked.root).table("pins")), "pins", PINS.key)
    for pin in pins.find(checked.spark, checked.root):
        name = f"corpus {pin.name}, version {pin.version}: pinned"
        try:
            n_rows, n_ids, fingerprint = _sums(
                corpus_records.with_files(pins.read(checked.spark, checked.root, pin.name, pin.version))
            )
        except Exception as error:
            if not (isinstance(error, CorpusError) or corpus_records.is_gone(error)):
                raise
            yield Check(name, pin.fingerprint, "nothing", False, note=str(error).splitlines()[0])
            continue
        is_whole = (n_rows, n_ids, fingerprint) == (pin.n_instances, pin.n_instances, pin.fingerprint)
        yield Check(name, pin.fingerprint, fingerprint, is_whole)


def taken_down(checked: CheckedRoot) -> Iterator[Check]:
    """Checks that no table has an instance of a document that was taken down, or a row about the instance.

    Args:
        checked: a root where something was taken down.

    Yields:
        One check per table, corpus and pinned version.
    """
    from pyspark.sql import functions as F

    documents = takedowns.document_ids(checked.spark, checked.root)
    wrong = checked.table("instances").where(F.arrays_overlap("document_ids", F.lit(documents)))
    yield none("instances: none is of a document that was taken down", wrong, "instance_id")
    gone = takedowns.instance_ids(checked.spark, checked.root)
    assert gone is not None
    frames = {name: checked.table(name) for name in TABLES if checked.has(name) and name != "corpora"}
    names = {row[0] for row in checked.table("corpora").select("name").collect()} if checked.has("corpora") else set()
    for corpus in map(table_names.refined, sorted(names)):
        if tables.exists(checked.spark, checked.uri(corpus)):
            frames[corpus] = tables.read(checked.spark, checked.uri(corpus))
    for pin in pins.find(checked.spark, checked.root):
        uri = Root(checked.root).pinned(pin.name, pin.version)
        if tables.exists(checked.spark, uri):
            frames[table_names.pinned(pin.name, pin.version)] = tables.read(checked.spark, uri)
    for name, frame in frames.items():
        left = frame.join(gone, "instance_id", "left_semi")
        yield none(f"{name}: no row of an instance that was taken down", left, "instance_id")


def _in_matrix(checked: CheckedRoot, name: str, corpus: "DataFrame", row: Any) -> Check:
    """Checks that every kept row is in its table of candidates, with the score that the recorded expression gives."""
    from pyspark.sql import functions as F

    config, inputs = json.loads(row["config"]), json.loads(row["inputs"])
    source, n_rows = config.get("candidates", candidates.MATRIX), int(row["n_instances"])
    check_name = f"{name}: rows are {'the matrix' if source == candidates.MATRIX else 'the proxy'}'s"
    if not _has_batches(checked, source, inputs.get("last_batches", {})):
        note = f"{source} was built again since, with other models or by another proxy"
        return Check(check_name, n_rows, n_rows, True, note=note)
    rows = _rows_with_columns(checked, config["score"], source, inputs)
    if rows is None:
        note = "the annotations that its score is made from have changed since"
        return Check(check_name, n_rows, n_rows, True, note=note)
    score: Column = F.expr(config["score"]).cast("double")
    wrong = corpus.join(rows.select("instance_id", score.alias("again")), "instance_id", "left").where(
        ~F.col("score").eqNullSafe(F.col("again"))
    )
    n_wrong = wrong.count()
    examples = examples_of(wrong, "instance_id") if n_wrong else ()
    return Check(check_name, n_rows, n_rows - n_wrong, n_wrong == 0, examples=examples)


def _has_batches(checked: CheckedRoot, source: str, batches: dict[str, int]) -> bool:
    """Whether the table of candidates (and the matrix) still has rows of the queries that a version names."""
    present = [table for table in {source, candidates.MATRIX} if checked.has(table)]
    queries = {row[0] for table in present for row in checked.table(table).select("query_id").distinct().collect()}
    return source in present and bool(batches) and set(batches) <= queries


def _rows_with_columns(checked: CheckedRoot, score: str, source: str, inputs: VersionTables) -> "DataFrame | None":
    """The candidates with the columns that the score names; None if the annotations have changed since."""
    rows = checked.table(source)
    if source == candidates.PROXY:
        # As the matrix was then: an instance that was scored later had no score.
        matrix = candidates.as_of(checked.table(candidates.MATRIX), inputs["last_batches"])
        rows = candidates.with_matrix(rows, matrix, score)
    if expressions.resolves(rows, score):
        return rows
    others = ["instances"]
    if (annotations_version := inputs.get(ANNOTATIONS_VERSION)) is not None:
        newest = corpus_records.newest(checked.uri("annotations"))
        if newest is None or newest.version != annotations_version:
            return None
        others.append("annotations")
    return expressions.joined(rows, *map(checked.table, others))
