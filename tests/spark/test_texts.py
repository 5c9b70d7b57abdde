"""The join of rows with their texts: the rows of a plain join, in parts, and no sort of texts in the plan."""

from typing import Any

import pytest

from miniplm_udf import tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.texts import texts_of
from tests.spark.score_tables import experiment, write_instances

TEXTS = [f"text {number} of some words" for number in range(60)]


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    made = experiment(tmp_path_factory.mktemp("texts") / "root", {})
    write_instances(spark, made, TEXTS)
    return made


@pytest.mark.parametrize("is_pruned", [True, False])
def test_the_texts_of_rows_come_without_a_sort(spark: Any, config: ExperimentConfig, is_pruned: bool) -> None:
    key = "spark.sql.autoBroadcastJoinThreshold"
    threshold = spark.conf.get(key)
    instances = tables.read(spark, config.table_uri("instances"))
    rows = instances.where("pmod(xxhash64(instance_id), 3) = 0").selectExpr("instance_id", "n_bytes * 2 AS doubled")
    wanted = ("instance_id", "doubled", "text")
    expected = {row[0]: row for row in rows.join(instances, "instance_id").select(*wanted).collect()}
    try:
        spark.conf.set(key, threshold if is_pruned else "-1")
        found = texts_of(rows, instances, ("text",), len(expected), 4)
        plan = found._jdf.queryExecution().executedPlan().toString()
        parts = found.select(*wanted).rdd.glom().collect()
    finally:
        spark.conf.set(key, threshold)
    assert "ShuffledHashJoin" in plan
    assert "Sort " not in plan
    assert ("BroadcastHashJoin" in plan) == is_pruned
    assert {row[0]: row for part in parts for row in part} == expected
    assert sum(map(len, parts)) == len(expected)
    assert len(parts) == 4
    assert sum(map(bool, parts)) > 1


def test_parts_are_as_many_as_their_tables_need(spark: Any, config: ExperimentConfig, monkeypatch: Any) -> None:
    monkeypatch.setattr("miniplm_udf.texts.MOST_ROWS_PER_PART", 10)
    instances = tables.read(spark, config.table_uri("instances"))
    rows = instances.select("instance_id")
    for n_rows, n_parts in ((5, 1), (11, 2), (30, 3)):
        assert texts_of(rows, instances, ("text",), n_rows).rdd.getNumPartitions() == n_parts
