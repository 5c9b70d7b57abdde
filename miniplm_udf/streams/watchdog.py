"""Notices a stall: no task of a running Spark job has finished, and none has read or written a row, for a while.

Input: the Spark session, asked every few seconds. Output: seconds without any change, and the tasks that run. Executors
report the rows of running tasks with each heartbeat (every 10 s), so a long task that works differs from a task that
hangs. Stops nothing: an executor ends a worker process that hangs (`spark.python.worker.idleTimeoutSeconds`), and a
worker ends a model that hangs. Driver only.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_MAX_TASKS = 200


class Watchdog:
    """Measures how long the activity of the running stages has not changed.

    Args:
        activity: returns what the active stages have done so far (`stage_activity`); empty if none is active.
        clock: monotonic time in seconds; tests pass a clock of their own.
    """

    def __init__(self, activity: Callable[[], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._activity, self._clock = activity, clock
        self._last: Any = None
        self._since = clock()

    def quiet_seconds(self) -> float:
        """Seconds since the activity last changed; 0 if no stage is active."""
        activity = self._activity()
        if not activity or activity != self._last:
            self._last, self._since = activity, self._clock()
        return self._clock() - self._since


def stage_activity(spark: "SparkSession") -> list[tuple[int, ...]]:
    """Reads the progress of each active stage from Spark's status store.

    Args:
        spark: the session whose stages are read.

    Returns:
        Tuples of a stage's id, tasks finished, tasks failed, rows read from the input, rows read from shuffles, rows
        written to the output, and rows written to shuffles; sorted by id.
    """
    return sorted(
        (
            stage.stageId(), stage.numCompleteTasks(), stage.numFailedTasks(),
            stage.inputRecords(), stage.shuffleReadRecords(), stage.outputRecords(), stage.shuffleWriteRecords(),
        )
        for stage in _active_stages(spark)
    )  # fmt: skip


def running_tasks(spark: "SparkSession") -> list[str]:
    """Returns the running tasks (at most 200 per stage), one line each: task, stage, host, seconds.

    Args:
        spark: the session whose tasks are listed.
    """
    store = spark.sparkContext._jsc.sc().statusStore()
    lines = []
    for stage in _active_stages(spark):
        tasks = store.taskList(stage.stageId(), stage.attemptId(), _MAX_TASKS)
        for task in (tasks.apply(i) for i in range(tasks.size())):
            if task.status() == "RUNNING":
                seconds = time.time() - task.launchTime().getTime() / 1000
                lines.append(f"task {task.taskId()} of stage {stage.stageId()} on {task.host()}, {seconds:.0f} s")
    return lines


def _active_stages(spark: "SparkSession") -> list[Any]:
    # Spark's web page reads the same store; there is no Python API for the rows of running tasks.
    stages = spark.sparkContext._jsc.sc().statusStore().activeStages()
    return [stages.apply(i) for i in range(stages.size())]
