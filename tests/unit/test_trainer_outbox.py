"""The outbox of a run: a store that cannot be reached for a while loses nothing, and losses at the end are named."""

import dataclasses
import threading
from collections.abc import Sequence

import pytest
import requests.exceptions
import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE

from trainer.tracking import outbox
from trainer.tracking.outbox import Outbox, Point, is_refusal

AWAY = requests.exceptions.ConnectionError("connection refused")
REFUSED = MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "_LONGEST_PAUSE_SECONDS", 0.02)


class Store:
    """Takes points; raises as many errors as it is told before, and can be made to hang."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.points: list[Point] = []
        self.calls: list[str] = []
        self.answers = threading.Event()
        self.answers.set()
        self.box = Outbox("small", self.send)

    def send(self, points: Sequence[Point]) -> None:
        self.answer()
        self.points += points
        self.calls.append(f"{len(points)} points")

    def answer(self) -> None:
        assert self.answers.wait(60)
        if self.errors:
            raise self.errors.pop(0)

    def call(self, what: str) -> None:
        def call() -> None:
            self.answer()
            self.calls.append(what)

        self.box.call(what, call)


def point(step: int | None, n_values: int = 2) -> Point:
    return Point({f"m{i}": float(i) for i in range(n_values)}, step, 1_000 + (step or 0))


def test_a_store_that_is_away_for_a_while_gets_everything_in_order(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(*[AWAY] * 5)
    with caplog.at_level("INFO", logger="miniplm"):
        store.call("start")
        points = [point(step) for step in range(1, 8)]
        for item in points[:4]:
            store.box.point(item)
        store.call("tags")
        for item in points[4:]:
            store.box.point(item)
        store.box.close(60)
    assert store.points == points
    assert [what for what in store.calls if "points" not in what] == ["start", "tags"]
    assert store.calls[0] == "start"
    assert caplog.text.count("MLflow cannot be reached: connection refused; the work continues") == 1
    assert caplog.text.count("MLflow is back after") == 1


def test_the_training_does_not_wait_for_a_store_that_hangs() -> None:
    store = Store()
    store.answers.clear()
    store.call("start")
    for step in range(1000):
        store.box.point(point(step))  # returns although no call has
    assert (store.calls, len(store.box.held_points())) == ([], 1000)
    store.answers.set()
    store.box.close(60)
    assert [item.step for item in store.points] == list(range(1000))
    assert store.box.held_points() == ()


def test_a_call_has_as_many_values_as_mlflow_takes() -> None:
    store = Store()
    store.answers.clear()
    store.call("start")
    for step in range(5):
        store.box.point(point(step, n_values=400))
    store.answers.set()
    store.box.close(60)
    assert store.calls == ["start", "2 points", "2 points", "1 points"]


def test_what_is_lost_is_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(*[AWAY] * 100_000)
    for step in (10, 20, None):
        store.box.point(point(step))
    store.call("end of the run")
    store.box.close(0.3)
    assert "small: MLflow does not have 3 points of the curve (steps 10 to 20), end of the run" in caplog.text
    assert store.points == []


def test_the_buffer_is_bounded_and_the_oldest_points_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "_MOST_POINTS", 4)
    store = Store()
    store.answers.clear()
    store.call("start")
    for step in range(1, 11):
        store.box.point(point(step))
    store.answers.set()
    store.box.close(60)
    assert [item.step for item in store.points] == [8, 9, 10]
    assert "MLflow does not have 7 points of the curve (steps 1 to 7)" in caplog.text


def test_a_refused_call_is_dropped_and_after_three_none_is_made(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(REFUSED)
    for what in ("parameters", "tags"):
        store.call(what)
    store.box.close(60)
    assert store.calls == ["tags"]
    assert "small: MLflow refuses the parameters: no such run" in caplog.text
    store = Store(*[REFUSED] * 3)
    for number in range(5):
        store.call(f"call {number}")
    store.box.close(60)
    store.call("one more")
    assert store.calls == []
    assert "refused 3 calls in a row: no further calls" in caplog.text


def test_a_fault_of_ours_is_raised_in_the_training() -> None:
    store = Store(KeyError("a fault in our code"))
    store.call("start")
    with pytest.raises(KeyError, match="a fault in our code"):
        store.box.wait_for_attempt()
    other = Store(KeyError("a fault in our code"))
    other.call("start")
    with pytest.raises(KeyError, match="a fault in our code"):
        other.box.close(60)


ERRORS = {
    "unreachable": (AWAY, False),
    "server's fault": (MlflowException("API request failed"), False),
    "busy": (MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE), False),
    "locked": (sqlalchemy.exc.OperationalError("insert", {}, Exception("database is locked")), False),
    "disk": (OSError(28, "No space left on device"), False),
    "deleted run": (REFUSED, True),
    "bad value": (MlflowException("bad", error_code=INVALID_PARAMETER_VALUE), True),
    "no database": (sqlalchemy.exc.DatabaseError("select", {}, Exception("file is not a database")), True),
}


@pytest.mark.parametrize("name", ERRORS)
def test_only_what_may_pass_is_tried_again(name: str) -> None:
    error, refusal = ERRORS[name]
    assert is_refusal(error) is refusal


def test_a_point_can_be_stored_as_json() -> None:
    assert Point(**dataclasses.asdict(point(3))) == point(3)
