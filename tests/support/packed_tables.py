"""Packed tables in the layout that the pack stage writes, made without a JVM, of any size.

`packed_batch` makes rows from arrays without a copy for each row; `write_rows` streams batches into one commit.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, WriterProperties, write_deltalake

from miniplm_udf import schemas
from miniplm_udf.packing.file_layout import FILE_ROWS, GROUP_ROWS

SCHEMA = schemas.packed("a", "b").arrow_schema()


def _binary(rows: np.ndarray) -> pa.Array:
    """Each row's bytes as a binary value."""
    width = rows.shape[1] * rows.itemsize
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * width
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.binary(), len(rows), buffers)


def packed_batch(first_id: int, tokens: np.ndarray, mask: np.ndarray) -> pa.RecordBatch:
    """Rows of a packed table: token ids (n, L + 1) and target masks (n, L), with ids from `first_id` on."""
    columns = [
        pa.array(np.arange(first_id, first_id + len(tokens)), pa.int64()),
        _binary(tokens.astype("<i4", copy=False)),
        _binary(mask.astype("u1", copy=False)),
        pa.array(mask.sum(axis=1, dtype=np.int32)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write_rows(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    metadata: dict[str, Any] | None,
    mode: Any = "overwrite",
    group_rows: int = GROUP_ROWS,
    compression: Any = "ZSTD",
    bytes_per_row: int | None = None,
) -> None:
    """One commit to a packed table; `metadata` stands where Spark's `userMetadata` does.

    Args:
        group_rows: rows of a row group.
        bytes_per_row: rows are written to several files of about as many rows as the pack stage's; None: to one file.
    """
    custom = {"userMetadata": json.dumps(metadata)} if metadata is not None else {}
    properties = WriterProperties(
        max_row_group_size=group_rows,
        compression=compression,
        compression_level=3 if compression == "ZSTD" else None,  # Spark's
        column_properties={
            "token_ids": ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE"),
            "target_mask": ColumnProperties(statistics_enabled="NONE"),
        },
    )
    write_deltalake(
        path.as_uri(),
        pa.RecordBatchReader.from_batches(SCHEMA, batches),
        mode=mode,
        writer_properties=properties,
        target_file_size=bytes_per_row * FILE_ROWS if bytes_per_row else None,
        configuration={"delta.dataSkippingStatsColumns": "sequence_id"},
        commit_properties=CommitProperties(custom_metadata=custom),
    )
