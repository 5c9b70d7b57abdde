"""Taking documents down by id: out of every table of a root, pinned versions too, and never in again. Driver only.

    asked for -> recorded -> packed, refined, pinned -> annotations, proxy_scores, score_matrix, scores, rejects,
              instances -> old files removed

Input: a config and ids of documents. Every instance that holds a byte of one goes, whole: a score belongs to the text
that was scored, and a cut text would be an instance that nobody has scored; its other documents lose that slice. What
will be removed is recorded first (removals.py) and `instances` goes last, so a command that was killed goes on from the
record. A corpus gets a new version without the rows; versions that are not pinned, and packed sequences of such rows,
are given up. No query of the root runs meanwhile (its lease); one that was behind begins anew. Inputs are not touched.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, pins, removals, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.removals import WHOLE, Takedown
from miniplm_udf.streams import checkpoints
from miniplm_udf.upkeep import versions

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.takedown")

# With rows by instance id, from the last to the first.
_BY_INSTANCE = ("annotations", "proxy_scores", "score_matrix", "scores", "rejects", "instances")
# Columns of annotations that name another instance.
_NAMING = ("duplicate_of", "near_duplicate_of")


def look(spark: "SparkSession", root: str, ids: Sequence[str]) -> dict[str, Any]:
    """What of documents is in `instances`.

    Returns:
        `instances` that hold any of them; `not_found`: ids that none holds; `other_documents` that lose a slice.

    Raises:
        ConfigError: no id was given.
        CorpusError: there is no table of instances.
    """
    from pyspark.sql import functions as F

    if not ids or not all(ids):
        raise ConfigError("take-down: expected ids of documents, found none, or an empty one; give --id or --ids-from")
    rows = _holding(spark, root, ids)
    held = {row[0] for row in rows.select(F.explode("document_ids")).distinct().collect()}
    wanted = set(ids)
    return {
        "instances": rows.count(),
        "not_found": sorted(wanted - held),
        "other_documents": len(held - wanted),
    }


def _holding(spark: "SparkSession", root: str, ids: Sequence[str]) -> "DataFrame":
    from pyspark.sql import functions as F

    instances = tables.read(spark, storage.join(storage.to_uri(root), "tables", "instances"))
    return instances.where(F.arrays_overlap("document_ids", F.lit(list(ids))))


def take_down(
    spark: "SparkSession", config: ExperimentConfig, ids: Sequence[str], takedown: Takedown
) -> dict[str, Any]:
    """Takes documents down. Run again with the same ids, or with more, it finishes what was begun.

    Args:
        ids: of documents, as in `instances.document_ids`: the input's own, else the hash of the text.

    Returns:
        As `look`; `takedown_id`; `removed`: {table: rows}; `begun_anew`: queries; `students` that were trained on
        packed sequences of such rows; `exports` under the root, which may hold such text and are not changed.

    Raises:
        ConfigError: no id was given.
        CorpusError: there is no table of instances; a query of the root runs.
    """
    with checkpoints.alone(config.root):
        found = look(spark, config.root, ids)
        removals.ask(spark, config.root, takedown, ids)
        _record_instances(spark, config.root, takedown)
        done = _TakeDown(spark, config, takedown)
        try:
            done.run()
        finally:
            done.gone.unpersist()
    LOGGER.info("take-down %s: %d instances, %s", takedown.id, found["instances"], done.removed)
    return {
        **found, "takedown_id": takedown.id, "removed": done.removed, "begun_anew": done.begun_anew,
        "students": done.students(), "exports": storage.list_folder(config.exports_uri),
    }  # fmt: skip


def _record_instances(spark: "SparkSession", root: str, takedown: Takedown) -> None:
    from pyspark.sql import functions as F

    rows = _holding(spark, root, removals.document_ids(spark, root)).select("instance_id")
    known = removals.instance_ids(spark, root)
    assert known is not None
    new = tables.missing_from(rows, known).select(F.col("instance_id").alias("key"), F.lit(1).alias("n_rows"))
    # Computed before the table of records is written, which it reads.
    new = new.persist()
    try:
        if new.count():
            removals.add(spark, root, takedown, "instances", new)
    finally:
        new.unpersist()


class _TakeDown:
    """One command at work, with all leases held. `gone` are all instances that were ever taken down."""

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, takedown: Takedown) -> None:
        self._spark, self._config, self._takedown = spark, config, takedown
        self._root = config.root
        gone = removals.instance_ids(spark, config.root)
        assert gone is not None
        self.gone: DataFrame = gone.persist()
        self.removed: dict[str, int] = {}
        self.begun_anew: list[str] = []
        self._emptied: list[str] = []

    def run(self) -> None:
        for name in self._folders("packed"):
            for tokenizer in self._folders(f"packed/{name}"):
                self._packed(name, tokenizer)
        for name in self._folders("refined"):
            self._corpus(name)
        for pin in pins.find(self._spark, self._root):
            self._pin(pin)
        self._named_in_annotations()
        for name in _BY_INSTANCE:
            self._table(name)

    def students(self) -> list[str]:
        """Models that were trained on packed sequences which were given up."""
        # By the table's place in its root, which may have been moved since.
        ends = tuple(f"/tables/{table}" for table in self._emptied)
        found = {}
        for name in storage.list_folder(storage.join(self._root, "models")):
            training = storage.read_json(storage.join(self._config.model_uri(name), "training.json")) or {}
            found[name] = str(training.get("packed_uri", ""))
        return sorted(name for name, packed in found.items() if ends and packed.endswith(ends))

    def _folders(self, name: str) -> list[str]:
        return storage.list_folder(self._config.table_uri(name))

    def _rows_of_gone(self, rows: "DataFrame") -> "DataFrame":
        return rows.join(self.gone, "instance_id", "left_semi")

    def _record(self, table: str, rows: "DataFrame") -> int:
        """Records the rows that will be removed of a table; returns their number."""
        from pyspark.sql import functions as F

        counted = rows.groupBy(F.col("instance_id").alias("key")).agg(F.count("*").alias("n_rows")).persist()
        try:
            n_rows = int(counted.agg(F.sum("n_rows")).collect()[0][0] or 0)
            # The instances were recorded before all else.
            if n_rows and table != "instances":
                removals.add(self._spark, self._root, self._takedown, table, counted)
        finally:
            counted.unpersist()
        if n_rows:
            self.removed[table] = n_rows
        return n_rows

    def _vacuum(self, table: str, is_logged: bool = False) -> None:
        tables.vacuum(self._spark, self._config.table_uri(table), 0, is_logged)

    def _packed(self, name: str, tokenizer: str) -> None:
        """Empties a packed table that holds such rows: which of its sequences does is not known; `pack` is exact."""
        from delta.tables import DeltaTable

        table = f"packed/{name}/{tokenizer}"
        uri = self._config.table_uri(table)
        if not tables.exists(self._spark, uri):
            return
        n_rows = tables.read(self._spark, uri).count()
        if n_rows and self._is_packed_of_gone(name, uri):
            whole = self._spark.createDataFrame([(WHOLE, n_rows)], "key string, n_rows bigint")
            removals.add(self._spark, self._root, self._takedown, table, whole)
            DeltaTable.forPath(self._spark, uri).delete()
            self.removed[table] = n_rows
            self._emptied.append(table)
        self._vacuum(table)

    def _is_packed_of_gone(self, name: str, uri: str) -> bool:
        """Whether the rows that a table was packed of hold some that are gone; where it cannot be told, they do."""
        if name == "reference":
            instances = tables.read(self._spark, self._config.table_uri("instances"))
            return not self._rows_of_gone(instances.where("split = 'reference'")).isEmpty()
        newest = corpora.newest(self._spark, uri)
        version = ((newest.metadata if newest else None) or {}).get("refined_version")
        if version is None:
            return True
        try:
            rows = corpora.read_corpus(self._spark, self._root, name, version)
            with corpora.readable(name, version):
                return not self._rows_of_gone(rows).isEmpty()
        except CorpusError:
            return True

    def _corpus(self, name: str) -> None:
        """Commits a corpus's newest rows without those that are gone; older versions lose their files."""
        uri = corpora.corpus_uri(self._root, name)
        newest = corpora.newest(self._spark, uri)
        if newest is None:
            return
        if newest.provenance is not None:
            # Where its maker was killed before it had done so.
            corpora.record(self._spark, self._root, newest.version, newest.provenance)
        rows = tables.read(self._spark, uri, newest.base)
        if self._record(f"refined/{name}", self._rows_of_gone(rows)):
            known = newest.provenance or corpora.provenance_of(self._spark, self._root, name, newest.version)
            left = tables.missing_from(rows, self.gone)
            derived = {"by": "take-down", "from_version": newest.version, "takedown_id": self._takedown.id}
            found = versions.recounted(known, left)
            versions.commit_derived(self._spark, self._config, left, found, newest, derived)
        self._vacuum(f"refined/{name}", is_logged=True)

    def _pin(self, pin: pins.Pin) -> None:
        """Removes rows from the copy of a pinned version, whose row says so first."""
        table = f"pinned/{pin.name}/{pin.version}"
        uri = pins.copy_uri(self._root, pin.name, pin.version)
        if not tables.exists(self._spark, uri):
            return
        rows = tables.read(self._spark, uri)
        if self._record(table, self._rows_of_gone(rows)):
            known = corpora.provenance_of(self._spark, self._root, pin.name, pin.version)
            left = versions.recounted(known, tables.missing_from(rows, self.gone))
            made = dataclasses.replace(pin, n_instances=left.n_instances, fingerprint=left.fingerprint)
            pins.changed(self._spark, self._root, made)
            tables.delete_matching(self._spark, uri, self.gone)
        self._vacuum(table)

    def _named_in_annotations(self) -> None:
        """Removes the annotations of instances that are said to be copies of one that goes: `annotate` makes them anew.

        Else `duplicate_of is null` would drop texts of which no copy is left.
        """
        uri = self._config.table_uri("annotations")
        if not tables.exists(self._spark, uri):
            return
        rows = tables.read(self._spark, uri)
        found = rows.select("instance_id").where("false")
        for name in set(_NAMING) & set(rows.columns):
            of_gone = self.gone.withColumnRenamed("instance_id", name)
            found = found.union(rows.join(of_gone, name, "left_semi").select("instance_id"))
        ids = tables.missing_from(found.distinct(), self.gone).persist()
        try:
            if n_rows := ids.count():
                tables.delete_matching(self._spark, uri, ids)
                LOGGER.info(
                    "annotations: %d rows named an instance that goes; `miniplm annotate` makes them anew", n_rows
                )
        finally:
            ids.unpersist()

    def _table(self, name: str) -> None:
        """Removes the rows of a table; a query that has still to read files of it begins anew, without them."""
        uri = self._config.table_uri(name)
        if not tables.exists(self._spark, uri):
            return
        n_rows = self._record(name, self._rows_of_gone(tables.read(self._spark, uri)))
        is_counted = n_rows > 0 and name == "score_matrix"
        for one in checkpoints.find(self._root):
            # A vacuum at no retention takes what it has not read; and a follower has counted what goes.
            if one.source == name and (is_counted or checkpoints.needed_from(self._spark, uri, one) is not None):
                storage.remove_folder(one.uri)
                self.begun_anew.append(one.name)
        if is_counted:
            storage.remove_folder(self._config.table_uri("cuts"))
        if n_rows:
            tables.delete_matching(self._spark, uri, self.gone)
        self._vacuum(name)
