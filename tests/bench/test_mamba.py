"""The Mamba benchmark, at sizes that say nothing of speed: it runs, and its ratios are those of its seconds."""

import pytest

from tests.bench import bench_mamba


def test_the_benchmark_measures_each_model() -> None:
    pytest.importorskip("mambapy", reason="the extra train has mambapy")
    rows = bench_mamba.run(16, 64, 1, 1, sequential=True)
    assert [row["model"] for row in rows] == ["llama", "mamba", "mamba_twice_as_deep", "mamba_sequential"]
    assert rows[1]["weights"] == rows[3]["weights"] < rows[2]["weights"]
    assert [row["ratio"] for row in rows] == [row["seconds"] / rows[0]["seconds"] for row in rows]
