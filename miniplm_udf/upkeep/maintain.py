"""Maintenance of a root: small files merged, old files removed, and what nobody needs any more. Driver only.

Input: a config and how long replaced files are kept; output: what was done, or would be. Never removed: a file of a
table's newest version; the copies of pinned versions; a file that a query of the root has still to read, for which the
retention of its table is lengthened (streams/checkpoints.py). Versions of corpora that students were trained on are
pinned before theirs can go. A table is merged under the leases of the queries that write it, or left to them. Nothing
rests on an earlier step: a retry goes on.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniplm_udf import pins, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.checkpoints import Checkpoint
from miniplm_udf.streams.lease import Lease, is_held, lease_uri
from miniplm_udf.upkeep import versions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.maintain")

RETAIN_HOURS = 168.0
ABANDONED_DAYS = 30.0
# A write that is under way has files that no version knows yet.
_LONGEST_WRITE_HOURS = 24.0
# Files of the version that a query is at were replaced a moment before or after its commit, by this clock or another.
_MARGIN_HOURS = 1.0
_MERGED = ("instances", "annotations", "scores", "score_matrix", "proxy_scores", "rejects")
_OTHERS = ("corpora", "pins", "takedowns")
# Their versions are what users go back to: kept for years unless a retention is given.
_VERSIONED = ("refined", "packed")


@dataclasses.dataclass(frozen=True)
class Tended:
    """What was done with one table.

    Attributes:
        retained_hours: files replaced within this time were kept; None: all were.
        n_removed: files; of a dry run, those that would be.
        is_merged: whether its small files were looked at.
        note: why less was done than asked.
    """

    table: str
    retained_hours: float | None
    n_removed: int
    is_merged: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Maintained:
    """What was done. `pinned`: versions, NAME@NUMBER; `forgotten`: checkpoints and status records of no use."""

    tables: list[Tended]
    pinned: list[str]
    forgotten: list[str]


def maintain(
    spark: "SparkSession", config: ExperimentConfig, retain_hours: float | None = None,
    abandoned_days: float = ABANDONED_DAYS, dry_run: bool = False,
) -> Maintained:  # fmt: skip
    """Merges and vacuums all tables of a root.

    Args:
        retain_hours: how long replaced files are kept. None: 168, and those of corpora and packed sequences for years,
            so that each of their versions can be read.
        abandoned_days: a query that is behind, does not run and has not moved for so long keeps no files any more: its
            checkpoint is removed.
        dry_run: tells what would be done.

    Raises:
        ConfigError: a number below 0.
        CorpusError: less than 24 hours, and a query runs, which may be writing.
    """
    if abandoned_days < 0 or (retain_hours is not None and retain_hours < 0):
        raise ConfigError(
            f"maintain: expected hours and days of at least 0, found --retain-hours {retain_hours}, --abandoned-days "
            f"{abandoned_days}"
        )
    forgotten = list(_forget(spark, config, abandoned_days, dry_run))
    pinned = [] if retain_hours is None else list(_pin_what_was_trained_on(spark, config, dry_run))
    queries = [one for one in checkpoints.find(config.root) if one.name not in forgotten]
    is_alone = not dry_run and retain_hours is not None and retain_hours < _LONGEST_WRITE_HOURS
    with checkpoints.alone(config.root) if is_alone else contextlib.nullcontext():
        tend = functools.partial(_tend, spark, config, queries, retain_hours, is_alone, dry_run)
        made = [tend(name) for name in _table_names(spark, config)]
    return Maintained(made, pinned, forgotten)


def _table_names(spark: "SparkSession", config: ExperimentConfig) -> Iterator[str]:
    """The tables of a root, those of pins apart."""
    names = [*_MERGED, *_OTHERS]
    for kind in ("refined", "cuts"):
        names += [f"{kind}/{name}" for name in storage.list_folder(config.table_uri(kind))]
    for corpus in storage.list_folder(config.table_uri("packed")):
        names += [f"packed/{corpus}/{name}" for name in storage.list_folder(config.table_uri(f"packed/{corpus}"))]
    return (name for name in names if tables.exists(spark, config.table_uri(name)))


def _tend(
    spark: "SparkSession", config: ExperimentConfig, queries: list[Checkpoint], retain_hours: float | None,
    is_alone: bool, dry_run: bool, name: str,
) -> Tended:  # fmt: skip
    """Merges and vacuums one table. With `is_alone`, all leases are held."""
    uri, kind = config.table_uri(name), name.split("/")[0]
    if retain_hours is None and kind in _VERSIONED:
        hours, note = None, "its versions are kept; --retain-hours removes those that are not pinned"
    else:
        hours, note = _retention(spark, uri, [one for one in queries if one.source == name], retain_hours)
    is_merged = not dry_run and (kind == "refined" or name in _MERGED)
    with contextlib.ExitStack() as stack:
        try:
            for lease in [] if is_alone or not is_merged else _writers(config.root, name, queries):
                stack.enter_context(lease)
        except CorpusError as error:
            LOGGER.info("%s: not merged: %s", name, error)
            is_merged, note = False, "; ".join(part for part in (note, "not merged: a query writes it") if part)
        if is_merged:
            tables.merge_small_files(spark, uri)
        # `verify` must know of versions that are gone; where queries write, a commit more could be in their way.
        n_removed = 0 if hours is None else tables.vacuum(spark, uri, hours, kind == "refined", dry_run)
    return Tended(name, hours, n_removed, is_merged, note)


def _retention(
    spark: "SparkSession", uri: str, readers: list[Checkpoint], retain_hours: float | None
) -> tuple[float, str]:
    """For how long replaced files of a table are kept, and for whom longer than asked."""
    hours, note = RETAIN_HOURS if retain_hours is None else retain_hours, ""
    for one in readers:
        version = checkpoints.needed_from(spark, uri, one)
        if version is not None and (needed := _age_hours(spark, uri, version) + _MARGIN_HOURS) > hours:
            hours, note = needed, f"kept for {one.name}, which has still to read from version {version} on"
    return hours, note


def _age_hours(spark: "SparkSession", uri: str, version: int) -> float:
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    history = DeltaTable.forPath(spark, uri).history().where(f"version >= {version}").agg(F.min("timestamp").alias("t"))
    seconds = F.current_timestamp().cast("double") - F.col("t").cast("double")
    return max(0.0, float(history.select(seconds).collect()[0][0]) / 3600)


def _writers(root: str, name: str, queries: list[Checkpoint]) -> list[Lease]:
    """The leases without which a table is not merged."""
    if name.startswith("refined/"):
        corpus = name.removeprefix("refined/")
        return [Lease(lease_uri(root, f"refined-{corpus}"), name, waits=True)]
    scoring = sorted(one.lease for one in queries if one.name.startswith("score-"))
    leases = {"instances": ["ingest"], "scores": scoring, "score_matrix": ["score_matrix"]}
    leases |= {"rejects": ["ingest", *scoring], "annotations": ["annotations"], "proxy_scores": ["proxy_scores"]}
    return [Lease(lease_uri(root, lease), lease) for lease in leases[name]]


def _forget(spark: "SparkSession", config: ExperimentConfig, abandoned_days: float, dry_run: bool) -> Iterator[str]:
    """Removes checkpoints of queries that were abandoned behind, and status records of queries without a checkpoint."""
    oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=abandoned_days)
    known = set()
    for one in checkpoints.find(config.root):
        known.add(one.lease)
        uri = config.table_uri(one.source or "")
        if one.source is None or one.moved_at() > oldest or is_held(lease_uri(config.root, one.lease)):
            continue
        if tables.exists(spark, uri) and checkpoints.needed_from(spark, uri, one) is not None:
            if not dry_run:
                storage.remove_folder(one.uri)
            yield one.name
    for status in statuses.read_all(config.root):
        if status.lease not in known and not is_held(lease_uri(config.root, status.lease)):
            if not dry_run:
                statuses.remove(config.root, status.lease)
            yield f"status of {status.lease}"


def _pin_what_was_trained_on(spark: "SparkSession", config: ExperimentConfig, dry_run: bool) -> Iterator[str]:
    """Pins the versions of corpora that the root's models were trained on, as far as they are there still."""
    for name in storage.list_folder(storage.join(config.root, "models")):
        training = storage.read_json(storage.join(config.model_uri(name), "training.json")) or {}
        lineage = training.get("lineage") or {}
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
