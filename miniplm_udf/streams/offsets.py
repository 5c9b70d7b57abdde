"""Where a query's micro-batches end, as its checkpoint says. Driver only; starts no job.

Input: a checkpoint's URI; output: the offset of the query's only source, parsed. Spark writes `offsets/<batch>` before
it begins a micro-batch, with the offset at which that one ends; a replay finds the same. Owns no checkpoint, writes
nothing.
"""

import json
from typing import Any

from miniplm_udf import storage

# Of an offsets file: a version, the query's settings, and a line a source.
_SOURCE_LINE = 2


def end_offset(checkpoint_uri: str, batch_id: int) -> dict[str, Any] | None:
    """The offset at which a micro-batch ends, or None where none of that number was begun."""
    place = storage.join(checkpoint_uri, "offsets", str(batch_id))
    if batch_id < 0 or not storage.exists(place):
        return None
    found: dict[str, Any] = json.loads(storage.read_text(place).splitlines()[_SOURCE_LINE])
    return found


def is_behind(offset: dict[str, Any] | None, version: int) -> bool:
    """Whether a stream that has come to `offset` of a Delta table may still read rows that `version` has."""
    if offset is None or bool(offset["isStartingVersion"]):
        return True
    return int(offset["reservoirVersion"]) <= version
