"""A Spark session of its own, in which tasks may fail once: `python -m tests.support.crash_session FOLDER`.

Prints one JSON line a step, and waits for a line of input before the next: so that a test may look on, and kill.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from jobs import score, session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.scores import query as scores
from miniplm_udf.workers.arrow import score_arrow
from tests.support.crashing_scorer import CrashingFactory
from tests.support.poison import dying_once
from tests.support.score_tables import FakeFactory, experiment, texts, two_models, write_instances


def make_session() -> Any:
    conf = {"spark.driver.memory": "1g"}
    base = ExperimentConfig(root="/tmp/unused", spark=SparkConfig(master="local[2,2]", conf=conf))
    return session.make_session(base, "crashes")


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


def workers() -> list[int]:
    """The Python workers of the session, less the daemon that forks them."""
    java = next(one for one in psutil.Process().children(recursive=True) if one.name() == "java")
    return [one.pid for daemon in java.children() for one in daemon.children() if one.status() != psutil.STATUS_ZOMBIE]


def main(folder: Path) -> None:
    spark = make_session()
    java = next(one.pid for one in psutil.Process().children(recursive=True) if one.name() == "java")
    models = two_models(folder)
    config = experiment(folder / "root", models)
    factories = {
        "teacher": FakeFactory(1.0, str(folder / "calls.log")),
        "reference": CrashingFactory(2.0, folder / "made.log"),
    }
    write_instances(spark, config, texts(60))

    def dying(*arguments: Any) -> Any:
        return dying_once(score_arrow(*arguments), str(folder / "tries.log"))

    with mock.patch.object(scores, "score_arrow", dying):
        first = score.run(spark, config, factories)
    rows = {
        name: [row.asDict() for row in spark.read.format("delta").load(config.layout.table(name)).collect()]
        for name in ("scores", "rejects")
    }
    keys = sorted((row["instance_id"], row["model_id"]) for row in rows["scores"])
    say(summary=dataclasses.asdict(first), keys=keys, n_rejects=len(rows["rejects"]), java=java)
    # Between two micro-batches Spark ends its workers: here all at once, by force.
    before = workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    write_instances(spark, config, texts(5, start=60), batch_id=1)
    score.run(spark, config, factories)
    say(workers_before=before, workers_after=workers())
    spark.stop()
    say(stopped=True)
    spark = make_session()
    again = experiment(folder / "again", models)
    write_instances(spark, again, texts(5))
    score.run(spark, again, factories)
    say(done=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
