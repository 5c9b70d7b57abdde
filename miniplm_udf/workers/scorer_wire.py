"""The messages between a Spark worker and a scorer process over a unix socket: pickled dataclasses after their size.

    worker -> process   TaskRequest, once, then any number of SliceRequest
    process -> worker   LoadingModel, LoadedModel; TaskReady; a ScoredSlice for each slice in turn; or at any time
                        TaskFailed or ProcessDying

The socket is in a folder that only this user can read, so unpickling is safe. Owns the bytes and the messages; a
retried task connects again. Executor side, both ends.
"""

import contextlib
import dataclasses
import pickle
import select
import socket
import struct

import pyarrow as pa

from miniplm_udf.errors import MiniplmError
from miniplm_udf.workers.score_counts import ScoreCounts

_SIZE = struct.Struct("!Q")


class ConnectionClosed(Exception):
    """The process at the other end has closed the connection or ended."""


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """The first message of a task.

    Attributes:
        daemon: process id of the daemon that forked the worker.
        path: the worker's `sys.path`.
        factories: makers of the scorers by alias, pickled as Spark pickles functions.
        carried: names of the columns that come out unchanged, the instance's id first.
        aliases: the models that the first rows name; loaded before the first slice.
        schema: columns of the results.
    """

    daemon: int
    path: list[str]
    factories: bytes
    carried: list[str]
    aliases: list[str]
    schema: pa.Schema


@dataclasses.dataclass(frozen=True)
class SliceRequest:
    """A slice to score, as an Arrow stream (`to_ipc`)."""

    stream: bytes


@dataclasses.dataclass(frozen=True)
class LoadingModel:
    """The process begins to load the model `alias`."""

    alias: str


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """The model is loaded; slices of `slice_bytes` suit the models that are loaded now."""

    slice_bytes: int


@dataclasses.dataclass(frozen=True)
class TaskReady:
    """The models of the request are loaded; slices should have `slice_bytes`."""

    slice_bytes: int


@dataclasses.dataclass(frozen=True)
class ScoredSlice:
    """The scored rows of a slice as an Arrow stream (`to_ipc`), and their counts."""

    stream: bytes
    counts: ScoreCounts


@dataclasses.dataclass(frozen=True)
class TaskFailed:
    """The error that ends the task; the process keeps running."""

    error: MiniplmError


@dataclasses.dataclass(frozen=True)
class ProcessDying:
    """The process ends after an error, described in `reason`."""

    reason: str


Message = TaskRequest | SliceRequest | LoadingModel | LoadedModel | TaskReady | ScoredSlice | TaskFailed | ProcessDying


class Wire:
    """One end of a connection. One thread may receive while another sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: Message) -> None:
        """Sends a `message`.

        Raises:
            ConnectionClosed: the message cannot arrive.
        """
        try:
            body = pickle.dumps(message, protocol=5)
            self._connection.sendall(_SIZE.pack(len(body)))
            self._connection.sendall(body)
        except OSError as error:
            raise ConnectionClosed from error

    def receive(self) -> Message:
        """Waits for a message.

        Raises:
            ConnectionClosed: no message will come.
        """
        try:
            body = self._read(*_SIZE.unpack(self._read(_SIZE.size)))
        except OSError as error:
            raise ConnectionClosed from error
        message: Message = pickle.loads(body)
        return message

    def has_message(self, patience_seconds: float) -> bool:
        """Whether a message begins, or the connection ends, within `patience_seconds`.

        Args:
            patience_seconds: longest time to wait; 0 does not wait.
        """
        return bool(select.select([self._connection], [], [], patience_seconds)[0])

    def _read(self, size: int) -> bytearray:
        """Reads exactly `size` bytes: `has_message` would not see bytes that are read too early."""
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            n = self._connection.recv_into(rest)
            if n == 0:
                raise ConnectionClosed
            rest = rest[n:]
        return data

    def stop_reading(self) -> None:
        """Wakes a thread that waits in `receive`, which then raises ConnectionClosed. Sent messages still arrive."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Closes the connection in both directions."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def to_ipc(batches: list[pa.RecordBatch]) -> bytes:
    """Writes record batches as an Arrow stream.

    Args:
        batches: batches of one schema.

    Returns:
        The stream; no bytes for no batches.
    """
    if not batches:
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_ipc(stream: bytes) -> list[pa.RecordBatch]:
    """Returns the record batches that `to_ipc` wrote.

    Args:
        stream: the stream; no bytes give no batches.
    """
    return list(pa.ipc.open_stream(stream)) if stream else []
