"""How far the streaming queries of a root have come, and what they have still to read of a table. Driver only.

Input: a root; output: a `Checkpoint` for each query, from the files under `<root>/_checkpoints`: Spark's own in the
checkpoint folder and the query's facts next to it. A query reads one table by its versions, so files that a later
commit has replaced may still be wanted: whoever removes files asks `needed_from` first. The query's lease tells whether
it runs now. A query whose checkpoint is removed starts from the beginning, and finds in the tables what is done
already. Reads the log, never data.
"""

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fsspec

from miniplm_udf import layout, storage
from miniplm_udf.errors import CorpusError, DamagedRecordError
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.table_kinds import KINDS
from miniplm_udf.storage import Json
from miniplm_udf.streams import facts
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.offsets import end_offset

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# The leases of queries that are a table's only writer; `alone` takes them also where no such query has a checkpoint.
_TABLE_LEASES = {lease for kind in KINDS if kind.queries for lease in kind.leases}

LOGGER = logging.getLogger("miniplm.streams")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one query.

    Attributes:
        uri: the folder; `name` is the last part of its path.
        id: the query's id as in the tables: 32 hexadecimal digits.
        batch_id: the newest finished micro-batch; None before the first is finished.
        offset: where that micro-batch ends in the source.
        facts: stage, source, sample, input format, lease and revisions of the query.
    """

    uri: str
    name: str
    id: str
    batch_id: int | None
    offset: Json | None
    facts: QueryFacts

    @property
    def stage(self) -> str:
        """Name of the stage that the query belongs to, for example `ingest`."""
        return self.facts.stage

    @property
    def source(self) -> str | None:
        """The table of the root that the query reads; None for ingest."""
        return self.facts.source

    @property
    def sample(self) -> float:
        """The share of its source's pool that the query takes."""
        return self.facts.sample

    @property
    def lease(self) -> str:
        """The name of the lease that the query's driver holds."""
        return self.facts.lease

    def moved_at(self) -> datetime.datetime:
        """When the query finished its newest micro-batch, or was begun, by the storage's clock (UTC)."""
        newest = "metadata" if self.batch_id is None else f"commits/{self.batch_id}"
        filesystem, path = fsspec.core.url_to_fs(storage.join(self.uri, newest))
        modified: datetime.datetime = filesystem.modified(path)
        return modified if modified.tzinfo else modified.replace(tzinfo=datetime.UTC)

    def remove(self) -> None:
        """Removes the checkpoint and the facts next to it. The query's next start begins with a new id."""
        storage.remove_folder(self.uri)
        storage.remove_folder(layout.query_facts(self.uri))


def find(root: str) -> Iterator[Checkpoint]:
    """Reads the checkpoints of the queries of a root.

    Args:
        root: URI of the root.

    Yields:
        Checkpoints by name. Folders without `metadata` (a training, a query that never started) are left out.

    Raises:
        CorpusError: a checkpoint's `metadata`, its newest offset or the file of facts is damaged.
    """
    for name in storage.list_folder(Root(root).checkpoint()):
        uri = Root(root).checkpoint(name)
        try:
            metadata = storage.read_json(storage.join(uri, "metadata"))
        except DamagedRecordError as error:
            raise CorpusError(
                f"checkpoint {storage.redact(uri)}: expected a file `metadata` with the query's id, found a damaged "
                "one; remove the whole checkpoint, and the next run continues from the tables"
            ) from error
        if metadata is None:
            continue  # a file of facts, the trainer's checkpoints, or a query that was never started
        batch_id = newest_finished(uri)
        offset = None if batch_id is None else end_offset(uri, batch_id)
        try:
            query_facts = facts.read(uri)
        except CorpusError as error:  # a copy that somebody put there
            LOGGER.warning("%s", error)
            continue
        yield Checkpoint(uri, name, metadata["id"].replace("-", ""), batch_id, offset, query_facts)


def newest_finished(checkpoint_uri: str) -> int | None:
    """Finds the newest finished micro-batch of a checkpoint.

    Args:
        checkpoint_uri: the checkpoint folder, which need not exist.

    Returns:
        The number of the micro-batch; None before the first is finished.
    """
    names = storage.list_folder(storage.join(checkpoint_uri, "commits"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def needed_from(spark: "SparkSession", table_uri: str, checkpoint: Checkpoint) -> int | None:
    """The first version of its source whose files a query still wants, though later versions may not have them.

    Args:
        table_uri: the source of the query.
        checkpoint: checkpoint of the query.

    Returns:
        The version; files that commits up to it have replaced are not wanted any more. None: no file is wanted.
    """
    # A query that has begun its first micro-batch, and not finished it, needs the version that it began with.
    offset = checkpoint.offset or end_offset(checkpoint.uri, 0)
    if offset is None:
        return None
    has_finished, is_in_first = checkpoint.offset is not None, bool(offset["isStartingVersion"])
    if has_finished and not is_in_first and not rows_behind(spark, table_uri, offset):
        return None
    return max(0, int(offset["reservoirVersion"]) - 1)


@contextlib.contextmanager
def alone(root: str) -> Iterator[None]:
    """Keeps every query of a root from running while the block runs; waits for a running annotation or refinement.

    Args:
        root: URI of the root.

    Raises:
        CorpusError: a query runs; raised at the start of the block.
    """
    corpora = storage.list_folder(Root(root).refined())
    leases = {*_TABLE_LEASES, *(checkpoint.lease for checkpoint in find(root)), *(f"follow-{name}" for name in corpora)}
    with contextlib.ExitStack() as stack:
        for lease in sorted(leases):
            stack.enter_context(Lease(Root(root).lease(lease), lease))
        stack.enter_context(Lease(Root(root).lease("annotations"), "annotate", waits=True))
        for name in corpora:
            stack.enter_context(Lease(Root(root).lease(f"refined-{name}"), table_names.refined(name), waits=True))
        yield
