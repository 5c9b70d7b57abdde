"""The benchmark of refinement, at sizes that say nothing of speed: it runs, checks its selection, merges results."""

from pathlib import Path
from typing import Any

import pytest

from tests.bench import bench_refine
from tests.support import bench_results as results


@pytest.mark.long
def test_the_benchmark_measures_and_checks(spark: Any, tmp_path: Path) -> None:
    sized = bench_refine.MatrixRoot(spark, tmp_path / "300", 300)
    sized.generate()
    sized.generate()
    assert sized.matrix.count() == 300
    row = bench_refine.measure(sized, bench_refine.PARTS)
    assert all(row[part] > 0 for part in bench_refine.PARTS)
    assert spark.read.parquet(str(sized.written("ours"))).count() == 150
    assert sized.is_the_sorts()
    sized._write(sized.candidates().where("n_tokens > 500"), "sort")
    assert not sized.is_the_sorts()


@pytest.mark.long
def test_texts_are_joined_and_copied(spark: Any, tmp_path: Path) -> None:
    threshold = spark.conf.get("spark.sql.autoBroadcastJoinThreshold")
    try:
        row = bench_refine.measure_texts(bench_refine.Texts(spark, tmp_path, 60))
    finally:
        spark.conf.set("spark.sql.autoBroadcastJoinThreshold", threshold)
    # The texts of both sides went through the shuffle.
    assert row["shuffled_mib"] * 2**20 > 60 * 1000
    assert row["join"] > 0


def test_sizes_and_parts_may_be_measured_one_by_one(tmp_path: Path) -> None:
    first = bench_refine.merged(tmp_path, "rows", "rows", [{"rows": 10, "scan": 1.0, "ours": 2.0}])
    assert bench_refine.ratios(first, []) == {"vs_scan": 2.0}
    results.record("refine", {}, first, folder=tmp_path)
    second = bench_refine.merged(
        tmp_path, "rows", "rows", [{"rows": 100, "ours": 22.0, "sort": 110.0}, {"rows": 10, "scan": 0.5}]
    )
    assert second == [{"rows": 10, "scan": 0.5, "ours": 2.0}, {"rows": 100, "ours": 22.0, "sort": 110.0}]
    found = bench_refine.ratios(second, [{"texts": 5, "join": 3.0, "copy": 2.0}])
    assert found == {"vs_scan": 4.0, "vs_sort": 5.0, "growth": 1.1, "text_vs_copy": 1.5}
