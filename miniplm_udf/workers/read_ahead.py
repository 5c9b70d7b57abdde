"""Reads an iterator ahead in a background thread, a bounded number of items, so that input and consumer overlap.

Input: any iterator, which only that thread may use from then on. Output: its items in their order; an error that the
iterator raises comes out of `next` unchanged. Where the consumer stops early, the thread stops before it takes another
item. Knows nothing about the items. Executor side; a retried task starts a thread of its own.
"""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# An input that blocks for ever cannot be interrupted: its thread is left running, as a daemon, until the input ends.
_JOIN_SECONDS = 5.0


class ReadAhead(Generic[T]):
    """An iterator over the items of another iterator, which a thread reads ahead. To be used in a `with` block.

    Args:
        items: the iterator to read.
        depth: most items that are read, or being read, and not taken yet.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> "ReadAhead[T]":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join(_JOIN_SECONDS)

    def __iter__(self) -> "ReadAhead[T]":
        return self

    def __next__(self) -> T:
        entry = self._ready.get()
        if isinstance(entry, tuple):
            self._room.release()
            return entry[0]
        # A further call of `next` gets the same end, or the same error.
        self._ready.put(entry)
        if entry is None:
            raise StopIteration
        raise entry

    @property
    def ready(self) -> bool:
        """Whether `next` would return at once: an item, the end or an error is ready."""
        return not self._ready.empty()

    def _read(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                self._ready.put((next(self._items),))
        except StopIteration:
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
