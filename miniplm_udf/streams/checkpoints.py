"""How far the streaming queries of a root have come, and what of a table they have still to read. Driver only.

Input: a root; output: a `Checkpoint` a query, from the files under `<root>/_checkpoints`. A query reads one table by
its versions (`SOURCES`), so files that a later commit has replaced may still be wanted: whoever removes files asks
`needed_from` first. Whether a query runs at this moment is told by its lease. A query whose checkpoint is removed
begins anew, and finds in the tables what it has done already. Reads the log, never data; writes nothing.
"""

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.lease import Lease, lease_uri
from miniplm_udf.streams.offsets import end_offset

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What the queries read, by the beginning of their checkpoints' names; ingest reads what is not ours.
SOURCES = {"score-": "instances", "score_matrix-": "scores", "follow-": "score_matrix", "proxy-": "instances"}
# Of queries that a table is the work of: they hold the lease of that name. Others have one of their own.
_LEASES = {"ingest-": "ingest", "score_matrix-": "score_matrix", "proxy-": "proxy_scores"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One query. `id` is as in the tables; `batch_id` its newest finished micro-batch, `offset` where that one ends."""

    uri: str
    name: str
    id: str
    batch_id: int | None
    offset: dict[str, Any] | None

    @property
    def source(self) -> str | None:
        """The table of the root that it reads."""
        return next((table for prefix, table in SOURCES.items() if self.name.startswith(prefix)), None)

    @property
    def sample(self) -> float:
        """The share of its source's rows that it takes; only `score` takes less than all (`scores.checkpoint_name`)."""
        parts = self.name.split("-", 2)
        return float(parts[2]) if parts[0] == "score" and len(parts) == 3 else 1.0

    @property
    def lease(self) -> str:
        """The name of the lease that its driver holds."""
        return next((lease for prefix, lease in _LEASES.items() if self.name.startswith(prefix)), self.name)

    def moved_at(self) -> datetime.datetime:
        """When it finished its newest micro-batch, or was begun, by the storage's clock (UTC)."""
        newest = "metadata" if self.batch_id is None else f"commits/{self.batch_id}"
        filesystem, path = fsspec.core.url_to_fs(storage.join(self.uri, newest))
        found: datetime.datetime = filesystem.modified(path)
        return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def find(root: str) -> Iterator[Checkpoint]:
    """The checkpoints of a root, by name."""
    for name in storage.list_folder(storage.join(root, "_checkpoints")):
        uri = storage.join(root, "_checkpoints", name)
        metadata = storage.read_json(storage.join(uri, "metadata"))
        if metadata is None:
            continue  # the trainer's checkpoints, or a query that was never begun
        numbers = [int(found) for found in storage.list_folder(storage.join(uri, "commits")) if found.isdigit()]
        batch_id = max(numbers, default=None)
        offset = None if batch_id is None else end_offset(uri, batch_id)
        yield Checkpoint(uri, name, metadata["id"].replace("-", ""), batch_id, offset)


def needed_from(spark: "SparkSession", table_uri: str, checkpoint: Checkpoint) -> int | None:
    """The version of its source from which on a query wants files that may be in no later version; None: it wants none.

    Files that a commit up to this version has replaced are not wanted any more.
    """
    # A query that has finished no micro-batch, but begun one, is bound to the version that it began with.
    offset = checkpoint.offset or end_offset(checkpoint.uri, 0)
    if offset is None:
        return None
    has_finished, is_in_first = checkpoint.offset is not None, bool(offset["isStartingVersion"])
    if has_finished and not is_in_first and not rows_behind(spark, table_uri, offset):
        return None
    return max(0, int(offset["reservoirVersion"]) - 1)


@contextlib.contextmanager
def alone(root: str) -> Iterator[None]:
    """Keeps the queries of a root from running, as far as it has any, and waits for what annotates or refines it.

    Raises:
        CorpusError: on entering, a query runs.
    """
    corpora = storage.list_folder(storage.join(root, "tables", "refined"))
    queries = {*_LEASES.values(), *(one.lease for one in find(root)), *(f"follow-{name}" for name in corpora)}
    with contextlib.ExitStack() as stack:
        for query in sorted(queries):
            stack.enter_context(Lease(lease_uri(root, query), query))
        stack.enter_context(Lease(lease_uri(root, "annotations"), "annotate", waits=True))
        for name in corpora:
            stack.enter_context(Lease(lease_uri(root, f"refined-{name}"), f"refined/{name}", waits=True))
        yield
