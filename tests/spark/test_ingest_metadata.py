"""Metadata of a table's doubles and of JSON lines: one rule for numbers that are no JSON, and only valid JSON."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miniplm_udf.config.sections import FieldsConfig, SplitConfig
from miniplm_udf.ingestion.documents import Document, DocumentReader
from miniplm_udf.ingestion.inputs import Inputs, batch_columns


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
    columns = table.selectExpr(*batch_columns(Inputs("parquet", "", schema=table.schema), fields)).collect()
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
