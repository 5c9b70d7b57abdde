"""Bytes of the tables `scores` and `score_matrix`, measured on made-up rows that are written to memory as Parquet.

Input: the scored aliases, and the text bytes of the sample's instances. Output: bytes by table. Driver; reads and
writes no file. The same input gives the same bytes.
"""

import io
import random
from collections.abc import Sequence
from typing import Any

from miniplm_udf import schemas

# Instances that the bytes are measured on at most; instances that a worker scores at once.
_MAX_ROWS, _SLICE_ROWS = 50_000, 256


def table_bytes(aliases: Sequence[str], text_bytes: Sequence[int], scale: float) -> dict[str, int]:
    """Estimates the bytes of `scores` and `score_matrix`.

    Args:
        aliases: aliases of the scored models.
        text_bytes: UTF-8 bytes of each instance of the sample that will be scored.
        scale: size of the whole pool to score, in samples.

    Returns:
        Bytes by table name.
    """
    n_instances = len(text_bytes) * scale
    matrix = schemas.score_matrix(list(aliases))
    return {
        "scores": round(_bytes_per_instance(schemas.SCORES, text_bytes, n_instances, len(aliases)) * n_instances),
        "score_matrix": round(_bytes_per_instance(matrix, text_bytes, n_instances, 1) * n_instances),
    }


def _bytes_per_instance(
    table: schemas.Table, text_bytes: Sequence[int], n_instances: float, rows_per_instance: int
) -> float:
    """Writes rows whose ids and numbers differ from row to row, and whose words and times do not.

    A worker writes a slice's rows of one model, then of the next model, so an id soon repeats and compresses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    n = min(round(n_instances), _MAX_ROWS)
    order = [
        i
        for start in range(0, n, _SLICE_ROWS)
        for _ in range(rows_per_instance)
        for i in range(start, min(start + _SLICE_ROWS, n))
    ]

    def values(name: str, kind: str) -> list[Any]:
        if name in ("instance_id", "content_hash"):
            ids = [f"{rng.getrandbits(128):032x}" for _ in range(n)]
            return [ids[i] for i in order]
        if kind == "float64":
            return [rng.random() for _ in order]
        if name.endswith(("_bytes", "n_tokens")):
            return [rng.choice(text_bytes) for _ in order]
        constant: Any = {"timestamp": 0, "int64": 0, "int32": 0, "bool": False, "binary": b""}.get(kind, "0" * 32)
        return [constant] * len(order)

    schema = table.arrow_schema()
    columns = [pa.array(values(column.name, column.type), schema.field(column.name).type) for column in table.columns]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer)  # Snappy, as Spark's default
    return buffer.tell() / n
