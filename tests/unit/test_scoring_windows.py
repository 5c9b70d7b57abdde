"""Windows and batches: hand-made goldens, and the invariants over a grid."""

import itertools

import pytest

from miniplm_udf.scoring.windows import Window, batches, windows


@pytest.mark.parametrize(
    ("n_tokens", "context", "overlap", "expected"),
    [
        (0, 4, 1, []),
        (1, 4, 1, [Window(0, 0, 1)]),
        (4, 4, 1, [Window(0, 0, 4)]),
        (5, 4, 1, [Window(0, 0, 4), Window(3, 4, 5)]),
        (10, 4, 1, [Window(0, 0, 4), Window(3, 4, 7), Window(6, 7, 10)]),
        (6, 3, 0, [Window(0, 0, 3), Window(3, 3, 6)]),
        (5, 3, 2, [Window(0, 0, 3), Window(1, 3, 4), Window(2, 4, 5)]),
    ],
)
def test_windows_golden(n_tokens: int, context: int, overlap: int, expected: list[Window]) -> None:
    assert list(windows(n_tokens, context, overlap)) == expected


def test_every_token_predicts_once_and_with_its_context() -> None:
    for n_tokens in range(30):
        for context in range(1, 9):
            for overlap in range(context):
                result = list(windows(n_tokens, context, overlap))
                predicted = [token for window in result for token in range(window.first_scored, window.end)]
                assert predicted == list(range(n_tokens)), (n_tokens, context, overlap)
                assert all(len(window) <= context for window in result)
                assert all(window.first_scored - window.start == overlap for window in result[1:])


def test_batches_golden() -> None:
    # Longest first; 5 alone, as 2 x 5 is over 8; then 4 and 3 in 2 x 4; then 1 and 1.
    assert list(batches([1, 5, 3, 4, 1], 8, 1)) == [[1], [3, 2], [0, 4]]
    assert list(batches([], 8, 1)) == []
    assert list(batches([9], 8, 1)) == [[0]]
    # A pass of its own is cheaper than padding 1 to 8.
    assert list(batches([8, 1, 7], 100, 2)) == [[0, 2], [1]]
    assert list(batches([8, 1, 7], 100, 20)) == [[0, 2, 1]]


def test_batches_of_at_least_so_many() -> None:
    assert list(batches([9, 8, 2, 1], 10, 1)) == [[0], [1], [2, 3]]
    assert list(batches([9, 8, 2, 1], 10, 1, at_least=2)) == [[0, 1], [2, 3]]
    assert list(batches([9, 8, 7], 10, 1, at_least=2)) == [[0], [1, 2]]
    # The long window does not share a batch with a much shorter one, whose padding would cost more.
    assert list(batches([9, 2, 1], 10, 1, at_least=2)) == [[0], [1, 2]]


def test_batches_hold_each_index_once_within_the_budget() -> None:
    lengths = [(7 * i) % 13 + 1 for i in range(50)]
    for budget in (1, 5, 13, 40, 10_000):
        result = list(batches(lengths, budget, 3))
        assert sorted(index for batch in result for index in batch) == list(range(50))
        for batch in result:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize("at_least", [1, 2, 3])
@pytest.mark.parametrize("pass_tokens", [0, 1, 4, 50])
def test_no_grouping_is_faster(pass_tokens: int, at_least: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        alone = sum(len(group) == 1 for group in groups) if at_least > 1 else 0
        return sum(len(group) * max(group) + pass_tokens for group in groups) + alone * pass_tokens

    for sizes in ([9, 8, 8, 5, 3, 3, 1], [30, 6, 6, 6, 6, 2, 2, 1, 1], [4] * 6):
        best = 10**9
        for cuts in itertools.product([False, True], repeat=len(sizes) - 1):
            groups = [[sizes[0]]]
            for size, is_cut in zip(sizes[1:], cuts, strict=True):
                groups.append([size]) if is_cut else groups[-1].append(size)
            if all(len(group) <= max(1, at_least, 20 // max(group)) for group in groups):
                best = min(best, cost(groups))
        found = [[sizes[index] for index in batch] for batch in batches(sizes, 20, pass_tokens, at_least)]
        assert cost(found) == best


@pytest.mark.parametrize("limit", [1, 7, 16, 30, 31])
def test_no_batch_crosses_the_limit(limit: int) -> None:
    lengths = [number % 31 + 1 for number in range(100)]
    result = list(batches(lengths, 100, 10, limit=limit))
    assert sorted(index for batch in result for index in batch) == list(range(100))
    assert all(len({lengths[index] > limit for index in batch}) == 1 for batch in result)
    # One batch more at most.
    assert len(result) <= len(list(batches(lengths, 100, 10))) + 1
