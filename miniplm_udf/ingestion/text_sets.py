"""Reads external sets of texts, on which models are evaluated: JSON lines, Parquet, or a Delta table at a version.

Input: the name and the config of a set (`evaluate.inputs`). Output: its texts with their sources, in the order of the
sorted file names, and each bad row with its reason and place. Decides as ingestion does what a bad row is
(documents.py); a bad row is never an error, but a missing column, a missing path and an unreadable file are. Reads with
fsspec and pyarrow, one part of a file at a time; needs no Spark and writes nothing. In the trainer, and on the driver
for the state of the files. A retry reads the same rows.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.config.evaluate import TextInputConfig
from miniplm_udf.config.sections import FieldsConfig, SplitConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.ingestion.documents import Document, DocumentReader, Reject
from miniplm_udf.ingestion.formats import format_of
from miniplm_udf.ingestion.unpacking import unpacked_chunks
from miniplm_udf.store import delta_files
from miniplm_udf.store.delta_log import has_commits, newest_version

_GLOB = re.compile(r"[*?\[\]]")
_PROBED_LINES = 100
# A remote file is fetched in blocks; the default size is for whole files.
_PROBED_BYTES = 1_000_000
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row without a usable text.

    Attributes:
        reason: a fixed word, as in the column `rejects.reason`.
        place: the file and the number of the line or row in it, from 1.
    """

    reason: str
    place: str


@dataclasses.dataclass(frozen=True)
class TextSet:
    """The files of one external set.

    Attributes:
        name: name of the set.
        config: its section of the config.
        format: `jsonl`, `parquet` or `delta`.
        location: the path or URI that the config names, without secrets.
        files: plain paths and URIs of the files, sorted.
        version: version of the Delta table; None for files.
        state: plain data that changes when a file or the version changes.
    """

    name: str
    config: TextInputConfig
    format: str
    location: str
    files: list[str]
    version: int | None
    state: list[Any]

    @property
    def key(self) -> str:
        """Key of the set in the config, for messages."""
        return f"evaluate.inputs.{self.name}"

    def rows(self) -> Iterator[Document | BadRow]:
        """Reads the set.

        Yields:
            Each row, as a document or as a bad row with its reason.

        Raises:
            ConfigError: a Parquet file does not have the text column.
            CorpusError: a file cannot be read to its end.
        """
        for file in self.files:
            read = self._lines(file) if self.format == "jsonl" else self._table_rows(file)
            for number, row in enumerate(read, start=1):
                if isinstance(row, Reject):
                    place = "line" if self.format == "jsonl" else "row"
                    yield BadRow(row.reason, f"{storage.redact(file)} {place} {number}")
                elif row is not None:
                    yield row

    def check_columns(self) -> None:
        """Refuses a set without the text column, before any model is loaded.

        Raises:
            ConfigError: the first file lacks the column: for JSON lines, none of its first objects has the field.
            CorpusError: the first file cannot be read.
        """
        if self.format != "jsonl":
            next(iter(self._table_rows(self.files[0])), None)
            return
        lines = list(itertools.islice(self._lines(self.files[0], block_size=_PROBED_BYTES), _PROBED_LINES))
        without = [row for row in lines if isinstance(row, Reject) and row.reason == "missing_text"]
        if without and not any(isinstance(row, Document) for row in lines):
            raise ConfigError(
                f"{self.key}.text_column: expected the field {self.config.text_column!r} in "
                f"{storage.redact(self.files[0])}, found no line with a text in it (the first: {without[0].detail}); "
                f"name another with {self.key}.text_column"
            )

    @property
    def _reader(self) -> DocumentReader:
        fields = FieldsConfig(text=self.config.text_column, source=self.config.source_column)
        return DocumentReader(fields, self.name, SplitConfig(reference=0.0, heldout=0.0))

    def _lines(self, file: str, **options: int) -> Iterator[Document | Reject | None]:
        reader, (filesystem, path) = self._reader, fsspec.core.url_to_fs(file)
        try:
            with filesystem.open(path, "rb", **options) as handle:
                parts: list[bytes] = []
                for chunk in unpacked_chunks(file, handle):
                    parts.append(chunk)
                    if b"\n" in chunk:  # else a long line would be copied for each of its chunks
                        *lines, rest = b"".join(parts).split(b"\n")
                        parts = [rest]
                        yield from map(reader.read_line, lines)
                yield reader.read_line(b"".join(parts))
        except Exception as error:  # each file system has errors of its own
            raise self._unreadable(file, error) from error

    def _table_rows(self, file: str) -> Iterator[Document | Reject]:
        reader, (filesystem, path) = self._reader, fsspec.core.url_to_fs(file)
        try:
            import pyarrow.parquet as pq

            with filesystem.open(path, "rb") as handle, pq.ParquetFile(handle) as parquet:
                columns = self._columns(file, parquet.schema_arrow)
                for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=columns):
                    texts, *sources = (_as_bytes(batch.column(column)) for column in columns)
                    for text, source in zip(texts, sources[0] if sources else [None] * len(texts), strict=True):
                        yield reader.read_columns(text, None, source, None)
        except ConfigError:
            raise
        except Exception as error:
            raise self._unreadable(file, error) from error

    def _columns(self, file: str, schema: Any) -> list[str]:
        """The names of the columns to read: the text, and the source if there is one."""
        names, text = schema.names, self.config.text_column
        where = storage.redact(file)
        if text not in names:
            raise ConfigError(
                f"{self.key}.text_column: expected a column of {where}, found no {text!r} among {', '.join(names)}; "
                f"name another with {self.key}.text_column"
            )
        kind = schema.field(text).type
        if not _is_text(kind):
            raise ConfigError(
                f"{self.key}.text_column: expected a column of strings, found {text!r} of type {kind} in {where}; "
                f"name another with {self.key}.text_column"
            )
        source = self.config.source_column
        return [text, source] if source in names and _is_text(schema.field(source).type) else [text]

    def _unreadable(self, file: str, error: Exception) -> CorpusError:
        return CorpusError(
            f"{self.key}: {storage.redact(file)} cannot be read to its end ({type(error).__name__}: {error}); restore "
            "the file or take it out of the set"
        )


