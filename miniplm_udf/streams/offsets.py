"""The offsets at which a query's micro-batches end, read from its checkpoint. Driver only; starts no Spark job.

Input: a checkpoint's URI; output: the offset of the query's only source, parsed. Before a micro-batch begins, Spark
writes `offsets/<batch>` with the offset at which it ends; a replay reads the same file. Writes nothing.
"""

import json

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.storage import Json

# Lines of an offsets file: a version, the query's settings, and one line per source.
_SOURCE_LINE = 2


def end_offset(checkpoint_uri: str, batch_id: int) -> Json | None:
    """The offset at which a micro-batch ends; None if no micro-batch of that number was begun.

    Args:
        checkpoint_uri: the checkpoint folder.
        batch_id: number of the micro-batch; a negative number was never begun.

    Raises:
        CorpusError: the file of offsets is damaged.
    """
    uri = storage.join(checkpoint_uri, "offsets", str(batch_id))
    if batch_id < 0 or not storage.exists(uri):
        return None
    try:
        offset: Json = json.loads(storage.read_text(uri).splitlines()[_SOURCE_LINE])
    except (ValueError, IndexError) as error:
        raise CorpusError(
            f"checkpoint {storage.redact(checkpoint_uri)}: expected the offsets of micro-batch {batch_id}, found a "
            "file that is cut off or damaged; remove the checkpoint, and the next run continues from the tables"
        ) from error
    return offset


def is_behind(offset: Json | None, version: int) -> bool:
    """Whether a stream at `offset` of a Delta table may still read rows that the table had at `version`.

    Args:
        offset: Delta's end offset of the newest finished micro-batch, parsed; None before the first is finished.
        version: a version of the table.

    Returns:
        Also True while the stream still reads the rows that the table had when the query began.
    """
    if offset is None or bool(offset["isStartingVersion"]):
        return True
    return int(offset["reservoirVersion"]) <= version
