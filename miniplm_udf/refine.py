"""Refinement: SQL over `score_matrix` chooses a corpus's instances; each choice is one version. Driver only, no torch.

    score_matrix (split = pool, `where`) -> score -> cut (top ratio, threshold, random) -> refined/<name>, corpora

alpha counts the candidates, pool rows that pass `where`: floor(alpha * N) instances, or instances of at most
floor(alpha * T) tokens in rank order. A score that is null, NaN or infinite counts among the candidates and is never
kept. Ties break by `instance_id`. The same inputs and config give the same rows; where the newest version has them
already, nothing is written. One version is one commit with its provenance; a retry after a kill adds what is missing.
A corpus has one writer at a time (its lease): whoever refines or follows it (follow.py) waits for the other.

Source: MiniPLM, arXiv 2410.17215: r = log p_teacher / p_reference per token = reference_nll_mean - teacher_nll_mean.
"""

import dataclasses
import logging
import math
import re
from typing import TYPE_CHECKING, Any

from miniplm_udf import __version__, corpora, schemas, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig, to_dict
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.model_records import read_record
from miniplm_udf.selection import Cut, RankedFrame, budget_of, find_cut, keep_condition
from miniplm_udf.streams.lease import Lease, lease_uri

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.refine")

MIN_TOKENS = 32
ROWS_PER_FILE = 2_000_000
_BATCH = ("query_id", "batch_id")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows that a corpus is chosen from: the columns of `refined/<name>`, and those of `_BATCH`."""

    frame: "DataFrame"
    n_rows: int
    n_tokens: int

    def usable(self) -> "DataFrame":
        """Those with a finite score: NaN is above infinity to Spark, so it goes first."""
        return self.frame.where(is_finite())


def is_finite() -> "Column":
    from pyspark.sql import functions as F

    score = F.col("score")
    return score.isNotNull() & ~F.isnan(score) & (F.abs(score) < F.lit(float("inf")))


def refine(spark: "SparkSession", config: ExperimentConfig, name: str) -> dict[str, Any]:
    """Makes the corpus's newest version, unless it is there already.

    Args:
        name: a key of `config.refine.corpora`.

    Returns:
        path, version, threshold, n_candidates, n_instances, n_tokens, kept_share_by_source, skipped.

    Raises:
        ConfigError: an expression that is no SQL over the matrix's columns; means of unequal tokenizers compared.
        CorpusError: there is no matrix, or nothing would be kept.
    """
    resolved = resolve(config, name)
    with corpus_lease(config, name):
        return _refine(spark, config, name, resolved)


def corpus_lease(config: ExperimentConfig, name: str) -> Lease:
    """What whoever writes `refined/<name>` holds meanwhile, and waits for."""
    return Lease(lease_uri(config.root, f"refined-{name}"), f"refined/{name}", waits=True)


def _refine(spark: "SparkSession", config: ExperimentConfig, name: str, resolved: CorpusConfig) -> dict[str, Any]:
    uri, matrix_uri = corpora.corpus_uri(config.root, name), config.table_uri("score_matrix")
    # Before the matrix: what was followed so far is of rows that this version of the matrix has.
    newest = corpora.newest(spark, uri)
    matrix_version = tables.version(spark, matrix_uri)
    matrix = tables.read(spark, matrix_uri, matrix_version)
    _check_columns(matrix, config)
    _check_tokenizers(config, name, resolved)
    rows = candidate_rows(matrix, config, name, resolved)
    inputs = _inputs(matrix, matrix_version)
    known = newest.provenance if newest else None
    if newest and known:
        # Where its maker was killed before it had done so.
        corpora.record(spark, config.root, newest.version, known)
    if newest and known and is_exact(known, plain_config(config, resolved), inputs["last_batches"]):
        version, found, skipped = newest.version, known, True
    else:
        revisions = _revisions(matrix, config.scored_aliases)
        version, found = _write(config, name, resolved, rows, inputs, revisions, newest)
        corpora.record(spark, config.root, version, found)
        skipped = False
    LOGGER.info(
        "refine: %s: version %d%s, %d of %d instances kept, %d of %d tokens, threshold %.6g",
        name, version, " is up to date" if skipped else "", found.n_instances, found.n_candidates, found.n_tokens,
        found.candidate_tokens, found.threshold,
    )  # fmt: skip
    reported = ("threshold", "n_candidates", "n_instances", "n_tokens", "kept_share_by_source")
    return {"path": uri, "version": version, **{key: getattr(found, key) for key in reported}, "skipped": skipped}


def is_exact(known: corpora.Provenance, plain: dict[str, Any], last_batches: dict[str, int]) -> bool:
    """Whether a version is the full refinement of these rows of the matrix by this config."""
    as_refined = known.followed is None and known.derived is None
    return as_refined and known.config == plain and known.inputs["last_batches"] == last_batches


def resolve(config: ExperimentConfig, name: str) -> CorpusConfig:
    """The corpus's config with its defaults filled in.

    Raises:
        ConfigError: there is no such corpus in the config.
    """
    if name not in config.refine.corpora:
        raise ConfigError(f"refine.corpora: expected one of {sorted(config.refine.corpora)}, found {name!r}")
    corpus = config.refine.corpora[name]
    where = f"{config.refine.tokens_of}_n_tokens >= {MIN_TOKENS}" if corpus.where is None else corpus.where
    score = random_score(corpus.select.seed) if corpus.select.rule == "random" else corpus.score
    return dataclasses.replace(corpus, where=where, score=score)


def random_score(seed: int) -> str:
    """A uniform of (0, 1) that belongs to the instance and the seed, however rows are partitioned."""
    return f"(shiftrightunsigned(xxhash64(instance_id, {int(seed)}L), 11) + 0.5D) / 9007199254740992D"


def candidate_rows(matrix: "DataFrame", config: ExperimentConfig, name: str, corpus: CorpusConfig) -> "DataFrame":
    """Pool rows that pass `where`, with their score, and their batch. Parses and analyses; runs nothing."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import BooleanType, NumericType

    place = f"refine.corpora.{name}"
    where = _expression(matrix, str(corpus.where), f"{place}.where", BooleanType, "a condition")
    score = _expression(matrix, corpus.score, f"{place}.score", NumericType, "a number")
    return (
        matrix.where(F.col("split") == "pool")
        .where(where)
        .withColumns({"score": score.cast("double"), "n_tokens": F.col(f"{config.refine.tokens_of}_n_tokens")})
        .select(*schemas.refined(name, config.scored_aliases).column_names, *_BATCH)
    )


