"""Following: a corpus grows with the matrix, without refining all rows again. Driver only, no torch.

    a micro-batch of score_matrix -> counts by bucket (cuts/<name>) -> cut -> its rows above the cut, as a new version

The cut is computed from the counts of all candidates so far (cuts.py). Rows that came earlier are not compared with it
again, so only a full refinement (refine.py) is exact. At the start, a full refinement runs if none of this config and
matrix exists. A later full refinement replaces all rows and records the last micro-batch of the matrix that it has
read; rows up to there are counted but not appended. A micro-batch of the stream is whole commits of the matrix. Counts
are committed first, then the rows with their provenance, then the row of `corpora`: a replay after a kill detects which
of these steps are done, and does the rest.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint, to_dict
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.refinement import cuts, fingerprints, refine
from miniplm_udf.refinement.cuts import BucketCounts, BucketCut, Counted
from miniplm_udf.refinement.selection import UNUSABLE, is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.schemas import table_names
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.store.provenance import FollowedFrom, Provenance, VersionTables
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.query import Query

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.follow")

# No limit, so that a micro-batch ends where a commit of the matrix ends.
_ALL_FILES = (1 << 31) - 1
_REPLACED = re.compile(r"\[?DELTA_SOURCE_(TABLE_IGNORE_CHANGES|IGNORE_DELETE)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowedVersion:
    """The newest version of a followed corpus.

    Attributes:
        path: URI of `refined/<name>`.
        version: number of the version.
        threshold: the lowest kept score.
        n_candidates: pool rows that passed `where`.
        n_instances: rows kept; `n_tokens` are their tokens.
        followed: how it was followed (`Provenance.followed`); None for a full refinement.
    """

    path: str
    version: int
    threshold: float
    n_candidates: int
    n_instances: int
    n_tokens: int
    followed: FollowedFrom | None


class Follower(Query):
    """The query that follows one corpus.

    Args:
        spark: the session that the query runs in.
        config: the experiment.
        name: name of the corpus.

    Raises:
        ConfigError: there is no such corpus in the config, or its selection cannot be followed.
    """

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, name: str) -> None:
        self._spark, self._config, self._name = spark, config, name
        self._corpus = refine.resolve_corpus(config, name)
        self._select = _followable(name, self._corpus)
        self._plain_config = refine.plain_config(config, self._corpus)
        self._config_fingerprint = fingerprint(self._plain_config)
        self._matrix_query = ""
        self._uri, self._cuts_uri = config.layout.refined(name), config.layout.cuts(name)
        self._matrix_uri = config.layout.table("score_matrix")
        query = f"follow-{name}"
        facts = QueryFacts(stage="follow", lease=query, source="score_matrix")
        super().__init__(f"follow {name}", facts, config.layout.checkpoint(query))

    def source(self) -> "DataFrame":
        """Makes sure that a full refinement and the counts of this checkpoint exist; returns the stream.

        Raises:
            ConfigError: an expression is refused, or needs more than the matrix.
            CorpusError: there is no matrix, or the full refinement would keep nothing.
        """
        self._matrix_query = _query_of(self._spark, self._matrix_uri)
        # A micro-batch has only the matrix's columns: other columns are refused here, before a full refinement.
        matrix = tables.read(self._spark, self._matrix_uri)
        try:
            refine.candidate_rows(matrix, self._config, self._name, self._corpus)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; --follow reads score_matrix alone: refine a corpus that names columns of annotations or "
                "instances without --follow, as often as needed"
            ) from error
        newest = corpus_records.newest(self._uri)
        if newest is not None and newest.provenance is not None and self._can_continue(newest.provenance):
            # Repair: the previous run may have died before it recorded this version.
            corpus_records.record(self._spark, self._config.root, newest.version, newest.provenance)
        else:
            refine.refine(self._spark, self._config, self._name)
        if cuts.read_counts(self._spark, self._cuts_uri, self._config_fingerprint, self._matrix_query).through < 0:
            # Every row has to be counted, and the checkpoint may be past some of them.
            storage.remove_folder(self.checkpoint_uri)
        reader = self._spark.readStream.format("delta").option("maxFilesPerTrigger", _ALL_FILES)
        return reader.load(self._matrix_uri)

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        """Counts the rows of a micro-batch, and appends the rows above the cut; each row once.

        Args:
            batch: rows of the matrix, whose own `batch_id` tells which rows were counted and appended before.
            query_id: id of this query; not used.
            batch_id: number of the query's micro-batch; not used.

        Raises:
            CorpusError: the corpus was refined by another config meanwhile, or the matrix was replaced.
        """
        with refine.corpus_lease(self._config, self._name):
            self._append(batch)

    def recover(self, error: "StreamingQueryException") -> bool:
        """Whether the stream failed because the matrix was built again with other models: then it starts again too.

        Args:
            error: the error that ended Spark's query.
        """
        return bool(_REPLACED.search(str(error))) and _query_of(self._spark, self._matrix_uri) != self._matrix_query

    def backlog(self, offset: Any) -> int:
        return rows_behind(self._spark, self._matrix_uri, offset)

    def _append(self, batch: "DataFrame") -> None:
        spark = batch.sparkSession
        newest, provenance = self._newest()
        counted = cuts.read_counts(spark, self._cuts_uri, self._config_fingerprint, self._matrix_query)
        included = provenance.inputs["last_batches"][self._matrix_query]
        rows = refine.candidate_rows(batch, self._config, self._name, self._corpus)
        rows = rows.withColumn("bucket", cuts.bucket_column(self._select, is_finite()))
        sums = self._sums(rows, counted.through, included)
        if not sums:
            return
        after, cut = self._count(spark, counted, sums)
        kept = [row for row in sums if row["bucket"] >= cut.bucket and row["n_kept"]]
        LOGGER.info(
            "follow: %s: through micro-batch %d of the matrix: %d candidates, cut at %.6g, %d instances appended",
            self._name, after.through, cuts.totals(after.counts)[0], cut.score, sum(row["n_kept"] for row in kept),
        )  # fmt: skip
        if kept:
            through = max(row["through"] for row in sums)
            inputs: VersionTables = {
                "matrix_version": delta_log.newest_version(self._matrix_uri),
                "last_batches": {self._matrix_query: max(through, included)},
            }
            extended = extended_provenance(newest.version, provenance, after.counts, cut, kept, inputs)
            chosen = rows.where(f"bucket >= {cut.bucket} and batch_id > {included}").drop("bucket")
            n_chosen = extended.n_instances - provenance.n_instances
            version = refine.commit(self._config, chosen, n_chosen, extended, newest, replaces=False)
            corpus_records.record(spark, self._config.root, version, extended)
            tables.compact(spark, self._uri, through)

    def _newest(self) -> tuple[corpus_records.Newest, Provenance]:
        newest = corpus_records.newest(self._uri)
        provenance = newest.provenance if newest else None
        if newest is None or provenance is None or not self._can_continue(provenance):
            raise CorpusError(
                f"{table_names.refined(self._name)}: expected versions of the config that is followed, found a version "
                "that another config wrote meanwhile; stop one of the two, and follow again"
            )
        return newest, provenance

    def _count(self, spark: "SparkSession", counted: Counted, sums: "list[Row]") -> tuple[Counted, BucketCut]:
        """Adds the counts of this micro-batch and commits them, unless they were added before; takes the cut."""
        counts = {row["bucket"]: (row["n_counted"], row["n_counted_tokens"]) for row in sums if row["n_counted"]}
        after = counted.plus(counts, max(counted.through, *(row["through"] for row in sums)))
        cut = cuts.cut_of(after.counts, self._select)
        if after.through > counted.through:
            cuts.write_counts(spark, self._cuts_uri, self._name, after, cut)
        return after, cut

    def _can_continue(self, provenance: Provenance) -> bool:
        """Whether a version is of this config and matrix, and was refined or followed."""
        is_same_config = provenance.config == self._plain_config
        return is_same_config and self._matrix_query in provenance.inputs["last_batches"] and provenance.derived is None

    def _sums(self, rows: "DataFrame", counted: int, included: int) -> "list[Row]":
        """Sums by bucket, from one pass, over rows that are not counted yet and rows that no version has judged yet.

        Args:
            rows: candidates with their `bucket`.
            counted: the newest micro-batch of the matrix that is counted.
            included: the newest micro-batch of the matrix that was judged for the newest version.

        Returns:
            One row for each bucket: `through`, `query_id`, `n_counted`, `n_counted_tokens`, and `fingerprints.sums_of`.

        Raises:
            CorpusError: another query wrote the rows of the matrix.
        """
        from pyspark.sql import functions as F

        is_new = F.col("batch_id") > counted
        by_bucket = rows.groupBy("bucket").agg(
            F.max("batch_id").alias("through"),
            F.max("query_id").alias("query_id"),
            F.count_if(is_new).alias("n_counted"),
            F.sum(F.when(is_new, F.col("n_tokens"))).alias("n_counted_tokens"),
            *fingerprints.sums_of(F.col("batch_id") > included),
        )
        sums = by_bucket.collect()
        if any(row["query_id"] != self._matrix_query for row in sums):
            raise CorpusError(
                f"{table_names.refined(self._name)}: score_matrix was built again meanwhile; follow again"
            )
        return sums


def extended_provenance(
    version: int, earlier: Provenance, counts: BucketCounts, cut: BucketCut, kept: "Sequence[Row]",
    inputs: VersionTables,
) -> Provenance:  # fmt: skip
    """The provenance of a version that has the rows of an earlier version and the new rows of the kept buckets.

    Args:
        version: number of the earlier version.
        earlier: its provenance.
        counts: counts of all candidates, by bucket.
        cut: that chose the new rows.
        kept: `fingerprints.sums_of` the new rows, by bucket.
        inputs: inputs of the new version.
    """
    n_appended = sum(row["n_kept"] for row in kept)
    n_instances = earlier.n_instances + n_appended
    n_candidates, candidate_tokens = cuts.totals(counts)
    parts = [fingerprints.parts_of(earlier.fingerprint), *((row["xor"], row["sum"]) for row in kept)]
    return dataclasses.replace(
        earlier,
        inputs=inputs,
        threshold=min(earlier.threshold, *(row["threshold"] for row in kept)),
        n_candidates=n_candidates,
        candidate_tokens=candidate_tokens,
        n_unscorable=counts.get(UNUSABLE, (0, 0))[0],
        n_instances=n_instances,
        n_tokens=earlier.n_tokens + sum(row["n_tokens"] for row in kept),
        fingerprint=fingerprints.fingerprint_of(parts, n_instances),
        code_revision=code_revision(),
        kept_share_by_source={},
        cuts={},
        diagnostics={},
        followed={
            "since_version": earlier.followed["since_version"] if earlier.followed else version,
            "n_appended": n_appended,
            "cut": dataclasses.asdict(cut),
        },
    )


def _followable(name: str, corpus: CorpusConfig) -> SelectConfig:
    """The selection of a corpus, if it can be followed, which only appends rows.

    Raises:
        ConfigError: it cannot.
    """
    select = corpus.select
    assert select is not None
    obstacles = {
        "only score_matrix can be followed, not proxy_scores": corpus.is_of_proxy,
        "a band has a second cut, so rows would have to be removed again": select.rule == "band",
        "a growing corpus would exceed a budget": select.budget_tokens is not None,
        "counts are of all sources together": select.per_source is not None,
    }
    for reason, applies in obstacles.items():
        if applies:
            raise ConfigError(
                f"refine.corpora.{name}: expected top_ratio, threshold, random or gumbel, with a ratio over all "
                f"sources, to follow; found {to_dict(select)}: {reason}; refine it without --follow, as often as needed"
            )
    return select


def followed_version(config: ExperimentConfig, name: str) -> FollowedVersion:
    """Returns facts about the newest version of a corpus, which has been followed or refined.

    Args:
        config: the experiment.
        name: name of the corpus.
    """
    uri = config.layout.refined(name)
    newest = corpus_records.newest(uri)
    assert newest is not None
    provenance = newest.provenance
    assert provenance is not None
    return FollowedVersion(
        path=uri,
        version=newest.version,
        threshold=provenance.threshold,
        n_candidates=provenance.n_candidates,
        n_instances=provenance.n_instances,
        n_tokens=provenance.n_tokens,
        followed=provenance.followed,
    )


def _query_of(spark: "SparkSession", matrix_uri: str) -> str:
    """The id of the query that wrote all rows of the matrix.

    Raises:
        CorpusError: there is no matrix, or it is empty.
    """
    first_row = tables.read(spark, matrix_uri).select("query_id").limit(1).collect()
    if not first_row:
        raise CorpusError("score_matrix: expected rows to follow, found none; run `miniplm score` first")
    return str(first_row[0][0])
