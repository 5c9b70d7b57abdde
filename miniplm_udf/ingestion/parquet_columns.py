"""Finds one schema for Parquet files whose columns differ, and reads the files that do not fit it.

On the driver: chooses from the footers the schema that fits the most rows. Spark reads the files that fit. On
executors: pyarrow reads the files that do not fit (ids that are numbers in one file and strings in another, a column of
nulls alone, nanoseconds), input split by input split, as Spark would cut them: the rows come in the same order, with
the same file and block start, and an id has the same string whatever its type. Writes nothing; a retry gives the same
rows.
"""

import base64
import datetime
import decimal
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

import fsspec

from miniplm_udf import storage
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.footers import Footer, ParquetColumn
from miniplm_udf.ingestion.nested import columns_for, place_of, same_name, value_at
from miniplm_udf.schemas.types import TableRow

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql.types import DataType, StructType

    from miniplm_udf.ingestion.listing import InputFile

_INTEGERS = ("tinyint", "smallint", "int", "bigint")
_TEXTS = ("string", "binary")
_ROWS = 1000


def wanted_columns(fields: FieldsConfig) -> list[str]:
    """Lists the columns that ingest reads.

    Args:
        fields: names of the columns for text, id, source and metadata.

    Returns:
        Names in this order, each once; after a name with dots, the columns that may hold it as a field.
    """
    names = [fields.text, fields.id, fields.source, *fields.metadata]
    return list(dict.fromkeys(column for name in names for column in columns_for(name)))


def holds_text(column: ParquetColumn) -> bool:
    """Whether a column holds strings or bytes, or only nulls.

    Args:
        column: a column of a Parquet file.
    """
    return column.is_null or (column.type is not None and column.type.simpleString() in _TEXTS)


# --- on the driver: the schema ---


def unify(footers: Sequence[tuple["InputFile", Footer]], wanted: Sequence[str]) -> "StructType":
    """Chooses for each wanted column the type that fits the most rows.

    Args:
        footers: files with their footers.
        wanted: names of the columns.

    Returns:
        The schema, without columns that no file has in a type that Spark can read.
    """
    from pyspark.sql.types import StructField, StructType

    fields = []
    for name in wanted:
        weights: Counter[DataType] = Counter()
        for _, footer in footers:
            column = footer.columns.get(name)
            if column is not None and column.type is not None and not column.is_null:
                weights[column.type] += footer.n_rows + 1
        if weights:
            fields.append(StructField(name, _chosen(weights)))
    return StructType(fields)


def fits(footer: Footer, schema: "StructType") -> bool:
    """Whether Spark can read a file's wanted columns with the schema; a column that the file does not have fits.

    Args:
        footer: the wanted columns of the file.
        schema: the schema that Spark is given.
    """
    return all(
        name in schema.names and not column.is_null and column.type is not None
        and _reads(schema[name].dataType, column.type)
        for name, column in footer.columns.items()
    )  # fmt: skip


def reads_all(schema: "StructType | None", files: "StructType | None") -> bool:
    """Whether Spark can read some files with a schema.

    Args:
        schema: the schema that Spark is given; None if there is none.
        files: the schema of the files; None for files without a footer, which any schema reads.
    """
    fields = files.fields if files else []
    return all(
        schema is not None and field.name in schema.names and _reads(schema[field.name].dataType, field.dataType)
        for field in fields
    )


def _chosen(weights: "Counter[DataType]") -> "DataType":
    from pyspark.sql.types import BinaryType, LongType

    families: Counter[str] = Counter()
    for data_type, n_rows in weights.items():
        families[_family(data_type)] += n_rows
    family = families.most_common(1)[0][0]
    members = [data_type for data_type in weights if _family(data_type) == family]
    if len(members) == 1:
        return members[0]
    return LongType() if family == "integer" else BinaryType()


