"""Lists the files of an input on this machine, without Spark, and opens them. Driver only.

Input: a local path, a folder, a glob of Hadoop, or a URI of an object storage that fsspec reaches. Output: the files
with their sizes, sorted by name, without files that Spark hides. Used by `miniplm init` and by the checks before a
command starts; ingest itself takes Spark's listing (inputs.py). `listed_once` keeps each listing for the block that it
opens, and no longer, because files may change between two commands of a process. Writes nothing; a retry lists again.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from miniplm_udf import storage
from miniplm_udf.ingestion import globs

# A file that is opened for its beginning, or for its footer, is fetched in blocks of this size.
_BLOCK_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True, order=True)
class ListedFile:
    """A file of an input.

    Attributes:
        place: plain path or URI, not percent-encoded.
        n_bytes: its size; 0 for a file of a hub that is not on this machine.
        is_here: whether it can be opened; False for a file of a hub that is not on this machine.
    """

    place: str
    n_bytes: int
    is_here: bool = True

    def open(self) -> IO[bytes]:
        """Returns the file, opened for reading bytes."""
        if storage.is_local(self.place):
            return open(storage.local_path(self.place), "rb")
        filesystem, path = fsspec.core.url_to_fs(self.place)
        handle: IO[bytes] = filesystem.open(path, "rb", block_size=_BLOCK_BYTES)
        return handle


_KNOWN: contextvars.ContextVar[dict[str, list[ListedFile]] | None] = contextvars.ContextVar("listings", default=None)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Lists each path only once inside the block."""
    token = _KNOWN.set({} if (known := _KNOWN.get()) is None else known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def list_files(path: str, seconds: float | None = None) -> list[ListedFile]:
    """Lists the files at a path, in a folder and all folders below it, or of a glob.

    Args:
        path: the path as the config has it.
        seconds: time for each request of a storage that can be stopped; None waits for its answers.

    Returns:
        The files, sorted, without those that Spark hides; empty if none matches.

    Raises:
        TimeoutError: the storage did not answer in this time.
        ImportError: the package of the storage is not installed.
        Exception: any error of the storage's client.
    """
    known = _KNOWN.get()
    if known is not None and path in known:
        return known[path]
    files = sorted(set(_local_files(path) if storage.is_local(path) else _remote_files(path, seconds)))
    if known is not None:
        known[path] = files
    return files


def is_hidden(name: str) -> bool:
    """Whether Spark does not read a file, or a folder below the input, because of its name.

    Args:
        name: the name without folders.
    """
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _local_files(path: str) -> Iterator[ListedFile]:
    plain = storage.local_path(storage.to_uri(path))
    for place in globs.local_matches(plain) if globs.has_magic(plain) and not os.path.exists(plain) else [plain]:
        if os.path.isdir(place):
            yield from _below(place)
        elif os.path.isfile(place) and not is_hidden(os.path.basename(place)):
            yield ListedFile(os.path.normpath(place), os.path.getsize(place))


def _below(folder: str) -> Iterator[ListedFile]:
    """The files in a folder and below it. Links are followed, as Hadoop does, but no folder is read twice."""
    waiting, seen = [os.path.normpath(folder)], set()
    while waiting:
        # A folder that cannot be read is reported by ingest.
        with contextlib.suppress(OSError):
            current = waiting.pop()
            facts = os.stat(current)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.is_file():
                        yield ListedFile(entry.path, entry.stat().st_size)


def _remote_files(path: str, seconds: float | None) -> Iterator[ListedFile]:
    filesystem, inner = fsspec.core.url_to_fs(path)
    scheme = path.partition("://")[0]
    ask = functools.partial(_asked, filesystem, seconds)
    entries: list[tuple[str, str, Any]] = []
    if globs.has_magic(inner) and not ask("exists", inner):
        for pattern in globs.without_braces(inner):
            for place, facts in ask("glob", pattern, detail=True).items():
                below = ask("find", place, detail=True) if facts["type"] == "directory" else {place: facts}
                entries += [(place, name, entry) for name, entry in below.items()]
        if not entries and scheme in ("s3", "s3a"):  # fails if there is no such bucket, which a glob does not tell
            ask("ls", inner.partition("/")[0])
    else:
        place = inner.rstrip("/")
        entries += [(place, name, entry) for name, entry in ask("find", place, detail=True).items()]
    for place, name, entry in entries:
        below_place = name.rpartition("/")[2] if name == place else name.removeprefix(place).strip("/")
        if entry["type"] == "file" and not name.endswith("/") and not any(map(is_hidden, below_place.split("/"))):
            uri = f"{scheme}://{filesystem.unstrip_protocol(name).partition('://')[2]}"
            yield ListedFile(uri, int(entry["size"] or 0))


def _asked(filesystem: Any, seconds: float | None, method: str, *arguments: Any, **options: Any) -> Any:
    """Calls a method of a file system. A call that takes too long is stopped, so that it makes no further requests.

    Raises:
        TimeoutError: it took too long.
    """
    if seconds is None or not isinstance(filesystem, AsyncFileSystem):
        return getattr(filesystem, method)(*arguments, **options)
    call = asyncio.wait_for(getattr(filesystem, f"_{method}")(*arguments, **options), seconds)
    return asyncio.run_coroutine_threadsafe(call, filesystem.loop).result()
