"""The rows that the trainer keeps: in the order of a training, each row group is decoded about once an epoch."""

import numpy as np
import pytest

from miniplm_udf.packing.file_layout import GROUP_ROWS
from trainer.loader.order import RowOrder, count_lanes
from trainer.loader.row_cache import RowCache


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 500, 512, 4096])
def test_an_epoch_of_twenty_windows_decodes_few_row_groups_twice(batch: int) -> None:
    group_rows = np.array([GROUP_ROWS] * 1280)
    starts = np.cumsum(group_rows) - group_rows
    lanes = count_lanes(group_rows)

    def read_group(group: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.arange(starts[group], starts[group] + GROUP_ROWS)
        return np.stack([numbers, numbers], axis=1), np.ones((GROUP_ROWS, 1), np.uint8)

    order, cache = RowOrder(group_rows, 0), RowCache(group_rows, lanes + lanes // 16, 1, read_group)
    for step in range(order.n_sequences // batch):
        rows = order.batch_rows(step, batch)
        assert np.array_equal(cache.get(rows)[0][:, 0], rows)
    # Two lanes share the row group at their border.
    assert cache.rows_decoded <= (1280 + lanes) * GROUP_ROWS
    assert cache.rows_decoded <= 1.1 * order.n_sequences


def test_a_row_group_that_cannot_be_decoded_is_not_kept() -> None:
    attempts = []

    def read_group(group: int) -> tuple[np.ndarray, np.ndarray]:
        attempts.append(group)
        if len(attempts) == 2:
            raise OSError
        return np.full((2, 2), group), np.ones((2, 1), np.uint8)

    cache = RowCache(np.array([2, 2]), 1, 1, read_group)
    assert cache.get(np.array([0]))[0].tolist() == [[0, 0]]
    with pytest.raises(OSError):  # noqa: PT011
        cache.get(np.array([3]))
    assert cache.get(np.array([1, 3, 0]))[0].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert attempts == [0, 1, 0, 1, 0]