def _family(data_type: "DataType") -> str:
    name = data_type.simpleString()
    return "integer" if name in _INTEGERS else "text" if name in _TEXTS else data_type.json()


def _reads(schema: "DataType", file: "DataType") -> bool:
    """Whether Spark can read a column of the type `file` as the type `schema`."""
    return schema == file or (_family(schema) == _family(file) and schema.simpleString() in ("bigint", *_TEXTS))


# --- on executors: files that do not fit ---


def open_file(uri: str) -> IO[bytes]:
    """Returns a file, opened for reading bytes.

    Args:
        uri: the URI as Spark names it, percent-encoded.
    """
    path = unquote(uri)
    if storage.is_local(path):
        return open(storage.local_path(path), "rb")
    handle: IO[bytes] = fsspec.open(path, "rb").open()
    return handle


def make_reader(fields: FieldsConfig) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """Returns the function for `mapInArrow` that reads input splits of files that Spark cannot read with the schema.

    Its input has a row for each row of a split, as Spark counts them, with `source_file`, `block_start`,
    `block_length` and further columns that have one value a split. Its output has the columns text, id, source and
    metadata, and the input's columns without `block_length`.

    Args:
        fields: names of the columns.
    """

    def read(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        rows = (tuple(row.items()) for batch in batches for row in batch.to_pylist())
        for place, split_rows in itertools.groupby(rows):
            yield from _read_split(dict(place), sum(1 for _ in split_rows), fields)

    return read


def _read_split(place: TableRow, n_rows: int, fields: FieldsConfig) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_read = 0
    path, start = place["source_file"], place["block_start"]
    kept = {name: value for name, value in place.items() if name != "block_length"}
    try:
        with open_file(path) as handle:
            file = pq.ParquetFile(handle)
            groups = row_groups(file.metadata, start, start + place["block_length"])
            columns = {
                name: stored_name
                for name in wanted_columns(fields)
                if (stored_name := same_name(name, file.schema_arrow.names)) is not None
            }
            for batch in file.iter_batches(_ROWS, row_groups=groups, columns=list(columns.values())):
                n_read += batch.num_rows
                yield with_place(converted(batch, columns, fields), kept)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"[FAILED_READ_FILE.ARROW] Encountered error while reading file {path}. {error}") from error
    if n_read != n_rows:
        raise RuntimeError(f"{path} from byte {start}: expected {n_rows} rows, as Spark counts, found {n_read}")


def row_groups(metadata: Any, start: int, end: int) -> list[int]:
    """The row groups whose middle byte lies in [start, end), which Spark reads for an input split.

    Args:
        metadata: a `pyarrow.parquet.FileMetaData`.
        start: first byte of the split.
        end: the byte after its last byte.

    Returns:
        Numbers of the row groups.
    """
    numbers = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        first = group.column(0)
        offsets = [first.data_page_offset, first.dictionary_page_offset]
        begin = min(offset for offset in offsets if offset)
        middle = begin + sum(group.column(c).total_compressed_size for c in range(group.num_columns)) // 2
        if start <= middle < end:
            numbers.append(i)
    return numbers


def with_place(batch: "pa.RecordBatch", place: TableRow) -> "pa.RecordBatch":
    """Returns a batch with further columns that have one value each.

    Args:
        batch: the batch.
        place: the values, strings or integers, by column.
    """
    import pyarrow as pa

    for name, value in place.items():
        kind = pa.string() if isinstance(value, str) else pa.int64()
        batch = batch.append_column(name, pa.array([value] * batch.num_rows, kind))
    return batch


