"""The first rows of some files of an input, and how much text all of its files hold. Driver only, no Spark.

    paths, globs, folders, hf://datasets/NAME, a Delta table  ->  `TextSample`: rows, files, bytes

Owns the choice of the files that are read (evenly spaced over the sorted list) and the reading of their beginnings.
Totals are estimates from the sample: bytes of all files, times what the bytes that were read have held. Reads at most
about 20 MB of text. JSON lines and text need the base install alone; other formats need pyarrow, `.zst` zstandard.
"""

import codecs
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import hub
from miniplm_udf.ingestion.encodings import encoding_hint, encoding_of
from miniplm_udf.ingestion.formats import SUFFIXES
from miniplm_udf.ingestion.json_arrays import is_array, json_rows
from miniplm_udf.ingestion.unpacking import DamagedDataError, unpacked_chunks
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits
from miniplm_udf.upkeep.input_checks import local_files

_FILES, _TEXT_FILES = 20, 300
_ROWS, _BYTES = 500, 1_000_000
_GLOB = re.compile(r"[*?\[\]{}]")
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The name of the field under which the content of a text file is a row.
TEXT = "text"


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of the input.

    Attributes:
        place: path or URI.
        n_bytes: its size.
    """

    place: str
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class TextSample:
    """The first rows of some files.

    Attributes:
        format: jsonl, json, text, parquet or arrow; a Delta table is parquet.
        n_files: number of files of that format.
        n_bytes: their size.
        rows: the rows as objects; a row that is no object is None.
        read_bytes: bytes of the files that hold these rows, as stored.
        is_complete: whether the rows are all rows of the input.
        encoding_hint: what to do about files that are not UTF-8; empty if the sample is.
    """

    format: str
    n_files: int
    n_bytes: int
    rows: list[Json | None]
    read_bytes: int
    is_complete: bool
    encoding_hint: str

    @property
    def scale(self) -> float:
        """How many times the sample the whole input is."""
        return 1.0 if self.is_complete else max(1.0, self.n_bytes / max(1, self.read_bytes))


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """The first rows of one file, the stored bytes that hold them, and whether they are all of its rows."""

    rows: list[Json | None]
    n_bytes: int
    is_whole: bool
    hint: str = ""


def read_sample(inputs: Sequence[str]) -> TextSample:
    """Reads the beginnings of some files.

    Args:
        inputs: paths, folders, globs, a Delta table or names of a hub.

    Returns:
        The sample.

    Raises:
        ConfigError: there is no file with a row, or a package is missing that reads the files.
    """
    files = [file for path in inputs for file in _list_files(path)]
    kind, files = _of_one_format(files)
    most = _TEXT_FILES if kind == "text" else _FILES
    chosen = files[:: max(1, -(-len(files) // most))]
    try:
        is_json = kind == "jsonl" and any(map(_holds_array, chosen))
        beginnings = [_beginning("json" if is_json else kind, file) for file in chosen]
    except ImportError as error:
        raise ConfigError(
            f"--input: {chosen[0].place} cannot be read here, because {error.name} is not installed; pip install "
            f"'miniplm[spark]', or pip install {error.name}"
        ) from error
    return TextSample(
        format="json" if is_json else kind,
        n_files=len(files),
        n_bytes=sum(file.n_bytes for file in files),
        rows=[row for part in beginnings for row in part.rows],
        read_bytes=sum(part.n_bytes for part in beginnings),
        is_complete=len(chosen) == len(files) and all(part.is_whole for part in beginnings),
        encoding_hint=next((part.hint for part in beginnings if part.hint), ""),
    )


def _list_files(path: str) -> list[TextFile]:
    plain = hub.local_copy(path) if hub.is_on_hub(path) else path
    if has_commits(storage.to_uri(plain)):
        return _table_files(storage.to_uri(plain))
    if storage.is_local(plain):
        return [TextFile(str(file), file.stat().st_size) for file in local_files(plain)]
    filesystem, inner = fsspec.core.url_to_fs(plain)
    matches = filesystem.glob(inner, detail=True) if _GLOB.search(inner) else filesystem.find(inner, detail=True)
    return [
        TextFile(filesystem.unstrip_protocol(name), int(facts["size"]))
        for name, facts in sorted(matches.items())
        if facts["type"] == "file" and not Path(name).name.startswith(("_", "."))
    ]


def _table_files(uri: str) -> list[TextFile]:
    """The files of a Delta table, as its log names them."""
    from deltalake import DeltaTable

    table = DeltaTable(storage.local_path(uri) if storage.is_local(uri) else uri)
    sizes = table.get_add_actions(flatten=True).column("size_bytes").to_pylist()
    return [TextFile(place, int(size)) for place, size in zip(table.file_uris(), sizes, strict=True)]


def _of_one_format(files: list[TextFile]) -> tuple[str, list[TextFile]]:
    """The format of the input, and the files that have it; text files next to others, and empty files, are left out."""
    by_kind: dict[str, list[TextFile]] = {kind: [] for kind in ("arrow", "parquet", "jsonl", "text")}
    for file in files:
        kind = next((kind for kind, ends in SUFFIXES.items() if file.place.lower().endswith(ends)), None)
        if kind is not None and file.n_bytes:
            by_kind[kind].append(file)
    for kind, matches in by_kind.items():
        if matches:
            return kind, matches
    raise ConfigError(
        "--input: expected files with rows, whose names end in "
        f"{' '.join(suffix for ends in SUFFIXES.values() for suffix in ends)}, found none; name the files, with a glob "
        "in quotes if there are many"
    )


def _open(file: TextFile) -> IO[bytes]:
    if storage.is_local(file.place):
        return open(storage.local_path(file.place), "rb")
    handle: IO[bytes] = fsspec.open(file.place, "rb").open()
    return handle


def _holds_array(file: TextFile) -> bool:
    with _open(file) as handle:
        return is_array(unpacked_chunks(file.place, handle))


def _beginning(kind: str, file: TextFile) -> _Beginning:
    readers: dict[str, Callable[[TextFile, IO[bytes]], _Beginning]] = {
        "jsonl": _json_beginning, "json": _json_beginning, "text": _text_beginning,
        "parquet": _parquet_beginning, "arrow": _arrow_beginning,
    }  # fmt: skip
    with _open(file) as handle:
        try:
            return readers[kind](file, handle)
        except (DamagedDataError, OSError):  # ingest reports a damaged file
            return _Beginning([], file.n_bytes, is_whole=True)


def _json_beginning(file: TextFile, handle: IO[bytes]) -> _Beginning:
    rows: list[Json | None] = []
    hint, n_bytes = "", 0
    for line in json_rows(_until_limit(file, handle)):
        if len(rows) >= _ROWS or n_bytes >= _BYTES:
            return _Beginning(rows, _stored(file, handle, n_bytes), is_whole=False, hint=hint)
        n_bytes += len(line) + 1
        if not line.strip():
            continue
        rows.append(_parsed(line))
        if rows[-1] is None and not hint:
            hint = encoding_hint(line)
    return _Beginning(rows, file.n_bytes, is_whole=True, hint=hint)


def _until_limit(file: TextFile, handle: IO[bytes]) -> Iterator[bytes]:
    """The content of a file; UTF-16 lines are no lines of bytes, and the whole file is shown as one of them."""
    chunks = unpacked_chunks(file.place, handle)
    first = next(chunks, b"")
    if first.startswith(_WIDE_MARKS):
        yield first.replace(b"\n", b" ")
        return
    yield from itertools.chain([first], chunks)


def _stored(file: TextFile, handle: IO[bytes], n_bytes: int) -> int:
    """The stored bytes of the rows that were read: of a plain file the rows' own, of a packed file what was read."""
    is_packed = file.place.lower().endswith((".gz", ".zst", ".bz2"))
    return min(file.n_bytes, handle.tell() if is_packed else n_bytes)