def _expression(matrix: "DataFrame", text: str, place: str, wanted: type, what: str) -> "Column":
    """The parsed expression.

    Raises:
        ConfigError: it is no SQL over the columns, is of another type, or differs from run to run.
    """
    from pyspark.errors import AnalysisException, ParseException
    from pyspark.sql import functions as F

    names = [column for column in matrix.columns if column not in _BATCH]
    columns = f"columns are {', '.join(names)}"
    try:
        analysed = matrix.select("instance_id", F.expr(text).alias("value"))
        found = analysed.schema["value"].dataType
    except (ParseException, AnalysisException) as error:
        raise ConfigError(f"{place}: {text!r} is no SQL over score_matrix{_position(error)}; {columns}") from error
    if not isinstance(found, wanted):
        raise ConfigError(
            f"{place}: expected {what}, found {text!r}, which is of type {found.simpleString()}; {columns}"
        )
    if not analysed._jdf.queryExecution().analyzed().deterministic():
        raise ConfigError(
            f"{place}: expected the same value in every run, found {text!r}, which is random; use select.rule: random"
        )
    return F.expr(text)


def _position(error: Any) -> str:
    """Where and what, of Spark's long message."""
    message = str(error).strip().splitlines()[0]
    contexts = error.getQueryContext() or []
    spot = f"at character {contexts[0].startIndex() + 1}: " if contexts and contexts[0].startIndex() >= 0 else ""
    found = re.search(r"\(line \d+, pos \d+\)", str(error))
    return f" ({spot}{message}{' ' + found.group() if found and found.group() not in message else ''})"


