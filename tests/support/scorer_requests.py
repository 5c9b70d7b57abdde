"""Requests to the scorers, as the workers get them, and processes to wait for."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa

from miniplm_udf.workers import process_slots
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.messages import SCORE_REQUEST_SCHEMA
from miniplm_udf.workers.score_counts import ScoreCounts


def request(texts: Sequence[str], aliases: Sequence[str] = ("teacher",)) -> pa.RecordBatch:
    rows = [{"instance_id": f"id{n}", "text": text, "model_ids": list(aliases)} for n, text in enumerate(texts)]
    return pa.RecordBatch.from_pylist(rows, schema=SCORE_REQUEST_SCHEMA)


def run(
    factories: dict[str, Any], texts: Sequence[str], total: ScoreCounts | None = None, rows_a_batch: int = 7
) -> list[dict[str, Any]]:
    """The scored rows of texts."""
    whole = request(texts, list(factories))
    batches = iter([whole.slice(start, rows_a_batch) for start in range(0, len(texts), rows_a_batch)])
    sink = SimpleNamespace(add=(total or ScoreCounts()).add)
    return [row for out in score_arrow(factories, sink=sink)(batches) for row in out.to_pylist()]


def texts_of(n: int) -> list[str]:
    return [f"the text number {i}" for i in range(n)]


def is_gone(pid: int) -> bool:
    try:
        return process_slots.is_gone(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return time.monotonic() - start
