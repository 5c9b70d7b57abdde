"""The log of a Delta table, read without Spark: tables of delta-rs, and commits as Spark writes them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from miniplm_udf.store import delta_log
from miniplm_udf.store.delta_log import Commit


def write_commit(table: Path, version: int, *actions: dict[str, Any]) -> None:
    (table / "_delta_log").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (table / "_delta_log" / f"{version:020}.json").write_text(text, encoding="utf-8")


def test_commits_come_newest_first_as_far_back_as_the_log_goes(tmp_path: Path) -> None:
    # As Delta's clean-up leaves a log: the commits before a checkpoint are gone.
    write_commit(
        tmp_path, 9, {"add": {"path": "a"}}, {"commitInfo": {"operation": "WRITE", "userMetadata": '{"n": 1}'}}
    )
    write_commit(tmp_path, 10, {"commitInfo": {"operation": "MERGE", "operationMetrics": {"numOutputRows": "12"}}})
    write_commit(tmp_path, 11, {"add": {"path": "b"}})
    found = list(delta_log.commits(str(tmp_path)))
    assert found == [
        Commit(11, "", None, {}), Commit(10, "MERGE", None, {"numOutputRows": "12"}), Commit(9, "WRITE", '{"n": 1}', {})
    ]  # fmt: skip
    assert (found[1].metric("numOutputRows"), found[1].metric("numFiles")) == (12, 0)
    assert (found[0].metadata(), found[2].metadata()) == (None, {"n": 1})
    assert delta_log.read_commit(str(tmp_path), 8) is None
    assert list(delta_log.commits(str(tmp_path / "nothing"))) == []


def test_a_cut_off_commit_is_an_error(tmp_path: Path) -> None:
    """No answer is better than an older one: the commit may be the one that was asked for."""
    write_commit(tmp_path, 0, {"commitInfo": {"operation": "WRITE"}})
    (tmp_path / "_delta_log" / f"{1:020}.json").write_text('{"commitInfo": {"oper')
    with pytest.raises(ValueError, match="Unterminated string"):
        list(delta_log.commits(str(tmp_path)))


@pytest.mark.parametrize("name", ["plain", "ä b#c"])
def test_a_table_of_delta_rs_says_the_same(name: str, tmp_path: Path) -> None:
    place, uri = tmp_path / name, f"file://{tmp_path / name}"
    assert delta_log.identity(uri) is None
    rows = pa.table({"n": [1, 2]})
    write_deltalake(place.as_uri(), rows, configuration={"delta.appendOnly": "false"})
    write_deltalake(place.as_uri(), rows, mode="append")
    found, table = delta_log.identity(uri), DeltaTable(place.as_uri())
    assert found is not None
    assert found.id == str(table.metadata().id)
    assert found.properties == {"delta.appendOnly": "false"}
    assert [commit.version for commit in delta_log.commits(uri)] == [1, 0]
    assert {commit.operation for commit in delta_log.commits(uri)} == {"WRITE"}
