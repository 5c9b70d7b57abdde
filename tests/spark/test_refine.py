"""Refinement: every rule against a plain sort, versions and their provenance, and what is refused before any job."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F

from jobs import refine as job
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.refinement.selection import ALL, RankedFrame, find_cuts, score_bucket
from miniplm_udf.store import corpus_records, delta_log, tables
from tests.support.matrices import ALIASES, DIFFERENCE, ids, matrix_rows, with_corpora, write_matrix, write_record
from tests.support.score_tables import experiment
from tests.support.selection_oracles import by_cut, by_sorting, random_rows


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A root with a matrix of 300 rows."""
    root = tmp_path_factory.mktemp("refine") / "root"
    made = experiment(root, {alias: ModelConfig(path="/nowhere") for alias in ALIASES})
    write_matrix(spark, made, matrix_rows(300))
    for alias in ALIASES:
        write_record(made, alias)
    return made


def ranked(rows: list[dict[str, Any]], min_tokens: int = 32) -> list[tuple[float, str, int]]:
    return [
        (row["reference_nll_mean"] - row["teacher_nll_mean"], row["instance_id"], row["teacher_n_tokens"])
        for row in rows
        if row["split"] == "pool" and row["teacher_n_tokens"] >= min_tokens
    ]


def test_the_rules_keep_what_a_sort_keeps(spark: Any, config: ExperimentConfig) -> None:
    used = with_corpora(
        config,
        half=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5)),
        tokens=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.3, by="tokens")),
        all=CorpusConfig(score=DIFFERENCE, where="true", select=SelectConfig(ratio=1.0)),
        above=CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="threshold", threshold=0.0)),
        random=CorpusConfig(score="no_such_column", select=SelectConfig(rule="random", ratio=0.5, seed=1)),
    )
    summary = job.run(spark, used)
    rows = ranked(matrix_rows(300))
    by_instances = [(score, name, 1) for score, name, _ in rows]
    expected = {
        "half": by_sorting(by_instances, len(rows) // 2),
        "tokens": by_sorting(rows, math.floor(0.3 * sum(row[2] for row in rows))),
        "all": sorted(row[1] for row in ranked(matrix_rows(300), 0)),
        "above": sorted(row[1] for row in rows if row[0] >= 0),
    }
    for name, kept in expected.items():
        assert ids(corpus_records.read_corpus(spark, used.root, name)) == kept, name
        assert summary.kept[name] == len(kept)
    assert summary.kept["random"] == len(rows) // 2
    assert ids(corpus_records.read_corpus(spark, used.root, "random")) != expected["half"]
    found = corpus_records.read_corpus(spark, used.root, "half")
    assert found.schema.names == schemas.refined("half", ALIASES).column_names
    refined = summary.refined["half"]
    scores = [row["score"] for row in found.collect()]
    assert refined.threshold == min(scores)
    assert refined.n_candidates == len(rows)
    assert refined.n_tokens == sum(row["n_tokens"] for row in found.collect())
    sources = {row["instance_id"]: row["source"] for row in matrix_rows(300)}
    n_web = [sum(sources[name] == "web" for name in names) for names in (expected["half"], [row[1] for row in rows])]
    assert refined.kept_share_by_source["web"] == n_web[0] / n_web[1]


def test_versions_carry_their_provenance_and_come_back(spark: Any, config: ExperimentConfig) -> None:
    def asked(ratio: float) -> ExperimentConfig:
        return with_corpora(config, travel=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=ratio)))

    first = job.run(spark, asked(0.5)).refined["travel"]
    before = corpus_records.read_corpus(spark, config.root, "travel").orderBy("instance_id").collect()
    second = job.run(spark, asked(0.2)).refined["travel"]
    assert second.version > first.version
    assert second.n_instances < first.n_instances
    back = spark.read.format("delta").option("versionAsOf", first.version).load(first.path)
    assert back.orderBy("instance_id").collect() == before
    assert corpus_records.read_corpus(spark, config.root, "travel", first.version).count() == first.n_instances

    commit = delta_log.read_commit(first.path, first.version)
    assert commit is not None
    metadata = commit.metadata()
    assert metadata is not None
    assert metadata["model_revisions"] == {alias: f"rev-{alias}" for alias in ALIASES}
    assert metadata["inputs"]["last_batches"] == {"q" * 32: 1}
    assert metadata["config"]["where"] == "teacher_n_tokens >= 32"
    shown = corpus_records.show_corpus(spark, config.root, "travel", first.version)
    assert shown["fingerprint"] == metadata["fingerprint"]
    assert shown["threshold"] == first.threshold

    # Killed between the commit and its row in corpora: the next run adds the row, and writes no version.
    spark.sql(f"DELETE FROM delta.`{config.layout.table('corpora')}` WHERE name = 'travel'")
    again = job.run(spark, asked(0.2)).refined["travel"]
    assert again == dataclasses.replace(second, skipped=True)
    assert corpus_records.show_corpus(spark, config.root, "travel")["version"] == second.version
    # Back to the first config: a new version with the old rows and fingerprint.
    third = job.run(spark, asked(0.5)).refined["travel"]
    assert third.version > second.version
    assert corpus_records.show_corpus(spark, config.root, "travel")["fingerprint"] == metadata["fingerprint"]
    assert corpus_records.list_corpora(spark, config.root).where("name = 'travel'").count() == 2
    with pytest.raises(CorpusError, match="travel"):
        corpus_records.read_corpus(spark, config.root, "travel", 999)


