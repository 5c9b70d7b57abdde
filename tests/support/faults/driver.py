"""A Spark driver that can be stopped at a fault point: `python -m tests.support.faults.driver MASTER`.

Input: as JSON in the arguments, the section `spark` and a place on the storage of the roots; then one JSON command a
line on stdin. Output: one JSON event a line on stdout (Spark's own output goes to stderr). It runs ingest, score (with
the matrix) and refine through the jobs' `run`, with stand-ins for what loads models (`experiment`). It keeps nothing
between commands but its session, so that one that was started earlier can take over from one that was killed. A failed
run is an event; the process stays.

    {"root": ..., "input": ..., "stages": [...], "models": [...], "mode": "document" | "packed", "varying": bool,
     "keyed": bool, "stop": Point | null}
    {"event": "ready" | "stage" | "stopped" | "done" | "failed", ...}; after "stopped": {"stop": Point | null}
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import ingest as ingest_job
from jobs import refine as refine_job
from jobs import score as score_job
from jobs.session import make_session
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.ingestion import query as ingest_query
from miniplm_udf.progress import configure_logging
from miniplm_udf.scores import run as scores_run
from tests.support.faults import experiment
from tests.support.faults.points import Point, Stops, installed


class Channel:
    """Lines of JSON: commands come in by stdin, events go out by what was stdout."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, event: str, **facts: Any) -> None:
        self._out.write(json.dumps({"event": event, **facts}) + "\n")

    def receive(self) -> dict[str, Any] | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None


def point_of(plain: dict[str, Any] | None) -> Point | None:
    return Point(**plain) if plain else None


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Replaces what would load a model or a tokenizer, on the driver's side and on the executors'."""
    described = experiment.descriptions()

    def describe(spark: Any, config: ExperimentConfig, models: dict[str, Any]) -> dict[str, Any]:
        for alias in models:
            storage.write_json(config.layout.model_record(alias), described[alias].to_dict())
        return {alias: described[alias] for alias in models}

    with (
        mock.patch.object(scores_run, "describe_models", describe),
        mock.patch.object(ingest_query, "executor_tokenizer_hash", return_value=experiment.TOKENIZER_HASH),
        mock.patch.object(ingest_query, "make_ingest_function", experiment.ingest_function),
        mock.patch.object(ingest_query, "pack_function", experiment.pack_function),
    ):
        yield


def run_stages(spark: Any, command: dict[str, Any], channel: Channel) -> None:
    """Runs the stages of a command, one after the other. `score` keeps the matrix as well; queries tell their start."""
    root, input_folder = command["root"], Path(command["input"])
    config = experiment.config(root, input_folder, command.get("models", ()), command["mode"])
    factories = experiment.factories(command["varying"], command["keyed"])
    runs: dict[str, Callable[[], Any]] = {
        "ingest": lambda: ingest_job.run(spark, config),
        "score": lambda: score_job.run(spark, config, factories),
        "refine": lambda: refine_job.run(spark, config),
    }
    for stage in command["stages"]:
        if stage == "refine":
            channel.send("stage", stage=stage)
        runs[stage]()


def warm(spark: Any) -> None:
    """Starts Python workers and loads Delta's classes, for which the first command would have to wait."""
    spark.range(0, 4, 1, 4).mapInArrow(lambda batches: batches, "id bigint").count()
    with tempfile.TemporaryDirectory() as folder:
        spark.range(10).write.format("delta").save(f"{folder}/table")
        spark.read.format("delta").load(f"{folder}/table").count()


def main() -> None:
    channel, given = Channel(), json.loads(sys.argv[1])
    configure_logging("WARNING")
    spark = make_session(ExperimentConfig(root=given["root"], spark=SparkConfig(**given["spark"])), "fault trial")
    stops = Stops(lambda point: stop_at(channel, point), lambda stage: channel.send("stage", stage=stage))
    with stand_ins(), installed(stops):
        warm(spark)
        channel.send("ready", app_id=spark.sparkContext.applicationId)
        while (command := channel.receive()) is not None:
            stops.next = point_of(command.get("stop"))
            try:
                run_stages(spark, command, channel)
                channel.send("done")
            except Exception as error:  # told to the harness, which decides
                channel.send("failed", error=f"{type(error).__name__}: {error}"[:3000])
    spark.stop()


def stop_at(channel: Channel, point: Point) -> Point | None:
    """Waits here; a killed process never returns. Returns the next point to stop at."""
    channel.send("stopped", point=dataclasses.asdict(point))
    return point_of((channel.receive() or {}).get("stop"))


if __name__ == "__main__":
    main()