def _check_columns(matrix: "DataFrame", config: ExperimentConfig) -> None:
    expected = schemas.score_matrix(config.scored_aliases).column_names
    if not set(expected) <= set(matrix.columns):
        raise CorpusError(
            f"score_matrix: expected columns of the models {config.scored_aliases}, missing "
            f"{sorted(set(expected) - set(matrix.columns))}; run `miniplm score` with this config first"
        )


def _check_tokenizers(config: ExperimentConfig, name: str, corpus: CorpusConfig) -> None:
    """Means per token compare models only where the tokens are the same."""
    known = set(config.scored_aliases)
    used = sorted(set(re.findall(r"(\w+)_nll_mean\b", corpus.score)) & known)
    hashes = {alias: read_record(config, alias).tokenizer_hash for alias in used} if len(used) > 1 else {}
    if len(set(hashes.values())) > 1:
        raise ConfigError(
            f"refine.corpora.{name}.score: {corpus.score!r} compares means per token of models with unequal tokenizers "
            f"({', '.join(f'{alias} {found}' for alias, found in hashes.items())}); compare bits per byte instead: "
            f"{' - '.join(f'{alias}_bits_per_byte' for alias in used)} (context_prefix: token scores every byte)"
        )


def _inputs(matrix: "DataFrame", version: int | None) -> dict[str, Any]:
    batches = matrix.groupBy("query_id").max("batch_id").collect()
    return {"matrix_version": version, "last_batches": {row[0]: row[1] for row in sorted(batches)}}


def _revisions(matrix: "DataFrame", aliases: list[str]) -> dict[str, str]:
    """Model revisions by alias: one query with one set of models wrote all rows of the matrix."""
    rows = matrix.select(*(f"{alias}_revision" for alias in aliases)).limit(1).collect()
    return dict(zip(aliases, rows[0], strict=True)) if rows else {}


def plain_config(config: ExperimentConfig, corpus: CorpusConfig) -> dict[str, Any]:
    """What a resolved corpus depends on, as it stands in its provenance."""
    return {**to_dict(corpus), "tokens_of": config.refine.tokens_of, "models": config.scored_aliases}


def _write(
    config: ExperimentConfig, name: str, corpus: CorpusConfig, rows: "DataFrame", inputs: dict[str, Any],
    revisions: dict[str, str], newest: corpora.Newest | None,
) -> tuple[int, corpora.Provenance]:  # fmt: skip
    kept, found = choose(config, name, corpus, rows, inputs, revisions)
    return commit(config, kept, found.n_instances, found, newest, replaces=True), found


def choose(
    config: ExperimentConfig, name: str, corpus: CorpusConfig, rows: "DataFrame", inputs: dict[str, Any],
    revisions: dict[str, str],
) -> tuple["DataFrame", corpora.Provenance]:  # fmt: skip
    """Of `candidate_rows`, those that the resolved corpus keeps, and what is to be said of them. Writes nothing.

    Raises:
        CorpusError: nothing is kept.
    """
    from pyspark.sql import functions as F

    candidates = _counted(rows)
    cut = select(candidates, corpus)
    kept = keep_condition(cut) if cut is not None else F.lit(False)
    found = _provenance(config, name, corpus, candidates, kept, inputs, revisions)
    return candidates.usable().where(kept), found


