"""The order of rows: a permutation an epoch that reads each row group once, shared among ranks without loss."""

import numpy as np
import pytest

from trainer.loader.order import WINDOW_ROWS, RowOrder, count_lanes

TABLES = {
    "one row": [1],
    "one group": [10],
    "small groups": [3, 1, 7, 4, 5],
    "full groups": [512] * 80,
    "files end in short groups": [512, 512, 200] * 40,
    "large groups": [9000, 5634, 20_000],
    "larger than a window": [WINDOW_ROWS + 5, 40],
}


def make_order(rows: list[int], seed: int = 0) -> RowOrder:
    return RowOrder(np.array(rows), seed)


def epoch(order: RowOrder, number: int = 0) -> np.ndarray:
    """The rows of an epoch in their order."""
    return order.batch_rows(number, order.n_sequences)


def group_of(rows: np.ndarray, group_rows: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(group_rows), rows, side="right")


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
def test_an_epoch_is_a_permutation(rows: list[int]) -> None:
    order = make_order(rows)
    for number in range(2):
        assert np.array_equal(np.sort(epoch(order, number)), np.arange(sum(rows)))


def test_seed_and_epoch_change_the_order() -> None:
    orders = [tuple(epoch(make_order([60, 40], seed), number)) for seed in (0, 1, 1 << 32) for number in (0, 1)]
    assert len(set(orders)) == len(orders)


def test_the_order_never_changes() -> None:
    # A new installation must be able to resume an old run. Another order needs another ORDER_VERSION.
    assert epoch(make_order([8])).tolist() == [7, 2, 4, 0, 5, 3, 1, 6]
    assert epoch(make_order([3, 1, 4], seed=5), 2).tolist() == [7, 5, 4, 6, 3, 2, 0, 1]
    many = epoch(make_order([512] * 100, seed=1 << 33))
    assert many[[0, 1, 63, 64, 51_199]].tolist() == [1910, 37469, 42844, 1996, 15663]


@pytest.mark.parametrize(("batch", "n"), [(4, 10), (10, 10), (11, 10), (25, 10), (3, 1)])
def test_steps_go_through_whole_epochs(batch: int, n: int) -> None:
    order = make_order([n])
    rows = np.concatenate([order.batch_rows(step, batch) for step in range(2 * n)])
    assert len(rows) == 2 * n * batch
    for number in range(len(rows) // n):
        assert rows[number * n : (number + 1) * n].tolist() == epoch(order, number).tolist()


def test_resuming_equals_not_stopping() -> None:
    rows = [512, 512, 300] * 60  # more than a chunk of positions, and the end of an epoch
    whole = make_order(rows, 9)
    last = whole.n_sequences // 512
    steps = [*range(3), *range(last - 2, last + 3)]
    expected = [whole.batch_rows(step, 512).tolist() for step in steps]
    for step, batch in zip(steps, expected, strict=True):
        assert make_order(rows, 9).batch_rows(step, 512).tolist() == batch


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [10, 512])
def test_ranks_share_the_batch_of_one_process(world_size: int, batch: int) -> None:
    order = make_order(TABLES["files end in short groups"])
    for step in (0, 4, order.n_sequences // batch):
        parts = [order.batch_rows(step, batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == sorted(order.batch_rows(step, batch))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("world_size", "batch"), [(2, 512), (4, 509), (8, 512)])
def test_each_rank_reads_its_own_row_groups(world_size: int, batch: int) -> None:
    rows = [512] * 640 + [77]
    order = make_order(rows)
    steps = range(order.n_sequences // batch)
    groups = [
        set(group_of(np.concatenate([order.batch_rows(step, batch, rank, world_size) for step in steps]), rows))
        for rank in range(world_size)
    ]
    # Two lanes share the row group at their border.
    assert sum(map(len, groups)) <= len(rows) + order.lanes
    assert max(map(len, groups)) <= len(rows) / world_size + 2 * order.lanes / world_size


@pytest.mark.parametrize(
    ("largest", "lanes"),
    [(1, 512), (64, 512), (512, 64), (600, 32), (5634, 4), (WINDOW_ROWS, 1), (10 * WINDOW_ROWS, 1)],
)
def test_the_lanes_row_groups_fit_into_the_window(largest: int, lanes: int) -> None:
    assert count_lanes(np.array([1, largest, 1])) == lanes
    assert lanes == 1 or lanes * largest <= WINDOW_ROWS


def test_a_batch_has_few_rows_of_a_row_group() -> None:
    rows, batch = [512] * 640, 512
    order = make_order(rows)
    for step in range(0, order.n_sequences // batch, 7):
        counts = np.unique(group_of(order.batch_rows(step, batch), rows), return_counts=True)[1]
        # At most 8 rows of each of 64 row groups; a row group in two lanes counts twice.
        assert counts.max() <= 2 * batch // order.lanes
        assert counts.mean() >= batch / order.lanes / 2


def test_neighbours_of_the_table_are_spread_over_the_window() -> None:
    rows, batch = [512] * 640, 512
    order = make_order(rows)
    step_of = np.empty(order.n_sequences, dtype=np.int64)
    for step in range(order.n_sequences // batch):
        step_of[order.batch_rows(step, batch)] = step
    apart = np.abs(np.diff(step_of))
    inside = np.diff(group_of(np.arange(order.n_sequences), rows)) == 0
    # Two places in a window of W steps are W / 3 steps apart on average. A border of two lanes puts rows further apart.
    window = WINDOW_ROWS / batch
    assert np.median(apart[inside]) == pytest.approx(window * (1 - np.sqrt(0.5)), rel=0.1)
    assert np.mean(apart[inside] == 0) < 1.2 / window
    assert np.mean(apart[inside] <= window) > 0.85
    # Row groups that stand next to each other in the table are as far apart as any two row groups.
    middle = np.array([np.median(step_of[start : start + 512]) for start in range(0, order.n_sequences, 512)])
    assert np.mean(np.abs(np.diff(middle))) == pytest.approx(order.n_sequences / batch / 3, rel=0.15)


def test_row_groups_are_spread_over_the_epoch() -> None:
    rows = [512] * 640
    groups = group_of(epoch(make_order(rows)), rows)
    tenths = [len(set(part.tolist())) for part in np.array_split(groups, 10)]
    assert max(tenths) < 3 * 64 + 10  # an order of all rows would read all 640 row groups in each tenth
