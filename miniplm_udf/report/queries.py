"""The report's queries over the tables: counts, histograms, shares per source, a few texts. Driver only.

Inputs: `instances`, `rejects`, `scores`, `score_matrix`, `corpora`, `refined/<name>` under the root. Outputs: small
frozen dataclasses of plain numbers and strings; 1,026 bucket counts per histogram, one row per source and a few dozen
texts come to the driver, however large the tables. Scores are nats per token unless a corpus's own expression says
otherwise. The refined version says which rows were kept. Reads only, so a retry repeats it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config import rules
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.refinement import candidates
from miniplm_udf.refinement.columns import with_instances
from miniplm_udf.report.histogram import Histogram, histogram
from miniplm_udf.schemas import SCORE_STAGE
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.storage import Json
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.store.provenance import CorpusRow, Diagnostics

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.report")

TEXT_CHARACTERS = 600
SHOWN_SOURCES = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFacts:
    """One Delta table: its location, its newest version and its number of rows."""

    name: str
    uri: str
    version: int
    n_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectCount:
    """Rejected rows of one stage and reason."""

    stage: str
    reason: str
    n_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overview:
    """Counts over the whole experiment, from the tables.

    Attributes:
        n_instances: instances of all splits.
        instances_by_split: by split.
        rejects: by stage and reason.
        scored: rows in `scores` by alias, of the present revision.
        models: the models' records by alias.
        tables: the tables that exist.
    """

    n_instances: int
    instances_by_split: dict[str, int]
    rejects: list[RejectCount]
    scored: dict[str, int]
    models: dict[str, ModelDescription]
    tables: list[TableFacts]

    @property
    def n_rejected(self) -> int:
        """Rows in `rejects`, over all stages and reasons."""
        return sum(reject.n_rows for reject in self.rejects)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceShare:
    """The candidates of one source, and how many of them were kept."""

    source: str
    n_candidates: int
    n_kept: int
    candidate_tokens: int
    kept_tokens: int
    n_negative: int
    score_mean: float

    @property
    def kept_share(self) -> float:
        """Share of the candidates that were kept, from 0 to 1."""
        return self.n_kept / self.n_candidates

    @property
    def negative_share(self) -> float:
        """Share of the candidates with a score below 0, from 0 to 1."""
        return self.n_negative / self.n_candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One shown instance; `text` holds at most TEXT_CHARACTERS of its `n_characters` characters."""

    instance_id: str
    source: str
    score: float
    kept: bool
    nll_means: dict[str, float]
    text: str
    n_characters: int

    @property
    def is_cut(self) -> bool:
        """Whether the instance is longer than the text that is shown."""
        return len(self.text) < self.n_characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """The newest version of a refined corpus.

    Attributes:
        name: of the corpus; `uri` is its table.
        record: its row in `corpora`; `config` is the config in it, with the configured score of a random corpus.
        score: candidates by score; `nll_means` by the mean loss of each model.
        sources: candidates by source, the largest sources only; `total` over all of them.
        examples: instances by place in the ranking.
        notes: sentences for the reader of the report.
    """

    name: str
    uri: str
    record: CorpusRow
    config: Json
    score: Histogram
    nll_means: dict[str, Histogram]
    sources: list[SourceShare]
    total: SourceShare
    examples: dict[str, list[Example]]
    notes: list[str]

    @property
    def rule(self) -> str:
        """Name of the selection rule, for example `top_ratio`."""
        return str(self.config.get("select", {}).get("rule", "top_ratio"))

    @property
    def diagnostics(self) -> Diagnostics:
        """Diagnostics of the refinement; empty for a followed corpus."""
        return self.record["inputs"].get("diagnostics", {})

    @property
    def cut(self) -> float | None:
        """The lowest kept score; None for a random corpus, whose score does not decide."""
        return None if self.rule == "random" else self.record["threshold"]


def overview(spark: "SparkSession", config: ExperimentConfig) -> Overview:
    """Counts instances, rejects and scores from the tables.

    Args:
        spark: any session.
        config: the experiment.

    Raises:
        CorpusError: there is no `instances` table.
    """
    instances = tables.read(spark, config.layout.table("instances"))
    by_split = {row["split"]: row["count"] for row in instances.groupBy("split").count().orderBy("split").collect()}
    records = {alias: storage.read_json(config.layout.model_record(alias)) for alias in config.scored_aliases}
    models = {alias: ModelDescription.from_dict(record) for alias, record in records.items() if record}
    return Overview(
        n_instances=sum(by_split.values()),
        instances_by_split=by_split,
        rejects=_rejects(spark, config, models),
        scored=_scored(spark, config, models),
        models=models,
        tables=list(_table_facts(spark, config)),
    )


