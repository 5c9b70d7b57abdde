"""Rules, selections and expressions on Spark: against plain sorts, repartitioned, refused before anything is made."""

import dataclasses
import logging.handlers
import math
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from jobs import refine as job
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.refinement import columns, diagnostics, expressions, refine
from miniplm_udf.refinement.keep import choose
from miniplm_udf.refinement.selection import budget_of
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.upkeep import verify
from tests.support.matrices import (
    ALIASES,
    DIFFERENCE,
    TEXTS,
    candidates,
    ids,
    rows_of_matrix,
    with_corpora,
    write_matrix,
    write_record,
)
from tests.support.score_tables import experiment, instance_id, write_instances
from tests.support.selection_oracles import by_sorting, exact


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A root with a matrix of 300 rows, and their instances; every third has metadata."""
    from pyspark.sql import functions as F

    root = tmp_path_factory.mktemp("rules") / "root"
    made = experiment(root, {alias: ModelConfig(path="/nowhere") for alias in ALIASES})
    write_matrix(spark, made, rows_of_matrix())
    write_instances(spark, made, TEXTS)
    uri = made.layout.table("instances")
    number = F.split("text", " ")[1].cast("int")
    changed = tables.read(spark, uri).withColumn(
        "metadata", F.when(number % 3 == 0, F.concat(F.lit('[{"lang": "en", "n": '), number, F.lit("}]")))
    )
    changed.write.format("delta").mode("overwrite").save(uri)
    for alias in ALIASES:
        write_record(made, alias)
    return made


def ranked(rows: list[dict[str, Any]], by_tokens: bool) -> list[tuple[float, str, int]]:
    return [(row["score"], row["instance_id"], row["teacher_n_tokens"] if by_tokens else 1) for row in rows]


def top(rows: list[dict[str, Any]], budget: int, by_tokens: bool = False) -> set[str]:
    return set(by_sorting(ranked(rows, by_tokens), budget))


def weight(rows: list[dict[str, Any]], by_tokens: bool) -> int:
    return sum(row[2] for row in ranked(rows, by_tokens))


def expected_of(select: SelectConfig, rows: list[dict[str, Any]]) -> set[str]:
    """The ids that a sort keeps, of rows that are ranked together."""
    by_tokens = select.counts_tokens
    if select.rule == "token_budget":
        return top(rows, int(select.budget_tokens or 0), True)
    total = weight(rows, by_tokens)
    if select.rule == "band":
        outer = budget_of(1 - Fraction(str(select.low)), total)
        return top(rows, outer, by_tokens) - top(rows, budget_of(1 - Fraction(str(select.high)), total), by_tokens)
    return top(rows, budget_of(float(select.ratio or 0), total), by_tokens)


def of(source: str) -> list[dict[str, Any]]:
    return [row for row in candidates() if row["source"] == source]


SOURCES = ("web", "code", "books")
TOGETHER = [
    SelectConfig(rule="token_budget", budget_tokens=7000),
    SelectConfig(rule="band", low=0.25, high=0.75),
    SelectConfig(rule="band", low=0, high=0.3, by="tokens"),
    SelectConfig(rule="band", low=0.9, high=1),
]
BY_SOURCE = [
    SelectConfig(ratio=0.3, per_source="same"),
    SelectConfig(ratio=0.7, by="tokens", per_source="same"),
    SelectConfig(rule="band", low=0.2, high=0.6, per_source="same"),
]


@pytest.mark.parametrize("select", TOGETHER + BY_SOURCE, ids=str)
def test_a_selection_keeps_what_a_sort_keeps(spark: Any, config: ExperimentConfig, select: SelectConfig) -> None:
    used = with_corpora(config, a=CorpusConfig(score=DIFFERENCE, select=select))
    rows = refine.candidate_rows(matrix_of(spark, config), used, "a", refine.resolve_corpus(used, "a"))
    if select.per_source is None:
        expected = expected_of(select, candidates())
    else:
        expected = {name for source in SOURCES for name in expected_of(select, of(source))}
    for frame in (rows, rows.repartition(7, "instance_id")):
        assert ids(choose(frame, select, "a").mark(frame).where("is_kept")) == sorted(expected)


def matrix_of(spark: Any, config: ExperimentConfig) -> Any:
    return tables.read(spark, config.layout.table("score_matrix"))


def test_shares_by_source_and_their_provenance(spark: Any, config: ExperimentConfig) -> None:
    shares = {"web": 0.5, "code": 0.25}
    select = SelectConfig(rule="token_budget", budget_tokens=8000, per_source=shares)
    used = with_corpora(config, shared=CorpusConfig(score=DIFFERENCE, select=select))
    refined = job.run(spark, used).refined["shared"]
    expected = {name for source, share in shares.items() for name in top(of(source), budget_of(share, 8000), True)}
    kept = corpus_records.read_corpus(spark, used.root, "shared")
    assert ids(kept) == sorted(expected)
    assert refined.kept_share_by_source["books"] == 0
    # The cuts alone choose the same rows again.
    cuts = corpus_records.show_corpus(spark, used.root, "shared")["inputs"]["cuts"]
    assert set(cuts) == set(shares)
    again = {
        row["instance_id"]
        for source, cut in cuts.items()
        for row in of(source)
        for score, last in [cut["down_to"]]
        if row["score"] > score or (row["score"] == score and (last is None or row["instance_id"] <= last))
    }
    assert again == expected
    assert job.run(spark, used).refined["shared"].skipped
    unknown = with_corpora(
        config, a=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=1, per_source={"wep": 1}))
    )
    with pytest.raises(CorpusError, match=r"'books', 'code', 'web'.*found \['wep'\]"):
        job.run(spark, unknown)


def test_gumbel_noise_is_seeded_and_samples_by_the_score(spark: Any, config: ExperimentConfig) -> None:
    def kept(temperature: float, seed: int, n_partitions: int) -> list[str]:
        select = SelectConfig(rule="gumbel", ratio=0.3, temperature=temperature, seed=seed)
        used = with_corpora(config, a=CorpusConfig(score=DIFFERENCE, select=select))
        matrix = matrix_of(spark, config).repartition(n_partitions, "n_bytes")
        rows = refine.candidate_rows(matrix, used, "a", refine.resolve_corpus(used, "a"))
        return ids(choose(rows, select, "a").mark(rows).where("is_kept"))

    best = sorted(top(candidates(), budget_of(0.3, len(candidates()))))
    scores = {row["instance_id"]: row["score"] for row in candidates()}
    some = kept(1.0, 0, 1)
    assert len(some) == len(best)
    assert kept(1.0, 0, 5) == some != kept(1.0, 1, 1)
    # The colder, the nearer to the top; the hotter, the nearer to a uniform choice.
    means = [sum(scores[name] for name in names) / len(names) for names in (best, some, kept(1e6, 0, 1))]
    assert means == sorted(means, reverse=True)
    assert abs(means[2] - sum(scores.values()) / len(scores)) < 0.3
    cold = kept(1e-9, 0, 1)
    lowest = min(scores[name] for name in best)
    assert {name for name in best if scores[name] > lowest} <= set(cold)


@pytest.mark.long
def test_monotone_equivalent_rules_select_the_same(spark: Any, config: ExperimentConfig) -> None:
    # Not half: sums and means have one sign.
    few = SelectConfig(ratio=0.2)
    rules = ("miniplm", "scaling_filter", "rho", "reference_only", "miniplm_sum", "color_filter")
    named = {rule: CorpusConfig(rule=rule, select=few) for rule in rules}
    band = SelectConfig(rule="band", low=0.3, high=0.7)
    named |= {"perplexity": CorpusConfig(rule="perplexity_band", select=band)}
    named |= {"loss": CorpusConfig(score="reference_nll_mean", select=band)}
    # A product with a power of two is not rounded, and losses of two digits stay apart under exp.
    named |= {"scaled": CorpusConfig(score=f"4 * ({DIFFERENCE})", select=few)}
    named |= {"chance": CorpusConfig(rule="random"), "teacher": CorpusConfig(rule="teacher_only")}
    used = with_corpora(config, **named)
    kept = {}
    for name in named:
        rows = refine.candidate_rows(matrix_of(spark, config), used, name, refine.resolve_corpus(used, name))
        select = refine.resolve_corpus(used, name).select
        assert select is not None
        kept[name] = tuple(ids(choose(rows, select, name).mark(rows).where("is_kept")))
    assert kept["miniplm"] == kept["scaling_filter"] == kept["rho"] == kept["scaled"]
    assert kept["miniplm_sum"] == kept["color_filter"]
    assert kept["perplexity"] == kept["loss"]
    assert len(set(kept.values())) == len(kept) - 5


def test_columns_of_the_instances_are_joined_where_they_are_named(spark: Any, config: ExperimentConfig) -> None:
    where = "get_json_object(metadata, '$[0].lang') = 'en' and teacher_n_tokens >= 32"
    used = with_corpora(
        config,
        english=CorpusConfig(score=DIFFERENCE, where=where, select=SelectConfig(ratio=0.5)),
        longest=CorpusConfig(score="length(text) + n_bytes / 1e6", select=SelectConfig(ratio=0.2)),
    )
    summary = job.run(spark, used).refined
    numbered = {instance_id(text): number for number, text in enumerate(TEXTS)}
    english = [row for row in candidates() if numbered[row["instance_id"]] % 3 == 0]
    assert summary["english"].n_candidates == len(english)
    assert ids(corpus_records.read_corpus(spark, used.root, "english")) == sorted(top(english, len(english) // 2))
    inputs = corpus_records.show_corpus(spark, used.root, "english")["inputs"]
    assert inputs["instances_version"] == delta_log.newest_version(config.layout.table("instances"))
    # Who reads the expression again finds the columns too.
    checks = [check for check in verify.verify(spark, used.root) if check.name.startswith("corpus longest")]
    assert [check.name.split(": ")[1] for check in checks] == ["rows", "fingerprint", "rows are the matrix's"]
    assert all(check.ok for check in checks)
    # Where none is named there is no join.
    plain = with_corpora(config, a=CorpusConfig(score=DIFFERENCE))
    assert columns.with_instances(spark, plain, matrix_of(spark, plain), DIFFERENCE)[1] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher_nll_mean + (select 1)", r"a subquery \(at character 21\)"),
        ("(select max(score) from x)", "is no SQL"),
        ("case when exists (select 1) then 1 else 0 end", r"a subquery \(at character 11\)"),
        ("teacher_nll_mean in (select 1) or true", "a subquery"),
        ("row_number() over (order by teacher_nll_mean)", "a window function"),
        ("explode(array(1, 2))", "a generator"),
        ("max(teacher_nll_mean)", "aggregate|no SQL"),
        ("unix_timestamp()", "depends on the time or the user"),
        ("length(current_user())", "depends on the time or the user"),
        ("teacher_nll_mean * rand(3)", "random"),
        ("teacher_nll_mean + * 2)", r"no SQL.*pos \d+"),
        ("teacher_nll_mean - no_such", "at character 20.*no_such"),
        ("ingested_at", "no SQL"),
    ],
)
def test_more_than_a_column_is_refused_with_its_place(
    spark: Any, config: ExperimentConfig, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        job.run(spark, with_corpora(config, wrong=CorpusConfig(score=text)))
    assert str(raised.value).startswith("refine.corpora.wrong.score: ")
    assert not tables.exists(spark, config.layout.table("refined/wrong"))


def test_what_is_only_tried_is_not_logged(spark: Any, config: ExperimentConfig) -> None:
    heard = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("SQLQueryContextLogger")
    logger.addHandler(heard)
    try:
        assert not expressions.resolves(tables.read(spark, config.layout.table("score_matrix")), "of_another_table > 1")
    finally:
        logger.removeHandler(heard)
    assert heard.buffer == []


def test_diagnostics_are_those_of_the_rows(spark: Any, config: ExperimentConfig, tmp_path: Path) -> None:
    """On a root of its own, where the teacher is too strong: its losses are next to nothing."""
    strong = [
        row | {"teacher_nll_mean": 0.01 * (number % 3), "reference_nll_mean": 1 + number % 89 / 40}
        for number, row in enumerate(rows_of_matrix())
    ]
    bits = "case when n_bytes % 5 = 0 then null else teacher_nll_mean - 0.005 end"
    used = with_corpora(
        dataclasses.replace(config, root=storage.to_uri(str(tmp_path / "root"))),
        strong=CorpusConfig(),
        signed=CorpusConfig(score=bits),
        random=CorpusConfig(rule="random"),
    )
    write_matrix(spark, used, strong)
    for alias in ALIASES:
        write_record(used, alias)
    summary = job.run(spark, used).refined
    measured = summary["strong"].diagnostics
    pool = [row for row in strong if row["split"] == "pool" and row["teacher_n_tokens"] >= 32]
    losses = [(row["reference_nll_mean"] - row["teacher_nll_mean"], row["reference_nll_mean"]) for row in pool]
    truth = exact(losses)
    assert abs(measured["spearman_with_reference_loss"] - truth) <= measured["spearman_error"] < 0.2
    assert truth > 0.9
    minus = exact([(row["reference_nll_mean"] - row["teacher_nll_mean"], -row["teacher_nll_mean"]) for row in pool])
    assert abs(measured["spearman_with_minus_teacher_loss"] - minus) <= measured["spearman_teacher_error"]
    spread = {alias: statistics.pstdev(row[f"{alias}_nll_mean"] for row in pool) for alias in ("teacher", "reference")}
    assert measured["pair"]["spread"] == pytest.approx(spread)
    assert measured["pair"]["spread_unit"] == "nats/token"
    assert ["too strong" in note for note in measured["notes"]] == [True]
    assert measured["negative_share"] == 0
    assert measured["rejects"] == {}
    kept = {row["instance_id"] for row in corpus_records.read_corpus(spark, used.root, "strong").collect()}
    by_length: dict[str, list[bool]] = {}
    for row in pool:
        k = int(math.log2(row["teacher_n_tokens"]))
        by_length.setdefault(f"{1 << k}-{(2 << k) - 1}", []).append(row["instance_id"] in kept)
    assert measured["kept_share_by_length"] == {key: sum(of) / len(of) for key, of in by_length.items()}
    usable = [row for row in pool if row["n_bytes"] % 5]
    negative = sum(row["teacher_nll_mean"] < 0.005 for row in usable) / len(usable)
    assert summary["signed"].diagnostics["negative_share"] == negative
    assert summary["random"].diagnostics["spearman_with_reference_loss"] is None
    # In the provenance of the commit, and in the row that outlives it.
    newest = corpus_records.newest(summary["strong"].path)
    assert newest is not None
    assert newest.provenance is not None
    assert newest.provenance.diagnostics == measured
    assert corpus_records.show_corpus(spark, used.root, "strong")["inputs"]["diagnostics"] == measured


def test_lengths_are_told_apart_at_powers_of_two(spark: Any) -> None:
    lengths = [1, 2, 3, 4, 31, 32, 33, 63, 64, 1023, 1024, 2**31 - 1, 2**31, 2**40]
    frame = spark.createDataFrame([(n,) for n in lengths], "n_tokens bigint")
    found = frame.select("n_tokens", diagnostics.length_bucket().alias("k")).collect()
    assert {row["n_tokens"]: row["k"] for row in found} == {n: n.bit_length() - 1 for n in lengths}
