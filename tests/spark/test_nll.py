"""`nll_udf` on real Spark: the job's numbers in SQL, one look at each row, and errors before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from miniplm_udf import nll_udf
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scores.nll import NLL_DDL, nll_arrow
from miniplm_udf.scoring.models import describe
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.messages import SCORE_REQUEST_DDL, SCORED_DDL
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support.crashing_scorer import CrashingFactory
from tests.support.score_tables import FakeFactory, model_config, scored_texts, texts
from tests.support.tiny_models import SEPARATOR, make_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_config(make_model_folder(tmp_path_factory.mktemp("models"), name="teacher", seed=1))


def settings(model: ModelConfig) -> dict[str, Any]:
    return {"document_separator": SEPARATOR, "context_tokens": 64, "window_overlap_tokens": 8, "tokens_per_batch": 256}


@pytest.mark.long
def test_sql_gives_the_numbers_of_the_score_job(spark: Any, model: ModelConfig) -> None:
    """Against the function that the job gives to mapInArrow, on the same table, in other batches and another order."""
    of = [*texts(20), *texts(10, start=100, words=3), "é ü, one token more\n\n", "x" * 300]
    rows = [(text, text, [], True, ["teacher"], f"s{i % 3}") for i, text in enumerate(of)]
    table = spark.createDataFrame(rows, f"{SCORE_REQUEST_DDL}, source string")
    factory = ModelScorerFactory(model, describe("teacher", model), ScoreConfig(tokens_per_batch=256))
    job = table.repartition(3).mapInArrow(score_arrow({"teacher": factory}), SCORED_DDL)
    expected = {row["instance_id"]: row for row in job.collect()}
    table.createOrReplaceTempView("nll_table")
    spark.udf.register("nll", nll_udf(str(model.path), **settings(model)))
    found = spark.sql("SELECT text, source, nll(text) AS nll FROM nll_table").collect()
    assert len(found) == len(expected) == len(of)
    for row in found:
        one = expected[row["text"]]
        assert row["nll"]["nll_sum_nats"] == pytest.approx(one["nll_sum_nats"], abs=1e-5 * one["n_tokens"])
        assert (row["nll"]["n_tokens"], row["nll"]["n_bytes"]) == (one["n_tokens"], one["n_bytes"])
    means = spark.sql(
        "SELECT source, avg(nll(text).nll_sum_nats / nll(text).n_bytes) AS mean FROM nll_table GROUP BY source"
    ).collect()
    for mean in means:
        ratios = [
            expected[row["text"]]["nll_sum_nats"] / expected[row["text"]]["n_bytes"]
            for row in found if row["source"] == mean["source"]
        ]  # fmt: skip
        assert mean["mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert len(means) == 3


def test_a_text_that_is_cut_off_has_one_token_less(spark: Any, model: ModelConfig) -> None:
    whole, cut = (nll_udf(str(model.path), ends_document=ends, **settings(model)) for ends in (True, False))
    frame = spark.createDataFrame([("hello world, this is a test",)], ["text"])
    (row,) = frame.select(whole("text").alias("whole"), cut("text").alias("cut")).collect()
    assert row["whole"]["n_tokens"] == row["cut"]["n_tokens"] + 1
    assert row["whole"]["nll_sum_nats"] > row["cut"]["nll_sum_nats"]


@pytest.mark.long
def test_a_model_with_a_device_map_gives_the_same_numbers(spark: Any, model: ModelConfig) -> None:
    """In a scorer process of its own, on the only device that is here."""
    whole, split = (nll_udf(str(model.path), device_map=place, **settings(model)) for place in (None, "auto"))
    frame = spark.createDataFrame([("hello world, this is a test",)], ["text"])
    (row,) = frame.select(whole("text").alias("whole"), split("text").alias("split")).collect()
    assert row["split"]["nll_sum_nats"] == pytest.approx(row["whole"]["nll_sum_nats"], rel=1e-6)
    assert row["split"]["n_tokens"] == row["whole"]["n_tokens"]


def test_null_and_empty_give_null(spark: Any, model: ModelConfig) -> None:
    spark.udf.register("nll", nll_udf(str(model.path), **settings(model)))
    rows = spark.sql(
        "SELECT text, nll(text) IS NULL, nll(text).n_tokens FROM VALUES (NULL), (''), ('hello world') AS t(text)"
    ).collect()
    assert [tuple(row) for row in rows[:2]] == [(None, True, None), ("", True, None)]
    assert rows[2][1] is False
    assert rows[2][2] > 1


def test_errors_come_when_the_udf_is_made(spark: Any, model: ModelConfig) -> None:
    with pytest.raises(ModelLoadError, match="/no/such/model"):
        nll_udf("/no/such/model")
    with pytest.raises(ConfigError, match=r"nll\.context_tokens: expected at most 128"):
        nll_udf(str(model.path), document_separator=SEPARATOR, context_tokens=4096)
    with pytest.raises(ConfigError, match="did you mean 'document_separator'"):
        nll_udf(str(model.path), document_seperator=SEPARATOR)


def test_a_text_that_kills_the_model_has_no_score_and_the_rest_has(spark: Any, tmp_path: Path) -> None:
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    udf = arrow_udf(nll_arrow(CrashingFactory(1.0, tmp_path / "log"), True), NLL_DDL, ArrowUDFType.SCALAR_ITER)
    of = [*texts(9), "kill", *texts(9, start=9)]
    found = spark.createDataFrame([(text,) for text in of], ["text"]).select("text", udf("text").alias("nll")).collect()
    assert [row["text"] for row in found] == of
    for row in found:
        assert row["nll"] is None if row["text"] == "kill" else row["nll"]["nll_sum_nats"] == sum(row["text"].encode())


@pytest.mark.parametrize(
    ("query", "looks"),
    [
        ("SELECT nll(text).nll_sum_nats / nll(text).n_bytes FROM nll_texts", 1),
        ("SELECT source, avg(nll(text).nll_sum_nats / nll(text).n_bytes) FROM nll_texts GROUP BY source", 1),
        ("SELECT s.nll_sum_nats / s.n_bytes FROM (SELECT nll(text) AS s FROM nll_texts)", 1),
        # A filter is a step of its own, and a sort looks at its rows once more to find its ranges.
        ("SELECT text, nll(text).n_bytes AS n FROM nll_texts ORDER BY n", 2),
        ("SELECT s.n_bytes FROM (SELECT nll(text) AS s FROM nll_texts) WHERE s.nll_sum_nats > 0", 2),
        ("SELECT s.n_bytes FROM (SELECT nll_once(text) AS s FROM nll_texts) WHERE s.nll_sum_nats > 0", 1),
    ],
)
def test_the_model_looks_at_each_row_once(spark: Any, tmp_path: Path, query: str, looks: int) -> None:
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    spark = spark.newSession()
    # With one partition, as these tests have it, a sort has no ranges to find.
    spark.conf.set("spark.sql.shuffle.partitions", "2")
    of, log = texts(50), tmp_path / "calls.log"
    frame = spark.createDataFrame([(text, f"s{i % 3}") for i, text in enumerate(of)], ["text", "source"])
    # A table: the optimiser computes what stands in the query itself while it plans.
    frame.write.parquet(str(tmp_path / "texts"))
    spark.read.parquet(str(tmp_path / "texts")).createOrReplaceTempView("nll_texts")
    udf = arrow_udf(nll_arrow(FakeFactory(1.0, str(log)), True), NLL_DDL, ArrowUDFType.SCALAR_ITER)
    spark.udf.register("nll", udf)
    spark.udf.register("nll_once", udf.asNondeterministic())
    assert spark.sql(query).collect()
    assert scored_texts(log, 1.0) == sorted(text[:40] for text in of for _ in range(looks))
