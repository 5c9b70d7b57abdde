"""Checks of the versions of refined corpora: as recorded, as pinned, and without what was taken down. Driver only.

Input: a `checks.Root`; output: `Check`s. A version reads to the count and the fingerprint that `corpora` has of it; the
newest one must, an older one may have been removed on purpose, and a pinned one's copy must at any time. Of what the
record of take-downs names, nothing is left in any table. Writes nothing.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, pins, removals, tables
from miniplm_udf.errors import CorpusError
from miniplm_udf.refinement import candidates, expressions
from miniplm_udf.refinement.columns import ANNOTATIONS_VERSION
from miniplm_udf.refinement.refine import fingerprint_of, sums_of
from miniplm_udf.schemas import CORPORA, PINS
from miniplm_udf.upkeep.checks import TABLES, Check, Root, examples_of, none, unique

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame


def corpora_of(at: Root) -> Iterator[Check]:
    recorded = at.table("corpora")
    yield unique(recorded, "corpora", CORPORA.key)
    rows = recorded.orderBy("name", "version").collect()
    newest = {row["name"]: row["version"] for row in rows}
    kept = {(pin.name, pin.version) for pin in pins.find(at.spark, at.root)}
    for row in rows:
        is_newest = newest[row["name"]] == row["version"]
        yield from _version(at, row, is_newest, may_be_gone=not is_newest or (row["name"], row["version"]) in kept)


def _version(at: Root, row: Any, is_newest: bool, may_be_gone: bool) -> Iterator[Check]:
    """A version of a corpus: its rows are those that `corpora` records; the newest one's are the matrix's, too.

    Maintenance may have removed an older one, and a pinned one is read from its copy (`pinned`).
    """
    name = f"corpus {row['name']}, version {row['version']}"
    uri = at.uri(f"refined/{row['name']}")
    try:
        corpus = corpora.with_files(tables.read(at.spark, uri, row["version"]))
        n_rows, n_ids, found = _sums(corpus)
    except Exception as error:
        if not corpora.is_gone(error):
            raise
        is_meant = may_be_gone and _is_vacuumed_since(at, uri, int(row["version"]))
        note = "removed by maintenance or a take-down" if is_meant else str(error).splitlines()[0]
        yield Check(f"{name}: its files are there", row["n_instances"], 0, is_meant, note=note)
        return
    yield Check(f"{name}: rows", row["n_instances"], n_rows, n_rows == n_ids == row["n_instances"])
    yield Check(f"{name}: fingerprint", row["fingerprint"], found, found == row["fingerprint"])
    if is_newest and at.has("score_matrix"):
        yield _in_matrix(at, name, corpus, row)


def _sums(corpus: "DataFrame") -> tuple[int, int, str]:
    """Rows, distinct ids and fingerprint of a version. Reads all its files."""
    from pyspark.sql import functions as F

    sums = corpus.agg(F.count_distinct("instance_id").alias("n_ids"), *sums_of(F.lit(True))).collect()[0]
    n_rows = int(sums["n_kept"])
    return n_rows, int(sums["n_ids"]), fingerprint_of([(sums["xor"] or 0, sums["sum"] or 0)], n_rows)


def _is_vacuumed_since(at: Root, uri: str, version: int) -> bool:
    """Whether files of a version can have been removed on purpose: it is in the log; or the log has ended since."""
    from delta.tables import DeltaTable

    history = DeltaTable.forPath(at.spark, uri).history().select("version", "operation").collect()
    vacuumed = any(row["operation"] == "VACUUM START" and row["version"] > version for row in history)
    return vacuumed or all(row["version"] > version for row in history)


def pinned(at: Root) -> Iterator[Check]:
    """Every file of every pinned version is there, with the rows that were pinned."""
    yield unique(tables.read(at.spark, pins.pins_uri(at.root)), "pins", PINS.key)
    for pin in pins.find(at.spark, at.root):
        name = f"corpus {pin.name}, version {pin.version}: pinned"
        try:
            n_rows, n_ids, found = _sums(corpora.with_files(pins.read(at.spark, at.root, pin.name, pin.version)))
        except Exception as error:
            if not (isinstance(error, CorpusError) or corpora.is_gone(error)):
                raise
            yield Check(name, pin.fingerprint, "nothing", False, note=str(error).splitlines()[0])
            continue
        is_whole = (n_rows, n_ids, found) == (pin.n_instances, pin.n_instances, pin.fingerprint)
        yield Check(name, pin.fingerprint, found, is_whole)


def taken_down(at: Root) -> Iterator[Check]:
    """Nothing that was taken down is in a table: no instance of its documents, and no row of such an instance."""
    from pyspark.sql import functions as F

    documents = removals.document_ids(at.spark, at.root)
    of_them = at.table("instances").where(F.arrays_overlap("document_ids", F.lit(documents)))
    yield none("instances: none is of a document that was taken down", of_them, "instance_id")
    gone = removals.instance_ids(at.spark, at.root)
    assert gone is not None
    frames = {name: at.table(name) for name in TABLES if at.has(name) and name != "corpora"}
    names = {row[0] for row in at.table("corpora").select("name").collect()} if at.has("corpora") else set()
    frames |= {f"refined/{name}": tables.read(at.spark, at.uri(f"refined/{name}")) for name in sorted(names)}
    for pin in pins.find(at.spark, at.root):
        uri = pins.copy_uri(at.root, pin.name, pin.version)
        if tables.exists(at.spark, uri):
            frames[f"pinned/{pin.name}/{pin.version}"] = tables.read(at.spark, uri)
    for name, frame in frames.items():
        left = frame.join(gone, "instance_id", "left_semi")
        yield none(f"{name}: no row of an instance that was taken down", left, "instance_id")


def _in_matrix(at: Root, name: str, corpus: "DataFrame", row: Any) -> Check:
    """Every kept row stands in the matrix, with the score that the recorded expression gives it there."""
    from pyspark.sql import functions as F

    config, inputs = json.loads(row["config"]), json.loads(row["inputs"])
    batches = inputs.get("last_batches", {})
    text, of = config["score"], config.get("candidates", candidates.MATRIX)
    what = "the matrix's" if of == candidates.MATRIX else "the proxy's"
    read = [table for table in {of, candidates.MATRIX} if at.has(table)]
    known = {one[0] for table in read for one in at.table(table).select("query_id").distinct().collect()}
    if of not in read or not batches or not set(batches) <= known:
        note = f"{of} was built anew since, of other models or by another proxy"
        return Check(f"{name}: rows are {what}", row["n_instances"], row["n_instances"], True, note=note)
    matrix = at.table(of)
    if of == candidates.PROXY:
        # As the matrix was: what was scored since had no score then.
        matrix = candidates.beside(matrix, candidates.as_of(at.table("score_matrix"), batches), text)
    if not expressions.resolves(matrix, text):
        others = ["instances"]
        if (made_of_version := inputs.get(ANNOTATIONS_VERSION)) is not None:
            newest = corpora.newest(at.spark, at.uri("annotations"))
            if newest is None or newest.version != made_of_version:
                note = "the annotations that its score is made of have changed since"
                return Check(f"{name}: rows are {what}", row["n_instances"], row["n_instances"], True, note=note)
            others.append("annotations")
        matrix = expressions.joined(matrix, *map(at.table, others))
    score: Column = F.expr(text).cast("double")
    wrong = corpus.join(matrix.select("instance_id", score.alias("again")), "instance_id", "left").where(
        ~F.col("score").eqNullSafe(F.col("again"))
    )
    n_wrong = wrong.count()
    examples = examples_of(wrong, "instance_id") if n_wrong else ()
    n_rows = int(row["n_instances"])
    return Check(f"{name}: rows are {what}", n_rows, n_rows - n_wrong, n_wrong == 0, examples=examples)
