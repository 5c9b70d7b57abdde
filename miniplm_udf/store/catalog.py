"""The tables of a root by name: for one session as temporary views, or for every session in a schema of the catalog.

    root -> instances, scores, score_matrix, ..., refined_<name>, and with its texts <name>_text

Owns only the names: in a catalog the tables are external, so they stay where they are and are read by their Delta logs.
Driver only. A second registration changes nothing.
"""

import re
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError
from miniplm_udf.layout import Root
from miniplm_udf.schemas.table_kinds import KINDS
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def register_tables(spark: "SparkSession", root: str, schema: str | None = None) -> list[str]:
    """Makes every table under `root` readable by name.

    Args:
        root: path or URI of the root.
        schema: `schema` or `catalog.schema`, created if missing: tables and views are created in it, for every
            session that uses the catalog. None: temporary views of this session.

    Returns:
        The names: the tables that exist; for each corpus `refined_<name>`, and with its texts `<name>_text`.

    Raises:
        ConfigError: the schema already has a table of one of these names at another location.
    """
    root = storage.to_uri(root)
    if schema is not None:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)}")
    names = [kind.name for kind in KINDS if kind.is_registered and not kind.is_folder]
    uris = {name: Root(root).table(name) for name in names}
    registered = [name for name, uri in uris.items() if tables.exists(spark, uri)]
    for name in registered:
        _register(spark, name, uris[name], schema)
    if "corpora" not in registered:
        return registered
    corpora = spark.read.format("delta").load(uris["corpora"]).select("name").distinct().orderBy("name").collect()
    for (corpus,) in corpora:
        name = f"refined_{corpus}"
        _register(spark, name, Root(root).refined(corpus), schema)
        view = f"{corpus}_text"
        spark.sql(
            f"CREATE OR REPLACE {'TEMPORARY ' if schema is None else ''}VIEW {_within(schema, view)} AS "
            f"SELECT c.*, i.document_ids, i.text FROM {_within(schema, name)} c "
            f"JOIN {_within(schema, 'instances')} i ON c.instance_id = i.instance_id"
        )
        registered += [name, view]
    return registered


def _register(spark: "SparkSession", name: str, uri: str, schema: str | None) -> None:
    if schema is None:
        spark.read.format("delta").load(uri).createOrReplaceTempView(name)
        return
    table = _within(schema, name)
    spark.sql(f"CREATE TABLE IF NOT EXISTS {table} USING DELTA LOCATION '{_escaped(uri)}'")
    location = spark.sql(f"DESCRIBE DETAIL {table}").select("location").collect()[0][0]
    if _normal(location) != _normal(uri):
        raise ConfigError(f"spark.schema: expected {uri} as {schema}.{name}, found {location}; choose another schema")


def _normal(uri: str) -> str:
    """A location in one form, whether it is written `file:/a` or `file:///a/`."""
    return re.sub(r":/+", ":/", storage.to_uri(uri)).rstrip("/")


def _within(schema: str | None, name: str) -> str:
    return f"`{name}`" if schema is None else f"{_quoted(schema)}.`{name}`"


def _quoted(schema: str) -> str:
    return ".".join(f"`{part}`" for part in schema.split("."))


def _escaped(uri: str) -> str:
    return uri.replace("\\", "\\\\").replace("'", "\\'")
