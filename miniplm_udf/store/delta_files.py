"""The Parquet files of a Delta table, for readers without a JVM: the trainer, the notebook, a user's own script.

Input: the location of a table, a path or a URI as `root` is written (not percent-encoded), and a version. Output: the
names of the files of that version, sorted by path, as fsspec and pyarrow open them: plain paths of a local table, URIs
of any other. Owns the encoding of names between this project, delta-rs and the log, and opens no data file. Refuses a
table whose rows cannot be read from its files alone (deletion vectors, mapped columns; see `delta_features`).

delta-rs is used only for the list of files: its own Arrow readers abort the interpreter at exit, and its `file_uris()`
are percent-encoded, so that pyarrow does not find the files of a root with a space or an umlaut.
"""

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
        TableNotFoundError, DeltaError: by delta-rs, if there is no such table or version.
        CorpusError: the table has features that cannot be read from its files.
    """
    return files_of(open_table(uri, version), uri)


def open_table(uri: str, version: int | None = None) -> "DeltaTable":
    """Opens a Delta table with delta-rs.

    Args:
        uri: path or URI of the table.
        version: Delta version; None takes the newest.

    Raises:
        TableNotFoundError, DeltaError: by delta-rs, if there is no such table or version.
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
    base = storage.local_path(storage.to_uri(uri)) if storage.is_local(uri) else uri
    # The log holds paths relative to the table, percent-encoded.
    paths = table.get_add_actions().column("path").to_pylist()
    return sorted(storage.join(base, unquote(str(path))) for path in paths)
