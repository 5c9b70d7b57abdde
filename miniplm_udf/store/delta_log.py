"""Reads the log of a Delta table: its newest version, its commits, its id and its properties. Needs no JVM.

Input: the location of a table, a path or a URI as `root` is written (not percent-encoded). Reads the log's JSON files,
and never a data file. Spark answers the same questions with a query (`DESCRIBE HISTORY`, `DESCRIBE DETAIL`), which
takes as long as a small micro-batch; queries ask them at every micro-batch. Owns no list of data files
(delta_files.py).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec

from miniplm_udf import storage
from miniplm_udf.storage import Json

# The names of a commit and of a checkpoint in a table's log begin with their version.
_LOG_FILE = re.compile(r"(\d{20})\.(json$|checkpoint\.)")


@dataclasses.dataclass(frozen=True)
class Commit:
    """The description of a commit, without the files that it added or removed.

    Attributes:
        version: the version of the table that the commit made.
        operation: Delta's name of what it did (`WRITE`, `MERGE`, ...); empty if its writer left it out.
        user_metadata: the `userMetadata` of its writer; None if there is none.
        metrics: `operationMetrics`, for example `numOutputRows`; numbers as text.
    """

    version: int
    operation: str
    user_metadata: str | None
    metrics: Mapping[str, str]

    def metadata(self) -> Json | None:
        """Parses `user_metadata`, for commits of this project; None if there is none, or if it is no JSON object."""
        try:
            value = json.loads(self.user_metadata or "null")
        except ValueError:  # of another writer
            return None
        return value if isinstance(value, dict) else None

    def metric(self, name: str) -> int:
        """A number among the metrics; 0 if it is not there: a commit that adds no row has none of rows.

        Args:
            name: its name.
        """
        return int(self.metrics.get(name, 0))


@dataclasses.dataclass(frozen=True)
class TableIdentity:
    """Tells a table from another at the same place.

    Attributes:
        id: Delta's id of the table, which a table that is made again in its place does not have.
        properties: the table's properties.
    """

    id: str
    properties: Mapping[str, str]


def has_commits(uri: str) -> bool:
    """Whether the folder has a Delta log with a commit.

    Args:
        uri: path or URI of the table.
    """
    # Either the first commit is there, or a checkpoint of the log, after which Delta may have removed that commit.
    return any(map(storage.exists, (commit_uri(uri, 0), storage.join(uri, "_delta_log", "_last_checkpoint"))))


def commit_uri(uri: str, version: int) -> str:
    """Returns the location of a commit's file, which may no longer exist.

    Args:
        uri: path or URI of the table.
        version: the version that the commit made.
    """
    return storage.join(uri, "_delta_log", f"{version:020}.json")


def newest_version(uri: str) -> int | None:
    """Finds the newest version of a Delta table: on a local disk by the names in its log, else by delta-rs.

    delta-rs lists a log from its last checkpoint on; the log of a busy table has a hundred thousand names.

    Args:
        uri: path or URI of the table.

    Returns:
        The version; None if there is no table.
    """
    if not storage.is_local(uri):
        from deltalake import DeltaTable

        return DeltaTable(uri, without_files=True).version() if has_commits(uri) else None
    names = storage.list_folder(storage.join(uri, "_delta_log"))
    versions = [int(match[1]) for name in names if (match := _LOG_FILE.match(name))]
    return max(versions, default=None)


def commits(uri: str, newest: int | None = None) -> Iterator[Commit]:
    """Reads the commits of a table one by one, from the newest to the oldest that the log still holds.

    Args:
        uri: path or URI of the table. If there is no table, there are no commits.
        newest: version of the first commit; None takes the table's newest.
    """
    newest = newest_version(uri) if newest is None else newest
    for version in range(-1 if newest is None else newest, -1, -1):
        commit = read_commit(uri, version)
        if commit is None:
            return
        yield commit


def read_commit(uri: str, version: int) -> Commit | None:
    """Reads one commit; None if it is not in the log, or no longer.

    Args:
        uri: path or URI of the table.
        version: the version that the commit made.
    """
    try:
        with fsspec.open(commit_uri(uri, version), "r", encoding="utf-8") as lines:
            # One action per line. Spark writes the commit's description first, other programs elsewhere.
            actions = (json.loads(line) for line in lines if line.strip())
            information: Json = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    except FileNotFoundError:
        return None
    return Commit(
        version=version,
        operation=information.get("operation", ""),
        user_metadata=information.get("userMetadata"),
        metrics=information.get("operationMetrics") or {},
    )


def identity(uri: str) -> TableIdentity | None:
    """Reads a table's id and properties with delta-rs; None if there is no table.

    Args:
        uri: path or URI of the table.

    Raises:
        DeltaError: by delta-rs, if the log cannot be read.
    """
    if not has_commits(uri):
        return None
    from deltalake import DeltaTable

    metadata = DeltaTable(encoded(uri), without_files=True).metadata()
    return TableIdentity(str(metadata.id), metadata.configuration)


def encoded(uri: str) -> str:
    """A location as delta-rs expects it: `file:` URIs of this project are not percent-encoded, like Hadoop's.

    Args:
        uri: path or URI of the table.
    """
    return Path(storage.local_path(storage.to_uri(uri))).as_uri() if storage.is_local(uri) else uri
