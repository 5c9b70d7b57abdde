"""Which sequences a step trains on: a pure function of (seed, step, batch size, table size).

Inputs: the training seed, the step (0-based), the sequences in a batch, the sequences in the table. Output: int64 row
numbers of shape (B,). No state, so that a resumed run sees the batches that an uninterrupted one would have seen, and
no world size, so that it does so on any number of ranks: rank r of R takes every R-th row of a batch from the r-th on.

    samples    0 .. n-1     n .. 2n-1     2n .. 3n-1        n sequences in the table; step s owns samples s*B .. s*B+B-1
    rows      permutation  permutation   permutation        one permutation an epoch, seeded by (seed, epoch)
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_sequences: int) -> np.ndarray:
    """A permutation of 0 .. n_sequences - 1, the same on every machine and numpy version.

    Returns:
        int64 of shape (n_sequences,); read-only, since it is cached.
    """
    # RandomState, not Generator: numpy promises its stream never changes (NEP 19), so an old run can be resumed.
    state = np.random.RandomState(np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch], dtype=np.uint32))
    order = state.permutation(n_sequences).astype(np.int64)
    order.setflags(write=False)
    return order


def batch_rows(seed: int, step: int, batch_sequences: int, n_sequences: int) -> np.ndarray:
    """Rows of one step's batch. A batch may cross from one epoch into the next.

    Args:
        seed: the training seed.
        step: 0-based optimiser step.
        batch_sequences: sequences in a batch, over all ranks.
        n_sequences: sequences in the table, at least 1.

    Returns:
        int64 of shape (batch_sequences,).
    """
    samples = np.arange(step * batch_sequences, (step + 1) * batch_sequences, dtype=np.int64)
    epochs, places = np.divmod(samples, n_sequences)
    parts = [epoch_order(seed, int(epoch), n_sequences)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def rank_rows(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of a batch that one rank reads; over all ranks every row is read once."""
    return rows[rank::world_size]
