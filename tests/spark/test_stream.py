"""The queries that keep running: new files, a column that comes, SIGTERM, progress, metrics, a stall. Fake scorers."""

import dataclasses
import functools
import signal
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import ingest, score, stream
from jobs.stage_runner import execute
from jobs.stages import stage_named
from miniplm_udf.config.sections import StreamConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.lease import Lease
from miniplm_udf.scores.run import prepare
from miniplm_udf.scoring.results import Score
from miniplm_udf.stopping import Stopped
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.runner import QueryRunner
from tests.support.ports import free_port
from tests.support.score_tables import experiment, texts, two_models, write_instances
from tests.support.services import Service, until


def test_new_files_are_scored_until_sigterm_and_seen_from_outside(
    spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    port = free_port()
    service = Service(spark, tmp_path, metrics_port=port)
    seen: dict[str, str] = {}

    def meanwhile() -> None:
        # The first file comes after the start.
        time.sleep(2)
        service.deliver("one", texts(5))
        until(lambda: service.count("score_matrix") == 5, "the first file's rows")
        # A damaged file next to a good one: one line in the log, and no failed task.
        service.deliver_cut("cut")
        service.deliver("two", [*texts(4, start=5), *texts(2)])
        until(lambda: service.count("score_matrix") == 9, "the second file's rows")
        until(lambda: service.status("score").rows >= 9, "the status")
        seen["metrics"] = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        with pytest.raises(CorpusError, match=r"ingest: the query is run by process"):
            ingest.run(spark, dataclasses.replace(service.config, stream=StreamConfig()))

    with caplog.at_level("INFO", "miniplm"):
        summary = service.run(meanwhile)
    (line,) = [message for message in caplog.messages if "is left out" in message]
    assert "cut.jsonl.gz is left out" in line
    assert "ingest: starting again" in caplog.messages
    errors = capfd.readouterr().err
    assert "Exception" not in errors
    assert "Traceback" not in errors
    assert service.count("rejects") == 1
    assert summary.scored == {"teacher": 9, "reference": 9}
    assert summary.matrix_rows == 9
    assert 'miniplm_query_running{lease="ingest",query="ingest"} 1.0' in seen["metrics"]
    assert 'miniplm_tokens{lease="score-' in seen["metrics"]
    ended = {status.query: status for status in statuses.read_all(service.config.root)}
    assert sorted(ended) == ["ingest", "score", "score_matrix"]
    assert {status.state for status in ended.values()} == {"stopped"}
    assert {status.backlog for status in ended.values()} == {0}
    assert ended["ingest"].backlog_unit == "files"
    # Started again, as the command starts it, it continues: nothing is scored twice.
    service.deliver("three", texts(1, start=9))
    monkeypatch.setattr(stream, "run", functools.partial(stream.run, factories=service.factories()))
    summary = service.run(
        lambda: until(lambda: service.count("score_matrix") == 10, "the third"),
        lambda spark, config, factories: execute(stage_named("stream"), spark, config),
    )
    assert summary.matrix_rows == 10
    calls = [line.split(" ", 1)[1] for line in service.log.read_text().splitlines() if line.startswith("1.0 ")]
    assert len(calls) == len(set(calls)) == 10


@pytest.mark.long
def test_the_running_micro_batch_is_finished_and_no_other_begun(spark: Any, tmp_path: Path) -> None:
    service = Service(spark, tmp_path)
    config = dataclasses.replace(
        service.config, score=dataclasses.replace(service.config.score, max_bytes_per_trigger="1b"),
        stream=StreamConfig(),
    )  # fmt: skip
    for i in range(4):
        write_instances(spark, config, texts(2, start=2 * i), batch_id=i)
    service.config = config

    def meanwhile() -> None:
        until(lambda: service.log.exists(), "the first call of a scorer")

    with pytest.raises(Stopped, match="before all input was read") as stopped:
        service.run(meanwhile, score.run)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    n_scored = service.count("scores")
    assert 0 < n_scored < 16
    assert n_scored % 2 == 0
    assert service.status("score").state == "stopped"
    assert score.run(spark, config, service.factories()).matrix_rows == 8
    calls = service.log.read_text().splitlines()
    assert len(calls) == len(set(calls)) == 16


@pytest.mark.long
def test_a_table_that_gains_a_column_goes_on(spark: Any, tmp_path: Path) -> None:
    service = Service(spark, tmp_path)
    source = tmp_path / "source"

    def write(documents: Sequence[str], **more: str) -> None:
        rows = [{"id": text, "text": text, **more} for text in documents]
        frame = spark.createDataFrame(rows)
        frame.write.format("delta").mode("append").option("mergeSchema", "true").save(str(source))

    service.config = dataclasses.replace(
        service.config, ingest=dataclasses.replace(service.config.ingest, input=str(source))
    )
    write(texts(3))

    def meanwhile() -> None:
        until(lambda: service.count("score_matrix") == 3, "the first rows")
        write(texts(3, start=3), url="http://x")
        until(lambda: service.count("score_matrix") == 6, "the rows with a new column")

    assert service.run(meanwhile).matrix_rows == 6


@dataclasses.dataclass(frozen=True)
class SlowFactory:
    """A scorer that hangs for a while."""

    seconds: float

    def __call__(self) -> "SlowFactory":
        return self

    def score(self, of: Sequence[str], *_: Any) -> list[Score]:
        time.sleep(self.seconds)
        return [Score(1.0, 1, len(text.encode())) for text in of]


@pytest.mark.long
def test_a_task_that_hangs_is_noticed(spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = {"teacher": two_models(tmp_path)["teacher"]}
    config = dataclasses.replace(experiment(tmp_path / "root", models), stream=StreamConfig(stalled_seconds=3.0))
    write_instances(spark, config, texts(3))
    with caplog.at_level("WARNING", logger="miniplm.streams"):
        score.run(spark, config, {"teacher": SlowFactory(9.0)})
    (line,) = [record.getMessage() for record in caplog.records if "no progress for" in record.getMessage()]
    assert line.startswith("score: no progress for 3 s: task ")
    assert " of stage " in line


def test_a_backlog_that_cannot_be_told_ends_no_query(
    spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(spark, tmp_path)
    write_instances(spark, service.config, texts(3))
    scoring = prepare(spark, service.config, "run", service.factories()).scoring

    def gone(offset: Any) -> int:
        raise FileNotFoundError("a file of the log is gone\n  with a trace")

    monkeypatch.setattr(scoring, "backlog", gone)
    with caplog.at_level("WARNING", logger="miniplm.streams"):
        QueryRunner(spark, service.config.root, StreamConfig()).run([scoring])
    assert "score: the backlog cannot be counted now: a file of the log is gone" in caplog.messages
    assert service.count("scores") == 6
    assert service.status("score").state == "stopped"


def test_what_cannot_start_says_so(spark: Any, tmp_path: Path) -> None:
    service = Service(spark, tmp_path)
    write_instances(spark, service.config, texts(1))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        config = dataclasses.replace(service.config, stream=StreamConfig(metrics_port=taken.getsockname()[1]))
        with pytest.raises(
            ConfigError, match=r"stream\.metrics_port: expected a free port, found that \d+ cannot be opened"
        ):
            score.run(spark, config, service.factories())
    assert service.count("scores") == 0
    with Lease(service.config.layout.lease("score_matrix"), "score_matrix"):
        config = dataclasses.replace(service.config, stream=StreamConfig(trigger="processing_time"))
        with pytest.raises(CorpusError, match="score_matrix: the query is run by process"):
            score.run(spark, config, service.factories())
