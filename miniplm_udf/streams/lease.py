"""A lease on a query: of two drivers that would run it at once, one does. Driver only.

Input: a place, one small JSON file a query under `<root>/_leases/`. The holder renews its lease every few seconds by
counting; another driver takes it where the holder has ended (on this machine) or has stopped counting, judged by its
own clock alone, and is refused with the holder's name otherwise. Whoever was taken for dead finds that out before its
next micro-batch. Exactly-once does not rest on the lease: commits are told apart by (query_id, batch_id). It is there
so that two drivers do not score the same text twice over, and that one is told.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError

LOGGER = logging.getLogger("miniplm.streams")

_RENEW_SECONDS = 5.0
# A holder on another machine that has not renewed for so long is given up.
_PATIENCE_SECONDS = 30.0
# Where two take a lease at once, both look again after this long: the later writer has it.
_SETTLE_SECONDS = 0.3
_LOOK_SECONDS = 0.5
_TELL_SECONDS = 60.0


def lease_uri(root: str, name: str) -> str:
    return storage.join(root, "_leases", f"{name}.json")


class Lease:
    """The lease of one query, held inside a `with` block.

    Args:
        uri: its file (`lease_uri`).
        name: of the query, for messages.
        waits: for a holder that is at work, instead of refusing.

    Raises:
        CorpusError: on entering, another driver runs the query.
    """

    def __init__(self, uri: str, name: str, waits: bool = False) -> None:
        self._uri, self._name, self._waits = uri, name, waits
        self._token = uuid.uuid4().hex
        self._renewals = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name=f"lease {name}", daemon=True)

    def __enter__(self) -> "Lease":
        self._wait_for_holder()
        self._write()
        time.sleep(_SETTLE_SECONDS)
        self.check()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        found = read(self._uri)
        if found is not None and found["token"] == self._token:
            filesystem, path = fsspec.core.url_to_fs(self._uri)
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm(path)

    def check(self) -> None:
        """Before work is begun that only the holder may do.

        Raises:
            CorpusError: another driver has the lease now.
        """
        found = read(self._uri)
        if found is None or found["token"] != self._token:
            by = "nobody: its file was removed" if found is None else holder(found)
            raise CorpusError(
                f"{self._name}: this driver ran the query and was given up for dead; it is run by {by} now. Nothing is "
                "lost: what was committed counts, and the other goes on from there"
            )

    def _wait_for_holder(self) -> None:
        """Returns when there is no holder, or it has ended."""
        found = read(self._uri)
        seen, since, told = _beat(found), time.monotonic(), time.monotonic()
        while found is not None and not _has_ended_here(found):
            if _beat(found) != seen:
                self._refuse(found)
                seen, since = _beat(found), time.monotonic()
            if time.monotonic() - since >= _PATIENCE_SECONDS:
                LOGGER.warning("%s: taking over from %s, which is silent", self._name, holder(found))
                return
            if told <= time.monotonic():
                LOGGER.info("%s: %s has it; waiting", self._name, holder(found))
                told = time.monotonic() + _TELL_SECONDS
            time.sleep(_LOOK_SECONDS)
            found = read(self._uri)

    def _refuse(self, found: dict[str, Any]) -> None:
        if not self._waits:
            raise CorpusError(
                f"{self._name}: the query is run by {holder(found)}; two at once would do the same work twice. "
                "Stop that one, or let it do the work"
            )

    def _write(self) -> None:
        record = {"token": self._token, "renewals": self._renewals, "pid": os.getpid(), **_here()}
        storage.write_json(self._uri, record)

    def _renew_for_ever(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                found = read(self._uri)
                if found is None or found["token"] != self._token:
                    return  # `check` says so, before the next micro-batch
                self._renewals += 1
                self._write()
            except OSError as error:  # a storage that is away for a moment
                LOGGER.warning("%s: its lease cannot be renewed: %s", self._name, error)


def read(uri: str) -> dict[str, Any] | None:
    """The record of a lease, or None where nobody holds one."""
    try:
        found: dict[str, Any] | None = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        # Released between two looks, or half written on a storage without renaming.
        return None
    return found


def _beat(record: dict[str, Any] | None) -> tuple[str, int] | None:
    return (record["token"], record["renewals"]) if record else None


def holder(record: dict[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']}"


def is_held(uri: str) -> bool:
    """Whether a driver holds the lease, as far as can be told at once: one of another machine that died still does."""
    found = read(uri)
    return found is not None and not _has_ended_here(found)


def _has_ended_here(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if record["machine"] != _here()["machine"]:
        return False
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _here() -> dict[str, str]:
    """Names this machine, in the sense of "a process id means the same": one boot, one space of process ids."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": host, "machine": f"{host}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"}
    except OSError:
        return {"host": host, "machine": f"{host}/{uuid.getnode():x}"}
