"""Pins: versions of refined corpora that are kept until they are unpinned. Driver only.

A pin is a row of the table `pins` and a copy of the version's rows: `pinned/<name>/<version>`, a separate Delta table
that only a take-down rewrites, and that is read at its newest version. So neither VACUUM, at any retention, nor the end
of the log of `refined/<name>` can remove the rows. A copy has the size of the version's ids and scores (no text). The
copy is made before the row, and the row is removed before the copy: a kill may leave a copy without a pin, never a pin
without rows, and the command can be run again. `verify` checks the copies.
"""

import dataclasses
import datetime
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.layout import Root
from miniplm_udf.schemas import table_names
from miniplm_udf.storage import Json
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


@dataclasses.dataclass(frozen=True)
class Pin:
    """A row of `pins`; the attributes are the columns, in the table's order.

    Attributes:
        name, version: name of the corpus, and number of the pinned version.
        tag: name that the user gave the pin; None without one.
        n_instances: number of rows of the version.
        fingerprint: fingerprint of these rows.
        pinned_at: when the version was pinned (UTC).
    """

    name: str
    version: int
    tag: str | None
    n_instances: int
    fingerprint: str
    pinned_at: datetime.datetime


def find(spark: "SparkSession", root: str, name: str | None = None) -> list[Pin]:
    """Reads the pins of a root.

    Args:
        spark: any session.
        root: URI of the root.
        name: the corpus whose pins are read; None reads the pins of all corpora.

    Returns:
        The pins, sorted by name and version; empty if nothing was ever pinned.
    """
    if not tables.exists(spark, Root(root).table("pins")):
        return []
    rows = tables.read(spark, Root(root).table("pins")).orderBy("name", "version").collect()
    return [Pin(*row) for row in rows if name in (None, row["name"])]


def of_version(spark: "SparkSession", root: str, name: str, version: int) -> Pin | None:
    """Reads the pin of a version.

    Args:
        spark: any session.
        root: URI of the root.
        name: name of the corpus.
        version: its number.

    Returns:
        The pin; None if the version is not pinned.
    """
    return next((pin for pin in find(spark, root, name) if pin.version == version), None)


def read(spark: "SparkSession", root: str, name: str, version: int) -> "DataFrame":
    """Returns the rows of a pinned version, read from its copy.

    Args:
        spark: any session.
        root: URI of the root.
        name: name of the corpus.
        version: its number.

    Raises:
        CorpusError: the copy is missing.
    """
    return tables.read(spark, Root(root).pinned(name, version))


def add(spark: "SparkSession", root: str, pin: Pin, rows: "DataFrame", metadata: Json) -> None:
    """Copies a version's rows, and then adds the row of the pin.

    Args:
        spark: any session.
        root: path or URI of the root.
        pin: the row.
        rows: the version's rows, as in `refined/<name>`.
        metadata: the version's provenance, which becomes the `userMetadata` of the copy.
    """
    table = dataclasses.replace(
        schemas.refined_as(pin.name, metadata["config"]), name=table_names.pinned(pin.name, pin.version)
    )
    tables.overwrite(rows, Root(root).pinned(pin.name, pin.version), table, metadata)
    frame = spark.createDataFrame([dataclasses.astuple(pin)], schemas.PINS.spark_schema())
    tables.append(frame, Root(root).table("pins"), schemas.PINS)


def remove(spark: "SparkSession", root: str, name: str, version: int) -> None:
    """Removes the row of a pin, and then the copy; does nothing if there is neither.

    Args:
        spark: any session.
        root: URI of the root.
        name: name of the corpus.
        version: its number.
    """
    from delta.tables import DeltaTable

    if of_version(spark, root, name, version) is not None:
        DeltaTable.forPath(spark, Root(root).table("pins")).delete(_is(name, version))
    storage.remove_folder(Root(root).pinned(name, version))


def changed(spark: "SparkSession", root: str, pin: Pin) -> None:
    """Updates the row of a pin to the number of rows and the fingerprint that its copy has now.

    Args:
        spark: any session.
        root: URI of the root, which has the table `pins`.
        pin: the pin with its new `n_instances` and `fingerprint`; the other attributes are not written.
    """
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    values = {"n_instances": F.lit(pin.n_instances).cast("bigint"), "fingerprint": F.lit(pin.fingerprint)}
    DeltaTable.forPath(spark, Root(root).table("pins")).update(_is(pin.name, pin.version), values)


def _is(name: str, version: int) -> "Column":
    from pyspark.sql import functions as F

    return (F.col("name") == name) & (F.col("version") == version)