def test_a_score_that_is_no_number_is_counted_and_never_kept(spark: Any, config: ExperimentConfig) -> None:
    bad = (
        "case when n_bytes % 3 = 0 then double('NaN') when n_bytes % 3 = 1 then double('inf') else teacher_nll_mean end"
    )
    used = with_corpora(
        config,
        bad=CorpusConfig(score=bad, select=SelectConfig(ratio=1.0)),
        bits=CorpusConfig(score="teacher_bits_per_byte", where="true", select=SelectConfig(ratio=1.0)),
    )
    summary = job.run(spark, used)
    rows = [row for row in matrix_rows(300) if row["split"] == "pool"]
    expected = [row["instance_id"] for row in rows if row["teacher_n_tokens"] >= 32 and row["n_bytes"] % 3 == 2]
    assert ids(corpus_records.read_corpus(spark, used.root, "bad")) == sorted(expected)
    assert summary.refined["bad"].n_candidates == sum(row["teacher_n_tokens"] >= 32 for row in rows)
    assert summary.kept["bits"] == sum(row["teacher_bits_per_byte"] is not None for row in rows)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig(score="teacher_nll_maen"), "teacher_nll_maen"),
        (CorpusConfig(score="teacher_nll_mean +"), "pos"),
        (CorpusConfig(score="source"), "a number"),
        (CorpusConfig(score="rand()"), "random"),
        (CorpusConfig(score="avg(teacher_nll_mean)"), "no SQL"),
        (CorpusConfig(where="teacher_n_tokens"), "a condition"),
        (CorpusConfig(where="teacher_n_tokens >"), "where"),
    ],
)
def test_a_bad_expression_is_refused_with_the_columns(
    spark: Any, config: ExperimentConfig, corpus: CorpusConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        job.run(spark, with_corpora(config, wrong=corpus))
    assert "teacher_nll_mean, " in str(raised.value) or message == "random"
    assert not tables.exists(spark, config.layout.table("refined/wrong"))


def test_nothing_to_keep_or_to_read_is_an_error(spark: Any, config: ExperimentConfig, tmp_path: Path) -> None:
    none = CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="threshold", threshold=99.0))
    with pytest.raises(CorpusError, match="expected instances to keep"):
        job.run(spark, with_corpora(config, none=none))
    with pytest.raises(CorpusError, match="expected instances to keep"):
        job.run(spark, with_corpora(config, none=CorpusConfig(score=DIFFERENCE, where="n_bytes < 0")))
    assert not tables.exists(spark, config.layout.table("refined/none"))
    with pytest.raises(CorpusError, match="found none"):
        job.run(spark, with_corpora(dataclasses.replace(config, root=str(tmp_path)), none=none))
    with pytest.raises(ConfigError, match="at least one"):
        job.run(spark, config)


