"""The rows between Spark and the executors: the DDL of an Arrow schema is what Spark is told."""

import pyarrow as pa
import pytest

from miniplm_udf.scores.nll import NLL_DDL
from miniplm_udf.workers.ddl import ddl, schema_of
from miniplm_udf.workers.messages import SCORE_REQUEST_DDL, SCORE_REQUEST_SCHEMA, SCORED_DDL, SCORED_SCHEMA


def test_ddl_of_the_messages() -> None:
    assert SCORE_REQUEST_DDL == (
        "instance_id string, text string, segment_ends array<int>, ends_document boolean, model_ids array<string>"
    )
    assert SCORED_DDL == (
        "instance_id string, model_id string, nll_sum_nats double, n_tokens bigint, n_bytes bigint, "
        "reason string, detail string"
    )
    assert NLL_DDL == "nll_sum_nats double, n_tokens bigint, n_bytes bigint"


def test_the_arrow_schema_of_a_ddl_string() -> None:
    assert schema_of(SCORE_REQUEST_DDL) == SCORE_REQUEST_SCHEMA
    assert schema_of(SCORED_DDL) == SCORED_SCHEMA
    assert schema_of("data binary") == pa.schema([("data", pa.binary())])


def test_a_type_that_no_message_has_is_refused() -> None:
    with pytest.raises(KeyError):
        ddl(pa.schema([("at", pa.timestamp("us"))]))
    with pytest.raises(KeyError):
        schema_of("at timestamp")
