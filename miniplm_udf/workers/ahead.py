"""Reads an iterator ahead in one background thread, a bounded number of items, so that input and consumer overlap.

Input: any iterator, which from then on is used by that thread alone. Output: its items in their order; an error that it
raises comes out of `next` as it was. Where the consumer stops early, the thread stops before it takes another item.
Knows nothing of what the items are. Executor side; a retried task starts a thread of its own.
"""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# An input that blocks for ever cannot be interrupted: the thread is then left behind, as a daemon, and ends with it.
_JOIN_SECONDS = 5.0


class Ahead(Generic[T]):
    """An iterator, to be used in a `with` block, over the items of another one that is read ahead.

    Args:
        items: what to read.
        depth: items that are read, or being read, and not taken yet.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> "Ahead[T]":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join(_JOIN_SECONDS)

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        found = self._ready.get()
        if isinstance(found, tuple):
            self._room.release()
            return found[0]
        # For whoever asks again: the end, or the error, stays.
        self._ready.put(found)
        if found is None:
            raise StopIteration
        raise found

    @property
    def ready(self) -> bool:
        """Whether `next` would not wait: an item, the end, or an error is there."""
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
