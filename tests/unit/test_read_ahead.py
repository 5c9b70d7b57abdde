"""The reading thread: order, errors, the end, and a consumer that stops early. No thread is left."""

import threading
import time
from collections.abc import Iterator

import pytest

from miniplm_udf.workers.read_ahead import ReadAhead


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100])
def test_every_item_comes_in_order(n: int) -> None:
    with ReadAhead(iter(range(n)), 2) as items:
        assert list(items) == list(range(n))
        assert next(items, "end") == "end"


def test_the_input_is_read_ahead_but_not_further_than_the_depth() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    with ReadAhead(source(), 3) as items:
        assert next(items) == 0
        wait_until(lambda: len(taken) == 4)
        time.sleep(0.05)
        assert len(taken) == 4
    assert len(taken) == 4, "stopped before another item was taken"


def wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_error_comes_as_it_was_behind_what_came_before_it() -> None:
    error = KeyError("lost")

    def source() -> Iterator[int]:
        yield 1
        raise error

    with ReadAhead(source(), 2) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(KeyError) as caught:
                next(items)
            assert caught.value is error


def test_a_consumer_that_fails_ends_the_thread() -> None:
    def fail_after_one() -> None:
        with ReadAhead(iter(range(1000)), 2) as items:
            next(items)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_one()


def test_an_input_that_blocks_does_not_block_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniplm_udf.workers.read_ahead._JOIN_SECONDS", 0.05)
    release = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        release.wait(5)

    with ReadAhead(source(), 2) as items:
        assert next(items) == 1
    # As when Spark ends a task: the socket's end wakes the reader.
    release.set()
    wait_until(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))
