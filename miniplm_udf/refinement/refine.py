"""Refinement: SQL over `score_matrix` chooses a corpus's instances; each choice is one version. Driver only, no torch.

    candidates (split = pool, `where`) -> score -> cuts -> kept rows -> refined/<name>, corpora

Owns the versions and their provenance. Other modules own the parts: candidates.py the rows, expressions.py the SQL,
config/rules.py the published rules, keep.py the cuts, diagnostics.py the signs of a poor choice. The same inputs and
config give the same rows; if the newest version has these rows already, nothing is written. A version is one commit
with its provenance; a retry after a kill adds what is missing. A corpus has one writer at a time (its lease); other
refinements and followers (follow.py) of the corpus wait.

Source: MiniPLM, arXiv 2410.17215: r = log p_teacher / p_reference per token = reference_nll_mean - teacher_nll_mean.
"""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.config import rules
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.refinement import candidates, diagnostics, expressions
from miniplm_udf.refinement.columns import ANNOTATIONS_VERSION, INSTANCES_VERSION, with_instances
from miniplm_udf.refinement.fingerprints import fingerprint_of, sums_of
from miniplm_udf.refinement.keep import SelectionCuts, choose
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.schemas import table_names
from miniplm_udf.scores.models import read_record
from miniplm_udf.storage import Json
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.store.provenance import Diagnostics, Provenance, VersionTables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.refine")