def open_text_set(name: str, config: TextInputConfig) -> TextSet:
    """Returns a set with its files; reads no text.

    Args:
        name: name of the set.
        config: its section of the config.

    Raises:
        ConfigError: there is no file at the path, the files have several formats, or the Delta table or its version
            does not exist.
        CorpusError: the Delta table has features that cannot be read from its files.
    """
    key = f"evaluate.inputs.{name}"
    uri, shown = storage.to_uri(config.path), storage.redact(config.path)
    if config.format == "delta" or (config.format == "auto" and has_commits(uri)):
        return _delta_set(name, config, uri)
    if config.version is not None:
        raise ConfigError(f"{key}.version: expected a Delta table, found none at {shown}; remove the key")
    files = _files(config)
    if not files:
        raise ConfigError(f"{key}.path: expected files of texts, found none at {storage.redact(uri)}; correct the path")
    formats = {file: _format(file) for file in files} if config.format == "auto" else {files[0]: config.format}
    if len(set(formats.values())) > 1 or None in formats.values():
        raise ConfigError(
            f"{key}.path: expected files of one format, .jsonl[.gz|.zst|.bz2] or .parquet, found "
            f"{', '.join(sorted(formats)[:5])}; name them with a glob, or set {key}.format"
        )
    kind = str(formats[files[0]])
    return TextSet(name, config, kind, shown, files, None, state_of(config))


def state_of(config: TextInputConfig) -> list[Any]:
    """Describes the files of a set without opening them: equal states mean unchanged texts.

    Args:
        config: its section of the config.

    Returns:
        Plain data: the version of a Delta table, or names, sizes and times of files; empty if there is no file.
    """
    uri = storage.to_uri(config.path)
    if config.format == "delta" or (config.format == "auto" and has_commits(uri)):
        return [newest_version(uri) if config.version is None else config.version]
    return [entry for file in _files(config) for entry in storage.folder_state(file)]


def _delta_set(name: str, config: TextInputConfig, uri: str) -> TextSet:
    from deltalake.exceptions import DeltaError

    shown = storage.redact(config.path)
    try:
        table = delta_files.open_table(uri, config.version)
    except DeltaError as error:
        at = "" if config.version is None else f" at version {config.version}"
        raise ConfigError(
            f"evaluate.inputs.{name}: expected a Delta table at {shown}{at}, found none that can be opened: "
            f"{str(error).splitlines()[0]}; correct the keys path and version"
        ) from error
    files, version = delta_files.files_of(table, uri), int(table.version())
    if not files:
        raise ConfigError(f"evaluate.inputs.{name}: expected rows, found an empty table at {shown} version {version}")
    # Names of data files are unique, and a file never changes: a version without a change of data is the same set.
    return TextSet(name, config, "delta", shown, files, version, [file.rsplit("/", 1)[-1] for file in files])


def _files(config: TextInputConfig) -> list[str]:
    """Plain paths of local files, URIs of others, sorted; of a folder, all files in it and below it."""
    path = storage.local_path(storage.to_uri(config.path)) if storage.is_local(config.path) else config.path
    filesystem, inner = fsspec.core.url_to_fs(path)
    if filesystem.isfile(inner):
        return [path]
    matches = filesystem.glob(inner) if _GLOB.search(inner) and not filesystem.exists(inner) else filesystem.find(inner)
    names = sorted(str(match) for match in matches if filesystem.isfile(match))
    visible = [name for name in names if not name.rsplit("/", 1)[-1].startswith(("_", "."))]
    return visible if storage.is_local(config.path) else [filesystem.unstrip_protocol(name) for name in visible]


def _format(file: str) -> str | None:
    kind = format_of(file)
    return kind if kind in ("jsonl", "parquet") else None


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _as_bytes(column: Any) -> list[bytes | None]:
    """The values of a column of strings as bytes: a value that is not UTF-8 is a bad row, not an error."""
    import pyarrow as pa

    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    values: list[bytes | None] = plain.cast(pa.large_binary()).to_pylist()
    return values
