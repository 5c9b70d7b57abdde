"""The cut of a ranking against a plain sort, over random rows with many ties."""

import random
from collections import defaultdict

import pytest

from miniplm_udf.selection import Bucket, Cut, IdGroup, budget_of, find_cut, n_fitting

Row = tuple[float, str, int]


class RankedList:
    """`Ranked` over a list: the same sums, plainly. Counts the rows that were fetched at once."""

    def __init__(self, rows: list[Row]) -> None:
        self.all, self.fetched = rows, 0

    @staticmethod
    def _bucket(rows: list[Row]) -> Bucket:
        scores = [row[0] for row in rows]
        return Bucket(len(rows), sum(row[2] for row in rows), min(scores), max(scores))

    def whole(self) -> Bucket | None:
        return self._bucket(self.all) if self.all else None

    def buckets(self, bucket: Bucket, n_buckets: int) -> list[Bucket]:
        parts: dict[int, list[Row]] = defaultdict(list)
        for row in self.all:
            if bucket.low <= row[0] <= bucket.high:
                share = (row[0] - bucket.low) / (bucket.high - bucket.low)
                parts[min(int(share * n_buckets), n_buckets - 1)].append(row)
        return [self._bucket(rows) for rows in parts.values()]

    def rows(self, bucket: Bucket) -> list[Row]:
        found = [row for row in self.all if bucket.low <= row[0] <= bucket.high]
        self.fetched = max(self.fetched, len(found))
        return found

    def id_groups(self, score: float, prefix: str, n_characters: int) -> list[IdGroup]:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in self.all:
            if row[0] == score and row[1].startswith(prefix):
                groups[row[1][:n_characters]].append(row)
        return [
            IdGroup(len(rows), sum(row[2] for row in rows), key, max(row[1] for row in rows))
            for key, rows in groups.items()
        ]


def by_sorting(rows: list[Row], budget: int) -> list[str]:
    kept, total = [], 0
    for _, instance_id, weight in sorted(rows, key=lambda row: (-row[0], row[1])):
        total += weight
        if total > budget:
            break
        kept.append(instance_id)
    return sorted(kept)


def by_cut(rows: list[Row], cut: Cut | None) -> list[str]:
    if cut is None:
        return []
    return sorted(
        instance_id
        for score, instance_id, _ in rows
        if score > cut.score or (score == cut.score and (cut.instance_id is None or instance_id <= cut.instance_id))
    )


def random_rows(rng: random.Random, n: int, n_scores: int, by_tokens: bool) -> list[Row]:
    scores = [rng.choice([rng.gauss(0, 1), rng.gauss(0, 1e-9), rng.gauss(0, 1e6)]) for _ in range(n_scores)]
    return [
        (rng.choice(scores), f"{rng.getrandbits(128):032x}", rng.randint(1, 300) if by_tokens else 1) for _ in range(n)
    ]


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
                ranked = RankedList(rows)
                cut = find_cut(ranked, budget, n_buckets, small)
                assert by_cut(rows, cut) == by_sorting(rows, budget), (n, n_scores, budget, cut)
                assert ranked.fetched <= small


def test_a_first_row_that_does_not_fit_keeps_nothing_even_where_a_later_one_would() -> None:
    rows = [(2.0, "a", 10), (1.0, "b", 1)]
    assert find_cut(RankedList(rows), 5) is None
    assert find_cut(RankedList(rows), 10) == Cut(2.0, "a")
    assert find_cut(RankedList(rows), 11) == Cut(1.0)


def test_ties_break_by_id_ascending() -> None:
    rows = [(0.5, name, 1) for name in "dbca"]
    cut = find_cut(RankedList(rows), 2, small=1)
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
