"""Features of Delta tables that a program which reads only the Parquet files would get wrong: switched off or refused.

The trainer, the notebook and users without Spark take a table's list of files and open the files themselves. A deletion
vector hides rows that are still in a file, column mapping gives the columns other names in the files, and type widening
leaves old files with another type. Owns the properties that keep tables free of these features, the test whether a
table has to be rewritten, and the error that refuses such tables. Spark rewrites tables (`tables.make_readable`). No
JVM, no pyspark.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from miniplm_udf.errors import CorpusError

if TYPE_CHECKING:
    from deltalake import DeltaTable

# Set on every table that this project creates, whatever the defaults of the session or the cluster are. Row tracking
# and v2 checkpoints need newer readers; a change feed would keep the text of removed rows.
FILE_READER_PROPERTIES = {
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
    "delta.enableTypeWidening": "false",
    "delta.checkpointPolicy": "classic",
    "delta.enableRowTracking": "false",
    "delta.enableChangeDataFeed": "false",
}
_VECTORS = "deletionVectors"
# Switching off its property converts neither the files nor the schema; `DROP FEATURE` does.
TYPE_WIDENING = "typeWidening"


def needs_repair(features: Collection[str], properties: Mapping[str, str]) -> bool:
    """Whether a table uses one of these features, or will use one with its next commit.

    Args:
        features: names that the table's protocol lists (`tableFeatures`).
        properties: the table's properties.
    """
    return not {_VECTORS, TYPE_WIDENING}.isdisjoint(features) or any(
        properties.get(key, value) != value for key, value in FILE_READER_PROPERTIES.items()
    )


def refuse_unreadable_features(table: "DeltaTable", where: str) -> None:
    """Refuses a table whose rows, at the loaded version, cannot be read from its files alone.

    Args:
        table: the table, opened by delta-rs.
        where: location of the table for the message, without secrets.

    Raises:
        CorpusError: a file has a deletion vector, columns are mapped to other names, or a column's type was widened.
    """
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    reasons = {
        f"column mapping ({mode}): its files have other column names": mode != "none",
        "type widening: its files have columns of different types": "delta.typeChanges" in table.schema().to_json(),
    }
    # Checked only if there is no other reason: delta-rs cannot list the vectors of a table with unknown features.
    if not any(reasons.values()) and _VECTORS in (table.protocol().reader_features or ()):
        reasons["deletion vectors: rows that were removed are still in its files"] = _has_vectors(table, where)
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise CorpusError(
            f"table {where}: expected a table whose files can be read without Spark, found {'; '.join(found)}. "
            "`miniplm maintain -c CONFIG` rewrites such files and switches the feature off. By hand: ALTER TABLE "
            "delta.`PATH` SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'false'), then REORG TABLE delta.`PATH` "
            "APPLY (PURGE); column mapping: SET TBLPROPERTIES ('delta.columnMapping.mode' = 'none'); widened types: "
            "ALTER TABLE delta.`PATH` DROP FEATURE typeWidening"
        )


def _has_vectors(table: "DeltaTable", where: str) -> bool:
    from deltalake.exceptions import DeltaError

    try:
        return any(batch.num_rows for batch in table.deletion_vectors())
    except DeltaError as error:
        raise CorpusError(
            f"table {where}: expected a table whose files can be read without Spark, found deletion vectors among its "
            f"features, which delta-rs cannot list here ({error}); `miniplm maintain -c CONFIG` removes them"
        ) from error
