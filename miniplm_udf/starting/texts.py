"""The first rows of some files of an input, and how much text all of its files hold. Driver only, no Spark.

    paths, globs, folders, hf://datasets/NAME, a Delta table  ->  `TextSample`: rows, files, bytes

Owns the choice of the files that are read, evenly spaced over the sorted list; ingestion/beginnings.py reads them.
Totals are estimates from the sample: bytes of all files, times what the bytes that were read have held. Reads at most
about 20 MB of text. JSON lines and text need the base install alone; other formats need pyarrow, `.zst` zstandard.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

from miniplm_udf import storage
from miniplm_udf.config.sections import IngestConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import hub
from miniplm_udf.ingestion.beginnings import Limits, first_holds_array, read_beginning
from miniplm_udf.ingestion.file_format import choose_format, is_of_format
from miniplm_udf.ingestion.input_files import ListedFile, list_files
from miniplm_udf.ingestion.listing import base_folders, escape_glob, folder_source
from miniplm_udf.ingestion.path_hints import path_hint
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits

_FILES, _TEXT_FILES = 20, 300
_LIMITS = Limits(rows=500, n_bytes=1_000_000)


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
        sources: the files of each source, the most frequent first; empty unless text files are in folders.
    """

    format: str
    n_files: int
    n_bytes: int
    rows: list[Json | None]
    read_bytes: int
    is_complete: bool
    encoding_hint: str
    sources: tuple[tuple[str, int], ...] = ()

    @property
    def scale(self) -> float:
        """How many times the sample the whole input is."""
        return 1.0 if self.is_complete else max(1.0, self.n_bytes / max(1, self.read_bytes))


def read_sample(inputs: Sequence[str]) -> TextSample:
    """Reads the beginnings of some files.

    Args:
        inputs: paths, folders, globs, a Delta table or names of a hub.

    Returns:
        The sample.

    Raises:
        ConfigError: there is no file with a row, or a package is missing that reads the files.
    """
    files = [file for path in inputs for file in _list_files(path) if file.n_bytes]
    if not files:
        raise ConfigError(
            "--input: expected files with rows, found none; name the files, with a glob in quotes if there are many"
            + "".join(map(path_hint, inputs))
        )
    try:
        kind, files = _of_one_format(inputs, files)
        most = _TEXT_FILES if kind == "text" else _FILES
        chosen = files[:: max(1, -(-len(files) // most))]
        beginnings = [read_beginning(kind, file, _LIMITS) for file in chosen]
    except ImportError as error:
        raise ConfigError(
            f"--input: {files[0].place} cannot be read here, because {error.name} is not installed; pip install "
            f"'miniplm[spark]', or pip install {error.name}"
        ) from error
    return TextSample(
        format=kind,
        n_files=len(files),
        n_bytes=sum(file.n_bytes for file in files),
        rows=[row for part in beginnings for row in part.rows],
        read_bytes=sum(part.n_bytes for part in beginnings),
        is_complete=len(chosen) == len(files) and all(part.is_whole for part in beginnings),
        encoding_hint=next((part.hint for part in beginnings if part.hint), ""),
        sources=_folder_sources(inputs, files) if kind == "text" else (),
    )


def _folder_sources(inputs: Sequence[str], files: Sequence[ListedFile]) -> tuple[tuple[str, int], ...]:
    """The sources that ingest gives text files (whole_files.py); empty if no file is in a folder of the input."""
    places = [hub.local_copy(path) if hub.is_on_hub(path) else path for path in inputs]
    uris = [quote(storage.to_uri(file.place), safe="/:") for file in files]
    paths = [storage.to_uri(place) for place in places]
    bases = base_folders([escape_glob(path) if _exists(path) else path for path in paths], uris)
    names = [folder_source(uri, bases) for uri in uris]
    default = IngestConfig().default_source
    return tuple(Counter(name or default for name in names).most_common()) if any(names) else ()


def _exists(uri: str) -> bool:
    return storage.is_local(uri) and os.path.exists(storage.local_path(uri))


def _list_files(path: str) -> list[ListedFile]:
    plain = hub.local_copy(path) if hub.is_on_hub(path) else path
    if has_commits(storage.to_uri(plain)):
        return _table_files(storage.to_uri(plain))
    return list_files(plain)


def _table_files(uri: str) -> list[ListedFile]:
    """The files of a Delta table, as its log names them."""
    from deltalake import DeltaTable

    table = DeltaTable(storage.local_path(uri) if storage.is_local(uri) else uri)
    sizes = table.get_add_actions(flatten=True).column("size_bytes").to_pylist()
    return [ListedFile(place, int(size)) for place, size in zip(table.file_uris(), sizes, strict=True)]


def _of_one_format(inputs: Sequence[str], files: list[ListedFile]) -> tuple[str, list[ListedFile]]:
    """The format of the input, and the files that have it."""
    by_path = {quote(file.place): file for file in files}
    kind = choose_format(
        IngestConfig(input=list(inputs)), list(by_path), lambda paths: first_holds_array([by_path[p] for p in paths])
    )
    return kind, [file for path, file in by_path.items() if is_of_format(path, kind)]
