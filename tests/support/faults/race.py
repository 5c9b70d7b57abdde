"""A race of several processes that append to one Delta table on S3, and what became of their rows.

Input: a server (tests.support.s3_server), a table and the kinds of the writers. Output: a `RaceResult`: commits that
returned, commits that the storage refused or replaced (by the server's log), rows lost and rows duplicated (by the
table, read with delta-rs). The writers are processes of `tests.support.faults.appender`.
"""

import collections
import dataclasses
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from tests.support import s3_server
from tests.support.faults.drivers import REPOSITORY
from tests.support.standalone import die_with_parent

_PUT = re.compile(r"PUT \S*/_delta_log/(\d{20})\.json\S* (\d+)$")
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class RaceResult:
    """What a race has left.

    Attributes:
        writers: kinds of the writers.
        commits: commits that returned to their writers.
        refused: puts of a commit that the server answered with 412: each would have replaced another's commit.
        replaced: commits that a later put has replaced.
        lost: rows of commits that returned, and are not in the table.
        duplicated: rows that are in the table more than once, counted without the first.
        unknown: rows in the table whose commit returned to nobody.
        gaps: versions that are missing between 0 and the newest.
        seconds: from the start of the first commit to the end of the last.
    """

    writers: tuple[str, ...]
    commits: int
    refused: int
    replaced: int
    lost: int
    duplicated: int
    unknown: int
    gaps: int
    seconds: float


def race(
    server: s3_server.S3Server | None, table: str, writers: Sequence[str], enough: Callable[[int, int], bool],
    disturb: Callable[[], None] = lambda: None, limit_seconds: float = 600.0,
) -> RaceResult:  # fmt: skip
    """Lets the writers append at once.

    Args:
        server: a server that counts its requests; None: another service, of which `refused` and `replaced` are 0.
        table: URI of the table, which does not exist yet.
        writers: kinds of the writers, as in `appender.WRITERS`.
        enough: whether the race is over, by the numbers of refused and of replaced commits.
        disturb: called twice a second while the race runs.

    Raises:
        RuntimeError: a writer failed, or the race took too long.
    """
    write_deltalake(table, pa.table({"id": pa.array([], pa.int64())}))
    if server is not None:
        server.reset()
    running = [_Writer(kind, number, table) for number, kind in enumerate(writers)]
    try:
        for writer in running:
            writer.wait_until_ready()
        start = time.monotonic()
        for writer in running:
            writer.begin()
        while not enough(*_puts(server)):
            disturb()
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - start > limit_seconds:
                raise RuntimeError(f"the race was not over in {limit_seconds:.0f} s: {_puts(server)} refused, replaced")
            for writer in running:
                writer.check()
        committed = [row for writer in running for row in writer.end()]
    finally:
        for writer in running:
            writer.kill()
    seconds = time.monotonic() - start
    return RaceResult(tuple(writers), len(committed), *_puts(server), *_rows(table, committed), _gaps(table), seconds)


def _puts(server: s3_server.S3Server | None) -> tuple[int, int]:
    """Numbers of refused and of replaced commits."""
    log = [] if server is None else server.log()
    puts = [match.groups() for line in log if (match := _PUT.search(line))]
    done = collections.Counter(version for version, status in puts if status == "200")
    return sum(status == "412" for _, status in puts), sum(count - 1 for count in done.values())


def _rows(table: str, committed: Sequence[int]) -> tuple[int, int, int]:
    """Numbers of rows that are lost, duplicated and unknown."""
    counts = collections.Counter(DeltaTable(table).to_pyarrow_table().column("id").to_pylist())
    lost, unknown = set(committed) - counts.keys(), counts.keys() - set(committed)
    return len(lost), sum(count - 1 for count in counts.values()), len(unknown)


def _gaps(table: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(f"{table}/_delta_log")
    filesystem.invalidate_cache()
    names = (Path(name).name for name in filesystem.ls(path, detail=False))
    versions = {int(name[:20]) for name in names if re.fullmatch(r"\d{20}\.json", name)}
    return max(versions) + 1 - len(versions)


class _Writer:
    """A process that appends."""

    def __init__(self, kind: str, number: int, table: str) -> None:
        self._kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults.appender", kind, str(number), table],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        self._lines: list[str] = []
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=lambda stream=stream, kept=kept: kept.extend(_lines_of(stream)), daemon=True)
            for stream, kept in ((self._process.stdout, self._lines), (self._process.stderr, self._errors))
        ]
        for reader in self._readers:
            reader.start()

    def wait_until_ready(self) -> None:
        while not self._lines:
            self.check()
            time.sleep(0.1)

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"writer {self._kind}: ended with {self._process.returncode}: {self._errors[-30:]}")

    def end(self) -> list[int]:
        """Lets the process finish its commit; returns the rows of all its commits."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(120) != 0:
            self.check()
        for reader in self._readers:
            reader.join(10)
        return [int(line) for line in self._lines[1:]]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _lines_of(stream: Iterator[str] | None) -> Iterator[str]:
    assert stream is not None
    yield from (line.rstrip("\n") for line in stream)
