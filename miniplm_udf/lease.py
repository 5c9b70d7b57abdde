"""A lease on a piece of work (a query, a run, a training), so that only one process at a time does it.

Input: the URI of one small JSON file per lease, under `<root>/_leases/`. The holder renews its lease every few seconds
by increasing a counter. Another process takes the lease if the holder has ended (on this machine) or its counter has
not moved for 30 s on the other process's clock; otherwise it is refused with the holder's name. A lease is taken and
renewed by conditional writes (conditional_files.py), so that of two that take it on S3 at the same moment one wins. A
holder that lost its lease learns it from `check`, before its next micro-batch or checkpoint. Exactly-once does not
depend on leases, because commits carry (query_id, batch_id); leases keep two processes from doing the same work, and
the second one gets an error. On the driver and in the trainer; imports no Spark.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

import fsspec

from miniplm_udf import conditional_files, storage
from miniplm_udf.errors import CorpusError, MiniplmError, reason

LOGGER = logging.getLogger("miniplm.lease")

_RENEW_SECONDS = 5.0
# A holder on another machine that has not renewed for this long is considered dead.
_PATIENCE_SECONDS = 30.0
# Where two processes may both write the lease, both read it again after this time: the later writer has it.
_SETTLE_SECONDS = 0.3
_POLL_SECONDS = 0.5
_LOG_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class LeaseRecord:
    """The file of a lease.

    Attributes:
        token: random; identifies the holder.
        renewals: how often the holder has renewed the lease.
        pid: process id of the holder.
        host: host name of the holder, for messages.
        machine: host, boot and namespace within which `pid` means the same process.
    """

    token: str
    renewals: int
    pid: int
    host: str
    machine: str

    @property
    def holder(self) -> str:
        """The process that holds the lease, for messages."""
        return f"process {self.pid} on {self.host}"


class Lease:
    """The lease of one piece of work, held inside a `with` block.

    Args:
        uri: the lease's file (`layout.Root.lease`).
        name: name of the work, for messages.
        waits: whether to wait for a holder that is working, instead of raising.
        what: kind of work, for messages: query, run, training.

    Raises:
        CorpusError: another process holds the lease; raised at the start of the block.
        MiniplmError: the file cannot be written, for example because the disk is full; raised at the same moment.
    """

    def __init__(self, uri: str, name: str, waits: bool = False, what: str = "query") -> None:
        self._uri, self._name, self._waits, self._what = uri, name, waits, what
        self._token = uuid.uuid4().hex
        self._renewals = 0
        self._tag = ""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name=f"lease {name}", daemon=True)

    def __enter__(self) -> "Lease":
        try:
            while not self._take():
                pass
        except OSError as error:
            raise MiniplmError(
                f"{storage.redact(self._uri)}: the lease of the {self._what} {self._name} cannot be written "
                f"({reason(error)}); free space there, or allow writing, and run it again"
            ) from error
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        record = read(self._uri)
        if record is not None and record.token == self._token:
            filesystem, path = fsspec.core.url_to_fs(self._uri)
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm_file(path)

    def _take(self) -> bool:
        """Waits for the holder, if there is one, and takes the lease; False if another process was faster."""
        left = self._wait_for_holder()
        text = self._text()
        if left is not None:
            tag = conditional_files.replace(self._uri, text, left)
            is_safe = conditional_files.replaces_in_one_step(self._uri)
        else:
            tag = conditional_files.create(self._uri, text)
            is_safe = conditional_files.creates_in_one_step(self._uri)
            if tag is None and storage.is_local(self._uri) and conditional_files.read(self._uri) is None:
                storage.write_text(self._uri, text)  # a disk without hard links
                tag, is_safe = text, False
        if tag is None:
            return False
        self._tag = tag
        if not is_safe:
            time.sleep(_SETTLE_SECONDS)
            self.check()
        return True

    def check(self) -> None:
        """Checks that this process still holds the lease; call it before work that only the holder may do.

        Raises:
            CorpusError: another process has the lease now.
        """
        record = read(self._uri)
        if record is None or record.token != self._token:
            by = "the file of the lease was removed" if record is None else f"{record.holder} has taken over"
            raise CorpusError(
                f"{self._name}: the {self._what} of this process did not renew its lease in time, and {by}. All "
                "commits are kept."
            )

    def _wait_for_holder(self) -> str | None:
        """Returns once there is no holder: None, or the tag of the file that a dead holder left."""
        record, tag = _read(self._uri)
        last_beat, since, next_log = _beat(record), time.monotonic(), time.monotonic()
        while record is not None and not _has_ended_here(record):
            if _beat(record) != last_beat:
                self._refuse(record)
                last_beat, since = _beat(record), time.monotonic()
            if time.monotonic() - since >= _PATIENCE_SECONDS:
                LOGGER.warning("%s: taking over from %s, which has not renewed its lease", self._name, record.holder)
                return tag
            if next_log <= time.monotonic():
                LOGGER.info("%s: waiting for %s, which holds its lease", self._name, record.holder)
                next_log = time.monotonic() + _LOG_SECONDS
            time.sleep(_POLL_SECONDS)
            record, tag = _read(self._uri)
        return tag

    def _refuse(self, record: LeaseRecord) -> None:
        if not self._waits:
            raise CorpusError(
                f"{self._name}: the {self._what} is run by {record.holder}; two at once would do the same work twice. "
                "Stop that process, or let it do the work"
            )

    def _record(self) -> LeaseRecord:
        return LeaseRecord(self._token, self._renewals, os.getpid(), socket.gethostname(), _machine())

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._record()), indent=2, sort_keys=True) + "\n"

    def _renew_for_ever(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            try:
                if not self._renew():
                    return  # `check` reports it before the next micro-batch
            except OSError as error:  # the storage may be unreachable for a moment
                LOGGER.warning("%s: its lease cannot be renewed: %s", self._name, error)

    def _renew(self) -> bool:
        """Renews the lease; False if another process has it."""
        self._renewals += 1
        tag = conditional_files.replace(self._uri, self._text(), self._tag)
        if tag is None:
            # An earlier renewal may have been written although its answer was lost.
            record, tag = _read(self._uri)
            if record is None or tag is None or record.token != self._token:
                return False
        self._tag = tag
        return True


def read(uri: str) -> LeaseRecord | None:
    """Reads the record of a lease.

    Args:
        uri: URI of the file of the lease (`Root.lease`).

    Returns:
        The record; None if nobody holds the lease, or its file is damaged.
    """
    return _read(uri)[0]


def _read(uri: str) -> tuple[LeaseRecord | None, str | None]:
    """The record of a lease, None if it is damaged, and the tag of its file, None if there is no file."""
    file = conditional_files.read(uri)
    if file is None:
        return None, None
    try:
        record = json.loads(file.text)
        return LeaseRecord(**{field.name: record[field.name] for field in dataclasses.fields(LeaseRecord)}), file.tag
    except (ValueError, KeyError, TypeError):  # half written on a storage without renaming, or damaged
        return None, file.tag


def _beat(record: LeaseRecord | None) -> tuple[str, int] | None:
    return (record.token, record.renewals) if record else None


def holder(uri: str) -> str | None:
    """Returns the process that holds the lease, in words; None if there is none.

    A holder that died on another machine counts until its lease is taken.

    Args:
        uri: URI of the file of the lease (`Root.lease`).
    """
    record = read(uri)
    return None if record is None or _has_ended_here(record) else record.holder


def is_held(uri: str) -> bool:
    """Whether a process holds the lease.

    Args:
        uri: URI of the file of the lease (`Root.lease`).
    """
    return holder(uri) is not None


def _has_ended_here(record: LeaseRecord) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if record.machine != _machine():
        return False
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    """Identifies the host, the boot and the namespace within which a process id means the same process."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{host}/{uuid.getnode():x}"
