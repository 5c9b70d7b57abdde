"""Metadata of a table's doubles and of JSON lines: one rule for numbers that are no JSON, and only valid JSON."""

import datetime
import json
import random
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miniplm_udf.config.sections import FieldsConfig, SplitConfig
from miniplm_udf.ingestion.documents import Document, DocumentReader
from miniplm_udf.ingestion.parquet_columns import converted
from miniplm_udf.ingestion.row_sql import batch_columns


def strict(text: str) -> Any:
    """The parsed text, by a reader that takes no more than RFC 8259 has."""

    def refuse(literal: str) -> None:
        raise ValueError(literal)

    return json.loads(text, parse_constant=refuse)


def test_parquet_and_json_lines_carry_the_same_numbers(spark: Any, tmp_path: Path) -> None:
    """Spark's own functions find the values, and a line of an export is valid JSON."""
    from pyspark.sql import functions as F

    numbers = [float("nan"), float("inf"), float("-inf"), 0.5]
    rows = [{"text": "a", "id": x, "score": x, "deep": {"list": [x], "n": {"x": x}}} for x in numbers]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    fields = FieldsConfig(metadata=["score", "deep"])
    reader = DocumentReader(fields, "unknown", SplitConfig(reference=0, heldout=0))
    table = spark.read.parquet(str(tmp_path / "rows.parquet"))
    columns = table.selectExpr(*batch_columns(table.schema, fields)).collect()
    of_table = [reader.read_columns(*(value and bytes(value) for value in row[:3]), row[3]) for row in columns]
    of_lines = [reader.read_line(json.dumps(row).encode()) for row in rows]
    expected = ["NaN", "Infinity", "-Infinity", 0.5]
    for found in (of_table, of_lines):
        assert all(isinstance(document, Document) for document in found)
        assert [document.document_id for document in found] == [str(value) for value in expected]
        assert [strict(document.metadata) for document in found] == [
            {"score": value, "deep": {"list": [value], "n": {"x": value}}} for value in expected
        ]
    frame = spark.createDataFrame([(f"[{document.metadata}]",) for document in of_lines], "metadata string")
    values = frame.select(F.get_json_object("metadata", "$[0].deep.n.x")).collect()
    assert [row[0] for row in values] == [str(value) for value in expected]
    lines = [row[0] for row in frame.select(F.to_json(F.struct("metadata"))).collect()]
    assert [strict(strict(line)["metadata"])[0]["score"] for line in lines] == expected


def test_a_file_that_pyarrow_reads_has_the_ids_and_the_metadata_that_spark_reads(spark: Any, tmp_path: Path) -> None:
    """Which of the two reads a file depends on the other files of the input. Written by pyarrow, read by both."""
    draw = random.Random(0)
    doubles = [7.0, 0.1, 1e-3, 9.99e-4, 1e7, 9999999.5, -12345678.0, 1e20, -0.0, float("nan"), float("-inf")]
    doubles += [struct.unpack("d", draw.randbytes(8))[0] for _ in range(50)]
    moments = [datetime.datetime(1969, 12, 31, 23, 59, 59, 999999), datetime.datetime(2024, 1, 2, 3, 4, 5, 600)]
    values = {
        "double": pa.array(doubles),
        "float": pa.array([0.1, 7, 12345678, 1e-5, 3.4e38, float("nan")], pa.float32()),
        "decimal": pa.array([Decimal("1.50"), Decimal("0E-10"), Decimal("-12345678.1")], pa.decimal128(20, 10)),
        "plain": pa.array(moments, pa.timestamp("us")),
        "zoned": pa.array(moments, pa.timestamp("us", "UTC")),
        "list": pa.array([[1.0, 1e20], [None], []]),
        "struct": pa.array([{"a": 1e7, "b": None, "c": "\u00e4"}]),
        "map": pa.array([[("k", 1), ("l", None)], []], pa.map_(pa.string(), pa.int64())),
        "binary": pa.array([b"ab", b"\xff"]),
        "flag": pa.array([True, False]),
    }
    n = len(doubles)
    columns = {
        name: pa.array(array.to_pylist() + [None] * (n - len(array)), array.type) for name, array in values.items()
    }
    table = pa.table({"text": pa.array(["a"] * n), **columns})
    pq.write_table(table, tmp_path / "rows.parquet")
    frame = spark.read.parquet(str(tmp_path / "rows.parquet"))
    [batch] = table.to_batches()
    for name in values:
        fields = FieldsConfig(id=name, metadata=list(values))
        rows = frame.selectExpr(*batch_columns(frame.schema, fields)).collect()
        found = converted(batch, {column: column for column in ("text", *values)}, fields)
        assert found.column("id").to_pylist() == [row[1] and bytes(row[1]) for row in rows], name
    assert found.column("metadata").to_pylist() == [row[3] for row in rows]
