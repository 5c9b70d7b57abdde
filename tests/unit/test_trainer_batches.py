"""Batches of the trainer: the same read ahead or not, and on any number of ranks; errors come in their step."""

import threading
import time

import numpy as np
import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import CorpusError
from trainer.loader.batches import Batches
from trainer.ranks.distributed import World

LENGTH, ROWS, STEPS = 4, 300, 20
CONFIG = TrainConfig(batch_sequences=12, steps=STEPS, warmup_steps=0, seed=7)


class NumberedSequences:
    """Rows that hold their number; a call past `n_good` fails."""

    sequence_length, n_sequences, group_rows = LENGTH, ROWS, np.array([100, 120, 80])

    def __init__(self, n_good: int = 1000):
        self.n_good, self.n_calls = n_good, 0

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.n_calls += 1
        if self.n_calls > self.n_good:
            raise CorpusError("the file is damaged")
        return np.repeat(rows[:, None], LENGTH + 1, axis=1).astype(np.int32), np.ones((len(rows), LENGTH), np.uint8)


def rows_of(batch: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    return batch[0][:, 0].tolist()


def until(condition: object) -> None:
    """Waits until `condition()` holds, at most for a minute."""
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("first", [0, 13])
def test_reading_ahead_changes_no_batch(first: int) -> None:
    direct, ahead = Batches(NumberedSequences(), CONFIG, World()), Batches(NumberedSequences(), CONFIG, World())
    expected = [direct.rows(step).tolist() for step in range(first, STEPS)]
    assert [rows_of(direct.get(step)) for step in range(first, STEPS)] == expected
    with ahead.read_ahead(first, STEPS):
        batches = [ahead.get(step) for step in range(first, STEPS)]
    assert [rows_of(batch) for batch in batches] == expected
    assert (batches[0][0].dtype, batches[0][1].dtype) == (torch.int64, torch.uint8)
    assert batches[0][1].shape == (12, LENGTH)
    assert rows_of(ahead.get(first)) == expected[0]  # outside of the block, any step


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_reads_the_same_rows(world_size: int) -> None:
    ranks = [Batches(NumberedSequences(), CONFIG, World(rank=rank, size=world_size)) for rank in range(world_size)]
    for step in range(STEPS):
        parts = [rows_of(rank.get(step)) for rank in ranks]
        assert sorted(np.concatenate(parts)) == sorted(ranks[0].rows(step))


def test_an_error_comes_in_the_step_that_needs_the_batch() -> None:
    batches = Batches(NumberedSequences(n_good=3), CONFIG, World())
    with batches.read_ahead(0, STEPS):
        for step in range(3):
            batches.get(step)
        for _ in range(2):
            with pytest.raises(CorpusError, match="the file is damaged"):
                batches.get(3)


def test_reading_ahead_is_bounded_and_stops_with_the_block() -> None:
    sequences = NumberedSequences()
    batches = Batches(sequences, CONFIG, World())
    before = threading.active_count()
    with batches.read_ahead(0, STEPS):
        batches.get(0)
        until(lambda: sequences.n_calls == 5)  # one batch was taken, four wait
        time.sleep(0.05)
        assert sequences.n_calls == 5
    assert threading.active_count() == before
    assert sequences.n_calls == 5
