"""Packages that groups of annotations need on executors: whether they are there, before any work; a small Spark job."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

# By key of the section `annotate`; names to import and to install.
NEEDED = {"language": "py3langid", "near_duplicates": "datasketch"}


def on_executors(spark: "SparkSession", groups: Iterable[str]) -> dict[str, str]:
    """Versions, as an executor has them, of the packages that the groups need, by name.

    Raises:
        ConfigError: one cannot be imported there.
    """
    needed = {group: NEEDED[group] for group in groups if group in NEEDED}
    if not needed:
        return {}

    def probe(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        import importlib
        import importlib.metadata

        import pyarrow as pa

        for _ in batches:
            rows = []
            for group, name in needed.items():
                try:
                    importlib.import_module(name)
                    rows.append({"group": group, "version": importlib.metadata.version(name), "problem": None})
                except ImportError as error:
                    rows.append({"group": group, "version": None, "problem": str(error)})
            fields = [(column, pa.string()) for column in ("group", "version", "problem")]
            yield pa.RecordBatch.from_pylist(rows, pa.schema(fields))

    found = spark.range(0, 1, 1, 1).mapInArrow(probe, "group string, version string, problem string").collect()
    for row in found:
        if row["problem"] is not None:
            raise ConfigError(
                f"annotate.{row['group']}: expected the package {needed[row['group']]} on every executor, found that "
                f"it cannot be imported ({row['problem']}); pip install 'miniplm[annotate]' there, or leave the key out"
            )
    return {needed[row["group"]]: row["version"] for row in found}