def _rejects(spark: "SparkSession", config: ExperimentConfig, models: dict[str, ModelDescription]) -> list[RejectCount]:
    if not tables.exists(spark, config.layout.table("rejects")):
        return []
    labels = {SCORE_STAGE + record.model_revision: f"score, {alias}" for alias, record in models.items()}
    rows = tables.read(spark, config.layout.table("rejects")).groupBy("stage", "reason").count()
    return [
        RejectCount(stage=labels.get(row["stage"], row["stage"]), reason=row["reason"], n_rows=row["count"])
        for row in rows.orderBy("stage", "reason").collect()
    ]


def _scored(spark: "SparkSession", config: ExperimentConfig, models: dict[str, ModelDescription]) -> dict[str, int]:
    """Rows in `scores` by alias, of the present revision."""
    if not tables.exists(spark, config.layout.table("scores")):
        return {}
    rows = tables.read(spark, config.layout.table("scores")).groupBy("model_id", "model_revision").count().collect()
    counts = {(row["model_id"], row["model_revision"]): row["count"] for row in rows}
    return {alias: counts.get((alias, record.model_revision), 0) for alias, record in models.items()}


def _table_facts(spark: "SparkSession", config: ExperimentConfig) -> Iterator[TableFacts]:
    names = ["instances", "scores", "score_matrix", "proxy_scores", "generations", "rejects", "corpora"]
    names += [f"refined/{corpus}" for corpus in config.refine.corpora]
    packed = {f"packed/{student.corpus}/{student.tokenizer}" for student in config.students.values()}
    for name in names + sorted(packed):
        uri = config.layout.table(name)
        version = delta_log.newest_version(uri)
        if version is not None:
            n_rows = tables.read(spark, uri).count()
            yield TableFacts(name=name, uri=storage.redact(uri), version=version, n_rows=n_rows)


def corpora(spark: "SparkSession", config: ExperimentConfig) -> list[CorpusFacts]:
    """Reads the newest version of each refined corpus: those of the config in its order, then the others by name.

    Args:
        spark: any session.
        config: the experiment.
    """
    uri = config.layout.table("corpora")
    if not tables.exists(spark, uri):
        return []
    rows = tables.read(spark, uri).orderBy("version").collect()
    newest = {row["name"]: corpus_records.parsed(row.asDict()) for row in rows}
    order = [*config.refine.corpora, *sorted(newest)]
    return [_corpus(spark, config, newest[name]) for name in dict.fromkeys(order) if name in newest]


def _corpus(spark: "SparkSession", config: ExperimentConfig, record: CorpusRow) -> CorpusFacts:
    name = record["name"]
    resolved = dict(record["config"])
    if resolved["select"]["rule"] == "random":
        # Its resolved score is the random draw, so the configured score is shown.
        resolved["score"] = rules.plain_score(config.refine.corpora.get(name, CorpusConfig()))
    notes: list[str] = []
    frame = _candidates(spark, config, record, resolved, notes).persist()
    try:
        aliases = [column.removesuffix("_nll_mean") for column in frame.columns if column.endswith("_nll_mean")]
        score = histogram(frame, "score")
        sources = source_shares(frame)
        total = _sum("all sources", sources)
        if not notes and total.n_candidates != record["n_candidates"]:
            missing = record["n_candidates"] - total.n_candidates
            notes.append(f"{missing:,} candidates have no finite score: they are never kept and not shown below.")
        return CorpusFacts(
            name=name,
            uri=storage.redact(config.layout.table(f"refined/{name}")),
            record=record,
            config=resolved,
            score=score,
            nll_means={alias: histogram(frame, f"{alias}_nll_mean") for alias in aliases},
            sources=_shown(sources),
            total=total,
            examples=_examples(spark, config, frame, aliases, score.median(), resolved["select"]["rule"]),
            notes=notes,
        )
    finally:
        frame.unpersist()


def _candidates(
    spark: "SparkSession", config: ExperimentConfig, record: CorpusRow, resolved: Json, notes: list[str]
) -> "DataFrame":
    """The rows that the corpus was chosen from: instance_id, source, n_tokens, score, `<alias>_nll_mean`, kept."""
    from pyspark.sql import functions as F

    inputs = record["inputs"]
    matrix = _table_at(spark, config, candidates.MATRIX, inputs.get("matrix_version"), notes)
    if not notes and inputs.get("last_batches"):
        # The matrix version that a followed corpus names may have a few rows more.
        matrix = candidates.as_of(matrix, inputs["last_batches"])
    tokens = f"{resolved['tokens_of']}_n_tokens"
    means = [column for column in matrix.columns if column.endswith("_nll_mean")]
    if resolved.get("candidates") == candidates.PROXY:
        predicted = _table_at(spark, config, candidates.PROXY, inputs["proxy_version"], notes)
        matrix = candidates.with_matrix(predicted, matrix, resolved["where"], resolved["score"])
        tokens, means = "estimated_tokens", []
    refined = tables.read(spark, config.layout.table(f"refined/{record['name']}"), record["version"])
    kept = refined.select("instance_id", F.lit(True).alias("kept"))
    matrix, _ = with_instances(spark, config, matrix, resolved["where"], resolved["score"])
    scored = (
        matrix.where("split = 'pool'")
        .where(resolved["where"])
        .withColumn("score", F.expr(resolved["score"]).cast("double"))
    )
    finite = scored.where("score is not null and not isnan(score) and abs(score) < double('inf')")
    columns = ["instance_id", "source", F.col(tokens).alias("n_tokens"), "score", *means]
    return finite.select(*columns).join(kept, "instance_id", "left").fillna(False, subset=["kept"])


