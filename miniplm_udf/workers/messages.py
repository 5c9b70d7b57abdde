"""The rows that Spark and the executors' functions exchange when models run, each declared once as an Arrow schema.

Owns the columns of a request, of a scored row and of a generated row, and the conversion of an Arrow schema to the DDL
string that `DataFrame.mapInArrow` takes. Driver and executor side; pure.
"""

from collections.abc import Iterable

import pyarrow as pa

# One instance, and the aliases of the models that score it.
SCORE_REQUEST_SCHEMA = pa.schema(
    [
        ("instance_id", pa.string()),
        ("text", pa.string()),
        ("segment_ends", pa.list_(pa.int32())),
        ("ends_document", pa.bool_()),
        ("model_ids", pa.list_(pa.string())),
    ]
)
_PAIR = (("instance_id", pa.string()), ("model_id", pa.string()))
_FAILURE = (("reason", pa.string()), ("detail", pa.string()))
# One pair of instance and model: numbers, or the reason why there are none.
SCORED_SCHEMA = pa.schema(
    [
        *_PAIR,
        ("nll_sum_nats", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        *_FAILURE,
    ]
)
# One instance that a model has continued: int32 token ids as bytes, or the reason why there are none.
GENERATED_SCHEMA = pa.schema(
    [
        *_PAIR,
        ("token_ids", pa.binary()),
        ("n_prompt_tokens", pa.int64()),
        ("n_tokens", pa.int64()),
        ("end_reason", pa.string()),
        *_FAILURE,
    ]
)
_SPARK_TYPES = {
    pa.string(): "string",
    pa.binary(): "binary",
    pa.bool_(): "boolean",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float64(): "double",
}


def ddl(fields: Iterable[pa.Field]) -> str:
    """The DDL string of an Arrow schema, or of a struct type's fields, as Spark takes it: `name type, name type`.

    Args:
        fields: the fields of an Arrow schema or struct type; their nullability is not part of the string.

    Raises:
        KeyError: a type that no message of this project has.
    """
    return ", ".join(f"{field.name} {_spark_type(field.type)}" for field in fields)


def _spark_type(arrow_type: pa.DataType) -> str:
    if pa.types.is_list(arrow_type):
        return f"array<{_spark_type(arrow_type.value_type)}>"
    return _SPARK_TYPES[arrow_type]


SCORE_REQUEST_DDL = ddl(SCORE_REQUEST_SCHEMA)
SCORED_DDL = ddl(SCORED_SCHEMA)
