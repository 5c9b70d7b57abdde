"""One check of a root, and the root as all checks of it see it. Driver only; what is checked is verify.py's.

Input: a Spark session and a root; output: `Root`, its tables at the versions that they had when it was made, and
`Check`s of rows that stand twice or should not stand at all. How far each query has come is read first, then the tables
from the last to the first, so a row that stands in a table has its origin in the ones read later. Writes nothing.
"""

import dataclasses
from typing import TYPE_CHECKING

from miniplm_udf import corpora, storage, tables
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_N_EXAMPLES = 5
# From the last to the first: each was written after the ones behind it.
TABLES = ("corpora", "proxy_scores", "score_matrix", "scores", "rejects", "annotations", "instances")


@dataclasses.dataclass(frozen=True)
class Check:
    """One sum.

    Attributes:
        name: what is checked.
        expected, found: rows, or what else is compared.
        ok: whether they agree, rows behind apart.
        behind: rows that no query has reached yet.
        note: why it could not be checked whole; or what is wrong.
        examples: ids that are wrong.
    """

    name: str
    expected: int | str
    found: int | str
    ok: bool
    behind: int = 0
    note: str = ""
    examples: tuple[str, ...] = ()


class Root:
    """The tables of a root as they were when this was made, and before that: how far the queries had come."""

    def __init__(self, spark: "SparkSession", root: str) -> None:
        self.spark, self.root = spark, storage.to_uri(root)
        self.queries = list(checkpoints.find(self.root))
        self.versions = {name: tables.version(spark, self.uri(name)) for name in TABLES}

    def uri(self, name: str) -> str:
        return storage.join(self.root, "tables", name)

    def has(self, name: str) -> bool:
        return self.versions[name] is not None

    def table(self, name: str) -> "DataFrame":
        return tables.read(self.spark, self.uri(name), self.versions[name])

    def reached(self, query: Checkpoint, name: str) -> "DataFrame | None":
        """The rows of a table that a query has surely read; None where it has read none, or the version is gone."""
        offset = query.offset
        if offset is None or offset["isStartingVersion"]:
            return None
        try:
            frame = tables.read(self.spark, self.uri(name), self._read_through(name, int(offset["reservoirVersion"])))
            frame.schema  # noqa: B018  (Delta refuses a version that is gone here)
        except Exception as error:
            if "VERSION" in str(error).upper():
                return None
            raise
        return frame

    def _read_through(self, name: str, begun: int) -> int:
        """The last version without rows that a query has not read, which may have read half of version `begun`.

        Versions that only merged or removed rows add none; those before them may have lost their files to a vacuum.
        """
        from delta.tables import DeltaTable

        history = DeltaTable.forPath(self.spark, self.uri(name)).history().where(f"version >= {begun}")
        for row in history.select("version", "operation").orderBy("version").collect():
            if row["operation"] not in (*corpora.MAINTENANCE, "MERGE"):
                return int(row["version"]) - 1
        return int(self.versions[name] or 0)


def examples_of(frame: "DataFrame", key: str) -> tuple[str, ...]:
    return tuple(str(row[0]) for row in frame.select(key).limit(_N_EXAMPLES).collect())


def unique(frame: "DataFrame", name: str, key: tuple[str, ...]) -> Check:
    from pyspark.sql import functions as F

    counted = frame.groupBy(*key).agg(F.count("*").alias("n_rows"))
    n_keys, n_rows = counted.agg(F.count("*"), F.sum("n_rows")).collect()[0]
    wrong = n_keys != (n_rows or 0)
    examples = examples_of(counted.where("n_rows > 1"), key[0]) if wrong else ()
    return Check(f"{name}: keys are unique", n_rows or 0, n_keys, not wrong, examples=examples)


def none(name: str, frame: "DataFrame", key: str, of: int | str = 0, note: str = "") -> Check:
    """That a frame of offending rows is empty."""
    n_rows = frame.count()
    return Check(name, of, n_rows, n_rows == 0, note=note, examples=examples_of(frame, key) if n_rows else ())
