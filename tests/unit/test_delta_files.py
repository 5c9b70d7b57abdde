"""The files of a Delta table by name: written by delta-rs, opened by pyarrow, whatever the folder is called."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from miniplm_udf import storage
from miniplm_udf.store.delta_files import files_by, open_table, parquet_files


@pytest.mark.parametrize("name", ["plain", "a b", "ä ü", "a#b&c;d=e,f", "a'b\"c<d>", "10:00:00", "😀"])
@pytest.mark.parametrize("as_uri", [False, True])
def test_files_are_found_under_every_name(name: str, as_uri: bool, tmp_path: Path) -> None:
    place = tmp_path / name
    write_deltalake(place.as_uri(), pa.table({"n": [1, 2], "part": ["x y", "ü%20"]}), partition_by=["part"])
    write_deltalake(place.as_uri(), pa.table({"n": [3], "part": ["z"]}), mode="append")
    uri = storage.to_uri(str(place)) if as_uri else str(place)
    files = parquet_files(uri)
    assert files == sorted(str(path) for path in place.rglob("*.parquet"))
    assert sorted(ds.dataset(files).to_table()["n"].to_pylist()) == [1, 2, 3]
    assert sorted(ds.dataset(parquet_files(uri, 0)).to_table()["n"].to_pylist()) == [1, 2]


def test_files_that_the_table_has_removed_are_not_among_them(tmp_path: Path) -> None:
    write_deltalake(tmp_path, pa.table({"n": [1]}))
    write_deltalake(tmp_path, pa.table({"n": [2]}), mode="overwrite")
    assert DeltaTable(tmp_path).version() == 1
    assert ds.dataset(parquet_files(str(tmp_path))).to_table()["n"].to_pylist() == [2]


def test_files_come_in_the_order_of_a_column(tmp_path: Path) -> None:
    for first in (20, 0, 30, 10):
        write_deltalake(tmp_path, pa.table({"n": [first + 1, first]}), mode="append")
    write_deltalake(tmp_path, pa.table({"n": pa.array([None], pa.int64())}), mode="append")
    files = files_by(open_table(str(tmp_path)), str(tmp_path), "n")
    assert [pq.read_table(file)["n"].to_pylist()[-1] for file in files] == [0, 10, 20, 30, None]
    by_path = files_by(open_table(str(tmp_path)), str(tmp_path), "unknown")
    assert by_path == sorted(files)


def test_the_snippet_of_the_docs_reads_a_root_with_a_space_and_an_umlaut(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reading-tables.md").read_text(encoding="utf-8")
    snippet = page.partition("Without Spark:\n\n```python\n")[2].partition("```")[0]
    assert "build/demo/tables" in snippet
    root = tmp_path / "meine Läufe"
    rows = pa.table({"model_id": ["teacher", "teacher", "reference"], "nll_sum_nats": [1.5, 2.0, 7.0]})
    write_deltalake((root / "tables" / "scores").as_uri(), rows)
    code = snippet.replace("build/demo", str(root))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()[1:3]] == [["reference", "7.0"], ["teacher", "3.5"]]
