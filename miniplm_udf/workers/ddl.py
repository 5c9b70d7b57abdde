"""Schemas of the rows that executors' functions return: as Spark's DDL string, and as an Arrow schema.

`DataFrame.mapInArrow` takes the string; the function on the executor makes its batches with the Arrow schema. pyarrow
is imported by the functions, so a module that declares its rows as a string needs no pyarrow to be imported. Driver and
executor side; pure.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

# Spark's names of types, and Arrow's.
_ARROW_NAMES = {
    "string": "string",
    "binary": "binary",
    "boolean": "bool",
    "int": "int32",
    "bigint": "int64",
    "double": "float64",
}


@functools.cache
def schema_of(ddl_text: str) -> "pa.Schema":
    """Returns the Arrow schema of a DDL string.

    Args:
        ddl_text: `name type, name type`, with the types of the messages of this project and arrays of these types.

    Raises:
        KeyError: a type that no message of this project has.
    """
    import pyarrow as pa

    pairs = [field.split(" ") for field in ddl_text.split(", ")]
    return pa.schema([(name, _arrow_type(type_name)) for name, type_name in pairs])


def _arrow_type(type_name: str) -> "pa.DataType":
    import pyarrow as pa

    if type_name.startswith("array<"):
        return pa.list_(_arrow_type(type_name.removeprefix("array<").removesuffix(">")))
    return pa.type_for_alias(_ARROW_NAMES[type_name])


def ddl(fields: "Iterable[pa.Field]") -> str:
    """Returns the DDL string of an Arrow schema, or of a struct type's fields: `name type, name type`.

    Args:
        fields: the fields of an Arrow schema or struct type; their nullability is not part of the string.

    Raises:
        KeyError: a type that no message of this project has.
    """
    return ", ".join(f"{field.name} {_spark_type(field.type)}" for field in fields)


def _spark_type(arrow_type: "pa.DataType") -> str:
    import pyarrow as pa

    if pa.types.is_list(arrow_type):
        return f"array<{_spark_type(arrow_type.value_type)}>"
    return {pa.type_for_alias(name): spark_name for spark_name, name in _ARROW_NAMES.items()}[arrow_type]
