"""`Table` and `Column`: the declaration of a table, and the schemas for Spark and Arrow that follow from it.

Input: a `Table` with its `Column`s, declared in `schemas/__init__.py`; output: schemas with types and nullability, and
the properties that Delta gets when the table is created. pyspark and pyarrow are imported only by the method that
makes their schema, so the trainer needs no Spark. On the driver, on executors and in the trainer.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql.types import StructType

TableRow = Mapping[str, Any]
"""A row of a table, or of a frame made from one: values by name of the column. The table declares names and types."""

# Types of a column, also as `list<TYPE>`, by Arrow's names; the values are Spark's names.
_SPARK_TYPES = {
    "string": "string",
    "int32": "int",
    "int64": "bigint",
    "float64": "double",
    "bool": "boolean",
    "timestamp": "timestamp",
    "binary": "binary",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: name of the column.
        type: a key of `_SPARK_TYPES`, or `list<KEY>`; lists hold no nulls.
        meaning: description for people, with the unit.
        nullable: whether the column may be null.
    """

    name: str
    type: str
    meaning: str
    nullable: bool = False

    @property
    def element(self) -> str | None:
        """The type of a list's elements; None for a column that is no list."""
        return self.type.removeprefix("list<").removesuffix(">") if self.type.startswith("list<") else None


@dataclasses.dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: place of the table under `<root>/tables`.
        key: columns whose values together are unique.
        append_only: rows are only added, by a streaming query: `query_id` and `batch_id` say by which micro-batch.
        pinnable: Delta keeps replaced files and the log for years, so that every old version can be read.
        statistics: columns of which Delta keeps minimum and maximum (never text or tokens, which would fill the log).
    """

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    append_only: bool = True
    pinnable: bool = False
    statistics: tuple[str, ...] = ()

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, in the declared order."""
        return [column.name for column in self.columns]

    def spark_schema(self) -> "StructType":
        """The Spark schema, nullability included."""
        from pyspark.sql.types import ArrayType, StructField, StructType, _parse_datatype_string

        def field(column: Column) -> "StructField":
            data_type = _parse_datatype_string(_SPARK_TYPES[column.element or column.type])
            if column.element:
                data_type = ArrayType(data_type, containsNull=False)
            return StructField(column.name, data_type, column.nullable)

        return StructType([field(column) for column in self.columns])

    def arrow_schema(self) -> "pa.Schema":
        """The Arrow schema, nullability included."""
        import pyarrow as pa

        def field(column: Column) -> "pa.Field":
            name = column.element or column.type
            data_type = pa.timestamp("us", tz="UTC") if name == "timestamp" else pa.type_for_alias(name)
            if column.element:
                data_type = pa.list_(pa.field("element", data_type, nullable=False))
            return pa.field(column.name, data_type, nullable=column.nullable)

        return pa.schema([field(column) for column in self.columns])

    def delta_properties(self) -> dict[str, str]:
        """Table properties to set when the table is created. None of them is a feature that delta-rs cannot read."""
        properties = {"delta.dataSkippingStatsColumns": ",".join(self.statistics)} if self.statistics else {}
        if self.pinnable:
            properties["delta.deletedFileRetentionDuration"] = "interval 3650 days"
            properties["delta.logRetentionDuration"] = "interval 3650 days"
        return properties
