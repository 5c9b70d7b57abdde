"""The lines and bars of a progress, on a terminal and elsewhere."""

import contextlib
import dataclasses
import io
import logging
import re
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf import task_progress
from miniplm_udf.progress import LEVEL_VARIABLE, _Handler, debugging, progress, time_left
from miniplm_udf.task_progress import QueryCounts, hidden, publish, watched_tasks


def test_what_an_earlier_process_finished_counts_and_is_no_part_of_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="miniplm")
    with progress("train small", 40, "steps", done=20) as shown:
        assert caplog.messages == ["train small: 20 of 40 steps"]
        shown.update(5)
    line = re.search(r"train small: 25 of 40 steps, ([\d,]+\.\d) steps/s, \d+ s left", caplog.text)
    assert line is not None
    assert shown.done == 25


@pytest.mark.parametrize(("level", "is_shown"), [("INFO", False), ("DEBUG", True)])
def test_errors_that_py4j_raises_are_not_logged_too(
    level: str, is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    written = io.StringIO()
    for path in ("/lib/py4j/java_gateway.py", "/lib/other.py"):
        _Handler(written).emit(logging.LogRecord("root", logging.ERROR, path, 1, f"from {path}", (), None))
    assert ("from /lib/py4j" in written.getvalue()) == is_shown
    assert "from /lib/other.py" in written.getvalue()


@pytest.mark.parametrize("is_wanted", [False, True])
def test_the_retries_of_mlflows_client_are_shown_only_for_debugging(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    retries = logging.getLogger("urllib3.connectionpool")
    with debugging(is_wanted):
        assert retries.isEnabledFor(logging.WARNING) == is_wanted
    assert not retries.isEnabledFor(logging.WARNING)
    assert retries.isEnabledFor(logging.ERROR)


def test_the_time_left_is_in_a_unit_that_fits() -> None:
    assert [time_left(share, 60) for share in (0, 0.5, 0.1)] == [None, "60 s left", "9 min 0 s left"]
    assert [time_left(share, 60) for share in (0.02, 0.001)] == ["49 min left", "16.6 h left"]


def counts(**values: Any) -> QueryCounts:
    given = {"rows": 300, "rows_per_second": 30.0, "tokens_per_second": {"teacher": 1200.0}, "behind": 700}
    return QueryCounts(**{**given, "total": 1000, "unit": "rows", "began_at": time.monotonic() - 10.0, **values})


def test_counts_of_a_query_in_words() -> None:
    assert counts().text() == "300 of 1,000 rows, 30.0 rows/s, teacher 1,200 tokens/s, 23 s left"
    of_files = counts(unit="files", behind=3, total=4, tokens_per_second={})
    assert of_files.text() == "300 rows, 1 of 4 files, 30.0 rows/s, 30 s left"
    # A service goes on with new input.
    assert counts(total=None, tokens_per_second={}).text() == "300 rows, 30.0 rows/s"


def test_the_rows_of_a_running_micro_batch_count() -> None:
    first = counts(rows=0, rows_per_second=0.0, behind=1000, outputs_per_row=1.5, tokens_per_second={})
    assert first.with_outputs(0) == first
    assert first.with_outputs(300).text() == "200 of 1,000 rows, 20.0 rows/s, 40 s left"
    uncounted = counts()
    assert uncounted.with_outputs(300) == uncounted


def test_the_time_until_the_first_rows_does_not_count() -> None:
    """200 rows came after 90 s, in which models were loaded, and 100 in the 10 s since then."""
    now = time.monotonic()
    live = counts(rows=300, began_at=now - 100, outputs_per_row=1.0, first_rows=200, first_at=now - 10)
    assert live.text().endswith(", 70 s left")
    just_begun = dataclasses.replace(live, rows=200, behind=800)
    assert "left" not in just_begun.text()


def until(has_happened: Callable[[], object]) -> None:
    """Waits for a line or a bar, which a thread writes."""
    end = time.monotonic() + 20
    while not has_happened() and time.monotonic() < end:
        time.sleep(0.01)


def spark_with_tasks(done: int, total: int) -> Any:
    """A session whose status tracker always shows one stage."""
    stage = SimpleNamespace(stageId=7, numCompletedTasks=done, numTasks=total)
    tracker = SimpleNamespace(getActiveStageIds=lambda: [7], getStageInfo=lambda stage_id: stage)
    return SimpleNamespace(sparkContext=SimpleNamespace(statusTracker=lambda: tracker))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, r"score: 300 of 1,000 rows, 30\.0 rows/s, teacher 1,200 tokens/s, 23 s left; \d s"),
        ({"rows": 0, "behind": 1000, "rows_per_second": 0.0, "tokens_per_second": {}},
         r"score: 0 of 1,000 rows; 3 of 8 Spark tasks, \d s left; \d s"),
    ],
)  # fmt: skip
def test_work_on_spark_shows_its_queries_and_until_rows_are_counted_its_tasks(
    caplog: pytest.LogCaptureFixture, values: dict[str, Any], line: str
) -> None:
    caplog.set_level("INFO", logger="miniplm")
    publish("score", counts(**values))
    with watched_tasks(spark_with_tasks(3, 8), "score", every_seconds=0.05):
        until(lambda: caplog.messages)
    publish("score", None)
    assert re.match(line, caplog.messages[0])


def test_the_first_line_comes_within_two_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task_progress._FIRST_SECONDS < 2
    monkeypatch.setattr(task_progress, "_FIRST_SECONDS", 0.05)
    caplog.set_level("INFO", logger="miniplm")
    with watched_tasks(spark_with_tasks(0, 1), "pack"):
        until(lambda: caplog.messages)
    assert [message.split(";")[0] for message in caplog.messages] == ["pack: 0 of 1 Spark tasks"]


def test_only_the_innermost_work_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="miniplm")
    spark = spark_with_tasks(0, 1)
    with watched_tasks(spark, "outer", every_seconds=0.05), watched_tasks(spark, "inner", every_seconds=0.05):
        until(lambda: len(caplog.messages) > 1)
    assert {message.partition(":")[0] for message in caplog.messages} == {"inner"}
    caplog.clear()
    with watched_tasks(spark, "outer", every_seconds=0.05), hidden():
        time.sleep(0.2)
    assert caplog.messages == []


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(task_progress, "is_terminal", lambda: True)
    monkeypatch.setattr(task_progress, "_DRAW_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched_tasks(spark_with_tasks(2, 8), "pack"))
        shown: list[str] = []
        until(lambda: shown.append(capsys.readouterr().err) or "25%" in "".join(shown))
    bar = "".join(shown)
    assert re.search(r" 25%\|█+ +\| pack: 2 of 8 Spark tasks", bar)
    assert not sys.stderr.isatty()