def _table_at(
    spark: "SparkSession", config: ExperimentConfig, name: str, version: int | None, notes: list[str]
) -> "DataFrame":
    """A table at the version that the refinement read; if that is gone, at the newest version, with a note."""
    from pyspark.errors import PySparkException

    uri = config.layout.table(name)
    if version is not None:
        try:
            return tables.read(spark, uri, version)
        except PySparkException as error:
            LOGGER.warning("%s version %s cannot be read any more: %s", name, version, str(error).splitlines()[0])
            notes.append(
                f"Version {version} of {name}, which this corpus was chosen from, cannot be read any more: "
                "candidates are those of the newest version, and rows scored since then count as dropped."
            )
    return tables.read(spark, uri)


def source_shares(frame: "DataFrame") -> list[SourceShare]:
    """Kept and dropped rows by source, the source with the most candidates first.

    Args:
        frame: source, n_tokens, score, kept.
    """
    from pyspark.sql import functions as F

    kept = F.col("kept").cast("bigint")
    rows = frame.groupBy("source").agg(
        F.count("*").alias("n_candidates"),
        F.sum(kept).alias("n_kept"),
        F.sum("n_tokens").alias("candidate_tokens"),
        F.sum(F.col("n_tokens") * kept).alias("kept_tokens"),
        F.count_if(F.col("score") < 0).alias("n_negative"),
        F.avg("score").alias("score_mean"),
    )
    return [SourceShare(**row.asDict()) for row in rows.orderBy(F.desc("n_candidates"), "source").collect()]


def _sum(label: str, shares: Sequence[SourceShare]) -> SourceShare:
    n_candidates = sum(share.n_candidates for share in shares)
    weighted = sum(share.score_mean * share.n_candidates for share in shares)
    return SourceShare(
        source=label,
        n_candidates=n_candidates,
        n_kept=sum(share.n_kept for share in shares),
        candidate_tokens=sum(share.candidate_tokens for share in shares),
        kept_tokens=sum(share.kept_tokens for share in shares),
        n_negative=sum(share.n_negative for share in shares),
        score_mean=weighted / n_candidates,
    )


def _shown(shares: list[SourceShare]) -> list[SourceShare]:
    """The largest sources, and one row for all others together."""
    if len(shares) <= SHOWN_SOURCES:
        return shares
    others = shares[SHOWN_SOURCES:]
    return [*shares[:SHOWN_SOURCES], _sum(f"({len(others):,} more sources)", others)]


def _examples(
    spark: "SparkSession", config: ExperimentConfig, frame: "DataFrame", aliases: Sequence[str], median: float,
    rule: str,
) -> dict[str, list[Example]]:  # fmt: skip
    """Instances at both ends, in the middle and, unless the corpus is random, on both sides of the cut."""
    from pyspark.sql import functions as F

    n = config.report.examples
    up, down, by_id = F.asc("score"), F.desc("score"), F.asc("instance_id")
    chosen: dict[str, list[Row]] = {
        "Highest": frame.orderBy(down, by_id).limit(n).collect(),
        "Middle": frame.orderBy(F.abs(F.col("score") - F.lit(median)), by_id).limit(n).collect(),
        "Lowest": frame.orderBy(up, by_id).limit(n).collect(),
    }
    if rule != "random":
        chosen["Just above the cut"] = frame.where("kept").orderBy(up, by_id).limit(n).collect()
        chosen["Just below the cut"] = frame.where("not kept").orderBy(down, by_id).limit(n).collect()
    texts = _texts(spark, config, {row["instance_id"] for rows in chosen.values() for row in rows})

    def example(row: "Row") -> Example:
        text, n_characters = texts.get(row["instance_id"], ("", 0))
        means = {alias: row[f"{alias}_nll_mean"] for alias in aliases}
        return Example(
            instance_id=row["instance_id"], source=row["source"], score=row["score"], kept=row["kept"],
            nll_means=means, text=text, n_characters=n_characters,
        )  # fmt: skip

    return {label: [example(row) for row in rows] for label, rows in chosen.items()}


def _texts(spark: "SparkSession", config: ExperimentConfig, ids: set[str]) -> dict[str, tuple[str, int]]:
    """{instance_id: (beginning of its text, length in characters)}."""
    from pyspark.sql import functions as F

    instances = tables.read(spark, config.layout.table("instances")).where(F.col("instance_id").isin(sorted(ids)))
    beginning = F.substring("text", 1, TEXT_CHARACTERS)
    rows = instances.select("instance_id", beginning.alias("text"), F.length("text").alias("n")).collect()
    return {row["instance_id"]: (row["text"], row["n"]) for row in rows}
