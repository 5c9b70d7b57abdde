"""Status records: what they count, what `miniplm status` prints of them, and the same as Prometheus text. No Spark."""

import json
import os
import socket
from pathlib import Path

import pytest

from jobs import cli
from jobs.records import write_record
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.status import QueryStatus


def make(query: str = "score") -> QueryStatus:
    made = QueryStatus(query=query, lease=f"{query}-1", run_id="r", started_at=statuses.now())
    made.add_batch(4, 100, 2.0, {"teacher": 1000})
    made.add_batch(5, 50, 2.0, {"teacher": 1600})
    made.add_batch(6, 0, 0.5, {"teacher": 1600})
    made.backlog = 1234
    return made


def test_rates_are_of_the_newest_micro_batch_that_had_any() -> None:
    found = make()
    assert (found.batch_id, found.rows, found.rows_per_second) == (6, 150, 25.0)
    assert found.tokens_per_second == {"teacher": 300.0}
    assert found.line() == "score: micro-batch 6: 0 rows in 0.5 s (25.0 rows/s, teacher 300 tokens/s)"


def test_status_prints_a_table_and_says_which_driver_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"file://{tmp_path}"
    statuses.write(root, make("ingest"))
    statuses.write(root, make("score"))
    with Lease(Root(root).lease("score-1"), "score"):
        assert cli.main(["status", "--root", str(tmp_path)]) == 0
    head, ingest, score, *below = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["query", "state", "micro-batch"]
    assert ingest.split()[:3] == ["ingest", "gone", "6"]
    assert score.split()[:3] == ["score", "running", "6"]
    assert "1,234 rows" in score
    assert "teacher 300" in score
    assert below == ["ingest: its driver stopped unexpectedly; run it again to continue"]


def test_prometheus_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses.write(f"file://{tmp_path}", make())
    assert cli.main(["status", "--root", str(tmp_path), "--prometheus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'miniplm_rows_per_second{lease="score-1",query="score"} 25.0' in lines
    assert 'miniplm_backlog{lease="score-1",query="score"} 1234.0' in lines
    assert 'miniplm_tokens_per_second{lease="score-1",model="teacher",query="score"} 300.0' in lines
    assert cli.main(["status", "--root", str(tmp_path), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["queries"][0]["tokens"] == {"teacher": 1600}
    assert (status["stages"], status["run"]) == ([], None)


def test_status_says_that_a_run_works_and_which_stages_have_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExperimentConfig(root=f"file://{tmp_path}")
    for stage, seconds in (("score", 61.25), ("ingest", 1234.0)):
        write_record(config, stage, "f", {"rows": 1}, seconds)
    with Lease(config.layout.lease("run"), "miniplm run", what="pipeline"):
        assert cli.main(["status", "--root", str(tmp_path)]) == 0
    run, empty, head, first, second = capsys.readouterr().out.splitlines()
    assert run == f"miniplm run works here: process {os.getpid()} on {socket.gethostname()}"
    assert empty == ""
    assert head.split() == ["stage", "finished", "(UTC)", "took"]
    assert [line.split()[0] for line in (first, second)] == ["score", "ingest"]
    assert [line.split()[-2] for line in (first, second)] == ["61.2", "1,234.0"]
    assert cli.main(["status", "--root", str(tmp_path)]) == 0
    assert "works here" not in capsys.readouterr().out


def test_nothing_ran_yet_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--root", str(tmp_path)]) == 1
    assert "nothing ran here yet" in capsys.readouterr().err
    assert cli.main(["status", "--root", f"{tmp_path}/50%"]) == 2
    assert "ConfigError: --root: expected a place without %" in capsys.readouterr().err
    assert cli.main(["status"]) == 2
