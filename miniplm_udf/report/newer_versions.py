"""Students whose corpus has a newer version than the one that they were trained on. Driver only; no Spark.

Input: a root and its trainings. Output: a `NewerVersion` for each corpus. Reads the table `corpora` (delta-rs); without
this package or the table, no version is known. Writes nothing.
"""

import dataclasses
from collections.abc import Iterable
from importlib.util import find_spec

from miniplm_udf.corpora import listing
from miniplm_udf.errors import CorpusError
from miniplm_udf.report.comparison import Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerVersion:
    """A corpus that has been refined again since students were trained on it.

    Attributes:
        corpus: its name.
        newest: number of its newest version.
        trained: number of the version by student.
    """

    corpus: str
    newest: int
    trained: dict[str, int]


def newer_versions(root: str, trainings: Iterable[Trained]) -> list[NewerVersion]:
    """Returns the corpora of a root that have a newer version than a student was trained on.

    Args:
        root: URI of the root.
        trainings: the trainings of its students.
    """
    if find_spec("deltalake") is None:
        return []
    try:
        newest = {row["name"]: row["version"] for row in listing.listing(root)}
    except CorpusError:
        return []
    trained: dict[str, dict[str, int]] = {}
    for each in trainings:
        if each.corpus in newest and each.corpus_version is not None and each.corpus_version < newest[each.corpus]:
            trained.setdefault(each.corpus, {})[each.name] = each.corpus_version
    return [NewerVersion(corpus=name, newest=newest[name], trained=students) for name, students in trained.items()]
