"""Following: a corpus that grows with the matrix, without a refinement of all of it. Driver only, no torch.

    a micro-batch of score_matrix -> counts by bucket (cuts/<name>) -> cut -> its rows above the cut, as a new version

The cut is that of all candidates so far, taken from the counts (cuts.py); rows that came earlier are not judged again,
so only a full refinement (refine.py) is exact. One is made at the start where there is none of this config and matrix.
One that comes later replaces all rows, and says up to which micro-batch of the matrix it has seen them: those are
counted, not appended. A micro-batch of the stream is whole commits of the matrix. Counts are committed first, then the
rows with their provenance, then the row of `corpora`: a replay after a kill anywhere finds what is done, and does the
rest.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, storage, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig, SelectConfig, fingerprint, to_dict
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.refinement import cuts, refine
from miniplm_udf.refinement.cuts import BucketCut, Counted, Counts
from miniplm_udf.refinement.selection import UNUSABLE, is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.query import Query

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.follow")

# No bound: so a micro-batch ends where a commit of the matrix ends.
_ALL_FILES = (1 << 31) - 1
_REPLACED = re.compile(r"\[?DELTA_SOURCE_(TABLE_IGNORE_CHANGES|IGNORE_DELETE)")


def follow_query(spark: "SparkSession", config: ExperimentConfig, name: str) -> Query:
    """The query that follows the corpus `name`.

    Raises:
        ConfigError: there is no such corpus in the config, or its selection cannot be followed.
    """
    follower = Follower(spark, config, name)
    return Query(
        name=f"follow {name}",
        lease=f"follow-{name}",
        checkpoint_uri=follower.checkpoint_uri,
        source=follower.start,
        micro_batch=lambda batch, query_id, batch_id: follower.take(batch),
        recover=follower.is_replaced,
        backlog=lambda offset: rows_behind(spark, follower.matrix_uri, offset),
    )


class Follower:
    """One corpus that is followed."""

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, name: str) -> None:
        self._spark, self._config, self._name = spark, config, name
        self._resolved = refine.resolve(config, name)
        self._select = _followable(name, self._resolved)
        self._plain = refine.plain_config(config, self._resolved)
        self._mark = fingerprint(self._plain)
        self._matrix_query = ""
        self._uri, self._cuts_uri = corpora.corpus_uri(config.root, name), cuts.cuts_uri(config.root, name)
        self.matrix_uri = config.table_uri("score_matrix")
        self.checkpoint_uri = config.checkpoint_uri(f"follow-{name}")

    def start(self) -> "DataFrame":
        """Sees to a full refinement and to counts that the checkpoint goes on from; returns the stream.

        Raises:
            ConfigError: an expression is refused, or needs more than the matrix.
            CorpusError: there is no matrix, or the full refinement would keep nothing.
        """
        self._matrix_query = _query_of(self._spark, self.matrix_uri)
        # A micro-batch has the matrix's columns alone: refused here, before a full refinement.
        matrix = tables.read(self._spark, self.matrix_uri)
        refine.candidate_rows(matrix, self._config, self._name, self._resolved)
        newest = corpora.newest(self._spark, self._uri)
        if newest is not None and newest.provenance is not None and self._goes_on_from(newest.provenance):
            # Where the run before was killed before it had done so.
            corpora.record(self._spark, self._config.root, newest.version, newest.provenance)
        else:
            refine.refine(self._spark, self._config, self._name)
        if cuts.read(self._spark, self._cuts_uri, self._mark, self._matrix_query).through < 0:
            # Every row is to be counted: the checkpoint may be past some.
            storage.remove_folder(self.checkpoint_uri)
        reader = self._spark.readStream.format("delta").option("maxFilesPerTrigger", _ALL_FILES)
        return reader.load(self.matrix_uri)

    def is_replaced(self, error: "StreamingQueryException") -> bool:
        """Whether the stream failed because the matrix was built anew, with other models: then it starts anew too."""
        return bool(_REPLACED.search(str(error))) and _query_of(self._spark, self.matrix_uri) != self._matrix_query

    def take(self, batch: "DataFrame") -> None:
        """Counts the rows of a micro-batch, and appends those above the cut; each once.

        Args:
            batch: of the matrix.

        Raises:
            CorpusError: the corpus was refined by another config meanwhile; the matrix was replaced.
        """
        with refine.corpus_lease(self._config, self._name):
            self._take(batch)

    def _take(self, batch: "DataFrame") -> None:
        spark = batch.sparkSession
        newest, known = self._newest(spark)
        counted = cuts.read(spark, self._cuts_uri, self._mark, self._matrix_query)
        included = known.inputs["last_batches"][self._matrix_query]
        rows = refine.candidate_rows(batch, self._config, self._name, self._resolved)
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
            inputs = {
                "matrix_version": tables.version(spark, self.matrix_uri),
                "last_batches": {self._matrix_query: max(through, included)},
            }
            found = grown(newest.version, known, after.counts, cut, kept, inputs)
            chosen = rows.where(f"bucket >= {cut.bucket} and batch_id > {included}").drop("bucket")
            n_chosen = found.n_instances - known.n_instances
            version = refine.commit(self._config, chosen, n_chosen, found, newest, replaces=False)
            corpora.record(spark, self._config.root, version, found)
            tables.compact(spark, self._uri, through)

    def _newest(self, spark: "SparkSession") -> tuple[corpora.Newest, corpora.Provenance]:
        newest = corpora.newest(spark, self._uri)
        known = newest.provenance if newest else None
        if newest is None or known is None or not self._goes_on_from(known):
            raise CorpusError(
                f"refined/{self._name}: expected versions of the config that is followed, found that another one was "
                "written meanwhile; end one of the two, and follow again"
            )
        return newest, known

    def _count(self, spark: "SparkSession", counted: Counted, sums: "list[Row]") -> tuple[Counted, BucketCut]:
        """Commits the counts with this micro-batch's, unless they have them, and takes the cut."""
        counts = {row["bucket"]: (row["n_counted"], row["n_counted_tokens"]) for row in sums if row["n_counted"]}
        after = counted.plus(counts, max(counted.through, *(row["through"] for row in sums)))
        cut = cuts.cut_of(after.counts, self._select)
        if after.through > counted.through:
            cuts.write(spark, self._cuts_uri, self._name, after, cut)
        return after, cut

    def _goes_on_from(self, known: corpora.Provenance) -> bool:
        is_ours = known.config == self._plain and self._matrix_query in known.inputs["last_batches"]
        return is_ours and known.derived is None

    def _sums(self, rows: "DataFrame", counted: int, included: int) -> "list[Row]":
        """By bucket: what is not counted yet, and (`refine.sums_of`) what is in no version yet. One pass.

        Args:
            counted: the micro-batch of the matrix up to which rows are counted.
            included: that up to which they were judged for the newest version.

        Raises:
            CorpusError: the rows are of another query than the corpus.
        """
        from pyspark.sql import functions as F

        is_new = F.col("batch_id") > counted
        found = rows.groupBy("bucket").agg(
            F.max("batch_id").alias("through"),
            F.max("query_id").alias("query_id"),
            F.count_if(is_new).alias("n_counted"),
            F.sum(F.when(is_new, F.col("n_tokens"))).alias("n_counted_tokens"),
            *refine.sums_of(F.col("batch_id") > included),
        )
        sums = found.collect()
        if any(row["query_id"] != self._matrix_query for row in sums):
            raise CorpusError(f"refined/{self._name}: score_matrix was built anew meanwhile; follow again")
        return sums


