"""Ingests and scores on a cluster with pretended GPUs, and notes what each task saw: run by test_gpus.py as a process.

Input: one JSON object in the arguments (master, conf, root, input, notes; split: whether a model has a device_map).
Output: one file a task under `notes`: the stage, the executor (the daemon that forked the worker), the worker, GPU
addresses, start and end. No model: stand-ins.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import ingest, score
from jobs.session import make_session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.ingestion import query as ingest_query
from tests.support.faults import experiment
from tests.support.faults.driver import stand_ins

TASK_SECONDS = 3.0


@contextlib.contextmanager
def noted(folder: str, stage: str) -> Iterator[None]:
    """Around a task's work: takes its time, and leaves a note."""
    from pyspark import TaskContext

    start = time.time()
    yield
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    note = {
        "stage": stage, "executor": os.getppid(), "worker": os.getpid(), "start": start, "end": time.time(),
        "gpus": list(gpu.addresses) if gpu is not None else [],
    }  # fmt: skip
    (Path(folder) / uuid.uuid4().hex).write_text(json.dumps(note))


@dataclasses.dataclass(frozen=True)
class NotingFactory(experiment.VaryingFactory):
    notes: str

    def __call__(self) -> "NotingScorer":
        return NotingScorer(self.scale, self.notes)


class NotingScorer(experiment.VaryingScorer):
    def __init__(self, scale: float, notes: str) -> None:
        super().__init__(scale, False)
        self._notes = notes

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> list[Any]:
        with noted(self._notes, "score"):
            time.sleep(TASK_SECONDS / len(experiment.SCALES))
            return super().score(texts, segment_ends, ends_document)


def noting_ingest(notes: str) -> Callable[..., Any]:
    def made(*given: Any) -> Callable[[Iterator[Any]], Iterator[Any]]:
        cut = experiment.ingest_function(*given)

        def ingest_split(batches: Iterator[Any]) -> Iterator[Any]:
            with noted(notes, "ingest"):
                time.sleep(TASK_SECONDS)
                yield from cut(batches)

        return ingest_split

    return made


def main() -> None:
    given = json.loads(sys.argv[1])
    config = experiment.config(Path(given["root"]), Path(given["input"]))
    # All files in one micro-batch, and more scorers than GPUs.
    config = dataclasses.replace(
        config,
        ingest=dataclasses.replace(config.ingest, max_files_per_trigger=100),
        score=dataclasses.replace(config.score, workers=4, max_bytes_per_trigger="1g"),
    )
    if given["split"]:
        models = {alias: dataclasses.replace(model, device_map="auto") for alias, model in config.models.items()}
        config = dataclasses.replace(config, models=models)
    spark = make_session(
        ExperimentConfig(root="/unused", spark=SparkConfig(master=given["master"], conf=given["conf"])), "GPU job"
    )
    factories = {alias: NotingFactory(scale, False, given["notes"]) for alias, scale in experiment.SCALES.items()}
    with stand_ins(), mock.patch.object(ingest_query, "make_ingest_function", noting_ingest(given["notes"])):
        ingest.run(spark, config)
        score.run(spark, config, factories)
    spark.stop()


if __name__ == "__main__":
    main()
