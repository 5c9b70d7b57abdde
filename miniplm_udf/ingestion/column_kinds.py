"""The kinds of columns, as far as the checks before Spark starts need them: text, struct, anything else.

Input: a pyarrow schema, or the schema of a Delta table as JSON. Output: a `ColumnKind` for each column. Finds names
with dots as ingest does (nested.py). Pure functions; pyarrow is imported only for a pyarrow schema.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf.ingestion.nested import columns_for, place_of, same_name

if TYPE_CHECKING:
    import pyarrow as pa

# A value of these kinds may have any field: the schema does not say which.
_OPEN = ("string", "binary", "map")
_TEXTS = ("string", "varchar", "char", "binary")


@dataclasses.dataclass(frozen=True)
class ColumnKind:
    """The kind of a column or of a field inside a column.

    Attributes:
        name: `string`, `binary`, `struct`, `map`, or the name of another type.
        fields: the fields of a struct; None for any other kind.
    """

    name: str
    fields: "Mapping[str, ColumnKind] | None" = None

    @property
    def is_text(self) -> bool:
        """Whether it may hold texts."""
        return self.name.startswith((*_TEXTS, "unknown"))


_UNKNOWN = ColumnKind("unknown")


def kind_at(name: str, columns: Mapping[str, ColumnKind]) -> ColumnKind | None:
    """Finds the column, or the field inside a column, that has a name.

    Args:
        name: name of a field in the config.
        columns: the kinds of the columns by name.

    Returns:
        Its kind, `unknown` if only the rows tell; None if there certainly is none.
    """
    place = place_of(name, list(columns))
    if place is None:
        return None
    return _inside(columns[place.column], place.path) if place.path else columns[place.column]


def _inside(kind: ColumnKind, path: str) -> ColumnKind | None:
    if kind.fields is None:
        return _UNKNOWN if kind.name.startswith((*_OPEN, "varchar", "char")) else None
    for name in columns_for(path):
        if (field := same_name(name, list(kind.fields))) is not None:
            rest = path[len(name) + 1 :]
            inner = _inside(kind.fields[field], rest) if rest else kind.fields[field]
            if inner is not None:
                return inner
    return None


def kinds_of_arrow(schema: "pa.Schema") -> dict[str, ColumnKind]:
    """Returns the kinds of the columns of a file.

    Args:
        schema: the schema of a Parquet or Arrow file.
    """
    return {field.name: _kind_of_arrow(field.type) for field in schema}


def _kind_of_arrow(kind: "pa.DataType") -> ColumnKind:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _kind_of_arrow(kind.value_type)
    if types.is_struct(kind):
        return ColumnKind("struct", {field.name: _kind_of_arrow(field.type) for field in kind})
    if types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return ColumnKind("string")
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return ColumnKind("binary")
    return ColumnKind("map" if types.is_map(kind) else str(kind))


def kinds_of_delta(schema: Any) -> dict[str, ColumnKind]:
    """Returns the kinds of the columns of a Delta table.

    Args:
        schema: the table's schema, parsed from its JSON.
    """
    return {field["name"]: _kind_of_delta(field["type"]) for field in schema["fields"]}


def _kind_of_delta(kind: Any) -> ColumnKind:
    if not isinstance(kind, dict):
        return ColumnKind(str(kind))
    if kind["type"] == "struct":
        return ColumnKind("struct", kinds_of_delta(kind))
    return ColumnKind(str(kind["type"]))
