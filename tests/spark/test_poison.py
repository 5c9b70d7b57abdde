"""Texts and kills that break a model, through the score job on real Spark: isolated, and nothing lost or doubled."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import score
from jobs.command import exit_code
from miniplm_udf.errors import EXIT_DONE, EXIT_TOO_MANY_REJECTS
from miniplm_udf.scores.models import describe_models
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support.crashing_scorer import made
from tests.support.poison import PoisonedFactory
from tests.support.score_tables import experiment, instance_id, texts, two_models, write_instances
from tests.support.scorer_requests import is_gone, wait_until


def table(spark: Any, config: Any, name: str) -> list[Any]:
    return list(spark.read.format("delta").load(config.layout.table(name)).collect())


def values(spark: Any, config: Any) -> dict[tuple[str, str], tuple[float, int, int]]:
    rows = table(spark, config, "scores")
    found = {
        (row["instance_id"], row["model_id"]): (row["nll_sum_nats"], row["n_tokens"], row["n_bytes"]) for row in rows
    }
    assert len(found) == len(rows)
    return found


@pytest.mark.long
def test_poison_is_isolated_and_the_rest_is_scored_as_without_it(spark: Any, tmp_path: Path) -> None:
    good, bad = texts(9, words=12), ["nan one two", "panic one two", "kill one two"]
    models = two_models(tmp_path)
    plain = experiment(tmp_path / "plain", models)
    write_instances(spark, plain, good)
    expected = score.run(spark, plain)
    assert exit_code(expected) == EXIT_DONE
    config = experiment(tmp_path / "root", models, max_reject_share=0.2)
    descriptions = describe_models(spark, config, config.models)
    log = tmp_path / "made.log"
    factories = {
        alias: PoisonedFactory(ModelScorerFactory(models[alias], descriptions[alias], config.score), str(log))
        for alias in models
    }
    write_instances(spark, config, [*good[:4], *bad, *good[4:]])
    summary = score.run(spark, config, factories)
    found = values(spark, config)
    assert found.keys() == values(spark, plain).keys()
    for key, (nll, *counts) in values(spark, plain).items():
        assert found[key][0] == pytest.approx(nll, abs=1e-5 * counts[0])
        assert list(found[key][1:]) == counts
    reasons = {
        (row["instance_id"], row["stage"]): (row["reason"], row["detail"]) for row in table(spark, config, "rejects")
    }
    assert len(reasons) == 6
    for text, reason in zip(bad, ["nan_score", "scorer_error", "scorer_crashed"], strict=True):
        of_text = [found for (key, _), found in reasons.items() if key == instance_id(text)]
        assert [found[0] for found in of_text] == [reason, reason]
        if reason == "scorer_crashed":
            assert all("killed by SIGKILL, perhaps by the kernel for lack of memory" in found[1] for found in of_text)
        if reason == "scorer_error":
            assert [found[1] for found in of_text] == ["Panic: index out of bounds"] * 2
    assert summary.new_scored == {"teacher": 9, "reference": 9}
    assert (summary.rejected, summary.matrix_rows) == (6, 9)
    assert exit_code(summary) == EXIT_TOO_MANY_REJECTS
    # On its way, alone, and halved from twelve rows to one: with the first start six processes of two models.
    assert len(log.read_text().splitlines()) <= 2 * 7


class Session:
    """`crash_session` in a process."""

    def __init__(self, folder: Path) -> None:
        with (folder / "session.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.crash_session", str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._log = folder / "session.log"

    def step(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        return dict(json.loads(line))

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.mark.long
def test_workers_that_die_cost_nothing_and_the_process_ends_with_its_session(tmp_path: Path) -> None:
    session = Session(tmp_path)
    try:
        _check_session(session, tmp_path)
    finally:
        session.process.kill()
        session.process.wait()


def _check_session(session: Session, folder: Path) -> None:
    # A Spark worker killed itself over its first answer; its task was tried again.
    first = session.step()
    tries = [line.split() for line in (folder / "tries.log").read_text().splitlines()]
    assert {attempt for attempt, _ in tries} == {"0", "1"}
    assert len({pid for _, pid in tries}) == 2
    assert first["keys"] == sorted(
        [instance_id(text), alias] for text in texts(60) for alias in ("reference", "teacher")
    )
    assert first["summary"]["new_scored"] == {"teacher": 60, "reference": 60}
    assert first["n_rejects"] == 0
    assert len(made(folder / "made.log")) == 1, "loaded once, whichever worker asks"
    session.go_on()
    # All workers were killed between two micro-batches.
    second = session.step()
    assert second["workers_before"]
    assert not set(second["workers_before"]) & set(second["workers_after"])
    ((_, scorer),) = made(folder / "made.log")
    assert not is_gone(scorer)
    session.go_on()
    session.step()
    assert wait_until(lambda: is_gone(scorer)) < 2, "the session was stopped; its JVM still runs"
    assert not is_gone(first["java"])
    session.go_on()
    session.step()
    scorer = made(folder / "made.log")[-1][1]
    assert not is_gone(scorer)
    os.kill(first["java"], signal.SIGKILL)
    assert wait_until(lambda: is_gone(scorer)) < 2
