"""Annotation: columns of the pool's texts for refinement to use, in the table `annotations`. Driver only, no torch.

    instances (split = pool) not annotated yet -> columns of the groups in `annotate` -> annotations, in one commit

Owns which rows are new, and the commit; each group of columns is its module's. Where the section `annotate` or the
evaluation files have changed, the table is made anew: its rows say what they were made by. Otherwise rows that are
there stay as they are and new ones are added; where none is new, nothing is written. A kill before the
commit loses the run's work and no row, and the next run does it again. One driver annotates at a time (its lease).
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, schemas, tables
from miniplm_udf.annotations import contamination, duplicates, language, packages, quality
from miniplm_udf.annotations.contamination import Evaluation
from miniplm_udf.annotations.words import n_ngrams, words
from miniplm_udf.config import AnnotateConfig, ExperimentConfig, to_dict
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.streams.lease import Lease, lease_uri

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.annotate")

# Raise it where a text would get other columns than before.
_RULES_VERSION = 1
_N_LANGUAGES = 10
_COUNTED = {
    "duplicates": "duplicate_of is not null",
    "near_duplicates": "near_duplicate_of is not null",
    "contamination": "contaminated_ngrams > 0",
}


def annotate(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Annotates the pool's instances that are not annotated yet.

    Returns:
        path, version, `annotated` (rows in all), `new_annotated`, and of the groups that there are: rows with a finding
        (`duplicates`, `near_duplicates`, `contamination`), `languages` (rows of the commonest), `evaluation` (n-grams,
        records, and those too short for one).

    Raises:
        ConfigError: the config has no section `annotate`; executors lack a package; evaluation files are not there.
        CorpusError: there are no instances to annotate.
    """
    if config.annotate is None:
        raise ConfigError("annotate: expected a section of that name in the config, found none; docs/annotations.md")
    with Lease(lease_uri(config.root, schemas.ANNOTATIONS), "annotate", waits=True):
        return _Annotation(spark, config, config.annotate).run()


