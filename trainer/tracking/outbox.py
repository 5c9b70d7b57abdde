"""Sends calls and points of a curve to a store, in order, in a thread; keeps them while the store cannot be reached.

Input: calls and points from the training, which never waits. A failure that may pass (no connection, a busy database, a
full disk) is tried again, after 1 s at first and at most 15 s later. A call that the store refuses is dropped with a
warning; after three refusals in a row, no further call is made. At the end, `close` waits a stated time, and counts and
names the calls and points that are lost. An error that is not the store's is raised in the caller's thread. Knows no
MLflow call.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from miniplm_udf import storage
from miniplm_udf.errors import first_line, mlflow_errors

LOGGER = logging.getLogger("miniplm.trainer.tracking")

# Values in one call of `send`; MLflow's limit.
_VALUES_A_CALL = 1000
# Points that are held back at most (about 50 MB); then the oldest are dropped.
_MOST_POINTS = 50_000
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 15.0
# A store that refuses this many calls in a row refuses all: the run was deleted, for example.
_REFUSALS_IN_A_ROW = 3
# Begins the names of values that belong to the machine; their steps are seconds.
SYSTEM_PREFIX = "system/"


@dataclasses.dataclass(frozen=True)
class Point:
    """Metric values of one moment.

    Attributes:
        values: value by name.
        step: optimiser step; None for single values.
        timestamp: milliseconds since 1970.
    """

    values: dict[str, float]
    step: int | None
    timestamp: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that sends no points; `what` names it in messages."""

    what: str
    call: Callable[[], None]