def _parsed(line: bytes) -> Json | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _text_beginning(file: TextFile, handle: IO[bytes]) -> _Beginning:
    content = b"".join(itertools.islice(unpacked_chunks(file.place, handle), 200))
    name = encoding_of(content)
    text = content.decode("utf-8-sig", "ignore") if name is None else None
    row: Json | None = None if text is None else {TEXT: text}
    return _Beginning([row], file.n_bytes, is_whole=True, hint=encoding_hint(content))


def _parquet_beginning(file: TextFile, handle: IO[bytes]) -> _Beginning:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(handle)
    n_rows = table.metadata.num_rows
    batch = next(table.iter_batches(batch_size=_ROWS), None)
    rows: list[Json | None] = [] if batch is None else list(batch.to_pylist())
    return _Beginning(rows, file.n_bytes * len(rows) // max(1, n_rows), is_whole=len(rows) == n_rows)


def _arrow_beginning(file: TextFile, handle: IO[bytes]) -> _Beginning:
    from miniplm_udf.ingestion.whole_files import arrow_batches, arrow_schema

    names = arrow_schema(handle).names
    handle.seek(0)
    rows: list[Json | None] = []
    n_bytes = 0
    for batch in arrow_batches(handle, names):
        rows += [_with_strings(row) for row in batch.to_pylist()]
        n_bytes += batch.nbytes
        if len(rows) >= _ROWS or n_bytes >= _BYTES:
            return _Beginning(rows, min(n_bytes, file.n_bytes), is_whole=False)
    return _Beginning(rows, file.n_bytes, is_whole=True)


def _with_strings(row: Json) -> Json:
    """A row of an Arrow file, whose strings were read as bytes."""
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value for name, value in row.items()
    }
