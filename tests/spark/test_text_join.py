"""The join of rows with their texts: the rows of a plain join, in parts, and no sort of texts in the plan."""

from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.store import tables
from miniplm_udf.store.text_join import maybe_wanted, texts_of
from tests.support.score_tables import experiment, write_instances

TEXTS = [f"text {number} of some words" for number in range(60)]


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    made = experiment(tmp_path_factory.mktemp("texts") / "root", {})
    write_instances(spark, made, TEXTS)
    return made


def test_the_texts_of_rows_come_without_a_sort(spark: Any, config: ExperimentConfig) -> None:
    instances = tables.read(spark, config.layout.table("instances"))
    rows = instances.where("pmod(xxhash64(instance_id), 3) = 0").selectExpr("instance_id", "n_bytes * 2 AS doubled")
    wanted = ("instance_id", "doubled", "text")
    expected = {row[0]: row for row in rows.join(instances, "instance_id").select(*wanted).collect()}
    found = texts_of(rows, instances, ("text",), len(expected), 4)
    plan = found._jdf.queryExecution().executedPlan().toString()
    parts = found.select(*wanted).rdd.glom().collect()
    assert "ShuffledHashJoin" in plan
    assert "Sort " not in plan
    assert "BroadcastHashJoin" in plan
    assert found.columns == ["instance_id", "text", "doubled"]
    assert {row[0]: row for part in parts for row in part} == expected
    assert sum(map(len, parts)) == len(expected)
    assert len(parts) == 4
    assert sum(map(bool, parts)) > 1


@pytest.mark.parametrize("n_rows", [1, *(pytest.param(number, marks=pytest.mark.long) for number in (10_000, 300_000))])
def test_texts_that_no_row_wants_stay_where_they_are(spark: Any, n_rows: int) -> None:
    # Also where the number of rows is wrong.
    texts = spark.range(30_000).selectExpr("lpad(hex(id), 32, '0') AS instance_id", "id", "'a text' AS text")
    rows = texts.where("id % 3 = 0").select("instance_id")
    found = [row["id"] for row in maybe_wanted(texts, rows, n_rows).collect()]
    wanted = {number for number in range(30_000) if number % 3 == 0}
    assert len(found) == len(set(found))
    assert wanted <= set(found)
    # At most one bit in fifteen is set; with one expected row, one in seven.
    assert len(set(found) - wanted) < 20_000 * (0.16 if n_rows == 1 else 0.07)
    assert maybe_wanted(texts, rows.limit(0), n_rows).count() == 0
    assert maybe_wanted(texts, rows, 10**9) is texts


def test_parts_are_as_many_as_their_tables_need(spark: Any, config: ExperimentConfig, monkeypatch: Any) -> None:
    monkeypatch.setattr("miniplm_udf.store.text_join.MOST_ROWS_PER_PART", 10)
    instances = tables.read(spark, config.layout.table("instances"))
    rows = instances.select("instance_id")
    for n_rows, n_parts in ((5, 1), (11, 2), (30, 3)):
        assert texts_of(rows, instances, ("text",), n_rows).rdd.getNumPartitions() == n_parts
