"""Pins: versions of refined corpora that are kept for ever. Driver only.

A pin is a row of the table `pins` and a copy of the version's rows: `pinned/<name>/<version>`, a Delta table of its own
that nothing rewrites but a take-down, and that is read at its newest version. So neither VACUUM, at whatever retention,
nor the end of the log of `refined/<name>` can take it away. It costs what the version's ids and scores take (no text).
The copy is made before the row, and the row removed before the copy: a kill leaves a copy too much, never a pin
without rows, and the command can be run again. Whether a copy is sound is `verify`'s to tell.
"""

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage, tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


@dataclasses.dataclass(frozen=True)
class Pin:
    """A row of `pins`, in its order."""

    name: str
    version: int
    tag: str | None
    n_instances: int
    fingerprint: str
    pinned_at: datetime.datetime


def pins_uri(root: str) -> str:
    return storage.join(storage.to_uri(root), "tables", schemas.PINS.name)


def copy_uri(root: str, name: str, version: int) -> str:
    """Where the rows of a pinned version are."""
    return storage.join(storage.to_uri(root), "tables", "pinned", name, str(version))


def find(spark: "SparkSession", root: str, name: str | None = None) -> list[Pin]:
    """The pins of a root, or of one corpus, by name and version."""
    if not tables.exists(spark, pins_uri(root)):
        return []
    rows = tables.read(spark, pins_uri(root)).orderBy("name", "version").collect()
    return [Pin(*row) for row in rows if name in (None, row["name"])]


def of_version(spark: "SparkSession", root: str, name: str, version: int) -> Pin | None:
    return next((pin for pin in find(spark, root, name) if pin.version == version), None)


def read(spark: "SparkSession", root: str, name: str, version: int) -> "DataFrame":
    """The rows of a pinned version.

    Raises:
        CorpusError: its copy is gone.
    """
    return tables.read(spark, copy_uri(root, name, version))


def add(spark: "SparkSession", root: str, pin: Pin, rows: "DataFrame", metadata: dict[str, Any]) -> None:
    """Copies a version's rows, and then adds its row.

    Args:
        metadata: its provenance, kept beside the copy.
    """
    table = dataclasses.replace(
        schemas.refined_as(pin.name, metadata["config"]), name=f"pinned/{pin.name}/{pin.version}"
    )
    tables.overwrite(rows, copy_uri(root, pin.name, pin.version), table, metadata)
    frame = spark.createDataFrame([dataclasses.astuple(pin)], schemas.PINS.spark_schema())
    tables.append(frame, pins_uri(root), schemas.PINS)


def remove(spark: "SparkSession", root: str, name: str, version: int) -> None:
    """Removes the row, and then the copy; what is not there is not missed."""
    from delta.tables import DeltaTable

    if of_version(spark, root, name, version) is not None:
        DeltaTable.forPath(spark, pins_uri(root)).delete(_is(name, version))
    storage.remove_folder(copy_uri(root, name, version))


def changed(spark: "SparkSession", root: str, pin: Pin) -> None:
    """Brings the row of a pin up to what its copy holds now."""
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    values = {"n_instances": F.lit(pin.n_instances).cast("bigint"), "fingerprint": F.lit(pin.fingerprint)}
    DeltaTable.forPath(spark, pins_uri(root)).update(_is(pin.name, pin.version), values)


def _is(name: str, version: int) -> "Column":
    from pyspark.sql import functions as F

    return (F.col("name") == name) & (F.col("version") == version)
