"""Finds columns by names with dots: `meta.source` is a column of this name, or a field inside the column `meta`.

The column `meta` may be a struct, a map, or a string that holds an object as JSON. On the driver: a SQL expression for
Spark. On executors: the value in a row that pyarrow has read. Both follow `documents.find_field`, which does the same
for JSON lines. Pure functions.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from miniplm_udf.ingestion.documents import ABSENT, find_field, object_in

if TYPE_CHECKING:
    from pyspark.sql.types import DataType


class ColumnPlace(NamedTuple):
    """Where a named value is.

    Attributes:
        column: name of a column of the table or file.
        path: name of the field inside the column, perhaps with dots; empty for the column itself.
    """

    column: str
    path: str


class NestedSql(NamedTuple):
    """A value of a row as Spark computes it.

    Attributes:
        expression: SQL.
        type: the expression's type.
        in_json: the same value as a VARIANT, with the type that it has in JSON, if it comes out of a string of JSON.
    """

    expression: str
    type: "DataType"
    in_json: str | None = None


def columns_for(name: str) -> list[str]:
    """Returns the columns that may hold the value of a name: the name itself, then the parts before its dots.

    Args:
        name: name of a field in the config.
    """
    return [name, *(name[: match.start()] for match in reversed(list(re.finditer(r"\.", name))))]


def place_of(name: str, columns: Sequence[str]) -> ColumnPlace | None:
    """Finds the column that holds the value of a name. As in Spark, upper and lower case may differ.

    Args:
        name: name of a field in the config.
        columns: names of the columns of a table or file.

    Returns:
        The place; None if there is no such column.
    """
    for column in columns_for(name):
        stored = same_name(column, columns)
        if stored is not None:
            return ColumnPlace(stored, name[len(column) + 1 :])
    return None


def same_name(wanted: str, names: Sequence[str]) -> str | None:
    """Finds the column that Spark reads under a name.

    Args:
        wanted: the name in the config.
        names: names of the columns of a file.

    Returns:
        The same name, or else the first that differs only in upper and lower case; None if there is none.
    """
    if wanted in names:
        return wanted
    return next((name for name in names if name.lower() == wanted.lower()), None)


def sql_of(path: str, outer: NestedSql) -> NestedSql | None:
    """Returns the SQL of a field inside a column.

    Args:
        path: name of the field, perhaps with dots; empty for the column itself.
        outer: the column.

    Returns:
        The SQL; None if the column's type has no such field.
    """
    from pyspark.sql.types import CharType, MapType, StringType, StructType, VarcharType

    if not path:
        return outer
    if re.search(r"['\\\\]", path):  # no such name can be written in SQL or in a JSON path
        return None
    if isinstance(outer.type, StringType | VarcharType | CharType):
        steps = "".join(f"[\\'{step}\\']" for step in path.split("."))
        variant = f"try_variant_get(try_parse_json({outer.expression}), '${steps}', 'variant')"
        return NestedSql(f"get_json_object({outer.expression}, '${steps}')", StringType(), variant)
    for name in columns_for(path):
        rest = path[len(name) + 1 :]
        if isinstance(outer.type, StructType) and (field := same_name(name, outer.type.names)) is not None:
            expression = f"{outer.expression}.{quoted(field)}"
        elif isinstance(outer.type, MapType):
            expression, field = f"{outer.expression}['{name}']", name
        else:
            continue
        inner = outer.type[field].dataType if isinstance(outer.type, StructType) else outer.type.valueType
        if (sql := sql_of(rest, NestedSql(expression, inner))) is not None:
            return sql
    return None


def quoted(column: str) -> str:
    """Returns the name of a column as it stands in SQL.

    Args:
        column: the name.
    """
    return "`" + column.replace("`", "``") + "`"


def value_at(value: Any, path: str) -> Any:
    """Returns a field inside a value that pyarrow has read.

    Args:
        value: a dictionary, a list of pairs (a map), or the bytes or the string of an object as JSON.
        path: name of the field, perhaps with dots; empty for the value itself.

    Returns:
        The field's value; None if there is none.
    """
    if not path:
        return value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)
    row = object_in(value)
    field = ABSENT if row is None else find_field(row, path)
    return None if field is ABSENT else field
