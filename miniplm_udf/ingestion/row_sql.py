"""SQL that reads the rows of a table or of Parquet files as text, id, source and metadata. Driver only.

Input: the schema, and `FieldsConfig`. Output: expressions for Spark. The columns that it reads are those that
`parquet_columns.converted` makes with pyarrow. Pure functions.
"""

from typing import TYPE_CHECKING

from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.nested import NestedSql, place_of, quoted, sql_of

if TYPE_CHECKING:
    from pyspark.sql.types import StructType


def batch_columns(input_schema: "StructType | None", fields: FieldsConfig) -> list[str]:
    """Makes the SQL expressions that read a row of a table or a Parquet file.

    Args:
        input_schema: schema of the table, or of the Parquet files; None if no file has one.
        fields: names of the columns.

    Returns:
        Expressions for `text`, `id`, `source` (bytes) and `metadata` (a JSON object); null for a missing column.
    """
    schema = read_schema(input_schema, fields)

    def as_bytes(field: str, name: str) -> str:
        sql = _sql(schema, field)
        if sql is None:
            return f"CAST(NULL AS BINARY) AS {name}"
        data_type = sql.type.simpleString()
        if data_type == "binary":
            return f"{sql.expression} AS {name}"
        plain = "to_json" if data_type.startswith(("struct", "array", "map")) else ""
        return f"CAST(CAST({plain}({sql.expression}) AS STRING) AS BINARY) AS {name}"

    values = {name: sql for name in fields.metadata if (sql := _sql(schema, name)) is not None}
    carried = ", ".join(f"{sql.in_json or sql.expression} AS {quoted(name)}" for name, sql in values.items())
    return [
        as_bytes(fields.text, "text"),
        as_bytes(fields.id, "id"),
        as_bytes(fields.source, "source"),
        f"{f'to_json(struct({carried}))' if carried else 'CAST(NULL AS STRING)'} AS metadata",
    ]


def read_schema(input_schema: "StructType | None", fields: FieldsConfig) -> "StructType":
    """Returns the input's schema; if no file has one, a schema with the text column alone.

    Args:
        input_schema: as for `batch_columns`.
        fields: names of the columns.
    """
    from pyspark.sql.types import StringType, StructField, StructType

    return input_schema or StructType([StructField(fields.text, StringType())])


def _sql(schema: "StructType", name: str) -> NestedSql | None:
    """The SQL of a column, or of a field inside a column; None if the input does not have it."""
    place = place_of(name, schema.names)
    if place is None:
        return None
    return sql_of(place.path, NestedSql(quoted(place.column), schema[place.column].dataType))