def test_means_of_unequal_tokenizers_are_not_compared(spark: Any, config: ExperimentConfig) -> None:
    write_record(config, "reference", "other" * 6 + "xx")
    try:
        used = with_corpora(config, mixed=CorpusConfig(score=DIFFERENCE))
        with pytest.raises(ConfigError, match="bits per byte"):
            job.run(spark, used)
        one = CorpusConfig(score="-teacher_nll_mean + reference_bits_per_byte")
        assert job.run(spark, with_corpora(config, one=one)).kept["one"] > 0
    finally:
        write_record(config, "reference")


@pytest.mark.parametrize("by_tokens", [False, True])
def test_the_cut_on_a_frame_equals_a_sort(spark: Any, by_tokens: bool) -> None:
    """One group and three groups, with few and many ties, down to the last id."""
    rng = random.Random(by_tokens)
    for groups in ((ALL,), ("web", "code", "books")):
        rows = {group: random_rows(rng, 150, n, by_tokens) for group, n in zip(groups, (60, 1, 60), strict=False)}
        rows[groups[0]] += [
            (1e308, "f" * 32, 1),
            (-1e308, "0" * 32, 1),
            (math.nan, "e" * 32, 7),
            (math.inf, "d" * 32, 7),
        ]
        flat = [(group, *row) for group, of in rows.items() for row in of]
        frame = spark.createDataFrame(flat, "group string, score double, instance_id string, weight bigint").persist()
        ranked = RankedFrame(frame)
        buckets, totals = ranked.tally(2)
        assert totals == {group: sum(row[2] for row in of) for group, of in rows.items()}
        finite = {group: [row for row in of if math.isfinite(row[0])] for group, of in rows.items()}
        for share in (0, 2):
            budgets = {group: 1 + sum(row[2] for row in of) * share // 4 for group, of in finite.items()}
            cuts = find_cuts(ranked, buckets, budgets, n_buckets=8, small=5)
            for group, budget in budgets.items():
                assert by_cut(finite[group], cuts.get(group)) == by_sorting(finite[group], budget), (group, share)
        frame.unpersist()
    empty = RankedFrame(spark.createDataFrame([], frame.schema))
    assert empty.tally() == ([], {})


def test_a_bucket_never_falls_as_the_score_rises(spark: Any) -> None:
    edges = [0.125, 64.0, 1.0, 1e-3, 63.9990234375, 1e300, 1.7e308]
    scores = {math.nextafter(edge, to) for edge in edges for to in (0, edge, math.inf)} | {0.0, 5e-324}
    rng = random.Random(5)
    scores |= {rng.choice((1e-6, 0.2, 2, 100, 1e9)) * rng.random() for _ in range(500)}
    ordered = sorted(scores | {-score for score in scores if score})
    frame = spark.createDataFrame([(score,) for score in ordered], "score double")
    numbers = [row[0] for row in frame.coalesce(1).select(score_bucket(F.col("score"), 1024)).collect()]
    assert numbers == sorted(numbers)
    assert all((number < 0) == (score < 0) for number, score in zip(numbers, ordered, strict=True))
    assert len({number for number, score in zip(numbers, ordered, strict=True) if 1 < score < 2}) > 30


def test_delta_rs_reads_the_same_corpus(spark: Any, config: ExperimentConfig) -> None:
    import pyarrow.parquet as pq
    from deltalake import DeltaTable

    used = with_corpora(config, both=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5)))
    made = job.run(spark, used).refined["both"]
    table = DeltaTable(storage.local_path(made.path))
    assert table.version() == made.version
    found = [row for uri in table.file_uris() for row in pq.read_table(uri).to_pylist()]
    expected = [row.asDict() for row in corpus_records.read_corpus(spark, used.root, "both").collect()]
    assert sorted(found, key=json.dumps) == sorted(expected, key=json.dumps)
    nullable = {field.name: field.nullable for field in table.schema().fields}
    assert nullable == {column.name: column.nullable for column in schemas.refined("both", ALIASES).columns}
