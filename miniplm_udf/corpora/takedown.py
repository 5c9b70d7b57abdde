"""Removes documents by id from every table of a root, pinned versions too, for good. Driver only.

    request -> recorded -> packed, refined, pinned -> generations, proxy_scores, score_matrix, scores, rejects,
            annotations, instances -> old files removed

Input: a config and ids of documents. Every instance that holds a byte of a document is removed whole, because a
score belongs to the text that was scored; other documents lose the slices that they share with it. The rows to remove
are recorded first (store/takedowns.py) and `instances` is changed last, so a command that was killed continues from the
record. A corpus gets a new version without the rows; versions that are not pinned, and packed sequences with these
rows, are deleted. No query of the root runs meanwhile (its lease is held); a query that was behind starts again. Input
files are not changed.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniplm_udf import object_storage, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora import versions
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.layout import Root, shown_table
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.table_kinds import KINDS
from miniplm_udf.store import corpus_records, model_records, pins, tables, takedowns
from miniplm_udf.store.provenance import DerivedFrom
from miniplm_udf.store.takedowns import WHOLE, Takedown
from miniplm_udf.streams import checkpoints

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.takedown")

# Columns of annotations that name another instance.
_NAMING = ("duplicate_of", "near_duplicate_of")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentCounts:
    """Counts of the instances that hold some documents.

    Attributes:
        instances: instances that hold a byte of any of them.
        not_found: ids that no instance holds.
        other_documents: other documents in these instances, which lose a slice.
    """

    instances: int
    not_found: list[str]
    other_documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakedownSummary(DocumentCounts):
    """The result of a take-down.

    Attributes:
        takedown_id: id in the record of take-downs.
        removed: rows by table.
        begun_anew: checkpoints of queries that start again from the beginning.
        students: models that were trained on packed sequences of removed rows; they are not changed.
        exports: exports under the root, which may hold the removed text and are not changed.
        earlier_objects: whether the storage may keep earlier versions of the removed files: none, kept, or unknown.
    """

    takedown_id: str
    removed: dict[str, int]
    begun_anew: list[str]
    students: list[str]
    exports: list[str]
    earlier_objects: object_storage.EarlierObjects


def preview(spark: "SparkSession", root: str, ids: Sequence[str]) -> DocumentCounts:
    """Returns the counts of instances that a take-down would remove.

    Args:
        spark: any session.
        root: URI of the root.
        ids: ids of documents, as in `instances.document_ids`.

    Raises:
        ConfigError: there is no id, or an id is empty.
        CorpusError: there is no table of instances.
    """
    from pyspark.sql import functions as F

    if not ids or not all(ids):
        raise ConfigError("take-down: expected ids of documents, found none, or an empty one; give --id or --ids-from")
    rows = _holding(spark, root, ids)
    held = {row[0] for row in rows.select(F.explode("document_ids")).distinct().collect()}
    wanted = set(ids)
    return DocumentCounts(instances=rows.count(), not_found=sorted(wanted - held), other_documents=len(held - wanted))


def _holding(spark: "SparkSession", root: str, ids: Sequence[str]) -> "DataFrame":
    """The instances that hold a byte of the documents."""
    from pyspark.sql import functions as F

    instances = tables.read(spark, Root(root).table("instances"))
    return instances.where(F.arrays_overlap("document_ids", F.lit(list(ids))))


def take_down(
    spark: "SparkSession", config: ExperimentConfig, ids: Sequence[str], takedown: Takedown
) -> TakedownSummary:
    """Takes documents down. Running it again with the same ids, or with more, finishes what was begun.

    Args:
        spark: any session.
        config: the experiment.
        ids: ids of documents, as in `instances.document_ids`: the id in the input, or the hash of the text if there is
            no id.
        takedown: the record of the command.

    Returns:
        Counts of what was removed.

    Raises:
        ConfigError: there is no id, or an id is empty.
        CorpusError: there is no table of instances; a query of the root runs.
    """
    with checkpoints.alone(config.root):
        counts = preview(spark, config.root, ids)
        takedowns.ask(spark, config.root, takedown, ids)
        _record_instances(spark, config.root, takedown)
        removal = _Removal(spark, config, takedown)
        try:
            removal.run()
        finally:
            removal.gone.unpersist()
    LOGGER.info("take-down %s: %d instances, %s", takedown.id, counts.instances, removal.removed)
    return TakedownSummary(
        **dataclasses.asdict(counts),
        takedown_id=takedown.id,
        removed=removal.removed,
        begun_anew=removal.begun_anew,
        students=removal.students(),
        exports=storage.list_folder(config.layout.exports()),
        earlier_objects=object_storage.earlier_objects(config.root),
    )


def _record_instances(spark: "SparkSession", root: str, takedown: Takedown) -> None:
    """Records the instances that hold a document which was ever taken down, unless they are recorded."""
    from pyspark.sql import functions as F

    rows = _holding(spark, root, takedowns.document_ids(spark, root)).select("instance_id")
    recorded = takedowns.instance_ids(spark, root)
    assert recorded is not None
    new = tables.missing_from(rows, recorded).select(F.col("instance_id").alias("key"), F.lit(1).alias("n_rows"))
    # Computed now, because the table of records that it reads is written next.
    new = new.persist()
    try:
        if new.count():
            takedowns.add(spark, root, takedown, "instances", new)
    finally:
        new.unpersist()


class _Removal:
    """Removes all instances that were ever taken down (`gone`) from every table. The caller holds all leases."""

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, takedown: Takedown) -> None:
        self._spark, self._config, self._takedown = spark, config, takedown
        self._root = config.root
        gone = takedowns.instance_ids(spark, config.root)
        assert gone is not None
        self.gone: DataFrame = gone.persist()
        self.removed: dict[str, int] = {}
        self.begun_anew: list[str] = []
        self._emptied: list[str] = []

    def run(self) -> None:
        layout = self._config.layout
        for name in storage.list_folder(layout.packed()):
            for tokenizer in storage.list_folder(layout.packed(name)):
                self._packed(name, tokenizer)
        for name in storage.list_folder(layout.refined()):
            self._corpus(name)
        for pin in pins.find(self._spark, self._root):
            self._pin(pin)
        self._named_in_annotations()
        # A table comes before the tables that it is made from.
        for kind in reversed(KINDS):
            if kind.has_instances:
                self._table(kind.name)

    def students(self) -> list[str]:
        """Names of models that were trained on packed sequences which were emptied."""
        # Compared by the path below the root, because the root may have been moved since.
        ends = tuple(f"/{shown_table(table)}" for table in self._emptied)
        packed_uris = {}
        for name in storage.list_folder(self._config.layout.model()):
            training = model_records.read_training(self._config, name)
            if training is not None:
                packed_uris[name] = training.packed_uri
        return sorted(name for name, uri in packed_uris.items() if ends and uri.endswith(ends))

    def _rows_of_gone(self, rows: "DataFrame") -> "DataFrame":
        return rows.join(self.gone, "instance_id", "left_semi")

    def _record(self, table: str, rows: "DataFrame") -> int:
        """Records the rows that will be removed from a table; returns their number."""
        from pyspark.sql import functions as F

        counted = rows.groupBy(F.col("instance_id").alias("key")).agg(F.count("*").alias("n_rows")).persist()
        try:
            n_rows = int(counted.agg(F.sum("n_rows")).collect()[0][0] or 0)
            # The instances were recorded first of all.
            if n_rows and table != "instances":
                takedowns.add(self._spark, self._root, self._takedown, table, counted)
        finally:
            counted.unpersist()
        if n_rows:
            self.removed[table] = n_rows
        return n_rows

    def _vacuum(self, table: str, is_logged: bool = False) -> None:
        """Removes all files but the newest version's, after rewriting files with rows that are only hidden."""
        uri = self._config.layout.table(table)
        tables.make_readable(self._spark, uri)
        tables.vacuum(self._spark, uri, 0, is_logged)

    def _packed(self, name: str, tokenizer: str) -> None:
        """Empties a packed table that was made from removed rows.

        The table does not record which sequences contain the removed rows, so all are deleted.
        """
        from delta.tables import DeltaTable

        table = table_names.packed(name, tokenizer)
        uri = self._config.layout.table(table)
        if not tables.exists(self._spark, uri):
            return
        n_rows = tables.read(self._spark, uri).count()
        if n_rows and self._is_packed_from_gone(name, uri):
            whole = self._spark.createDataFrame([(WHOLE, n_rows)], "key string, n_rows bigint")
            takedowns.add(self._spark, self._root, self._takedown, table, whole)
            DeltaTable.forPath(self._spark, uri).delete()
            self.removed[table] = n_rows
            self._emptied.append(table)
        self._vacuum(table)

    def _is_packed_from_gone(self, name: str, uri: str) -> bool:
        """Whether a table was packed from rows that are gone; True if that is not known."""
        if name == "reference":
            instances = tables.read(self._spark, self._config.layout.table("instances"))
            return not self._rows_of_gone(instances.where("split = 'reference'")).isEmpty()
        newest = corpus_records.newest(uri)
        metadata = (newest.metadata if newest else None) or {}
        if metadata.get("generation_revision") is not None:
            generations = self._config.layout.table("generations")
            # If the table is gone, the rows that were packed are not known.
            return (
                not tables.exists(self._spark, generations)
                or not self._rows_of_gone(tables.read(self._spark, generations)).isEmpty()
            )
        version = metadata.get("refined_version")
        if version is None:
            return True
        try:
            rows = corpus_records.read_corpus(self._spark, self._root, name, version)
            with corpus_records.readable(name, version):
                return not self._rows_of_gone(rows).isEmpty()
        except CorpusError:
            return True

    def _corpus(self, name: str) -> None:
        """Commits the newest rows of a corpus without the removed rows, and removes the files of older versions."""
        uri = Root(self._root).refined(name)
        newest = corpus_records.newest(uri)
        if newest is None:
            return
        if newest.provenance is not None:
            # Repair: the previous run may have died before it recorded this version.
            corpus_records.record(self._spark, self._root, newest.version, newest.provenance)
        rows = tables.read(self._spark, uri, newest.base)
        if self._record(table_names.refined(name), self._rows_of_gone(rows)):
            recorded = newest.provenance or corpus_records.provenance_of(self._spark, self._root, name, newest.version)
            remaining = tables.missing_from(rows, self.gone)
            derived: DerivedFrom = {"by": "take-down", "from_version": newest.version, "takedown_id": self._takedown.id}
            provenance = versions.recounted(recorded, remaining)
            versions.commit_derived(self._spark, self._config, remaining, provenance, newest, derived)
        self._vacuum(table_names.refined(name), is_logged=True)

    def _pin(self, pin: pins.Pin) -> None:
        """Removes rows from the copy of a pinned version, after changing the counts in its row of `pins`."""
        table = table_names.pinned(pin.name, pin.version)
        uri = Root(self._root).pinned(pin.name, pin.version)
        if not tables.exists(self._spark, uri):
            return
        rows = tables.read(self._spark, uri)
        if self._record(table, self._rows_of_gone(rows)):
            recorded = corpus_records.provenance_of(self._spark, self._root, pin.name, pin.version)
            remaining = versions.recounted(recorded, tables.missing_from(rows, self.gone))
            changed = dataclasses.replace(pin, n_instances=remaining.n_instances, fingerprint=remaining.fingerprint)
            pins.changed(self._spark, self._root, changed)
            tables.delete_matching(self._spark, uri, self.gone)
        self._vacuum(table)

    def _named_in_annotations(self) -> None:
        """Removes the annotations that name a removed instance as the original; `annotate` makes them again.

        Otherwise `duplicate_of is null` would drop texts of which no copy is left.
        """
        uri = self._config.layout.table("annotations")
        if not tables.exists(self._spark, uri):
            return
        rows = tables.read(self._spark, uri)
        naming = rows.select("instance_id").where("false")
        for name in set(_NAMING) & set(rows.columns):
            gone = self.gone.withColumnRenamed("instance_id", name)
            naming = naming.union(rows.join(gone, name, "left_semi").select("instance_id"))
        ids = tables.missing_from(naming.distinct(), self.gone).persist()
        try:
            if n_rows := ids.count():
                tables.delete_matching(self._spark, uri, ids)
                LOGGER.info(
                    "annotations: %d rows named a removed instance; `miniplm annotate` makes them again", n_rows
                )
        finally:
            ids.unpersist()

    def _table(self, name: str) -> None:
        """Removes the rows of a table; a query that still has to read its old files starts again without them."""
        uri = self._config.layout.table(name)
        if not tables.exists(self._spark, uri):
            return
        n_rows = self._record(name, self._rows_of_gone(tables.read(self._spark, uri)))
        is_counted = n_rows > 0 and name == "score_matrix"
        for query in checkpoints.find(self._root):
            # The vacuum removes files that the query has not read; and a follower has counted rows that are removed.
            if query.source == name and (is_counted or checkpoints.needed_from(self._spark, uri, query) is not None):
                query.remove()
                self.begun_anew.append(query.name)
        if is_counted:
            storage.remove_folder(self._config.layout.cuts())
        if n_rows:
            tables.delete_matching(self._spark, uri, self.gone)
        self._vacuum(name)
