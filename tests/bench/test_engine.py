"""The engine's benchmark, at sizes that say nothing of speed: it runs, checks its scores, and leaves its ratios."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bench_engine
from tests.support import bench_results as results
from tests.support.tiny_models import make_model_folder


def test_the_benchmark_measures_and_checks(spark: Any, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path, name="model")
    made = []

    def make(rows: int) -> bench_engine.InstancesRoot:
        made.append(bench_engine.InstancesRoot(spark, tmp_path / str(rows), rows, 100, model, workers=1))
        return made[-1]

    rows = bench_engine.run(make, [300], rows_per_batch=100)
    assert [row["rows"] for row in rows] == [300]
    assert rows[0]["us_per_instance"] > 0
    scores = spark.read.format("delta").load(made[-1].config.layout.table("scores"))
    assert sorted(row["count"] for row in scores.groupBy("batch_id").count().collect()) == [100, 100, 100]
    assert made[-1].n_wrong() == 0
    uri = made[-1].config.layout.table("scores")
    spark.sql(f"UPDATE delta.`{uri}` SET nll_sum_nats = nll_sum_nats + 1 WHERE batch_id = 1")
    assert made[-1].n_wrong() == 100
    ratios = bench_engine.ratios(
        [rows[0], {**rows[0], "us_per_instance": 2 * rows[0]["us_per_instance"], "ratio": 2.5}]
    )
    assert ratios == {"engine_growth": 2.0, "engine_vs_copy": 2.5}


def test_results_of_several_benchmarks_stand_in_one_file(tmp_path: Path) -> None:
    results.record("score", {"a": 1.0, "b": 2.0}, [{"x": 1}], key="first", folder=tmp_path)
    path = results.record("score", {"b": 3.0}, [{"y": 2}], key="second", folder=tmp_path)
    found = json.loads(path.read_text())
    assert found == {"ratios": {"a": 1.0, "b": 3.0}, "first": [{"x": 1}], "second": [{"y": 2}]}


@pytest.mark.parametrize("rows", [[], [(1, 2.5)]])
def test_a_table_is_aligned(rows: list[tuple[Any, ...]]) -> None:
    assert results.table(("n", "seconds"), rows).splitlines()[0] == "n  seconds"