def commit(
    config: ExperimentConfig, kept: "DataFrame", n_kept: int, found: corpora.Provenance, newest: corpora.Newest | None,
    replaces: bool,
) -> int:  # fmt: skip
    """Writes `n_kept` rows of `candidate_rows` as a version and returns it: in place of the rows there are, or beside.

    Args:
        found: of the version, so of all its rows.
    """
    # Of what is recorded: a version of the past may be of other models.
    table = schemas.refined(found.corpus, found.config["models"])
    # By the ids' hash, and in the ids' order within: the same rows in the same files, however the matrix lies.
    n_files = max(1, math.ceil(n_kept / ROWS_PER_FILE))
    ordered = kept.drop(*_BATCH).repartition(n_files, "instance_id").sortWithinPartitions("instance_id")
    uri = corpora.corpus_uri(config.root, found.corpus)
    return corpora.commit(ordered, uri, table, dataclasses.asdict(found), newest, replaces)


def _counted(rows: "DataFrame") -> Candidates:
    from pyspark.sql import functions as F

    n_rows, n_tokens = rows.agg(F.count("*"), F.sum("n_tokens")).collect()[0]
    return Candidates(rows, n_rows, n_tokens or 0)


def select(candidates: Candidates, corpus: CorpusConfig) -> Cut | None:
    """The cut of a corpus's rule; None where it keeps nothing."""
    from pyspark.sql import functions as F

    rule = corpus.select
    if rule.rule == "threshold":
        assert rule.threshold is not None
        return Cut(float(rule.threshold))
    assert rule.ratio is not None
    by_tokens = rule.by == "tokens"
    weight = F.col("n_tokens") if by_tokens else F.lit(1).cast("bigint")
    ranked = RankedFrame(candidates.usable().select("instance_id", "score", weight.alias("weight")))
    return find_cut(ranked, budget_of(rule.ratio, candidates.n_tokens if by_tokens else candidates.n_rows))


def _provenance(
    config: ExperimentConfig, name: str, corpus: CorpusConfig, candidates: Candidates, kept: "Column",
    inputs: dict[str, Any], revisions: dict[str, str],
) -> corpora.Provenance:  # fmt: skip
    """Counts, threshold and fingerprint of what will be kept, from one pass.

    Raises:
        CorpusError: nothing is kept.
    """
    from pyspark.sql import functions as F

    usable = is_finite()
    keep = usable & kept
    sources = candidates.frame.groupBy("source").agg(
        F.count("*").alias("n_rows"), F.count_if(~usable).alias("n_unusable"), *sums_of(keep)
    )
    found = sorted(sources.collect(), key=lambda row: row["source"])
    n_kept, n_unusable = sum(row["n_kept"] for row in found), sum(row["n_unusable"] for row in found)
    if n_kept == 0:
        raise CorpusError(
            f"refine.corpora.{name}: expected instances to keep, found none: of {candidates.n_rows} pool instances "
            f"that pass where = {corpus.where!r}, {n_unusable} have no finite score and none passes the rule "
            f"{to_dict(corpus.select)}; loosen `where` or the rule"
        )
    if n_unusable:
        LOGGER.warning("refine: %s: %d of %d candidates have no finite score", name, n_unusable, candidates.n_rows)
    return corpora.Provenance(
        corpus=name,
        config=plain_config(config, corpus),
        inputs=inputs,
        model_revisions=revisions,
        threshold=min(row["threshold"] for row in found if row["n_kept"]),
        n_candidates=candidates.n_rows,
        candidate_tokens=candidates.n_tokens,
        n_unscorable=n_unusable,
        n_instances=n_kept,
        n_tokens=sum(row["n_tokens"] or 0 for row in found),
        fingerprint=fingerprint_of([(row["xor"] or 0, row["sum"] or 0) for row in found], n_kept),
        code_revision=__version__,
        kept_share_by_source={row["source"]: row["n_kept"] / row["n_rows"] for row in found},
    )


def sums_of(keep: "Column") -> list["Column"]:
    """Aggregates of the rows that `keep` keeps: n_kept, n_tokens, threshold, and xor and sum of their hashes."""
    from pyspark.sql import functions as F

    hashed = F.xxhash64("instance_id", "score")
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