class Outbox:
    """The calls of one run that the store does not have yet.

    Args:
        name: name of the model, for messages.
        send: sends points, of at most 1,000 values, in one call.
    """

    def __init__(self, name: str, send: Callable[[Sequence[Point]], None]) -> None:
        self._name, self._send = name, send
        self._items: collections.deque[Point | _Call] = collections.deque()
        self._changed = threading.Condition()
        self._attempts = self._refusals = 0
        self._dropped: list[Point] = []
        self._away_since: float | None = None
        self._is_closing, self._patience, self._answered = False, 0.0, time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def call(self, what: str, call: Callable[[], None], *, raises: bool = True) -> None:
        """Adds a call.

        Args:
            what: name of what the call sends, for messages.
            call: the call; it may be made again after a failure.
            raises: whether to raise an earlier error that is not the store's; False in a thread other than the run's.
        """
        self._add(_Call(what, call), raises)

    def point(self, point: Point, *, raises: bool = True) -> None:
        """Adds a point.

        Args:
            point: metric values.
            raises: see `call`.
        """
        self._add(point, raises)

    def held_points(self) -> tuple[Point, ...]:
        """The points that the store does not have yet."""
        with self._changed:
            return tuple(item for item in self._items if isinstance(item, Point))

    def _add(self, item: Point | _Call, raises: bool) -> None:
        if raises:
            self._raise_error()
        with self._changed:
            if self._refusals >= _REFUSALS_IN_A_ROW:
                return
            if len(self._items) >= _MOST_POINTS and isinstance(item, Point):
                oldest = next((held for held in self._items if isinstance(held, Point)), None)
                if oldest is not None:
                    self._items.remove(oldest)
                    if not _is_of_system(oldest):
                        self._dropped.append(dataclasses.replace(oldest, values={}))
            self._items.append(item)
            self._changed.notify_all()

    def wait_for_attempt(self) -> None:
        """Waits until the first call was made once, with or without success."""
        with self._changed:
            self._changed.wait_for(lambda: self._attempts > 0 or self._error is not None)
        self._raise_error()

    def close(self, wait_seconds: float) -> None:
        """Waits until the store has everything; logs a warning that names what is lost.

        Args:
            wait_seconds: longest time to wait without an answer of the store.
        """
        with self._changed:
            self._is_closing, self._patience = True, wait_seconds
            self._answered = time.monotonic()
            self._changed.notify_all()
            if self._items and self._away_since is not None:
                LOGGER.warning(
                    "%s: MLflow cannot be reached: waiting up to %.0f s (mlflow.wait_seconds)",
                    self._name,
                    wait_seconds,
                )
            while self._items and self._error is None and self._left() > 0:
                self._changed.wait(self._left())
            lost = list(self._items)
            self._items.clear()
        self._raise_error()
        self._report(lost, wait_seconds)

    def _left(self) -> float:
        """Seconds that `close` waits for the next answer."""
        return self._answered + self._patience - time.monotonic()

    def _report(self, lost: Sequence[Point | _Call], wait_seconds: float) -> None:
        points = [*self._dropped, *(item for item in lost if isinstance(item, Point) and not _is_of_system(item))]
        steps = [point.step for point in points if point.step is not None]
        texts = [item.what for item in lost if isinstance(item, _Call)]
        if points:
            of_steps = f" (steps {min(steps)} to {max(steps)})" if steps else ""
            texts.insert(0, f"{len(points)} points of the curve{of_steps}")
        if texts:
            LOGGER.warning(
                "%s: MLflow does not have %s: no answer for %.0f s at the end (mlflow.wait_seconds)",
                self._name,
                ", ".join(texts),
                wait_seconds,
            )

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        """Sends until the box is closed and empty."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_closing)
                batch = self._next()
            if not batch:
                return
            try:
                failure = self._attempt(batch)
            except BaseException as error:  # not an error of the store: the caller's thread raises it
                with self._changed:
                    self._error, self._attempts = error, self._attempts + 1
                    self._changed.notify_all()
                return
            with self._changed:
                self._note(batch, failure)
                if failure is None or is_refusal(failure):
                    pause = _FIRST_PAUSE_SECONDS
                    continue
                # New items do not end the pause; `close` does, for one more attempt.
                self._changed.wait_for(lambda: self._is_closing, timeout=pause)
            if self._is_closing:
                time.sleep(min(_FIRST_PAUSE_SECONDS, max(0.0, self._left())))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _next(self) -> list[Point | _Call]:
        """The next call, or the next points that fit into one call."""
        batch: list[Point | _Call] = []
        values = 0
        for item in self._items:
            values += len(item.values) if isinstance(item, Point) else 0
            if batch and (isinstance(item, _Call) or values > _VALUES_A_CALL):
                break
            batch.append(item)
            if isinstance(item, _Call):
                break
        return batch

    def _attempt(self, batch: Sequence[Point | _Call]) -> Exception | None:
        """Makes the call of a batch. Returns the store's error, or None."""
        first = batch[0]
        try:
            if isinstance(first, _Call):
                first.call()
            else:
                self._send([item for item in batch if isinstance(item, Point)])
        except mlflow_errors() as error:
            return error
        return None

    def _note(self, batch: Sequence[Point | _Call], failure: Exception | None) -> None:
        """Removes what was sent or refused; logs when the store cannot be reached, and when it is back."""
        self._attempts += 1
        is_refused = failure is not None and is_refusal(failure)
        if failure is None or is_refused:
            self._answered = time.monotonic()
            sent = set(map(id, batch))
            while self._items and id(self._items[0]) in sent:
                self._items.popleft()
            if self._away_since is not None:
                LOGGER.info("%s: MLflow is back after %.0f s", self._name, time.monotonic() - self._away_since)
                self._away_since = None
        self._refusals = self._refusals + 1 if is_refused else 0
        if failure is not None:
            shown = storage.redact(first_line(failure))
            what = batch[0].what if isinstance(batch[0], _Call) else "metrics"
            if is_refused:
                LOGGER.warning("%s: MLflow refuses the %s: %s; the work continues", self._name, what, shown)
            elif self._away_since is None:
                self._away_since = time.monotonic()
                LOGGER.warning(
                    "%s: MLflow cannot be reached: %s; the work continues, the points are logged when it is back",
                    self._name,
                    shown,
                )
        if self._refusals >= _REFUSALS_IN_A_ROW:
            LOGGER.warning("%s: MLflow refused %d calls in a row: no further calls", self._name, self._refusals)
            self._items.clear()
        self._changed.notify_all()


def _is_of_system(point: Point) -> bool:
    """Whether a point has values of the machine, and not of the training."""
    return any(name.startswith(SYSTEM_PREFIX) for name in point.values)


def is_refusal(error: Exception) -> bool:
    """Whether the same call would fail again, because the request is wrong or the database is damaged.

    Args:
        error: one of `mlflow_errors`.
    """
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, sqlalchemy.exc.SQLAlchemyError) and not isinstance(error, sqlalchemy.exc.OperationalError)
