"""The Parquet files of a Delta table, for readers without a JVM: the trainer, the notebook, a user's own script.

Input: the location of a table, a path or a URI as `root` is written (not percent-encoded), and a version. Output: the
names of the files of that version, sorted by path, as fsspec and pyarrow open them: plain paths of a local table, URIs
of any other. Owns the encoding of names between this project, delta-rs and the log, and opens no data file. Refuses a
table whose rows cannot be read from its files alone (deletion vectors, mapped columns; see `delta_features`).

delta-rs is used only for the list of files: its own Arrow readers abort the interpreter at exit, and its `file_uris()`
are percent-encoded, so that pyarrow does not find the files of a root with a space or an umlaut.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from miniplm_udf import storage
from miniplm_udf.store.delta_features import refuse_unreadable_features
from miniplm_udf.store.delta_log import encoded

if TYPE_CHECKING:
    from deltalake import DeltaTable


def parquet_files(uri: str, version: int | None = None) -> list[str]:
    """The data files of a Delta table.

    Args:
        uri: path or URI of the table.
        version: Delta version; None takes the newest.

    Returns:
        Plain paths of a local table, URIs of any other, sorted.

    Raises:
        TableNotFoundError, DeltaError: there is no such table or version; raised by delta-rs.
        CorpusError: the table has features that cannot be read from its files.
    """
    return files_of(open_table(uri, version), uri)


def open_table(uri: str, version: int | None = None) -> "DeltaTable":
    """Returns a Delta table, opened with delta-rs.

    Args:
        uri: path or URI of the table.
        version: Delta version; None takes the newest.

    Raises:
        TableNotFoundError, DeltaError: there is no such table or version; raised by delta-rs.
        CorpusError: the table has features that cannot be read from its files.
    """
    from deltalake import DeltaTable

    table = DeltaTable(encoded(uri), version=version)
    refuse_unreadable_features(table, storage.redact(uri))
    return table


def files_of(table: "DeltaTable", uri: str) -> list[str]:
    """Lists the data files of a table that `open_table` opened.

    Args:
        table: the opened table.
        uri: path or URI of the table, as `open_table` took it.

    Returns:
        Plain paths of a local table, URIs of any other, sorted.
    """
    return sorted(_located(table.get_add_actions().column("path").to_pylist(), uri))


def files_by(table: "DeltaTable", uri: str, column: str) -> list[str]:
    """Lists the data files of a table in the order of a column that grows from file to file.

    A writer names its files at random, so their names do not tell this order.

    Args:
        table: the opened table.
        uri: path or URI of the table, as `open_table` took it.
        column: a column of whose values the log keeps the minimum. Files whose minimum is not known come last.

    Returns:
        Plain paths of a local table, URIs of any other, sorted by their smallest value, then by path.
    """
    actions = table.get_add_actions(flatten=True)
    paths = _located(actions.column("path").to_pylist(), uri)
    name = f"min.{column}"
    smallest = actions.column(name).to_pylist() if name in actions.schema.names else [None] * len(paths)
    return [
        path
        for _, _, path in sorted((value is None, value or 0, path) for value, path in zip(smallest, paths, strict=True))
    ]


def _located(paths: Iterable[str], uri: str) -> list[str]:
    """The places of files by their names in the log, which are relative to the table and percent-encoded."""
    base = storage.local_path(storage.to_uri(uri)) if storage.is_local(uri) else uri
    return [storage.join(base, unquote(path)) for path in paths]