class _Annotation:
    """One run, with the lease held."""

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, settings: AnnotateConfig) -> None:
        self._spark, self._settings = spark, settings
        self._uri = config.table_uri(schemas.ANNOTATIONS)
        self._table = schemas.annotations(settings.groups)
        instances_uri = config.table_uri("instances")
        self._instances_version = tables.version(spark, instances_uri)
        self._pool = tables.read(spark, instances_uri, self._instances_version).where("split = 'pool'")

    def run(self) -> dict[str, Any]:
        versions = packages.on_executors(self._spark, self._settings.groups)
        evaluation = self._evaluation()
        try:
            n_new = self._write(evaluation, self._mark(evaluation, versions))
        finally:
            if evaluation is not None:
                evaluation.ngrams.unpersist()
        found = self._summary(evaluation, n_new)
        LOGGER.info("annotate: %d of %d instances were new", n_new, found["annotated"])
        return found

    def _evaluation(self) -> Evaluation | None:
        given = self._settings.contamination
        if given is None:
            return None
        found = contamination.load(self._spark, given)
        if found.n_short:
            LOGGER.warning(
                "annotate: %d of %d evaluation records have no text of %d words, and cannot be found",
                found.n_short, found.n_records, given.ngram_words,
            )  # fmt: skip
        return found

    def _write(self, evaluation: Evaluation | None, mark: str) -> int:
        """Commits the rows that are new; returns their number."""
        newest = corpora.newest(self._spark, self._uri)
        known = self._known(newest, mark)
        new, kept = self._pool, []
        try:
            if known is not None:
                kept.append(tables.missing_from(self._pool.select("instance_id"), known).persist())
                new = self._pool.join(kept[0], "instance_id", "left_semi")
            n_new = (kept[0] if kept else new).count()
            if n_new:
                rows = self._annotated(new, known, evaluation, mark, kept)
                metadata = {"annotate": to_dict(self._settings), "instances_version": self._instances_version}
                corpora.commit(rows, self._uri, self._table, metadata, newest, replaces=known is None)
        finally:
            for frame in kept:
                frame.unpersist()
        if not n_new and known is None:
            raise CorpusError("instances: expected some of the split `pool` to annotate, found none")
        return n_new

    def _mark(self, evaluation: Evaluation | None, versions: dict[str, str]) -> str:
        """What the columns of a text depend on, beside the text: not what the evaluation files are called."""
        plain = {group: value for group, value in to_dict(self._settings).items() if value}
        if evaluation is not None:
            plain["contamination"] = {**plain["contamination"], "files": evaluation.fingerprint}
        return json.dumps({**plain, "packages": versions, "rules_version": _RULES_VERSION}, sort_keys=True)

    def _known(self, newest: corpora.Newest | None, mark: str) -> "DataFrame | None":
        """The rows that stay; None where the table is to be made anew."""
        if newest is None:
            return None
        found = tables.read(self._spark, self._uri, newest.base)
        has_columns = found.columns == self._table.column_names
        marks = [row[0] for row in found.select("annotated_by").limit(1).collect()] if has_columns else []
        if marks == [mark]:
            return found
        LOGGER.info("annotate: the section or an evaluation file has changed, or no row is left: all are made anew")
        return None

    def _annotated(
        self, new: "DataFrame", known: "DataFrame | None", evaluation: Evaluation | None, mark: str,
        kept: "list[DataFrame]",
    ) -> "DataFrame":  # fmt: skip
        """The new rows with all columns. What takes a pass over the texts is kept: it is read more than once."""
        from pyspark import StorageLevel
        from pyspark.sql import functions as F

        settings = self._settings
        by_text = self._by_text(new).persist(StorageLevel.DISK_ONLY)
        kept.append(by_text)
        rows = duplicates.with_duplicates(by_text, self._pool) if settings.duplicates else by_text
        if settings.near_duplicates is not None:
            columns = ["instance_id", "ingested_at", duplicates.BUCKETS]
            old = None if known is None else known.select(*columns)
            pairs = duplicates.pairs(by_text.select(*columns), old).persist(StorageLevel.DISK_ONLY)
            kept.append(pairs)
            sets = duplicates.shingled(pairs, self._pool, settings.near_duplicates).persist(StorageLevel.DISK_ONLY)
            kept.append(sets)
            near = duplicates.nearest(pairs, sets, settings.near_duplicates.threshold)
            rows = rows.join(near, "instance_id", "left")
        if settings.contamination is not None and evaluation is not None:
            shared = contamination.shared_ngrams(new, evaluation, settings.contamination.ngram_words)
            n_shared = F.coalesce("contaminated_ngrams", F.lit(0).cast("bigint"))
            rows = rows.join(shared, "instance_id", "left").withColumn("contaminated_ngrams", n_shared)
            rows = rows.withColumn("contaminated_share", F.try_divide("contaminated_ngrams", "_n_ngrams"))
        return rows.withColumn("annotated_by", F.lit(mark)).select(*self._table.column_names)

    def _by_text(self, new: "DataFrame") -> "DataFrame":
        """What a text alone says."""
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

    def _summary(self, evaluation: Evaluation | None, n_new: int) -> dict[str, Any]:
        from pyspark.sql import functions as F

        newest = corpora.newest(self._spark, self._uri)
        assert newest is not None
        rows = tables.read(self._spark, self._uri)
        counted = {group: text for group, text in _COUNTED.items() if group in self._settings.groups}
        counts = [F.count_if(F.expr(text)).alias(group) for group, text in counted.items()]
        found = rows.agg(F.count("*").alias("annotated"), *counts).collect()[0].asDict()
        if self._settings.language:
            by_language = rows.groupBy("language").count().orderBy(F.desc("count"), "language")
            found["languages"] = {row[0]: row[1] for row in by_language.limit(_N_LANGUAGES).collect()}
        if evaluation is not None:
            found["evaluation"] = {
                "ngrams": evaluation.n_ngrams, "records": evaluation.n_records, "short_records": evaluation.n_short,
            }  # fmt: skip
        return {"path": self._uri, "version": newest.version, "new_annotated": n_new, **found}
