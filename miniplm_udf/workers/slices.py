"""Slices of rows: cut from Spark's batches, and turned with their results into the rows that come out. Arrow only.

Input: batches with the columns of `udf.SCORE_REQUEST_DDL`. Output: batches that hold as much text as a scorer wants at
once; and, from a scorer's results, batches of SCORED_SCHEMA with their `Tally`. Knows no scorers. Executor side, in the
Spark worker and in the scorer process; pure.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from miniplm_udf.workers.tally import ModelCounts, Tally

SCORED_SCHEMA = pa.schema(
    [
        ("instance_id", pa.string()),
        ("model_id", pa.string()),
        ("nll_sum_nats", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_MAX_DETAIL = 1000
_NUMBER_NAMES = ("nll_sum_nats", "n_tokens", "n_bytes")
_NUMBERS = operator.attrgetter(*_NUMBER_NAMES)


@dataclasses.dataclass(frozen=True)
class Failed:
    """A result for a row that no scorer gave one: a fixed word and, for people, what happened."""

    reason: str
    detail: str


def full_slices(batches: Iterator[pa.RecordBatch], slice_bytes: Callable[[], int]) -> Iterator[pa.RecordBatch]:
    """Cuts and joins batches, so that each slice but the last has `slice_bytes` of text, or one row that reaches it."""
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
    """The rows that want each alias, or None for all of them. Aliases ascend."""
    import numpy as np
    import pyarrow.compute as pc

    aliases, rows = pc.list_flatten(model_ids), pc.list_parent_indices(model_ids)
    wanted: dict[str, list[int] | None] = {}
    for alias in sorted(aliases.unique().to_pylist()):
        of_alias = np.unique(rows.filter(pc.equal(aliases, alias)).to_numpy()).tolist()
        wanted[alias] = None if len(of_alias) == len(model_ids) else of_alias
    return wanted


def scored_rows(kept: pa.RecordBatch, alias: str, results: Sequence[Any]) -> tuple[pa.RecordBatch, Tally]:
    """The output rows, and their counts. A failure has no numbers, a score no reason.

    Args:
        kept: the instances' ids, and the columns that come out as they went in.
        alias: of the model.
        results: one a row, with nll_sum_nats, n_tokens and n_bytes, or reason and detail. What is not a finite number
            has the reason nan_score.
    """
    import numpy as np
    import pyarrow.compute as pc

    numbers = _numbers(results)
    failed = np.flatnonzero(~np.isfinite(np.array(numbers[0], np.float64))).tolist()
    reasons: list[str | None] = [None] * len(results)
    details: list[str | None] = [None] * len(results)
    for row in failed:
        for values in numbers:
            values[row] = None
        reasons[row] = getattr(results[row], "reason", None) or "nan_score"
        details[row] = str(getattr(results[row], "detail", None) or "")[:_MAX_DETAIL] or None
    arrays = [
        pa.array(values, field.type)
        for values, field in zip([*numbers, reasons, details], list(SCORED_SCHEMA)[2:], strict=True)
    ]
    ids = kept.column(0).cast(pa.string())
    tally = Tally(
        models={alias: ModelCounts(len(results) - len(failed), len(failed), pc.sum(arrays[1]).as_py() or 0)},
        failed=[(ids[row].as_py(), alias, str(reasons[row]), details[row]) for row in failed],
    )
    scored = pa.RecordBatch.from_arrays(
        [ids, pa.repeat(alias, len(results)), *arrays, *kept.columns[1:]],
        schema=pa.schema([*SCORED_SCHEMA, *list(kept.schema)[1:]]),
    )
    return scored, tally


def _numbers(results: Sequence[Any]) -> list[list[Any]]:
    """nll_sum_nats, n_tokens and n_bytes of the results, None for a failure."""
    rows: list[tuple[Any, ...]]
    try:
        # Without a failure among them, which is the usual: no look at each for what it may lack.
        rows = list(map(_NUMBERS, results))
    except AttributeError:
        rows = [tuple(getattr(result, name, None) for name in _NUMBER_NAMES) for result in results]
    return [list(column) for column in zip(*rows, strict=True)]
