"""The rows that Spark and the executors' functions exchange when models run, each declared once as an Arrow schema.

Owns the columns of a request, of a scored row and of a generated row. Driver and executor side; pure.
"""

import pyarrow as pa

from miniplm_udf.workers.ddl import ddl

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
SCORE_REQUEST_DDL = ddl(SCORE_REQUEST_SCHEMA)
SCORED_DDL = ddl(SCORED_SCHEMA)