MIN_TOKENS = 32
ROWS_PER_FILE = 2_000_000
_BATCH = ("query_id", "batch_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedVersion:
    """The newest version of a corpus, as a refinement left it.

    Attributes:
        path: URI of `refined/<name>`.
        version: number of the version.
        threshold: the lowest kept score.
        n_candidates: pool rows that passed `where`.
        n_instances: rows kept; `n_tokens` are their tokens.
        kept_share_by_source: share of the candidates that was kept, 0 to 1.
        diagnostics: results of `diagnostics.diagnose`.
        skipped: whether the version was there already, so that nothing was written.
    """

    path: str
    version: int
    threshold: float
    n_candidates: int
    n_instances: int
    n_tokens: int
    kept_share_by_source: dict[str, float]
    diagnostics: Diagnostics
    skipped: bool


@dataclasses.dataclass(frozen=True)
class VersionInputs:
    """Everything that decides which rows a version keeps.

    Attributes:
        config: the experiment.
        name: name of the corpus.
        corpus: its resolved config.
        inputs: versions and last micro-batches of the tables that are read (`Provenance.inputs`).
        revisions: model revisions by alias.
    """

    config: ExperimentConfig
    name: str
    corpus: CorpusConfig
    inputs: VersionTables
    revisions: dict[str, str]


def refine(spark: "SparkSession", config: ExperimentConfig, name: str) -> RefinedVersion:
    """Makes the corpus's newest version, unless it exists already.

    Args:
        spark: any session.
        config: the experiment.
        name: a key of `config.refine.corpora`.

    Returns:
        The newest version.

    Raises:
        ConfigError: an expression is not SQL over the available columns, or compares means of unequal tokenizers.
        CorpusError: there is no matrix, or no row would be kept.
    """
    corpus = resolve_corpus(config, name)
    with corpus_lease(config, name), tables.long_scans(spark):
        return _refine(spark, config, name, corpus)


def corpus_lease(config: ExperimentConfig, name: str) -> Lease:
    """Returns the lease that a writer of `refined/<name>` holds; another writer waits for it.

    Args:
        config: the experiment.
        name: name of the corpus.
    """
    return Lease(config.layout.lease(f"refined-{name}"), table_names.refined(name), waits=True)


def _refine(spark: "SparkSession", config: ExperimentConfig, name: str, corpus: CorpusConfig) -> RefinedVersion:
    uri = config.layout.refined(name)
    # Read before the matrix: this version of the matrix then has all rows that the newest version of the corpus has.
    newest = corpus_records.newest(uri)
    scored = candidates.read_candidates(spark, config, corpus)
    check_tokenizers(config, f"refine.corpora.{name}.score", str(corpus.score))
    joined, other_inputs = with_instances(spark, config, scored.rows, str(corpus.where), str(corpus.score))
    rows = candidate_rows(joined, config, name, corpus)
    inputs = scored.inputs | other_inputs
    provenance = newest.provenance if newest else None
    if newest and provenance:
        # Repair: the previous run may have died before it recorded this version.
        corpus_records.record(spark, config.root, newest.version, provenance)
    if newest and provenance and _is_full_refinement(provenance, plain_config(config, corpus), inputs):
        version, skipped = newest.version, True
    else:
        revisions = candidates.revisions(config, corpus, scored.rows)
        version_inputs = VersionInputs(config, name, corpus, inputs, revisions)
        with chosen_rows(spark, version_inputs, rows) as (kept, provenance):
            version = commit(config, kept, provenance.n_instances, provenance, newest, replaces=True)
        corpus_records.record(spark, config.root, version, provenance)
        skipped = False
    return _summary(uri, version, provenance, skipped)


def _summary(uri: str, version: int, provenance: Provenance, skipped: bool) -> RefinedVersion:
    """Logs a version, and describes it."""
    LOGGER.info(
        "refine: %s: version %d%s, %d of %d instances kept, %d of %d tokens, threshold %.6g",
        provenance.corpus, version, " is up to date" if skipped else "", provenance.n_instances,
        provenance.n_candidates, provenance.n_tokens, provenance.candidate_tokens, provenance.threshold,
    )  # fmt: skip
    for note in provenance.diagnostics.get("notes", ()):
        LOGGER.warning("refine: %s: %s", provenance.corpus, note)
    return RefinedVersion(
        path=uri,
        version=version,
        threshold=provenance.threshold,
        n_candidates=provenance.n_candidates,
        n_instances=provenance.n_instances,
        n_tokens=provenance.n_tokens,
        kept_share_by_source=provenance.kept_share_by_source,
        diagnostics=provenance.diagnostics,
        skipped=skipped,
    )


def _is_full_refinement(provenance: Provenance, plain: Json, inputs: VersionTables) -> bool:
    """Whether a version is the full refinement, by this config, of the same matrix rows and the same annotations."""
    was_refined = provenance.followed is None and provenance.derived is None
    same_inputs = all(provenance.inputs.get(key) == inputs.get(key) for key in ("last_batches", ANNOTATIONS_VERSION))
    return was_refined and provenance.config == plain and same_inputs


def resolve_corpus(config: ExperimentConfig, name: str) -> CorpusConfig:
    """A corpus's config with its rule and its defaults filled in.

    Args:
        config: the experiment.
        name: name of the corpus.

    Returns:
        The config, in which `score`, `select` and `where` are set.

    Raises:
        ConfigError: there is no such corpus in the config.
    """
    if name not in config.refine.corpora:
        raise ConfigError(f"refine.corpora: expected one of {sorted(config.refine.corpora)}, found {name!r}")
    corpus = rules.resolve(config.refine.corpora[name])
    where = f"{tokens_column(config, corpus)} >= {MIN_TOKENS}" if corpus.where is None else corpus.where
    return dataclasses.replace(corpus, where=where)


def tokens_column(config: ExperimentConfig, corpus: CorpusConfig) -> str:
    """Returns the column that a selection by tokens adds up: scored tokens, or estimated tokens of a proxy's corpus.

    Args:
        config: the experiment.
        corpus: the resolved corpus config.
    """
    return "estimated_tokens" if corpus.is_of_proxy else f"{config.refine.tokens_of}_n_tokens"


def candidate_rows(rows: "DataFrame", config: ExperimentConfig, name: str, corpus: CorpusConfig) -> "DataFrame":
    """The pool rows that pass `where`, with their score and their micro-batch. Analyses the SQL; runs no job.

    Args:
        rows: rows of the corpus's table, with the other columns that the expressions name (`with_instances`).
        config: the experiment.
        name: name of the corpus.
        corpus: its resolved config.

    Returns:
        The columns of `schemas.refined_as`, with `score` (double) and `n_tokens`; and `query_id`, `batch_id`.

    Raises:
        ConfigError: an expression is refused (`expressions.expression`).
    """
    from pyspark.sql import functions as F
    from pyspark.sql.types import BooleanType, NumericType

    place, where, score = f"refine.corpora.{name}", str(corpus.where), str(corpus.score)
    passes = expressions.expression(rows, where, f"{place}.where", BooleanType, "a condition")
    rank = expressions.expression(rows, score, f"{place}.score", NumericType, "a number")
    columns = schemas.refined_as(name, plain_config(config, corpus)).column_names
    return (
        rows.where(F.col("split") == "pool")
        .where(passes)
        .withColumns({"score": rank.cast("double"), "n_tokens": F.col(tokens_column(config, corpus))})
        .select(*columns, *_BATCH)
    )


def check_tokenizers(config: ExperimentConfig, place: str, score: str) -> None:
    """Refuses a score that compares means per token of models with unequal tokenizers.

    Args:
        config: the experiment, whose models have records.
        place: place of the expression in the config, for the message.
        score: the expression.

    Raises:
        ConfigError: the expression compares such means.
    """
    used = sorted(set(re.findall(r"(\w+)_nll_mean\b", score)) & set(config.scored_aliases))
    hashes = {alias: read_record(config, alias).tokenizer_hash for alias in used} if len(used) > 1 else {}
    if len(set(hashes.values())) > 1:
        raise ConfigError(
            f"{place}: {score!r} compares means per token of models with unequal tokenizers "
            f"({', '.join(f'{alias} {digest}' for alias, digest in hashes.items())}); compare bits per byte instead: "
            f"{' - '.join(f'{alias}_bits_per_byte' for alias in used)} (context_prefix: token scores every byte)"
        )


def plain_config(config: ExperimentConfig, corpus: CorpusConfig) -> Json:
    """Returns everything in the config that a corpus depends on, as the provenance records it.

    Args:
        config: the experiment.
        corpus: the resolved corpus config.
    """
    return {**to_dict(corpus), "tokens_of": config.refine.tokens_of, "models": config.scored_aliases}


@contextlib.contextmanager
def chosen_rows(
    spark: "SparkSession", version_inputs: VersionInputs, rows: "DataFrame"
) -> Iterator[tuple["DataFrame", Provenance]]:
    """Chooses the rows of a version. Writes no table.

    Args:
        spark: any session.
        version_inputs: what decides the choice.
        rows: `candidate_rows` of the resolved corpus.

    Yields:
        The rows that are kept, with the columns of `rows`; and the provenance of the version.

    Raises:
        CorpusError: no row is kept.
    """
    from pyspark import StorageLevel

    # The rows are read about five times, so the result of a join is stored on disk meanwhile.
    joins = {INSTANCES_VERSION, ANNOTATIONS_VERSION} & version_inputs.inputs.keys()
    if joins or {"matrix_version", "proxy_version"} <= version_inputs.inputs.keys():
        rows = rows.persist(StorageLevel.DISK_ONLY)
    try:
        assert version_inputs.corpus.select is not None
        cuts = choose(rows, version_inputs.corpus.select, f"refine.corpora.{version_inputs.name}")
        provenance = _provenance(spark, version_inputs, rows, cuts)
        yield cuts.mark(rows).where("is_kept").drop("is_kept"), provenance
    finally:
        rows.unpersist()


def commit(
    config: ExperimentConfig, kept: "DataFrame", n_kept: int, provenance: Provenance,
    newest: corpus_records.Newest | None, replaces: bool,
) -> int:  # fmt: skip
    """Writes rows as a new version of `refined/<name>`.

    Args:
        config: the experiment.
        kept: rows of `candidate_rows`.
        n_kept: their number.
        provenance: provenance of the version, so of all its rows.
        newest: the state of the table that the rows were chosen with; None: there is no table.
        replaces: whether the rows replace the rows of the newest version, or are appended to them.

    Returns:
        The number of the version.

    Raises:
        CorpusError: the table is gone, or another driver has committed meanwhile.
    """
    # From the recorded config: an old version may be of other models.
    table = schemas.refined_as(provenance.corpus, provenance.config)
    # Partitioned by a hash of the ids and sorted by id, so the files are the same however the matrix is stored.
    n_files = max(1, math.ceil(n_kept / ROWS_PER_FILE))
    ordered = kept.drop(*_BATCH).repartition(n_files, "instance_id").sortWithinPartitions("instance_id")
    uri = config.layout.refined(provenance.corpus)
    if newest is None:
        corpus_records.require_unrecorded(kept.sparkSession, config.root, provenance.corpus)
    return corpus_records.commit(ordered, uri, table, dataclasses.asdict(provenance), newest, replaces)


def _provenance(
    spark: "SparkSession", version_inputs: VersionInputs, rows: "DataFrame", cuts: SelectionCuts
) -> Provenance:
    """The provenance of the version: counts, threshold and fingerprint of the rows to keep, from one pass."""
    config, corpus = version_inputs.config, version_inputs.corpus
    sums = _sums_by_source_and_length(rows, cuts)
    n_rows, n_kept, n_unusable = (sum(row[key] for row in sums) for key in ("n_rows", "n_kept", "n_unusable"))
    if n_kept == 0:
        raise CorpusError(
            f"refine.corpora.{version_inputs.name}: expected instances to keep, found none: of {n_rows} pool instances "
            f"that pass where = {corpus.where!r}, {n_unusable} have no finite score and none passes the rule "
            f"{to_dict(corpus.select)}; loosen `where` or the rule"
        )
    if n_unusable:
        LOGGER.warning("refine: %s: %d of %d candidates have no finite score", version_inputs.name, n_unusable, n_rows)
    return Provenance(
        corpus=version_inputs.name,
        config=plain_config(config, corpus),
        inputs=version_inputs.inputs,
        model_revisions=version_inputs.revisions,
        threshold=min(row["threshold"] for row in sums if row["n_kept"]),
        n_candidates=n_rows,
        candidate_tokens=sum(row["candidate_tokens"] for row in sums),
        n_unscorable=n_unusable,
        n_instances=n_kept,
        n_tokens=sum(row["n_tokens"] or 0 for row in sums),
        fingerprint=fingerprint_of([(row["xor"] or 0, row["sum"] or 0) for row in sums], n_kept),
        code_revision=code_revision(),
        kept_share_by_source=_kept_share_by_source(sums),
        cuts=cuts.plain(),
        diagnostics=diagnostics.diagnose(spark, config, corpus, rows, sums),
    )


def _sums_by_source_and_length(rows: "DataFrame", cuts: SelectionCuts) -> "list[Row]":
    from pyspark.sql import functions as F

    sums = (
        cuts.mark(rows)
        .groupBy("source", diagnostics.length_bucket().alias("length"))
        .agg(
            F.count("*").alias("n_rows"),
            F.sum("n_tokens").alias("candidate_tokens"),
            F.count_if(~is_finite()).alias("n_unusable"),
            F.count_if(is_finite() & (F.col("score") < 0)).alias("n_negative"),
            *sums_of(F.col("is_kept")),
        )
    )
    return sorted(sums.collect(), key=lambda row: (row["source"], row["length"]))


def _kept_share_by_source(sums: "Sequence[Row]") -> dict[str, float]:
    by_source: dict[str, tuple[int, int]] = {}
    for row in sums:
        n_kept, n_rows = by_source.get(row["source"], (0, 0))
        by_source[row["source"]] = (n_kept + row["n_kept"], n_rows + row["n_rows"])
    return {source: n_kept / n_rows for source, (n_kept, n_rows) in by_source.items()}
