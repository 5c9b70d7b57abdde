"""What a Spark worker and a scorer process say to each other over a unix socket: tuples, pickled, behind their size.

    worker -> process   open (what is asked, once), then slice (Arrow IPC), as many as it has
    process -> worker   hello, loading, loaded, ready; of each slice in turn scored (Arrow IPC, Tally); error; dying

The socket lies in a folder that only this user can look into, which is why unpickling is safe. Owns the bytes only.
"""

import contextlib
import pickle
import select
import socket
import struct
from typing import Any

import pyarrow as pa

_SIZE = struct.Struct("!Q")


class Gone(Exception):
    """There is nobody at the other end any more."""


class Wire:
    """One end of a connection. One thread may receive while another sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, kind: str, *values: Any) -> None:
        """Sends a message.

        Raises:
            Gone: it cannot arrive.
        """
        try:
            body = pickle.dumps((kind, *values), protocol=5)
            self._connection.sendall(_SIZE.pack(len(body)))
            self._connection.sendall(body)
        except OSError as error:
            raise Gone from error

    def receive(self) -> tuple[Any, ...]:
        """Waits for a message: its kind and its values.

        Raises:
            Gone: none is to come.
        """
        try:
            body = self._read(*_SIZE.unpack(self._read(_SIZE.size)))
        except OSError as error:
            raise Gone from error
        return tuple(pickle.loads(body))

    def has_message(self, patience_seconds: float) -> bool:
        """Whether `receive` would not wait for a message to begin, now or before patience is at its end."""
        return bool(select.select([self._connection], [], [], patience_seconds)[0])

    def _read(self, size: int) -> bytearray:
        """As many bytes, and not one more: what is read is not hidden from `has_message`."""
        found = bytearray(size)
        rest = memoryview(found)
        while rest:
            n = self._connection.recv_into(rest)
            if n == 0:
                raise Gone
            rest = rest[n:]
        return found

    def stop_reading(self) -> None:
        """Wakes a thread that waits in `receive`, which raises Gone. What is sent still arrives."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def to_ipc(batches: list[pa.RecordBatch]) -> bytes:
    """Record batches of one schema as an Arrow stream; nothing where there are none."""
    if not batches:
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_ipc(stream: bytes) -> list[pa.RecordBatch]:
    return list(pa.ipc.open_stream(stream)) if stream else []
