"""The content of a root, read without Spark, and its differences from the root of an undisturbed run.

Input: two roots' tables. Output: `Differences`: instances lost, rows that stand twice, rows that differ, and a line on
each kind for people. Reads the files of each table's newest version (deltalake, pyarrow). Writes nothing.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from deltalake import DeltaTable

from miniplm_udf import layout
from tests.support.faults.experiment import CORPUS, RATIO, SCALES

_SCORE_KEY = ("instance_id", "model_revision")
_EXAMPLES = 3


@dataclasses.dataclass
class Differences:
    """Counts, and what was found, in words."""

    lost: int = 0
    duplicated: int = 0
    differing: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)

    def note(self, kind: str, what: str, found: Iterable[Any]) -> None:
        """Counts what was found under `lost`, `duplicated` or `differing`."""
        found = list(found)
        if found:
            setattr(self, kind, getattr(self, kind) + len(found))
            self.lines.append(f"{kind}: {what}: {len(found)}, such as {found[:_EXAMPLES]}")


@dataclasses.dataclass(frozen=True)
class Root:
    """The rows of a root's tables. `keys` is `document_keys`, which packed chunking alone has."""

    instances: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    matrix: list[dict[str, Any]]
    refined: list[dict[str, Any]]
    corpora: list[dict[str, Any]]
    keys: list[dict[str, Any]]


def read_root(root: str | Path) -> Root:
    """Reads the tables of the root at a path or URI."""
    names = ("instances", "rejects", "scores", "score_matrix", f"refined/{CORPUS}", "corpora", "document_keys")
    return Root(*(rows(root, name) for name in names))


def rows(root: str | Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table; none where there is no table."""
    place = layout.Root(str(root)).table(name)
    if not DeltaTable.is_deltatable(place):
        return []
    return [row for uri in DeltaTable(place).file_uris() for row in _file_rows(uri)]


def _file_rows(uri: str) -> list[dict[str, Any]]:
    with fsspec.open(uri) as file:
        return list(pq.ParquetFile(file).read().to_pylist())


def compare(found: Root, expected: Root, varying: bool) -> Differences:
    """How a root differs from an undisturbed run's.

    Args:
        varying: the scores are other ones in every run, so that rows are held against the committed scores instead.
    """
    differences = Differences()
    _keys(differences, "instances", found.instances, expected.instances, ("instance_id",))
    _keys(differences, "document_keys", found.keys, expected.keys, ("document_key",))
    _keys(differences, "rejects", found.rejects, expected.rejects, ("reject_id",))
    _keys(differences, "scores", found.scores, expected.scores, _SCORE_KEY)
    _keys(differences, "score_matrix", found.matrix, expected.matrix, ("instance_id",))
    _same_values(differences, "document_keys", found.keys, expected.keys, ("document_key",), "instance_id")
    _same_values(differences, "instances", found.instances, expected.instances, ("instance_id",), "text", "split")
    if not varying:
        _same_values(
            differences, "scores", found.scores, expected.scores, _SCORE_KEY, "nll_sum_nats", "n_tokens", "n_bytes"
        )
        _same_values(differences, "refined", found.refined, expected.refined, ("instance_id",), "score", "n_tokens")
        _same_values(differences, "corpora", found.corpora, expected.corpora, ("name",), "fingerprint", "threshold")
    versions = [(row["name"], row["version"]) for row in found.corpora]
    if versions != [(row["name"], row["version"]) for row in expected.corpora]:
        differences.note("differing", "versions in corpora", versions or ["none"])
    _matrix_is_of_scores(differences, found)
    _refined_is_of_matrix(differences, found)
    return differences


def _by_key(table: list[dict[str, Any]], key: tuple[str, ...]) -> dict[Hashable, dict[str, Any]]:
    return {tuple(row[name] for name in key): row for row in table}


def _keys(
    differences: Differences, name: str, found: list[dict[str, Any]], expected: list[dict[str, Any]],
    key: tuple[str, ...],
) -> None:  # fmt: skip
    """Every key once, and no other."""
    counts = collections.Counter(tuple(row[column] for column in key) for row in found)
    wanted = set(_by_key(expected, key))
    differences.note("lost", f"keys of {name} that are missing", sorted(wanted - set(counts)))
    differences.note("duplicated", f"keys of {name}", [one for one, count in counts.items() for _ in range(count - 1)])
    differences.note("differing", f"keys of {name} that no undisturbed run has", sorted(set(counts) - wanted))


def _same_values(
    differences: Differences, name: str, found: list[dict[str, Any]], expected: list[dict[str, Any]],
    key: tuple[str, ...], *columns: str,
) -> None:  # fmt: skip
    mine, theirs = _by_key(found, key), _by_key(expected, key)
    unequal = [one for one in mine.keys() & theirs.keys() if any(mine[one][c] != theirs[one][c] for c in columns)]
    differences.note("differing", f"rows of {name} in {columns}", unequal)
    differences.note("differing", f"keys of {name}", mine.keys() ^ theirs.keys())


def _matrix_is_of_scores(differences: Differences, root: Root) -> None:
    """Each row of the matrix repeats the committed scores, number by number."""
    scores = _by_key(root.scores, _SCORE_KEY)
    for alias in SCALES:
        unequal = [
            row["instance_id"] for row in root.matrix if not _is_made_of(row, alias, scores)
        ]  # fmt: skip
        differences.note("differing", f"matrix rows not made of their committed scores of {alias}", unequal)


def _is_made_of(row: Mapping[str, Any], alias: str, scores: Mapping[Hashable, Mapping[str, Any]]) -> bool:
    score = scores.get((row["instance_id"], row[f"{alias}_revision"]))
    if score is None:
        return False
    mean = score["nll_sum_nats"] / score["n_tokens"]
    wanted = (score["nll_sum_nats"], score["n_tokens"], mean)
    return wanted == tuple(row[f"{alias}_{name}"] for name in ("nll_sum_nats", "n_tokens", "nll_mean"))


def _refined_is_of_matrix(differences: Differences, root: Root) -> None:
    """The newest version holds the best of the matrix, once each; its row in `corpora` has their count."""
    ranked = sorted((row["reference_nll_mean"] - row["teacher_nll_mean"], row["instance_id"]) for row in root.matrix)
    n_kept = math.floor(RATIO * len(ranked))
    best = {instance_id: score for score, instance_id in ranked[len(ranked) - n_kept :]}
    counts = collections.Counter(row["instance_id"] for row in root.refined)
    differences.note("lost", "refined instances that are missing", best.keys() - counts.keys())
    differences.note("duplicated", "refined instances", [one for one, count in counts.items() if count > 1])
    unequal = [row["instance_id"] for row in root.refined if best.get(row["instance_id"]) != row["score"]]
    differences.note("differing", "refined rows that the matrix does not give", unequal)
    newest = max(root.corpora, key=lambda row: row["version"], default=None)
    if newest is None or newest["n_instances"] != n_kept:
        differences.note("differing", "newest version's count in corpora", [newest and newest["n_instances"]])