def converted(batch: "pa.RecordBatch", columns: dict[str, str], fields: FieldsConfig) -> "pa.RecordBatch":
    """Returns rows with text, id, source (bytes) and metadata (a JSON object), as `row_sql.batch_columns` does.

    Args:
        batch: rows of a file.
        columns: names of existing columns in the batch, by their names in the config.
        fields: names of the columns in the config.
    """
    import pyarrow as pa

    plain = {name: _plain(batch.column(stored_name)) for name, stored_name in columns.items()}
    names = [fields.text, fields.id, fields.source, *fields.metadata]
    places = {name: place for name in names if (place := place_of(name, list(plain))) is not None}
    values = {name: [value_at(value, at.path) for value in plain[at.column]] for name, at in places.items()}
    absent = [None] * batch.num_rows
    data = {
        key: pa.array([_as_bytes(value) for value in values.get(name, absent)], pa.binary())
        for key, name in (("text", fields.text), ("id", fields.id), ("source", fields.source))
    }
    carried = [name for name in fields.metadata if name in values]
    rows = [{name: values[name][i] for name in carried} for i in range(batch.num_rows)]
    metadata = [_json(row) for row in rows] if fields.metadata else absent
    return pa.RecordBatch.from_pydict({**data, "metadata": pa.array(metadata, pa.string())})


def _plain(array: "pa.Array") -> list[Any]:
    """Python values; strings as bytes, because they may not be UTF-8; nanoseconds are cut to microseconds.

    Single floats have their own shortest digits (0.1, not 0.10000000149011612), except inside lists and structs.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return list(array.cast(pa.large_binary()).to_pylist())
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        array = pc.cast(array, pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_float32(kind):
        array = array.cast(pa.string()).cast(pa.float64())
    if pa.types.is_map(kind):  # a list of pairs; an empty list becomes an empty object
        return [{} if v == [] else v for v in array.to_pylist()]
    return [_Binary(v) if isinstance(v, bytes) else v for v in array.to_pylist()]


class _Binary(bytes):
    """Bytes of a column without a text type; in JSON they are base 64, as Spark writes them."""


def _as_bytes(value: Any) -> bytes | None:
    """A value as the bytes of the string that Spark casts it to."""
    if value is None or isinstance(value, bytes):
        return None if value is None else bytes(value)
    if isinstance(value, dict | list):
        return _json(value).encode()
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, decimal.Decimal):
        return format(value, "f").encode()
    if isinstance(value, float):
        return _float_text(value).encode()
    if isinstance(value, datetime.datetime):
        return _utc(value).isoformat(" ").rstrip("0" if value.microsecond else "").encode()
    return str(value).encode()


def _utc(value: datetime.datetime) -> datetime.datetime:
    return value if value.tzinfo is None else value.astimezone(datetime.UTC).replace(tzinfo=None)


def _float_text(value: float) -> str:
    """A number as Java writes it: 0.001, 1.0E7, NaN, Infinity."""
    if value - value != 0:
        return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}[str(value)]
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return repr(value)
    sign, digits, exponent = decimal.Decimal(repr(value)).normalize().as_tuple()
    rest = "".join(map(str, digits[1:])) or "0"
    return f"{'-' * sign}{digits[0]}.{rest}E{int(exponent) + len(digits) - 1}"


def _json(value: Any) -> str:
    """Compact JSON as Spark's `to_json`: structs without null fields, numbers that are no JSON as strings."""
    if isinstance(value, dict):
        return _object((key, inner) for key, inner in value.items() if inner is not None)
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a map, whose null values are kept
        return _object(value)
    if isinstance(value, list):
        return f"[{','.join(map(_json, value))}]"
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, float) and value - value == 0:
        return _float_text(value)
    return json.dumps(_json_scalar(value), ensure_ascii=False)


def _object(pairs: Iterable[tuple[Any, Any]]) -> str:
    return f"{{{','.join(f'{_json(str(key))}:{_json(value)}' for key, value in pairs)}}}"


def _json_scalar(value: Any) -> Any:
    if isinstance(value, _Binary):
        return base64.b64encode(value).decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, datetime.datetime):
        return _utc(value).isoformat(timespec="milliseconds") + ("" if value.tzinfo is None else "Z")
    return value if isinstance(value, str | int | bool | None) else str(value)
