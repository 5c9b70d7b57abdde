"""Maintenance of a root: merges small files, and removes old files and records that nobody needs. Driver only.

Input: a config and how long replaced files are kept. Output: what was done, or would be done. Never removed: a file of
a table's newest version; the copies of pinned versions; a file that a query of the root still has to read, for which
the retention of its table is extended (streams/checkpoints.py). Versions of corpora that students were trained on are
pinned before their files may be removed. A table is merged under the leases of the queries that write it, or is not
merged. Each step is independent of the steps before it, so a retry does what is left.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora import versions
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease, is_held
from miniplm_udf.schemas import table_kinds, table_names
from miniplm_udf.store import model_records, pins, tables
from miniplm_udf.store.provenance import PackedMetadata
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.maintain")

RETAIN_HOURS = 168.0
ABANDONED_DAYS = 30.0
# A running write has files that no version lists yet; after this time a file without a version is abandoned.
_LONGEST_WRITE_HOURS = 24.0
# Added to the age of the version that a query reads, because clocks differ and files are replaced around its commit.
_MARGIN_HOURS = 1.0


@dataclasses.dataclass(frozen=True)
class MaintainedTable:
    """The result of the maintenance of one table.

    Attributes:
        table: its name.
        retained_hours: files that were replaced within this time were kept; None: all were kept.
        n_removed: removed files; in a dry run, files that would be removed.
        is_merged: whether small files were merged, if there were any.
        note: why less was done than asked for.
    """

    table: str
    retained_hours: float | None
    n_removed: int
    is_merged: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Maintained:
    """The result of a maintenance; in a dry run, the result that it would have.

    Attributes:
        tables: one entry for each table.
        pinned: versions that were pinned, as NAME@NUMBER.
        forgotten: checkpoints and status records that were removed because nobody needs them.
    """

    tables: list[MaintainedTable]
    pinned: list[str]
    forgotten: list[str]


def maintain(
    spark: "SparkSession", config: ExperimentConfig, retain_hours: float | None = None,
    abandoned_days: float = ABANDONED_DAYS, dry_run: bool = False,
) -> Maintained:  # fmt: skip
    """Merges the small files of all tables of a root, and removes files that no kept version needs.

    Args:
        spark: any session.
        config: the experiment.
        retain_hours: how long replaced files are kept. None: 168 hours, and all files of corpora and packed sequences,
            so that each of their versions can be read.
        abandoned_days: the checkpoint of a query is removed if the query is behind, does not run and has not moved for
            this time (days). Files that only this query has still to read are then removed, too.
        dry_run: only finds out what would be done.

    Returns:
        What was done.

    Raises:
        ConfigError: a number is below 0.
        CorpusError: `retain_hours` is below 24 while a query runs, which may be writing.
    """
    if abandoned_days < 0 or (retain_hours is not None and retain_hours < 0):
        raise ConfigError(
            f"maintain: expected hours and days of at least 0, found --retain-hours {retain_hours}, --abandoned-days "
            f"{abandoned_days}"
        )
    forgotten = list(_forget(spark, config, abandoned_days, dry_run))
    pinned = [] if retain_hours is None else list(_pin_training_corpora(spark, config, dry_run))
    queries = [query for query in checkpoints.find(config.root) if query.name not in forgotten]
    is_alone = not dry_run and retain_hours is not None and retain_hours < _LONGEST_WRITE_HOURS
    with checkpoints.alone(config.root) if is_alone else contextlib.nullcontext():
        maintain_table = functools.partial(_maintain_table, spark, config, queries, retain_hours, is_alone, dry_run)
        maintained = [maintain_table(name) for name in _table_names(spark, config)]
    return Maintained(maintained, pinned, forgotten)


def _table_names(spark: "SparkSession", config: ExperimentConfig) -> Iterator[str]:
    """The names of the tables of a root, without the copies of pinned versions."""
    names = [kind.name for kind in table_kinds.KINDS if not kind.is_folder]
    names += map(table_names.refined, storage.list_folder(config.layout.refined()))
    names += map(table_names.cuts, storage.list_folder(config.layout.cuts()))
    for corpus in storage.list_folder(config.layout.packed()):
        names += [table_names.packed(corpus, name) for name in storage.list_folder(config.layout.packed(corpus))]
    return (name for name in names if tables.exists(spark, config.layout.table(name)))


def _maintain_table(
    spark: "SparkSession", config: ExperimentConfig, queries: list[Checkpoint], retain_hours: float | None,
    is_alone: bool, dry_run: bool, name: str,
) -> MaintainedTable:  # fmt: skip
    """Merges and vacuums one table. With `is_alone`, the caller holds all leases."""
    uri, kind = config.layout.table(name), table_kinds.find_kind(name)
    if retain_hours is None and kind.is_versioned:
        hours, note = None, "its versions are kept; --retain-hours removes those that are not pinned"
    else:
        hours, note = _retention(spark, uri, [query for query in queries if query.source == name], retain_hours)
    is_merged = not dry_run and kind.is_merged
    with contextlib.ExitStack() as stack:
        try:
            for lease in [] if is_alone or not is_merged else _writers(config.root, name, queries):
                stack.enter_context(lease)
        except CorpusError as error:
            LOGGER.info("%s: not merged: %s", name, error)
            is_merged, note = False, "; ".join(part for part in (note, "not merged: a query writes it") if part)
        # A packed table has no lease: its writer replaces all rows, and Delta detects a conflict.
        if not dry_run and (is_merged or kind.name == table_names.PACKED) and tables.make_readable(spark, uri):
            note = "; ".join(part for part in (note, "rewritten for readers of files") if part)
        if is_merged:
            tables.merge_small_files(spark, uri)
        # A logged vacuum tells `verify` that versions of a corpus were removed; elsewhere it could disturb the queries.
        n_removed = 0 if hours is None else tables.vacuum(spark, uri, hours, kind.name == table_names.REFINED, dry_run)
    return MaintainedTable(name, hours, n_removed, is_merged, note)


def _retention(
    spark: "SparkSession", uri: str, readers: list[Checkpoint], retain_hours: float | None
) -> tuple[float, str]:
    """How long replaced files of a table are kept, in hours; and a note if a query needs them longer than asked."""
    hours, note = RETAIN_HOURS if retain_hours is None else retain_hours, ""
    for query in readers:
        version = checkpoints.needed_from(spark, uri, query)
        if version is not None and (needed := _age_hours(spark, uri, version) + _MARGIN_HOURS) > hours:
            hours, note = needed, f"kept for {query.name}, which still has to read from version {version} on"
    return hours, note


def _age_hours(spark: "SparkSession", uri: str, version: int) -> float:
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    history = DeltaTable.forPath(spark, uri).history().where(f"version >= {version}").agg(F.min("timestamp").alias("t"))
    seconds = F.current_timestamp().cast("double") - F.col("t").cast("double")
    return max(0.0, float(history.select(seconds).collect()[0][0]) / 3600)


def _writers(root: str, name: str, queries: list[Checkpoint]) -> list[Lease]:
    """The leases that have to be held while a table is merged."""
    kind = table_kinds.find_kind(name)
    if kind.name == table_names.REFINED:
        return [Lease(Root(root).lease(f"refined-{table_names.corpus_of(name)}"), name, waits=True)]
    leases = {*kind.leases, *(query.lease for query in queries if query.stage in kind.queries)}
    return [Lease(Root(root).lease(lease), lease) for lease in sorted(leases)]


def _forget(spark: "SparkSession", config: ExperimentConfig, abandoned_days: float, dry_run: bool) -> Iterator[str]:
    """Removes checkpoints of abandoned queries that are behind, and status records of queries without a checkpoint."""
    oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=abandoned_days)
    leases = set()
    for query in checkpoints.find(config.root):
        leases.add(query.lease)
        uri = config.layout.table(query.source or "")
        if query.source is None or query.moved_at() > oldest or is_held(config.layout.lease(query.lease)):
            continue
        if tables.exists(spark, uri) and checkpoints.needed_from(spark, uri, query) is not None:
            if not dry_run:
                query.remove()
            yield query.name
    for status in statuses.read_all(config.root):
        if status.lease not in leases and not is_held(config.layout.lease(status.lease)):
            if not dry_run:
                statuses.remove(config.root, status.lease)
            yield f"status of {status.lease}"


def _pin_training_corpora(spark: "SparkSession", config: ExperimentConfig, dry_run: bool) -> Iterator[str]:
    """Pins the versions of corpora that the root's models were trained on, if they still exist."""
    for name in storage.list_folder(config.layout.model()):
        training = model_records.read_training(config, name)
        lineage: PackedMetadata = (training.lineage if training else None) or {}
        corpus, version = lineage.get("corpus"), lineage.get("refined_version")
        if corpus is None or version is None or pins.of_version(spark, config.root, corpus, version) is not None:
            continue
        address = f"{corpus}@{version}"
        try:
            if not dry_run:
                versions.pin(spark, config.root, address)
            yield address
        except CorpusError as error:
            LOGGER.warning("%s, which %s was trained on, cannot be pinned: %s", address, name, error)
