"""Chooses the sequences of a training step, as a pure function of (seed, step, batch size, table size).

Inputs: the training seed, the step (from 0), the sequences in a batch, the sequences in the table. Output: int64 row
numbers of shape (B,). There is no state, so a resumed run reads the same batches as an uninterrupted run. The batch
does not depend on the number of ranks: rank r of R reads the rows r, r + R, r + 2R, ... of the batch.

    samples    0 .. n-1     n .. 2n-1     2n .. 3n-1        n sequences in the table; step s has samples s*B .. s*B+B-1
    rows      permutation  permutation   permutation        one permutation per epoch, seeded by (seed, epoch)
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_sequences: int) -> np.ndarray:
    """Returns the order of the rows in one epoch: a permutation that is the same on every machine and numpy version.

    Args:
        seed: the training seed.
        epoch: number of the pass over the table, from 0.
        n_sequences: sequences in the table.

    Returns:
        int64 of shape (n_sequences,), a permutation of 0 .. n_sequences - 1; read-only, because it is cached.
    """
    # RandomState instead of Generator: numpy promises that its stream never changes (NEP 19), so old runs can resume.
    state = np.random.RandomState(np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, epoch], dtype=np.uint32))
    order = state.permutation(n_sequences).astype(np.int64)
    order.setflags(write=False)
    return order


def batch_rows(seed: int, step: int, batch_sequences: int, n_sequences: int) -> np.ndarray:
    """Returns the row numbers of one step's batch. A batch may contain the end of one epoch and the start of the next.

    Args:
        seed: the training seed.
        step: optimiser step, from 0.
        batch_sequences: sequences in a batch, over all ranks.
        n_sequences: sequences in the table, at least 1.

    Returns:
        int64 of shape (batch_sequences,).
    """
    samples = np.arange(step * batch_sequences, (step + 1) * batch_sequences, dtype=np.int64)
    epochs, positions = np.divmod(samples, n_sequences)
    parts = [epoch_order(seed, int(epoch), n_sequences)[positions[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def rank_rows(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Returns the rows of a batch that one rank reads: every `world_size`-th row from row `rank`.

    Args:
        rows: numbers of the rows of the batch, shape (n,).
        rank: number of this process, from 0.
        world_size: number of processes.
    """
    return rows[rank::world_size]
