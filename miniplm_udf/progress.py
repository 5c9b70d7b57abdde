"""Progress for people: bars on a terminal, plain lines elsewhere. Everything that shows progress goes through here.

Input: counts from the code that works. Output: lines on stderr through `logging`, so that stdout holds only results.
Owns no computation. On the driver, on executors and in the trainer.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOGGER = logging.getLogger("miniplm")


def configure_logging(level: str | None = None) -> None:
    """Sends the project's log to stderr, one line per record.

    Args:
        level: name of the lowest level that is shown; None takes `MINIPLM_LOG_LEVEL`, and without it INFO.
    """
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    LOGGER.setLevel(level or os.environ.get("MINIPLM_LOG_LEVEL", "INFO"))
    # Our Arrow UDFs have no type hints, because these would import pyarrow on the driver; Spark warns about that.
    warnings.filterwarnings("ignore", message="It is preferred to specify type hints for arrow UDF")


class Progress:
    """Counts units of work: a tqdm bar where stderr is a terminal, else a log line every `every_seconds`."""

    def __init__(
        self, label: str, total: float | None = None, unit: str = "it", every_seconds: float = 10.0, done: float = 0.0
    ):
        self.label, self.total, self.unit, self.every_seconds = label, total, unit, every_seconds
        self.done = self._done_before = done
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=False, initial=done)

    def update(self, n: float = 1, **facts: object) -> None:
        """Adds finished units, and shows the progress.

        Args:
            n: finished units since the last call.
            facts: values to show after the count, by name: a loss, a rate.
        """
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last >= self.every_seconds:
            self._last = time.monotonic()
            LOGGER.info("%s", self._line(facts))

    def _line(self, facts: dict[str, object]) -> str:
        total = f" of {self.total:,.0f}" if self.total else ""
        rate = (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)
        tail = "".join(f", {key} {value}" for key, value in facts.items())
        return f"{self.label}: {self.done:,.0f}{total} {self.unit}, {rate:,.1f} {self.unit}/s{tail}"

    def close(self, **facts: object) -> None:
        """Removes the bar and logs the final count."""
        if self._bar is not None:
            self._bar.close()
        LOGGER.info("%s", self._line(facts))


@contextmanager
def progress(label: str, total: float | None = None, unit: str = "it", done: float = 0.0) -> Iterator[Progress]:
    """Makes a `Progress` that closes itself, also when the work raises.

    Args:
        label: what is counted, for the line.
        total: units of the whole work; None if it is not known.
        unit: name of the unit.
        done: units that an earlier process has finished.
    """
    bar = Progress(label, total, unit, done=done)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def watched_tasks(spark: Any, label: str, every_seconds: float = 10.0) -> Iterator[None]:
    """Logs the finished tasks of Spark's active stages every `every_seconds`, while the block runs.

    Args:
        spark: a `SparkSession`. The annotation does not name it, because the trainer imports this module without Spark.
        label: start of each line.
    """
    tracker = spark.sparkContext.statusTracker()
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(every_seconds):
            for stage in filter(None, map(tracker.getStageInfo, tracker.getActiveStageIds())):
                LOGGER.info(
                    "%s: %d of %d tasks of stage %d", label, stage.numCompletedTasks, stage.numTasks, stage.stageId
                )

    thread = threading.Thread(target=watch, name=label, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
