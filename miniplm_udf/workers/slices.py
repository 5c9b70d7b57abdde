"""Slices of rows: cut from Spark's batches, and joined with a scorer's results into the rows that come out. Arrow only.

Input: batches of SCORE_REQUEST_SCHEMA (`messages`). Output: batches that hold as much text as a scorer wants in one
call; and, from a scorer's results, batches of SCORED_SCHEMA or GENERATED_SCHEMA with their `ScoreCounts`. Knows no
scorers. Executor side, in the Spark worker and in the scorer process; pure, so a retry gives the same slices and rows.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from miniplm_udf.workers.score_counts import ModelCounts, ScoreCounts

_MAX_DETAIL = 1000


def full_slices(batches: Iterator[pa.RecordBatch], slice_bytes: Callable[[], int]) -> Iterator[pa.RecordBatch]:
    """Cuts and joins batches to slices of `slice_bytes` of text.

    Args:
        batches: rows with a column `text`.
        slice_bytes: gives the UTF-8 bytes of text that fill a slice; asked again for each slice.

    Yields:
        Slices in the order of the rows. Each but the last holds `slice_bytes` of text or more, of which the last row is
        the first to reach them.
    """
    import numpy as np
    import pyarrow.compute as pc

    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        lengths = pc.fill_null(pc.binary_length(batch.column("text")), 0).to_numpy(zero_copy_only=False)
        ends, start = np.cumsum(lengths, dtype=np.int64), 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            # The first row with which the slice is full.
            row = int(np.searchsorted(ends, before + slice_bytes() - size))
            if row == len(ends):
                held.append(batch.slice(start))
                size += int(ends[-1]) - before
                break
            yield _joined([*held, batch.slice(start, row + 1 - start)])
            held, size, start = [], 0, row + 1
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def rows_by_alias(model_ids: pa.ListArray) -> dict[str, list[int] | None]:
    """Lists the rows that name each alias.

    Args:
        model_ids: aliases of the models that score a row, for each row (list of strings).

    Returns:
        By alias, in ascending order: the sorted numbers of its rows, from 0; None if all rows name it.
    """
    import numpy as np
    import pyarrow.compute as pc

    aliases, rows = pc.list_flatten(model_ids), pc.list_parent_indices(model_ids)
    rows_of: dict[str, list[int] | None] = {}
    for alias in sorted(aliases.unique().to_pylist()):
        alias_rows = np.unique(rows.filter(pc.equal(aliases, alias)).to_numpy()).tolist()
        rows_of[alias] = None if len(alias_rows) == len(model_ids) else alias_rows
    return rows_of


def result_rows(
    carried: pa.RecordBatch, alias: str, results: Sequence[Any], schema: pa.Schema
) -> tuple[pa.RecordBatch, ScoreCounts]:
    """The output rows of one model, and their counts. A failure has no values, any other result no reason.

    Args:
        carried: the instances' ids in the first column, and the columns that come out unchanged.
        alias: alias of the model.
        results: one for each row: a failure with reason and detail, or an object with the columns of `schema` between
            the model's alias and the reason as attributes. A score whose first number, the sum in nats, is not finite
            becomes a failure with the reason nan_score.
        schema: SCORED_SCHEMA or GENERATED_SCHEMA.

    Returns:
        A batch of `schema` and the carried columns, and the counts with each failed row.
    """
    import numpy as np
    import pyarrow.compute as pc

    fields = list(schema)[2:-2]
    columns = _columns(results, [field.name for field in fields])
    if pa.types.is_floating(fields[0].type):
        failed = np.flatnonzero(~np.isfinite(np.array(columns[0], np.float64))).tolist()
    else:
        failed = [row for row, value in enumerate(columns[0]) if value is None]
    reasons: list[str | None] = [None] * len(results)
    details: list[str | None] = [None] * len(results)
    for row in failed:
        for values in columns:
            values[row] = None
        reasons[row] = getattr(results[row], "reason", None) or "nan_score"
        details[row] = str(getattr(results[row], "detail", None) or "")[:_MAX_DETAIL] or None
    arrays = [
        pa.array(values, field.type)
        for values, field in zip([*columns, reasons, details], list(schema)[2:], strict=True)
    ]
    n_tokens = pc.sum(arrays[schema.get_field_index("n_tokens") - 2]).as_py() or 0
    ids = carried.column(0).cast(pa.string())
    counts = ScoreCounts(
        models={alias: ModelCounts(len(results) - len(failed), len(failed), n_tokens)},
        failed=[(ids[row].as_py(), alias, str(reasons[row]), details[row]) for row in failed],
    )
    scored = pa.RecordBatch.from_arrays(
        [ids, pa.repeat(alias, len(results)), *arrays, *carried.columns[1:]],
        schema=pa.schema([*schema, *list(carried.schema)[1:]]),
    )
    return scored, counts


def _columns(results: Sequence[Any], names: Sequence[str]) -> list[list[Any]]:
    """The values of the results by column; None for a failure."""
    rows: list[tuple[Any, ...]]
    try:
        # Mostly no result is a failure, and no attribute has to be tested for.
        rows = list(map(operator.attrgetter(*names), results))
    except AttributeError:
        rows = [tuple(getattr(result, name, None) for name in names) for result in results]
    return [list(column) for column in zip(*rows, strict=True)]
