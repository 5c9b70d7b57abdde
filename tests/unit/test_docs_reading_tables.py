"""The page docs/reading-tables.md: its example without Spark that writes scores to a CSV file."""

import csv
from pathlib import Path

import pytest

from docs.site.markdown import code_blocks
from miniplm_udf import schemas
from tests.support import report_root

PAGE = report_root.REPOSITORY / "docs/reading-tables.md"


def test_the_csv_has_all_scores_with_the_ids_of_their_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = report_root.report_config(tmp_path / "build/demo")
    instances = [{**row, "document_ids": [row["stream_id"], "172"]} for row in report_root.instance_rows()]
    matrix = report_root.matrix_rows([row for row in instances if row["split"] == "pool"])
    # One instance is missing: its scores are written all the same.
    missing = matrix[0]["instance_id"]
    report_root.write(config, schemas.INSTANCES, [row for row in instances if row["instance_id"] != missing])
    report_root.write(config, schemas.score_matrix(report_root.ALIASES), matrix)
    (example,) = [block for block in code_blocks(PAGE) if "scores.csv" in block.text]
    exec(compile(example.text, PAGE.name, "exec"), {})

    with open("scores.csv", encoding="utf-8", newline="") as file:
        rows = {row["instance_id"]: row for row in csv.DictReader(file)}
    documents = {row["instance_id"]: row["document_ids"] for row in instances}
    assert len(rows) == len(matrix)
    for expected in matrix:
        row = rows[expected["instance_id"]]
        names = [] if expected["instance_id"] == missing else documents[expected["instance_id"]]
        assert row["document_ids"] == "|".join(names)
        for alias in report_root.ALIASES:
            assert float(row[f"{alias}_nll_mean"]) == expected[f"{alias}_nll_mean"]
