"""The result of one check of a root, and the root as all checks see it. Driver only; verify.py owns the checks.

Input: a Spark session and a root. Output: `CheckedRoot`, its tables at the versions that they had when it was made, and
`Check`s for rows that occur twice or should not exist. The progress of each query is read first, then the tables from
the last stage to the first, so the origin of a row is in the tables that were read after it. Writes nothing.
"""

import dataclasses
import itertools
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.layout import Root
from miniplm_udf.schemas.table_kinds import KINDS
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_N_EXAMPLES = 5
# In the order of reading: each table is written after the tables that follow it here.
TABLES = [kind.name for kind in reversed(KINDS) if kind.is_verified]


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what is checked.
        expected, found: numbers of rows, or other values that are compared.
        ok: whether they agree, apart from rows that are behind.
        behind: rows that no query has reached yet.
        note: why the check is not complete, or what is wrong.
        examples: ids of wrong rows.
    """

    name: str
    expected: int | str
    found: int | str
    ok: bool
    behind: int = 0
    note: str = ""
    examples: tuple[str, ...] = ()


class CheckedRoot:
    """The tables of a root as they were when this object was made, and the progress of the queries just before."""

    def __init__(self, spark: "SparkSession", root: str) -> None:
        self.spark, self.root = spark, storage.to_uri(root)
        self.queries = list(checkpoints.find(self.root))
        self.versions = {name: delta_log.newest_version(self.uri(name)) for name in TABLES}

    def uri(self, name: str) -> str:
        """Returns the URI of the table `name`."""
        return Root(self.root).table(name)

    def has(self, name: str) -> bool:
        """Whether the table `name` existed when this object was made."""
        return self.versions[name] is not None

    def table(self, name: str) -> "DataFrame":
        """Returns the table `name` at the version that it had when this object was made.

        Args:
            name: name of a table that exists (`has`).
        """
        return tables.read(self.spark, self.uri(name), self.versions[name])

    def reached(self, query: Checkpoint, name: str) -> "DataFrame | None":
        """Reads the rows of a table that a query has certainly read.

        Args:
            query: the checkpoint of a query that reads the table.
            name: name of the table.

        Returns:
            The rows; None if the query has read none, or the version is gone.
        """
        offset = query.offset
        if offset is None or offset["isStartingVersion"]:
            return None
        try:
            frame = tables.read(self.spark, self.uri(name), self._read_through(name, int(offset["reservoirVersion"])))
            frame.schema  # noqa: B018  (here Delta raises the error that a version is gone)
        except Exception as error:
            if "VERSION" in str(error).upper():
                return None
            raise
        return frame

    def _read_through(self, name: str, begun: int) -> int:
        """The last version without unread rows, for a query that may have read a part of version `begun`.

        A version that only merged or removed rows adds no unread row, so the newest such version is taken: the files of
        files of earlier versions may have been vacuumed.
        """
        read, newest = (*corpus_records.MAINTENANCE, "MERGE", "DELETE"), self.versions[name] or 0
        since = itertools.takewhile(lambda commit: commit.version >= begun, delta_log.commits(self.uri(name)))
        unread = [commit.version for commit in since if commit.operation not in read]
        return unread[-1] - 1 if unread else newest


def examples_of(frame: "DataFrame", key: str) -> tuple[str, ...]:
    """Returns up to 5 values of a column, as text.

    Args:
        frame: the rows.
        key: name of the column.
    """
    return tuple(str(row[0]) for row in frame.select(key).limit(_N_EXAMPLES).collect())


def unique(frame: "DataFrame", name: str, key: tuple[str, ...]) -> Check:
    """Returns the check that no two rows of a table have the same key.

    Args:
        frame: all rows of the table.
        name: name of the table, for the check's name.
        key: names of the key's columns; the first gives the examples.
    """
    from pyspark.sql import functions as F

    counted = frame.groupBy(*key).agg(F.count("*").alias("n_rows"))
    n_keys, n_rows = counted.agg(F.count("*"), F.sum("n_rows")).collect()[0]
    wrong = n_keys != (n_rows or 0)
    examples = examples_of(counted.where("n_rows > 1"), key[0]) if wrong else ()
    return Check(f"{name}: keys are unique", n_rows or 0, n_keys, not wrong, examples=examples)


def none(name: str, frame: "DataFrame", key: str) -> Check:
    """Returns the check that a frame of wrong rows is empty.

    Args:
        name: name of the check.
        frame: the wrong rows.
        key: column whose values are the examples.
    """
    n_rows = frame.count()
    return Check(name, 0, n_rows, n_rows == 0, examples=examples_of(frame, key) if n_rows else ())
