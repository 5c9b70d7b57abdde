"""The order of rows: a permutation an epoch, the same whenever it is asked for, shared among ranks without loss."""

import numpy as np
import pytest

from trainer.order import batch_rows, epoch_order, rank_rows


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_an_epoch_is_a_permutation(n: int) -> None:
    assert sorted(epoch_order(3, 0, n)) == list(range(n))


def test_seed_and_epoch_change_the_order() -> None:
    orders = [tuple(epoch_order(seed, epoch, 100)) for seed in (0, 1, 1 << 32) for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)


def test_the_order_never_changes() -> None:
    # An old run must be resumable by a new installation: these numbers may not change.
    assert epoch_order(0, 0, 8).tolist() == [2, 6, 0, 4, 1, 3, 5, 7]
    assert epoch_order(5, 2, 8).tolist() == [1, 6, 2, 3, 7, 4, 5, 0]


@pytest.mark.parametrize(("batch", "n"), [(4, 10), (10, 10), (11, 10), (25, 10), (3, 1)])
def test_steps_go_through_whole_epochs(batch: int, n: int) -> None:
    steps = 2 * n
    rows = np.concatenate([batch_rows(0, step, batch, n) for step in range(steps)])
    assert len(rows) == steps * batch
    for epoch in range(len(rows) // n):
        assert rows[epoch * n : (epoch + 1) * n].tolist() == epoch_order(0, epoch, n).tolist()


def test_resuming_equals_not_stopping() -> None:
    whole = [batch_rows(9, step, 6, 20).tolist() for step in range(12)]
    epoch_order.cache_clear()
    assert [batch_rows(9, step, 6, 20).tolist() for step in range(7, 12)] == whole[7:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_are_disjoint_and_complete(world_size: int) -> None:
    rows = batch_rows(0, 4, 10, 100)
    parts = [rank_rows(rows, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == sorted(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