def grown(
    version: int, known: corpora.Provenance, counts: Counts, cut: BucketCut, kept: "Sequence[Row]",
    inputs: dict[str, Any],
) -> corpora.Provenance:  # fmt: skip
    """The provenance of a version with the rows of the kept buckets beside those it had.

    Args:
        version: the one that `known` is of.
        kept: `refine.sums_of` the new rows, by bucket.
    """
    n_appended = sum(row["n_kept"] for row in kept)
    n_instances = known.n_instances + n_appended
    n_candidates, candidate_tokens = cuts.totals(counts)
    parts = [refine.parts_of(known.fingerprint), *((row["xor"], row["sum"]) for row in kept)]
    return dataclasses.replace(
        known,
        inputs=inputs,
        threshold=min(known.threshold, *(row["threshold"] for row in kept)),
        n_candidates=n_candidates,
        candidate_tokens=candidate_tokens,
        n_unscorable=counts.get(UNUSABLE, (0, 0))[0],
        n_instances=n_instances,
        n_tokens=known.n_tokens + sum(row["n_tokens"] for row in kept),
        fingerprint=refine.fingerprint_of(parts, n_instances),
        code_revision=code_revision(),
        kept_share_by_source={},
        cuts={},
        diagnostics={},
        followed={
            "since_version": known.followed["since_version"] if known.followed else version,
            "n_appended": n_appended,
            "cut": dataclasses.asdict(cut),
        },
    )


def _followable(name: str, corpus: CorpusConfig) -> SelectConfig:
    """The selection, if rows that are only ever appended can fulfil it.

    Raises:
        ConfigError: they cannot.
    """
    select = corpus.select
    assert select is not None
    unfit = {
        "what is followed is score_matrix, not proxy_scores": corpus.is_of_proxy,
        "a band has a second cut, below which rows would have to go again": select.rule == "band",
        "a budget would be passed as the corpus grows": select.budget_tokens is not None,
        "counts are of all sources together": select.per_source is not None,
    }
    for reason, applies in unfit.items():
        if applies:
            raise ConfigError(
                f"refine.corpora.{name}: expected top_ratio, threshold, random or gumbel, with a ratio over all "
                f"sources, to follow; found {to_dict(select)}: {reason}; refine it without --follow, as often as wanted"
            )
    return select


def newest_version(spark: "SparkSession", config: ExperimentConfig, name: str) -> dict[str, Any]:
    """Where a corpus stands: path, version, counts, and how it was followed."""
    uri = corpora.corpus_uri(config.root, name)
    newest = corpora.newest(spark, uri)
    assert newest is not None
    assert newest.provenance is not None
    reported = ("threshold", "n_candidates", "n_instances", "n_tokens", "followed")
    return {"path": uri, "version": newest.version, **{key: getattr(newest.provenance, key) for key in reported}}


def _query_of(spark: "SparkSession", matrix_uri: str) -> str:
    """The query that all rows of the matrix are of.

    Raises:
        CorpusError: there is no matrix, or no row in it.
    """
    found = tables.read(spark, matrix_uri).select("query_id").limit(1).collect()
    if not found:
        raise CorpusError("score_matrix: expected rows to follow, found none; run `miniplm score` first")
    return str(found[0][0])
