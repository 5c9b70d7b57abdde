"""The cut of a ranking against a plain sort, over random rows with many ties."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest

from miniplm_udf.refinement.selection import ALL, Bucket, Cut, IdGroup, budget_of, find_cuts, n_fitting
from tests.support.selection_oracles import RankedRow, by_cut, by_sorting, random_rows


class RankedList:
    """`Ranked` over lists, a group each: the same sums, plainly. Counts what was fetched at once."""

    def __init__(self, groups: dict[str, list[RankedRow]]) -> None:
        self.groups, self.fetched = groups, 0

    @staticmethod
    def _bucket(group: str, rows: list[RankedRow]) -> Bucket:
        scores = [row[0] for row in rows]
        return Bucket(group, len(rows), sum(row[2] for row in rows), min(scores), max(scores))

    def _by(self, group: str, keyed: list[tuple[Any, RankedRow]]) -> list[Bucket]:
        parts: dict[Any, list[RankedRow]] = defaultdict(list)
        for key, row in keyed:
            parts[key].append(row)
        return [self._bucket(group, rows) for rows in parts.values()]

    def whole(self, n_buckets: int) -> list[Bucket]:
        """All rows, in buckets of unequal widths."""
        return [
            bucket
            for group, rows in self.groups.items()
            for bucket in self._by(group, [(math.floor(math.atan(row[0]) * n_buckets), row) for row in rows])
        ]

    def _within(self, bucket: Bucket) -> list[RankedRow]:
        return [row for row in self.groups[bucket.group] if bucket.low <= row[0] <= bucket.high]

    def split(self, ranges: Mapping[str, Bucket], n_buckets: int) -> list[Bucket]:
        found = []
        for group, bucket in ranges.items():
            shares = [(row[0] - bucket.low) / (bucket.high - bucket.low) for row in self._within(bucket)]
            numbers = [min(int(share * n_buckets), n_buckets - 1) for share in shares]
            found += self._by(group, list(zip(numbers, self._within(bucket), strict=True)))
        return found

    def scores(self, ranges: Mapping[str, Bucket]) -> list[Bucket]:
        self.fetched = max(self.fetched, sum(len(self._within(bucket)) for bucket in ranges.values()))
        return [
            part
            for group, bucket in ranges.items()
            for part in self._by(group, [(row[0], row) for row in self._within(bucket)])
        ]

    def id_groups(self, ties: Mapping[str, tuple[float, str]], n_characters: int) -> list[IdGroup]:
        groups: dict[tuple[str, str], list[RankedRow]] = defaultdict(list)
        for group, (score, prefix) in ties.items():
            for row in self.groups[group]:
                if row[0] == score and row[1].startswith(prefix):
                    groups[group, row[1][:n_characters]].append(row)
        if n_characters > 32:
            self.fetched = max(self.fetched, sum(map(len, groups.values())))
        return [
            IdGroup(group, len(rows), sum(row[2] for row in rows), key, max(row[1] for row in rows))
            for (group, key), rows in groups.items()
        ]


def find_cut(rows: list[RankedRow], budget: int, n_buckets: int = 16, small: int = 100_000) -> Cut | None:
    ranked = RankedList({ALL: rows})
    cut = find_cuts(ranked, ranked.whole(n_buckets), {ALL: budget}, n_buckets, small).get(ALL)
    assert ranked.fetched <= small
    return cut


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("small", [1, 7, 100_000])
@pytest.mark.parametrize("n_buckets", [2, 16])
def test_the_cut_equals_a_sort(by_tokens: bool, small: int, n_buckets: int) -> None:
    rng = random.Random(f"{by_tokens} {small} {n_buckets}")
    for n in (0, 1, 2, 3, 50, 400):
        for n_scores in (1, 3, 500):
            rows = random_rows(rng, n, n_scores, by_tokens)
            total = sum(row[2] for row in rows)
            for budget in {0, 1, total // 3, total // 2, total - 1, total, total + 5}:
                cut = find_cut(rows, budget, n_buckets, small)
                assert by_cut(rows, cut) == by_sorting(rows, budget), (n, n_scores, budget, cut)


@pytest.mark.parametrize("small", [1, 30, 100_000])
def test_groups_are_cut_each_by_itself_in_the_same_passes(small: int) -> None:
    rng = random.Random(small)
    for n_scores in (1, 3, 300):
        groups = {
            name: random_rows(rng, n, n_scores, True) for name, n in (("a", 300), ("b", 1), ("c", 150), ("d", 40))
        }
        budgets = {
            name: sum(row[2] for row in rows) // rng.randint(1, 4) for name, rows in groups.items() if name != "d"
        }
        ranked = RankedList(groups)
        cuts = find_cuts(ranked, ranked.whole(4), budgets, 4, small)
        assert set(cuts) <= set(budgets)
        for name, budget in budgets.items():
            assert by_cut(groups[name], cuts.get(name)) == by_sorting(groups[name], budget), (n_scores, name)
        assert ranked.fetched <= small


def test_a_first_row_that_does_not_fit_keeps_nothing_even_where_a_later_one_would() -> None:
    rows = [(2.0, "a", 10), (1.0, "b", 1)]
    assert find_cut(rows, 5) is None
    assert find_cut(rows, 10) == Cut(2.0)
    assert find_cut(rows, 11) == Cut(1.0)


def test_ties_break_by_id_ascending() -> None:
    rows = [(0.5, name, 1) for name in "dbca"]
    cut = find_cut(rows, 2, small=1)
    assert cut == Cut(0.5, "b")
    assert by_cut(rows, cut) == ["a", "b"]


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [(0.29, 100, 29), (0.5, 7, 3), (1.0, 7, 7), (0.1, 9, 0), (0.1, 10, 1), (0.57, 100, 57), (1e-3, 1000, 1)],
)
def test_the_budget_is_the_floor_of_the_ratio_as_written(ratio: float, total: int, expected: int) -> None:
    assert budget_of(ratio, total) == expected


def test_n_fitting() -> None:
    assert [n_fitting([3, 0, 4, 0], budget) for budget in (0, 2, 3, 6, 7)] == [0, 0, 2, 2, 4]
    assert n_fitting([], 5) == 0
