"""Decompresses `.gz`, `.zst` and `.bz2` files to their ends: all members or frames, and an error if data are missing.

Input: an open file and its name. Output: chunks of its content; a file with another ending is passed on as it is. (The
readers of Spark, and fsspec's reader for zstd, stop at the end of the first frame or of cut data without a word.) No
Spark; writes nothing. A retry gives the same bytes.
"""

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

_CHUNK_BYTES = 64 * 1024


class DamagedDataError(Exception):
    """The bytes of a file do not fit its format. Whoever reads the file turns it into a reject or a `MiniplmError`."""


def unpacked_chunks(path: str, handle: IO[bytes]) -> Iterator[bytes]:
    """Reads a file to its end.

    Args:
        path: name of the file; its ending names the format.
        handle: the file, at its start.

    Yields:
        Parts of the content, at most a few MiB each.

    Raises:
        DamagedDataError: the bytes do not fit the format, or end too early.
    """
    if path.endswith(".gz"):
        yield from _unpacked(handle, lambda: zlib.decompressobj(wbits=31), zlib.error, "gzip")
    elif path.endswith(".zst"):
        import zstandard

        yield from _unpacked(handle, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, "zstd")
    elif path.endswith(".bz2"):
        yield from _unpacked(handle, bz2.BZ2Decompressor, OSError, "bzip2")
    else:
        while data := handle.read(_CHUNK_BYTES):
            yield data


def _unpacked(handle: IO[bytes], make: Callable[[], Any], errors: type[Exception], name: str) -> Iterator[bytes]:
    """Decompresses the members or frames of a file one after the other.

    Args:
        handle: the file.
        make: makes a decompressor for one member.
        errors: the errors that the decompressor raises.
        name: name of the format, for messages.

    Raises:
        DamagedDataError: the bytes do not fit the format, or end too early.
    """
    unpacker, data = None, b""
    try:
        while data := data or handle.read(_CHUNK_BYTES):
            if unpacker is None:
                if not data.strip(b"\0"):  # padding after the last member
                    data = b""
                    continue
                unpacker = make()
            yield unpacker.decompress(data)
            data = unpacker.unused_data if unpacker.eof else b""
            if unpacker.eof:
                unpacker = None
    except errors as error:
        if getattr(error, "errno", None) is not None:  # an error of the storage; the errors of bz2 have no number
            raise
        raise DamagedDataError(f"damaged {name} data: {error}") from error
    if unpacker is not None:
        raise DamagedDataError(f"the {name} data end too early (a file that was cut)")
