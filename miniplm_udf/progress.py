"""Progress for people: bars on a terminal, plain lines elsewhere; and the levels of the log.

Input: counts from the code that works. Output: lines on stderr through `logging`, so that stdout holds only results. A
line says how many units are done, their rate, and the time that is left. Work on Spark is shown by task_progress.py.
Owns no computation. On the driver, on executors and in the trainer.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOGGER = logging.getLogger("miniplm")
LEVEL_VARIABLE = "MINIPLM_LOG_LEVEL"


class _Handler(logging.StreamHandler[Any]):
    """Writes a record above the bars of a terminal, which are drawn again below it.

    Without `--debug`, it leaves out py4j's records: py4j logs the trace of each error that it raises.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if "py4j" in record.pathname and not is_debug():
            return None
        tqdm_module = sys.modules.get("tqdm")
        if tqdm_module is None or not is_terminal():
            return super().emit(record)
        with tqdm_module.tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def configure_logging(level: str | None = None) -> None:
    """Sends the project's log to stderr, one line per record.

    Args:
        level: name of the lowest level that is shown; None takes `MINIPLM_LOG_LEVEL`, which `--debug` sets, and without
            it INFO.
    """
    handler = _Handler(sys.stderr)
    logging.basicConfig(
        level=logging.WARNING, handlers=[handler], format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    _set_levels(level)
    # Our Arrow UDFs have no type hints, because these would import pyarrow on the driver; Spark warns about that.
    warnings.filterwarnings("ignore", message="It is preferred to specify type hints for arrow UDF")


def _set_levels(level: str | None) -> None:
    LOGGER.setLevel(level or os.environ.get(LEVEL_VARIABLE, "INFO"))
    # A warning for each retry of MLflow's client, dozens while its server is away; our own warning names the server.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.NOTSET if is_debug() else logging.ERROR)


def is_debug() -> bool:
    """Whether traces are wanted: `--debug`, or MINIPLM_LOG_LEVEL=DEBUG in the environment."""
    return os.environ.get(LEVEL_VARIABLE) == "DEBUG"


@contextmanager
def debugging(is_wanted: bool) -> Iterator[None]:
    """Shows debug messages and traces while the block runs, in this process and in those that it starts.

    Args:
        is_wanted: whether the user asked for it; else nothing is changed.
    """
    before = os.environ.get(LEVEL_VARIABLE)
    if is_wanted:
        os.environ[LEVEL_VARIABLE] = "DEBUG"
    configure_logging()
    try:
        yield
    finally:
        if is_wanted:
            os.environ.pop(LEVEL_VARIABLE)
            os.environ.update({} if before is None else {LEVEL_VARIABLE: before})
            _set_levels(before)


def is_terminal() -> bool:
    """Whether stderr is a terminal, so that bars can be drawn on it."""
    return sys.stderr.isatty()


def time_left(fraction: float, seconds: float) -> str | None:
    """Returns the estimate of the time that work still takes, in words; None if it cannot be told yet.

    Args:
        fraction: share of the work that is done, 0 to 1.
        seconds: time that this share took.
    """
    if not 0 < fraction <= 1:
        return None
    return f"{duration(seconds * (1 - fraction) / fraction)} left"


def duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours.

    Args:
        seconds: the duration.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Counts units of work: a bar where stderr is a terminal, else log lines at the start and every `every_seconds`."""

    def __init__(
        self, label: str, total: float | None = None, unit: str = "it", every_seconds: float = 10.0, done: float = 0.0
    ):
        self.label, self.total, self.unit, self.every_seconds = label, total, unit, every_seconds
        self.done = self._done_before = done
        self._start = self._last = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if is_terminal():
            from tqdm import tqdm as make_bar

            self._bar = make_bar(total=total, desc=label, unit=unit, unit_scale=True, leave=False, initial=done)
        else:
            LOGGER.info("%s", self._line({}))

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

    def _line(self, facts: Mapping[str, object]) -> str:
        total, seconds = self.total, max(time.monotonic() - self._start, 1e-9)
        done = self.done - self._done_before
        parts = [f"{self.label}: {self.done:,.0f}{f' of {total:,.0f}' if total else ''} {self.unit}"]
        if done:
            parts.append(f"{done / seconds:,.1f} {self.unit}/s")
        parts += [f"{key} {value}" for key, value in facts.items()]
        if total and self.done < total and (left := time_left(done / (total - self._done_before), seconds)):
            parts.append(left)
        return ", ".join(parts)

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
