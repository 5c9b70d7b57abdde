"""The shapes of what `listing` returns: versions of corpora as `miniplm corpus list`, `show` and `diff` print them.

Dicts with declared keys, because `--json` prints them as they are: a key keeps its name and meaning. Reads nothing.
"""

import datetime
from typing import TypedDict

from miniplm_udf.store.provenance import CorpusRow

# {source: {"n_instances": ..., "n_tokens": ...}}
Counts = dict[str, dict[str, int]]


class ListedVersion(TypedDict):
    """A version in the list: columns of `corpora`, and two more.

    Attributes:
        made_by: refine, follow, restore, rebuild or take-down.
        pinned: the tag of its pin, "yes" for a pin without a tag, None for no pin.
    """

    name: str
    version: int
    created_at: datetime.datetime
    n_instances: int
    n_tokens: int
    threshold: float
    fingerprint: str
    made_by: str
    pinned: str | None


class ShownVersion(CorpusRow):
    """The provenance of a version, its pin, and its counts by source (None if the version's rows are gone)."""

    pinned: bool
    tag: str | None
    by_source: Counts | None


class ShownInstance(TypedDict):
    """An example of an added or removed row; `text` has at most 240 characters, None if there is no such instance."""

    instance_id: str
    source: str
    score: float
    text: str | None


# `from` and `to` are NAME@NUMBER. The first word is Python's, so no class statement can declare it.
VersionDifference = TypedDict(
    "VersionDifference",
    {
        "from": str,
        "to": str,
        "added": Counts,
        "removed": Counts,
        "both": Counts,
        "added_examples": list[ShownInstance],
        "removed_examples": list[ShownInstance],
    },
)
