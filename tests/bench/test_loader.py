"""The benchmark of the loader, at a size that says nothing of speed: it runs, and its counts are right."""

from pathlib import Path

import pytest

from tests.bench import bench_loader


def test_the_benchmark_reads_an_epoch_with_each_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_loader, "PAPER_FILES", 3)
    tables = dict(bench_loader.run(tmp_path, 2048, 128))
    assert [row["loader"] for row in tables["from the disk"]] == ["ZSTD", "memory-mapped file"]
    assert [row["loader"] for row in tables["from the system's cache"]] == [*bench_loader.CODECS, "memory-mapped file"]
    for row in (*tables["from the disk"], *tables["from the system's cache"]):
        assert row["decoded"] == 1  # four row groups, all of which are kept
        assert row["M tokens/s"] > 0
    assert tables["paper's size"][0]["sequences"] == 3 * 65_536
    ours, full = tables["shuffle"]
    assert ours["same row group"] == pytest.approx(1, abs=0.1)  # two of each of 64 row groups
    assert ours["same row group"] > full["same row group"]
