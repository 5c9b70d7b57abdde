"""Refinement: SQL over `score_matrix` chooses a corpus's instances; each choice is one version. Driver only, no torch.

    candidates.py (split = pool, `where`) -> score -> what is kept (keep.py) -> refined/<name>, corpora

Owns versions and their provenance; the rows are candidates.py's, the expressions expressions.py's, published rules
rules.py's, the cut keep.py's, the signs of a poor choice diagnostics.py's. The same inputs and config give the same
rows; where the newest version has them already, nothing is written. One version is one commit with its provenance; a
retry after a kill adds what is missing. A corpus has one writer at a time (its lease): whoever refines or follows it
(follow.py) waits.

Source: MiniPLM, arXiv 2410.17215: r = log p_teacher / p_reference per token = reference_nll_mean - teacher_nll_mean.
"""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, rules, schemas, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig, to_dict
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.model_records import read_record
from miniplm_udf.refinement import candidates, diagnostics, expressions
from miniplm_udf.refinement.columns import ANNOTATIONS_VERSION, INSTANCES_VERSION, with_instances
from miniplm_udf.refinement.keep import Kept, choose
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.revision import code_revision
from miniplm_udf.streams.lease import Lease, lease_uri

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.refine")

MIN_TOKENS = 32
ROWS_PER_FILE = 2_000_000
_BATCH = ("query_id", "batch_id")


def refine(spark: "SparkSession", config: ExperimentConfig, name: str) -> dict[str, Any]:
    """Makes the corpus's newest version, unless it is there already.

    Args:
        name: a key of `config.refine.corpora`.

    Returns:
        path, version, threshold, n_candidates, n_instances, n_tokens, kept_share_by_source, diagnostics, skipped.

    Raises:
        ConfigError: an expression that is no SQL over the matrix's columns; means of unequal tokenizers compared.
        CorpusError: there is no matrix, or nothing would be kept.
    """
    resolved = resolve(config, name)
    with corpus_lease(config, name), tables.long_scans(spark):
        return _refine(spark, config, name, resolved)


def corpus_lease(config: ExperimentConfig, name: str) -> Lease:
    """What whoever writes `refined/<name>` holds meanwhile, and waits for."""
    return Lease(lease_uri(config.root, f"refined-{name}"), f"refined/{name}", waits=True)


def _refine(spark: "SparkSession", config: ExperimentConfig, name: str, resolved: CorpusConfig) -> dict[str, Any]:
    uri = corpora.corpus_uri(config.root, name)
    # Before the matrix: what was followed so far is of rows that this version of the matrix has.
    newest = corpora.newest(spark, uri)
    read = candidates.read(spark, config, resolved)
    check_tokenizers(config, f"refine.corpora.{name}.score", str(resolved.score))
    seen, others = with_instances(spark, config, read.rows, str(resolved.where), str(resolved.score))
    rows = candidate_rows(seen, config, name, resolved)
    inputs = {**read.inputs, **others}
    known = newest.provenance if newest else None
    if newest and known:
        # Where its maker was killed before it had done so.
        corpora.record(spark, config.root, newest.version, known)
    if newest and known and is_exact(known, plain_config(config, resolved), inputs):
        version, found, skipped = newest.version, known, True
    else:
        revisions = candidates.revisions(config, resolved, read.rows)
        version, found = _write(spark, Made(config, name, resolved, inputs, revisions), rows, newest)
        corpora.record(spark, config.root, version, found)
        skipped = False
    LOGGER.info(
        "refine: %s: version %d%s, %d of %d instances kept, %d of %d tokens, threshold %.6g",
        name, version, " is up to date" if skipped else "", found.n_instances, found.n_candidates, found.n_tokens,
        found.candidate_tokens, found.threshold,
    )  # fmt: skip
    for note in found.diagnostics.get("notes", ()):
        LOGGER.warning("refine: %s: %s", name, note)
    reported = ("threshold", "n_candidates", "n_instances", "n_tokens", "kept_share_by_source", "diagnostics")
    return {"path": uri, "version": version, **{key: getattr(found, key) for key in reported}, "skipped": skipped}


