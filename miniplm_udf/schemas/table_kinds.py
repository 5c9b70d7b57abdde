"""The kinds of tables, and what the commands do with the tables of each kind: one `TableKind` a kind, in `KINDS`.

`register_tables`, the checks before a command, maintenance, take-downs and `verify` go through `KINDS`. A new table is
declared twice: here, and with its columns in `schemas/__init__.py`. Reads and writes nothing.
"""

import dataclasses

from miniplm_udf.schemas import table_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableKind:
    """One kind of table. A kind in a folder has one table for each corpus, or more.

    Attributes:
        name: name of the table; for tables in a folder, the first part of their names (`refined`).
        is_registered: `register_tables` gives it a name for SQL. Of the kinds in folders only `refined` is registered,
            by code of its own.
        is_merged: maintenance merges its small files, and first takes the leases of its writers.
        leases: names of the leases of its writers, without those of the queries in `queries`.
        queries: stages of the streaming queries that append to it.
        is_optional: its queries write it in some roots only, so their checkpoints do not say that it must exist.
        has_instances: a take-down deletes the rows of the removed instances by their `instance_id`.
        is_verified: all checks of `verify` read it at one and the same version. Never for a kind in a folder.
        is_versioned: users go back to its old versions, so maintenance keeps replaced files for years.
        remedy: what to do if it is lost and has no copy; "" if nothing else in a root says that it existed.
    """

    name: str
    is_registered: bool
    is_merged: bool
    leases: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    is_optional: bool = False
    has_instances: bool
    is_verified: bool
    is_versioned: bool = False
    remedy: str

    @property
    def is_folder(self) -> bool:
        """Whether its tables stand in a folder."""
        return self.name in table_names.FOLDERS


# After the checkpoints of a stage's queries are removed, its command does this. Every stage in `queries` has an entry.
EFFECT_OF_REMOVAL = {
    "ingest": "`miniplm ingest` then reads the whole input again; instances that come out the same keep their scores",
    "score": "`miniplm score` then reads all instances again, and scores those that have no score in `scores`",
    "score_matrix": "`miniplm score` then builds the matrix again from `scores`",
    "proxy": "`miniplm proxy` then predicts all instances again",
    "generate": "`miniplm generate` then reads all instances again, and continues those without a row in `generations`",
}

# A table stands after the tables that it is made from. Take-downs and `verify` go through them backwards.
KINDS = (
    TableKind(
        name="instances",
        is_registered=True,
        is_merged=True,
        leases=("ingest",),
        queries=("ingest",),
        has_instances=True,
        is_verified=True,
        remedy=f"remove the checkpoints ingest-*: {EFFECT_OF_REMOVAL['ingest']}",
    ),
    TableKind(
        name="document_keys",
        is_registered=False,  # hashes and ids, which only the next ingest needs
        is_merged=True,
        leases=("ingest",),
        queries=("ingest",),
        is_optional=True,  # only where chunking is packed
        has_instances=False,  # after a take-down, its hashes keep the documents from being packed again
        is_verified=False,  # read by the check of the ingest
        remedy="ingest into a new root: without these keys a document that comes again would be packed again",
    ),
    TableKind(
        name="annotations",
        is_registered=True,
        is_merged=True,
        leases=("annotations",),
        has_instances=True,
        is_verified=True,
        remedy="run `miniplm annotate`, which makes it again",
    ),
    TableKind(
        name="rejects",
        is_registered=True,
        is_merged=True,
        leases=("ingest",),
        queries=("ingest", "score", "generate"),
        has_instances=True,
        is_verified=True,
        remedy="remove the checkpoints ingest-* and score-*: `miniplm ingest` and `miniplm score` then find them again",
    ),
    TableKind(
        name="scores",
        is_registered=True,
        is_merged=True,
        queries=("score",),
        has_instances=True,
        is_verified=True,
        remedy=f"remove the checkpoints score-* and score_matrix-*: {EFFECT_OF_REMOVAL['score']}",
    ),
    TableKind(
        name="score_matrix",
        is_registered=True,
        is_merged=True,
        leases=("score_matrix",),
        queries=("score_matrix",),
        has_instances=True,
        is_verified=True,
        remedy="run `miniplm score`, which builds it again from `scores`",
    ),
    TableKind(
        name="proxy_scores",
        is_registered=True,
        is_merged=True,
        leases=("proxy_scores",),
        queries=("proxy",),
        has_instances=True,
        is_verified=True,
        remedy="run `miniplm proxy`, which predicts all instances again",
    ),
    TableKind(
        name="generations",
        is_registered=True,
        is_merged=True,
        queries=("generate",),
        has_instances=True,
        is_verified=True,
        remedy=f"remove the checkpoints generate-*: {EFFECT_OF_REMOVAL['generate']}",
    ),
    TableKind(
        name=table_names.CUTS,
        is_registered=False,  # numbers of a query that runs
        is_merged=False,
        has_instances=False,  # a take-down removes it whole
        is_verified=False,
        remedy="",  # a follower counts again
    ),
    TableKind(
        name=table_names.REFINED,
        is_registered=True,
        is_merged=True,  # under the lease `refined-<corpus>`
        has_instances=False,  # a take-down makes a new version
        is_verified=False,  # read by the check of corpora
        is_versioned=True,
        remedy="refine under another name in refine.corpora: new versions would get the numbers of the recorded ones",
    ),
    TableKind(
        name="corpora",
        is_registered=True,
        is_merged=False,
        has_instances=False,
        is_verified=True,
        remedy="run `miniplm refine`, which records the newest version of each corpus again; older ones are forgotten",
    ),
    TableKind(
        name="pins",
        is_registered=True,
        is_merged=False,
        has_instances=False,
        is_verified=False,  # read by the check of pinned copies
        remedy="",
    ),
    TableKind(
        name=table_names.PINNED,
        is_registered=False,  # `read_corpus` reads the copy of a pinned version
        is_merged=False,
        has_instances=False,  # a take-down changes it with its row of `pins`
        is_verified=False,  # read by the check of pinned copies
        remedy="`miniplm corpus unpin` the version, if nobody needs its rows",
    ),
    TableKind(
        name=table_names.PACKED,
        is_registered=False,  # token ids in binary, which the trainer reads
        is_merged=False,
        has_instances=False,  # a take-down empties it, since its sequences have no ids
        is_verified=False,  # read by the check of take-downs, by time
        is_versioned=True,
        remedy="",  # `miniplm pack` makes it again
    ),
    TableKind(
        name="takedowns",
        is_registered=True,
        is_merged=False,
        has_instances=False,  # the record of the take-down itself
        is_verified=False,  # read by the check of take-downs
        remedy="",
    ),
)


def find_kind(table: str) -> TableKind:
    """Returns the kind of the table `table`, e.g. of `refined/best`."""
    return next(kind for kind in KINDS if kind.name == table_names.kind_of(table))
