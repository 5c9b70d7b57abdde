"""The benchmark of growth, at sizes that say nothing of speed: the real queries go on from what it generated."""

from pathlib import Path
from typing import Any

import pytest

from miniplm_udf.upkeep import verify
from tests.bench import bench_stream


def test_the_real_queries_go_on_from_what_is_generated(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stream, "_WARM_UP", 0)
    sized = bench_stream.GrowingRoot(spark, tmp_path, 200, 100)
    sized.fill()
    found = sized.measure(1)
    assert all(found[stage] > 0 for stage in bench_stream.STAGES)
    sized.check()
    # The state knows the generated rows: nothing was lost, nothing is there twice.
    checks = {check.name: check for check in verify.verify(spark, sized.config.root)}
    assert [check for check in checks.values() if not check.ok or check.behind] == []
    assert checks["ingest-jsonl: read = instances + rejected"].found == 200 + 2 * 100
    rows = [
        {"rows": 1, **dict.fromkeys(bench_stream.STAGES, 2.0)},
        {"rows": 2, **dict.fromkeys(bench_stream.STAGES, 3.0)},
    ]
    assert bench_stream.ratios(rows) == {"batch_growth": 1.5}
    spark.sql(f"DELETE FROM delta.`{sized.config.layout.table('scores')}` WHERE batch_id = 1 AND model_id = 'teacher'")
    with pytest.raises(RuntimeError, match="expected rows"):
        sized.check()
