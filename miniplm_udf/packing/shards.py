"""The rows of one shard on their way back from an executor: sequences as Arrow batches, numbered within the shard.

Input: rows of one shard in stored order, with the column `shard`, and a `SequenceMaker`. Output: one row per sequence
(SEQUENCE_DDL). Holds one batch of sequences at a time. Executor side; pure, so a retried task gives the same rows.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from miniplm_udf.packing.generated import SequenceMaker
from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa

    from miniplm_udf.packing.sequences import PackedSequence

# `position` counts the sequences of a shard.
SEQUENCE_DDL = "shard int, position bigint, token_ids binary, target_mask binary, n_targets int, n_new_tokens bigint"
_ROWS_PER_BATCH = 256


def shard_function(make: SequenceMaker) -> Callable[["Iterator[pa.RecordBatch]"], "Iterator[pa.RecordBatch]"]:
    """Returns the function for `DataFrame.mapInArrow`: rows of one shard in stored order to rows of SEQUENCE_DDL.

    Args:
        make: makes the sequences of the rows.
    """

    def pack_shard(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        shard: int | None = None

        def rows() -> "Iterator[pa.RecordBatch]":
            nonlocal shard
            for batch in batches:
                if shard is None and batch.num_rows:
                    shard = batch.column("shard")[0].as_py()
                yield batch

        group: list[PackedSequence] = []
        position = 0
        for sequence in make(rows()):
            group.append(sequence)
            if len(group) == _ROWS_PER_BATCH:
                yield _to_arrow(group, shard, position)
                position += len(group)
                group = []
        if group:
            yield _to_arrow(group, shard, position)

    return pack_shard


def _to_arrow(group: list["PackedSequence"], shard: int | None, position: int) -> "pa.RecordBatch":
    import pyarrow as pa

    columns = {
        "shard": [shard] * len(group),
        "position": range(position, position + len(group)),
        "token_ids": [sequence.token_ids.astype("<i4").tobytes() for sequence in group],
        "target_mask": [sequence.target_mask.tobytes() for sequence in group],
        "n_targets": [int(sequence.target_mask.sum()) for sequence in group],
        "n_new_tokens": [sequence.n_new_tokens for sequence in group],
    }
    return pa.RecordBatch.from_pydict(columns, schema=schema_of(SEQUENCE_DDL))