def is_exact(known: corpora.Provenance, plain: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a version is the full refinement of these rows of the matrix, and these annotations, by this config."""
    as_refined = known.followed is None and known.derived is None
    same = all(known.inputs.get(key) == inputs.get(key) for key in ("last_batches", ANNOTATIONS_VERSION))
    return as_refined and known.config == plain and same


def resolve(config: ExperimentConfig, name: str) -> CorpusConfig:
    """The corpus's config with its defaults filled in.

    Raises:
        ConfigError: there is no such corpus in the config.
    """
    if name not in config.refine.corpora:
        raise ConfigError(f"refine.corpora: expected one of {sorted(config.refine.corpora)}, found {name!r}")
    corpus = rules.resolve(config.refine.corpora[name])
    where = f"{tokens_column(config, corpus)} >= {MIN_TOKENS}" if corpus.where is None else corpus.where
    return dataclasses.replace(corpus, where=where)


def tokens_column(config: ExperimentConfig, corpus: CorpusConfig) -> str:
    """What a selection by tokens counts: scored tokens, or, where not all was scored, estimated ones."""
    return "estimated_tokens" if corpus.is_of_proxy else f"{config.refine.tokens_of}_n_tokens"


def candidate_rows(seen: "DataFrame", config: ExperimentConfig, name: str, corpus: CorpusConfig) -> "DataFrame":
    """Pool rows that pass `where`, with their score, and their batch. Parses and analyses; runs nothing.

    Args:
        seen: rows of the corpus's table, with other columns beside where expressions name such (`with_instances`).
        corpus: resolved.

    Raises:
        ConfigError: an expression is refused (expressions.py).
    """
    from pyspark.sql import functions as F
    from pyspark.sql.types import BooleanType, NumericType

    place, where, score = f"refine.corpora.{name}", str(corpus.where), str(corpus.score)
    candidate = expressions.expression(seen, where, f"{place}.where", BooleanType, "a condition")
    rank = expressions.expression(seen, score, f"{place}.score", NumericType, "a number")
    columns = schemas.refined_as(name, plain_config(config, corpus)).column_names
    return (
        seen.where(F.col("split") == "pool")
        .where(candidate)
        .withColumns({"score": rank.cast("double"), "n_tokens": F.col(tokens_column(config, corpus))})
        .select(*columns, *_BATCH)
    )


def check_tokenizers(config: ExperimentConfig, place: str, score: str) -> None:
    """Means per token compare models only where the tokens are the same.

    Raises:
        ConfigError: the expression, which stands at this place in the config, compares others.
    """
    known = set(config.scored_aliases)
    used = sorted(set(re.findall(r"(\w+)_nll_mean\b", score)) & known)
    hashes = {alias: read_record(config, alias).tokenizer_hash for alias in used} if len(used) > 1 else {}
    if len(set(hashes.values())) > 1:
        raise ConfigError(
            f"{place}: {score!r} compares means per token of models with unequal tokenizers "
            f"({', '.join(f'{alias} {found}' for alias, found in hashes.items())}); compare bits per byte instead: "
            f"{' - '.join(f'{alias}_bits_per_byte' for alias in used)} (context_prefix: token scores every byte)"
        )


def plain_config(config: ExperimentConfig, corpus: CorpusConfig) -> dict[str, Any]:
    """What a resolved corpus depends on, as it stands in its provenance."""
    return {**to_dict(corpus), "tokens_of": config.refine.tokens_of, "models": config.scored_aliases}


@dataclasses.dataclass(frozen=True)
class Made:
    """What a version is made of."""

    config: ExperimentConfig
    name: str
    corpus: CorpusConfig
    inputs: dict[str, Any]
    revisions: dict[str, str]


def _write(
    spark: "SparkSession", made: Made, rows: "DataFrame", newest: corpora.Newest | None
) -> tuple[int, corpora.Provenance]:
    with chosen(spark, made, rows) as (kept, found):
        return commit(made.config, kept, found.n_instances, found, newest, replaces=True), found


@contextlib.contextmanager
def chosen(spark: "SparkSession", made: Made, rows: "DataFrame") -> Iterator[tuple["DataFrame", corpora.Provenance]]:
    """Of `candidate_rows`, those that the resolved corpus keeps, and what is to be said of them. Writes no table.

    Raises:
        CorpusError: nothing is kept.
    """
    from pyspark import StorageLevel

    # They are read some five times: what a join made is kept meanwhile.
    joins = {INSTANCES_VERSION, ANNOTATIONS_VERSION} & made.inputs.keys()
    if joins or {"matrix_version", "proxy_version"} <= made.inputs.keys():
        rows = rows.persist(StorageLevel.DISK_ONLY)
    try:
        assert made.corpus.select is not None
        kept = choose(rows, made.corpus.select, f"refine.corpora.{made.name}")
        found = _provenance(spark, made, rows, kept)
        yield kept.mark(rows).where("is_kept").drop("is_kept"), found
    finally:
        rows.unpersist()


def commit(
    config: ExperimentConfig, kept: "DataFrame", n_kept: int, found: corpora.Provenance, newest: corpora.Newest | None,
    replaces: bool,
) -> int:  # fmt: skip
    """Writes `n_kept` rows of `candidate_rows` as a version and returns it: in place of the rows there are, or beside.

    Args:
        found: of the version, so of all its rows.
    """
    # Of what is recorded: a version of the past may be of other models.
    table = schemas.refined_as(found.corpus, found.config)
    # By the ids' hash, and in the ids' order within: the same rows in the same files, however the matrix lies.
    n_files = max(1, math.ceil(n_kept / ROWS_PER_FILE))
    ordered = kept.drop(*_BATCH).repartition(n_files, "instance_id").sortWithinPartitions("instance_id")
    uri = corpora.corpus_uri(config.root, found.corpus)
    return corpora.commit(ordered, uri, table, dataclasses.asdict(found), newest, replaces)


def _provenance(spark: "SparkSession", made: Made, rows: "DataFrame", kept: Kept) -> corpora.Provenance:
    """Counts, threshold and fingerprint of what will be kept, from one pass.

    Raises:
        CorpusError: nothing is kept.
    """
    from pyspark.sql import functions as F

    sums = (
        kept.mark(rows)
        .groupBy("source", diagnostics.length_bucket().alias("length"))
        .agg(
            F.count("*").alias("n_rows"),
            F.sum("n_tokens").alias("candidate_tokens"),
            F.count_if(~is_finite()).alias("n_unusable"),
            F.count_if(is_finite() & (F.col("score") < 0)).alias("n_negative"),
            *sums_of(F.col("is_kept")),
        )
    )
    found = sorted(sums.collect(), key=lambda row: (row["source"], row["length"]))
    n_rows, n_kept, n_unusable = (sum(row[key] for row in found) for key in ("n_rows", "n_kept", "n_unusable"))
    if n_kept == 0:
        raise CorpusError(
            f"refine.corpora.{made.name}: expected instances to keep, found none: of {n_rows} pool instances "
            f"that pass where = {made.corpus.where!r}, {n_unusable} have no finite score and none passes the rule "
            f"{to_dict(made.corpus.select)}; loosen `where` or the rule"
        )
    if n_unusable:
        LOGGER.warning("refine: %s: %d of %d candidates have no finite score", made.name, n_unusable, n_rows)
    return corpora.Provenance(
        corpus=made.name,
        config=plain_config(made.config, made.corpus),
        inputs=made.inputs,
        model_revisions=made.revisions,
        threshold=min(row["threshold"] for row in found if row["n_kept"]),
        n_candidates=n_rows,
        candidate_tokens=sum(row["candidate_tokens"] for row in found),
        n_unscorable=n_unusable,
        n_instances=n_kept,
        n_tokens=sum(row["n_tokens"] or 0 for row in found),
        fingerprint=fingerprint_of([(row["xor"] or 0, row["sum"] or 0) for row in found], n_kept),
        code_revision=code_revision(),
        kept_share_by_source=_kept_share_by_source(found),
        cuts=kept.plain(),
        diagnostics=diagnostics.diagnose(spark, made.config, made.corpus, rows, found),
    )


def _kept_share_by_source(sums: "Sequence[Row]") -> dict[str, float]:
    by_source: dict[str, tuple[int, int]] = {}
    for row in sums:
        n_kept, n_rows = by_source.get(row["source"], (0, 0))
        by_source[row["source"]] = (n_kept + row["n_kept"], n_rows + row["n_rows"])
    return {source: n_kept / n_rows for source, (n_kept, n_rows) in by_source.items()}


def row_hash() -> "Column":
    """What a fingerprint is made of, a bigint a row."""
    from pyspark.sql import functions as F

    return F.xxhash64("instance_id", "score")


def sums_of(keep: "Column") -> list["Column"]:
    """Aggregates of the rows that `keep` keeps: n_kept, n_tokens, threshold, and xor and sum of their hashes."""
    from pyspark.sql import functions as F

    hashed = row_hash()
    low_bits = hashed.bitwiseAND(F.lit(0xFFFFFFFF).cast("bigint"))
    return [
        F.count_if(keep).alias("n_kept"),
        F.sum(F.when(keep, F.col("n_tokens"))).alias("n_tokens"),
        F.min(F.when(keep, F.col("score"))).alias("threshold"),
        F.bit_xor(F.when(keep, hashed)).alias("xor"),
        F.sum(F.when(keep, low_bits)).alias("sum"),
    ]


def parts_of(fingerprint: str) -> tuple[int, int]:
    """The exclusive or and the sum that a fingerprint was made of."""
    return int(fingerprint[:16], 16), int(fingerprint[16:32], 16)


def fingerprint_of(parts: list[tuple[int, int]], n_rows: int) -> str:
    """Exclusive or, sum and number of the kept rows' hashes: the same in any order and any grouping."""
    xor, total = 0, 0
    for part_xor, part_sum in parts:
        xor, total = xor ^ (part_xor & 0xFFFFFFFFFFFFFFFF), total + part_sum
    return f"{xor:016x}{total & 0xFFFFFFFFFFFFFFFF:016x}-{n_rows}"
