"""Notices that nothing moves: no task of a running Spark job has finished, read or written a row for a while.

Input: the Spark session, asked every few seconds. Output: for how long nothing has moved, and which tasks run where.
Executors report the rows of running tasks with each heartbeat (10 s), so a long task that works is told from one that
hangs. Driver only; owns nothing and stops nothing: a worker process that hangs is ended by its own executor
(`spark.python.worker.idleTimeoutSeconds`), a model that hangs by its worker.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_MAX_TASKS = 200


class Watchdog:
    """Asks what the active stages have done, and remembers when that last changed.

    Args:
        clock: seconds, monotonic; a test has its own.
    """

    def __init__(self, activity: Callable[[], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._activity, self._clock = activity, clock
        self._seen: Any = None
        self._since = clock()

    def quiet_seconds(self) -> float:
        """For how long the active stages have not moved; 0 where there are none."""
        found = self._activity()
        if not found or found != self._seen:
            self._seen, self._since = found, self._clock()
        return self._clock() - self._since


def stage_activity(spark: "SparkSession") -> list[tuple[int, ...]]:
    """What each active stage has done so far: id, tasks finished and failed, records read and written."""
    return sorted(
        (
            stage.stageId(), stage.numCompleteTasks(), stage.numFailedTasks(),
            stage.inputRecords(), stage.shuffleReadRecords(), stage.outputRecords(), stage.shuffleWriteRecords(),
        )
        for stage in _active_stages(spark)
    )  # fmt: skip


def running_tasks(spark: "SparkSession") -> list[str]:
    """The running tasks, one text each: stage, task, host, seconds."""
    store = spark.sparkContext._jsc.sc().statusStore()
    found = []
    for stage in _active_stages(spark):
        tasks = store.taskList(stage.stageId(), stage.attemptId(), _MAX_TASKS)
        for task in (tasks.apply(i) for i in range(tasks.size())):
            if task.status() == "RUNNING":
                seconds = time.time() - task.launchTime().getTime() / 1000
                found.append(f"task {task.taskId()} of stage {stage.stageId()} on {task.host()}, {seconds:.0f} s")
    return found


def _active_stages(spark: "SparkSession") -> list[Any]:
    # Spark's own web page asks the same; there is no Python API for the rows of running tasks.
    stages = spark.sparkContext._jsc.sc().statusStore().activeStages()
    return [stages.apply(i) for i in range(stages.size())]
