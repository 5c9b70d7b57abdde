"""Whole files without Spark: damage found by reading, Parquet values as Spark writes them, row groups of a split."""

import bz2
import datetime
import decimal
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.footers import Footer, ParquetColumn
from miniplm_udf.ingestion.listing import InputFile
from miniplm_udf.ingestion.parquet_columns import converted, fits, reads_all, row_groups, unify
from miniplm_udf.ingestion.readability import check_file
from miniplm_udf.ingestion.taken import TakenFile, changed_since, record_sizes, recorded_sizes

TEXT = b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(20000))
MEMBERS = gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:])
BLOCKS = bz2.compress(TEXT[:1000]) + bz2.compress(TEXT[1000:])
FRAMES = zstandard.compress(TEXT[:1000]) + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstandard.compress(TEXT[1000:])


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.gz", MEMBERS, None),
        ("a.gz", MEMBERS + bytes(512), None),
        ("a.gz", b"", None),
        ("a.gz", MEMBERS[:-4], "end too early"),
        ("a.gz", MEMBERS[: len(MEMBERS) // 2], "end too early"),
        ("a.gz", MEMBERS[:-8] + bytes(8), "damaged gzip data"),  # a wrong checksum
        ("a.gz", TEXT, "damaged gzip data"),
        ("a.bz2", BLOCKS, None),
        ("a.bz2", BLOCKS[:-1], "end too early"),
        ("a.bz2", TEXT, "damaged bzip2 data"),
        ("a.zst", FRAMES, None),
        ("a.zst", FRAMES[:-1], "end too early"),
        ("a.zst", FRAMES[: len(FRAMES) // 2], "end too early"),
        ("a.zst", TEXT, "damaged zstd data"),
    ],
)
def test_packed_files(tmp_path: Path, name: str, data: bytes, problem: str | None) -> None:
    (tmp_path / name).write_bytes(data)
    _, found, n_rows, unchecked = check_file(f"file:{tmp_path}/{name}", "jsonl", FieldsConfig())
    assert unchecked is None
    assert (found is None) == (problem is None)
    if problem is not None and found is not None:
        assert problem in found
        whole = len(data) > 0.6 * len(MEMBERS)
        assert n_rows is None if data is TEXT else 0.85 < n_rows / (20000 if whole else 10000) < 1.2


def test_a_storage_that_python_does_not_know_is_left_to_the_query() -> None:
    _, found, _, unchecked = check_file("nosuchstorage://x/a.gz", "jsonl", FieldsConfig())
    assert found is None
    assert unchecked is not None


def test_values_as_spark_writes_them() -> None:
    """The strings are what Spark 4 casts these values to, and what its `to_json` writes."""
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 600000)
    cases = [
        (pa.array([7], pa.int32()), b"7"),
        (pa.array(["7"], pa.large_string()), b"7"),
        (pa.array([7], pa.uint64()), b"7"),
        (pa.array([True]), b"true"),
        (pa.array([1.5]), b"1.5"),
        (pa.array([decimal.Decimal("1.50")]), b"1.50"),
        (pa.array([datetime.date(2024, 1, 2)]), b"2024-01-02"),
        (pa.array([moment], pa.timestamp("ns")), b"2024-01-02 03:04:05.6"),
        (pa.array([b"\xff"]), b"\xff"),
        (pa.array([{"a": 1, "b": None}]), b'{"a":1}'),
        (pa.nulls(1), None),
    ]
    fields = FieldsConfig(metadata=["id"])
    for ids, wanted in cases:
        batch = pa.RecordBatch.from_arrays([pa.array(["text"]), ids], names=["text", "id"])
        assert converted(batch, {"text": "text", "id": "id"}, fields).column("id").to_pylist() == [wanted]
    metadata = [
        (pa.array([moment], pa.timestamp("us", "UTC")), '{"id":"2024-01-02T03:04:05.600Z"}'),
        (pa.array([float("nan")]), '{"id":"NaN"}'),
        (pa.array([b"ab"]), '{"id":"YWI="}'),
        (pa.array(["ä"]).dictionary_encode(), '{"id":"ä"}'),
        (pa.nulls(1), "{}"),
    ]
    for values, written in metadata:
        batch = pa.RecordBatch.from_arrays([pa.array(["text"]), values], names=["text", "id"])
        assert converted(batch, {"text": "text", "id": "id"}, fields).column("metadata").to_pylist() == [written]


def test_each_row_group_is_in_one_split(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(1000)]}), tmp_path / "a.parquet", 70)
    metadata, size = pq.read_metadata(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size
    for length in (1000, 4096, size):
        found = [g for start in range(0, size, length) for g in row_groups(metadata, start, start + length)]
        assert found == list(range(metadata.num_row_groups))


def test_the_schema_that_most_rows_fit() -> None:
    types = pytest.importorskip("pyspark.sql.types")
    kinds = {"i": types.IntegerType(), "l": types.LongType(), "s": types.StringType(), "n": None}

    def footer(kind: str, n_rows: int) -> tuple[InputFile, Footer]:
        column = ParquetColumn("id", kinds[kind], kind, is_null=kind == "n")
        return InputFile(kind, 0, 1), Footer(n_rows, ("id",), {"id": column})

    few_strings = [footer("i", 5), footer("l", 5), footer("s", 9), footer("n", 100)]
    schema = unify(few_strings, ["text", "id"])
    assert schema == types.StructType([types.StructField("id", types.LongType())])
    assert [fits(found, schema) for _, found in few_strings] == [True, True, False, False]
    text, number, other = (unify([footer(kind, 1)], ["id"]) for kind in ("s", "i", "n"))
    assert [reads_all(schema, files) for files in (number, other, None, text)] == [True, True, True, False]
    assert [reads_all(None, files) for files in (None, number)] == [True, False]
    many_strings = [footer("i", 5), footer("s", 9)]
    assert [fits(found, unify(many_strings, ["id"])) for _, found in many_strings] == [False, True]
    assert unify([footer("n", 3)], ["id"]) == types.StructType([])


def test_files_that_changed_after_they_were_taken() -> None:
    files = [
        InputFile("file:/x/a%20b", 5_000_400, 1),
        InputFile("file:/x/c", 7_000_000, 1),
        InputFile("file:/x/d", 1, 1),
        InputFile("file:/x/longer", 5_000_000, 2),
        InputFile("file:/x/equal", 5_000_000, 2),
    ]
    taken = [
        TakenFile("file:///x/a%20b", 5_000, 0),
        TakenFile("file:///x/c", 6_000, 1, 1),
        TakenFile("file:///x/longer", 5_000, 1, 1),
        TakenFile("file:///x/equal", 5_000, 1, 2),
    ]
    assert changed_since(files, taken) == ["file:/x/c", "file:/x/longer"]


def test_sizes_of_taken_files_are_merged_and_survive_replays(tmp_path: Path) -> None:
    uri = f"file:{tmp_path}"
    for batch_id in range(1, 120):
        record_sizes(uri, batch_id, {f"file:/x/{batch_id}": batch_id})
        record_sizes(uri, batch_id, {f"file:/x/{batch_id}": 0})
    assert sorted(path.name for path in (tmp_path / "file_sizes").iterdir()) == ["109", "119", "99"]
    assert recorded_sizes(uri) == {f"file:/x/{n}": n for n in range(1, 120)}
