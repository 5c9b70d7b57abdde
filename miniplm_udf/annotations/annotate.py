"""Annotation: columns about the pool's texts, for refinement, in the table `annotations`. Driver only, no torch.

    instances (split = pool) not annotated yet -> columns of the groups in `annotate` -> annotations, in one commit

Owns which rows are new, and the commit; each group of columns has its own module. If the section `annotate` or the
evaluation files have changed, all rows are made again: each row records its settings (`annotated_by`). Otherwise
existing rows stay and new ones are added; if none is new, nothing is written. A kill before the commit loses the work
of the run and no row, and the next run does it again. One driver annotates at a time (its lease).
"""

import dataclasses
import json
import logging
from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.annotations import contamination, duplicates, language, packages, quality
from miniplm_udf.annotations.contamination import EvaluationCounts, EvaluationNgrams
from miniplm_udf.annotations.words import n_ngrams, words
from miniplm_udf.config.annotate import AnnotateConfig
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.storage import Json
from miniplm_udf.store import corpus_records, delta_log, tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.annotate")

# Raise it when a change of the code gives a text other values than before.
_RULES_VERSION = 2
_N_LANGUAGES = 10
_COUNTED = {
    "duplicates": "duplicate_of is not null",
    "near_duplicates": "near_duplicate_of is not null",
    "contamination": "contaminated_ngrams > 0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotationSummary:
    """The state of `annotations` after a run.

    Attributes:
        path: URI of the table.
        version: its newest version that changed rows.
        new_annotated: rows that this run added.
        annotated: rows in all.
        duplicates, near_duplicates, contamination: rows with a finding; None if the config lacks the group.
        languages: rows of the most frequent languages, by code; None if the config lacks the group.
        evaluation: the evaluation files; None without the group contamination.
    """

    path: str
    version: int
    new_annotated: int
    annotated: int
    duplicates: int | None = None
    near_duplicates: int | None = None
    contamination: int | None = None
    languages: dict[str, int] | None = None
    evaluation: EvaluationCounts | None = None

    def to_dict(self) -> Json:
        """Plain data, without the groups that the config does not have."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def annotate(spark: "SparkSession", config: ExperimentConfig) -> AnnotationSummary:
    """Annotates the instances of the pool that are not annotated yet.

    Args:
        spark: any session.
        config: the experiment, with a section `annotate`.

    Returns:
        Counts of the table.

    Raises:
        ConfigError: the config has no section `annotate`; executors lack a package; evaluation files do not exist.
        CorpusError: there are no instances to annotate.
    """
    if config.annotate is None:
        raise ConfigError(
            "annotate: expected a section with this name in the config, found none; docs/annotations.md explains it"
        )
    with Lease(config.layout.lease(schemas.ANNOTATIONS), "annotate", waits=True):
        return _Annotation(spark, config, config.annotate).run()


class _Annotation:
    """One run. The caller holds the lease."""

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, settings: AnnotateConfig) -> None:
        self._spark, self._settings = spark, settings
        self._uri = config.layout.table(schemas.ANNOTATIONS)
        self._table = schemas.annotations(settings.groups)
        instances_uri = config.layout.table("instances")
        self._instances_version = delta_log.newest_version(instances_uri)
        self._pool = tables.read(spark, instances_uri, self._instances_version).where("split = 'pool'")

    def run(self) -> AnnotationSummary:
        versions = packages.on_executors(self._spark, self._settings.groups)
        evaluation = self._evaluation()
        try:
            n_new = self._write(evaluation, self._settings_json(evaluation, versions))
        finally:
            if evaluation is not None:
                evaluation.ngrams.unpersist()
        summary = self._summary(evaluation, n_new)
        LOGGER.info("annotate: %d of %d instances were new", n_new, summary.annotated)
        return summary

    def _evaluation(self) -> EvaluationNgrams | None:
        settings = self._settings.contamination
        if settings is None:
            return None
        evaluation = contamination.load(self._spark, settings)
        if evaluation.n_short:
            LOGGER.warning(
                "annotate: %d of %d evaluation records have no text of %d words, so they cannot be found in instances",
                evaluation.n_short, evaluation.n_records, settings.ngram_words,
            )  # fmt: skip
        return evaluation

    def _write(self, evaluation: EvaluationNgrams | None, settings_json: str) -> int:
        """Commits the rows that are new; returns their number."""
        newest = corpus_records.newest(self._uri)
        existing = self._existing_rows(newest, settings_json)
        new, persisted = self._pool, []
        try:
            if existing is not None:
                persisted.append(tables.missing_from(self._pool.select("instance_id"), existing).persist())
                new = self._pool.join(persisted[0], "instance_id", "left_semi")
            n_new = (persisted[0] if persisted else new).count()
            if n_new:
                rows = self._annotated(new, existing, evaluation, settings_json, persisted)
                metadata = {"annotate": to_dict(self._settings), "instances_version": self._instances_version}
                corpus_records.commit(rows, self._uri, self._table, metadata, newest, replaces=existing is None)
        finally:
            for frame in persisted:
                frame.unpersist()
        if not n_new and existing is None:
            raise CorpusError(
                "instances: expected instances of the split `pool` to annotate, found none; check ingest.split, and "
                "run `miniplm ingest`"
            )
        return n_new

    def _settings_json(self, evaluation: EvaluationNgrams | None, versions: dict[str, str]) -> str:
        """Everything but the text that its columns depend on; the names of evaluation files do not count."""
        plain = {group: value for group, value in to_dict(self._settings).items() if value}
        if evaluation is not None:
            plain["contamination"] = {**plain["contamination"], "files": evaluation.fingerprint}
        return json.dumps({**plain, "packages": versions, "rules_version": _RULES_VERSION}, sort_keys=True)

    def _existing_rows(self, newest: corpus_records.Newest | None, settings_json: str) -> "DataFrame | None":
        """The rows that stay; None if all rows have to be made."""
        if newest is None:
            return None
        rows = tables.read(self._spark, self._uri, newest.base)
        has_columns = rows.columns == self._table.column_names
        recorded = [row[0] for row in rows.select("annotated_by").limit(1).collect()] if has_columns else []
        if recorded == [settings_json]:
            return rows
        LOGGER.info(
            "annotate: the section, an evaluation file or a rule has changed, or the table is empty: all rows are made "
            "again"
        )
        return None

    def _annotated(
        self, new: "DataFrame", existing: "DataFrame | None", evaluation: EvaluationNgrams | None, settings_json: str,
        persisted: "list[DataFrame]",
    ) -> "DataFrame":  # fmt: skip
        """The new rows with all columns.

        Results of a pass over the texts are read more than once, so they are stored and added to `persisted`.
        """
        from pyspark import StorageLevel
        from pyspark.sql import functions as F

        settings = self._settings
        by_text = self._by_text(new).persist(StorageLevel.DISK_ONLY)
        persisted.append(by_text)
        rows = duplicates.with_duplicates(by_text, self._pool) if settings.duplicates else by_text
        if settings.near_duplicates is not None:
            columns = ["instance_id", "ingested_at", duplicates.BUCKETS]
            old = None if existing is None else existing.select(*columns)
            pairs = duplicates.pairs(by_text.select(*columns), old).persist(StorageLevel.DISK_ONLY)
            persisted.append(pairs)
            sets = duplicates.shingle_sets(pairs, self._pool, settings.near_duplicates).persist(StorageLevel.DISK_ONLY)
            persisted.append(sets)
            near = duplicates.nearest(pairs, sets, settings.near_duplicates.threshold)
            rows = rows.join(near, "instance_id", "left")
        if settings.contamination is not None and evaluation is not None:
            shared = contamination.shared_ngrams(new, evaluation, settings.contamination.ngram_words)
            n_shared = F.coalesce("contaminated_ngrams", F.lit(0).cast("bigint"))
            rows = rows.join(shared, "instance_id", "left").withColumn("contaminated_ngrams", n_shared)
            rows = rows.withColumn("contaminated_share", F.try_divide("contaminated_ngrams", "_n_ngrams"))
        return rows.withColumn("annotated_by", F.lit(settings_json)).select(*self._table.column_names)

    def _by_text(self, new: "DataFrame") -> "DataFrame":
        """The columns that depend on nothing but the text."""
        settings = self._settings
        rows = new.select("instance_id", "ingested_at", "content_hash", "text")
        if settings.quality:
            rows = quality.with_quality(rows)
        if settings.language:
            rows = language.with_language(rows)
        if settings.near_duplicates is not None:
            rows = duplicates.with_buckets(rows, settings.near_duplicates)
        if settings.contamination is not None:
            rows = rows.withColumn("_n_ngrams", n_ngrams(words("text"), settings.contamination.ngram_words))
        return rows.drop("text")

    def _summary(self, evaluation: EvaluationNgrams | None, n_new: int) -> AnnotationSummary:
        from pyspark.sql import functions as F

        newest = corpus_records.newest(self._uri)
        assert newest is not None
        rows = tables.read(self._spark, self._uri)
        conditions = {group: text for group, text in _COUNTED.items() if group in self._settings.groups}
        sums = [F.count_if(F.expr(text)).alias(group) for group, text in conditions.items()]
        counts = rows.agg(F.count("*").alias("annotated"), *sums).collect()[0].asDict()
        languages = None
        if self._settings.language:
            by_language = rows.groupBy("language").count().orderBy(F.desc("count"), "language")
            languages = {row[0]: row[1] for row in by_language.limit(_N_LANGUAGES).collect()}
        return AnnotationSummary(
            path=self._uri,
            version=newest.version,
            new_annotated=n_new,
            **counts,
            languages=languages,
            evaluation=None if evaluation is None else evaluation.counts(),
        )
