"""Chooses the sequences of a training step, as a pure function of (seed, step, batch size, row groups of the table).

Inputs: the training seed, the rows of each row group in stored order, the step (from 0) and the sequences in a batch.
Output: int64 row numbers. There is no state, so a resumed run reads the same batches as an uninterrupted run. Row
groups are permuted over the whole table, and the rows of a row group over a window of about WINDOW_ROWS rows, so that
reading decodes each row group once an epoch and keeps one window in memory:

    stored order   [group 0][group 1][group 2] ...            the table
    epoch order    [group 7][group 2][group 9] ...            row groups permuted, rows permuted inside each row group
    lanes          |----- lane 0 -----|----- lane 1 -----|    the epoch order, cut into lanes of equal length
    positions      lane 0, lane 1, ..., lane 0, lane 1, ...   each position takes the next row of its lane

The batch does not depend on the number of ranks. Samples are numbered through all epochs; step s has the samples s*B to
s*B + B - 1, and rank r of R reads the samples whose number is r modulo R. If R divides the number of lanes (a power of
two), a rank reads only its own lanes in an epoch, and so decodes only its share of the row groups.
"""

from functools import lru_cache

import numpy as np

# Raise it when a change chooses other rows for the same seed: runs of the earlier version then cannot be resumed.
ORDER_VERSION = 2
WINDOW_ROWS = 32_768
_MAX_LANES = 512
_CHUNK_POSITIONS = 2 * WINDOW_ROWS


def count_lanes(group_rows: np.ndarray) -> int:
    """Computes the number of lanes: how many row groups an epoch reads at the same time.

    Args:
        group_rows: int64 of shape (n_groups,), the rows of each row group.

    Returns:
        The largest power of two with which the lanes' row groups hold at most WINDOW_ROWS rows; 1 to 512.
    """
    lanes = max(1, min(_MAX_LANES, WINDOW_ROWS // int(group_rows.max())))
    return 1 << (lanes.bit_length() - 1)


class RowOrder:
    """The order of the rows of a table in a training.

    Args:
        group_rows: int64 of shape (n_groups,), the rows of each row group in stored order, each at least 1.
        seed: the training seed.

    Attributes:
        n_sequences: rows of the table.
        lanes: number of lanes.
    """

    def __init__(self, group_rows: np.ndarray, seed: int):
        self._group_rows = group_rows.astype(np.int64)
        self._starts = np.cumsum(self._group_rows) - self._group_rows
        self._seed_words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        # RandomState instead of Generator: numpy never changes its stream (NEP 19), so old runs can resume.
        self._random = np.random.RandomState(0)
        self.n_sequences = int(self._group_rows.sum())
        self.lanes = count_lanes(self._group_rows)
        # A batch may need two chunks, and the end of one epoch with the start of the next.
        self._groups_of_epoch = lru_cache(maxsize=2)(self._permuted_groups)
        self._chunk = lru_cache(maxsize=3)(self._chunk_rows)

    def batch_rows(self, step: int, batch_sequences: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Returns the rows of one step. A batch may contain the end of one epoch and the start of the next.

        Args:
            step: optimiser step, from 0.
            batch_sequences: sequences in a batch, over all ranks.
            rank: number of this process, from 0.
            world_size: number of processes; 1 returns the whole batch.

        Returns:
            int64 row numbers of this rank's part of the batch. The parts of all ranks make up the batch.
        """
        samples = np.arange(step * batch_sequences, (step + 1) * batch_sequences, dtype=np.int64)
        epochs, positions = np.divmod(samples[samples % world_size == rank], self.n_sequences)
        rows = np.empty(len(positions), dtype=np.int64)
        chunks = positions // _CHUNK_POSITIONS
        for epoch, chunk in sorted(set(zip(epochs.tolist(), chunks.tolist(), strict=True))):
            chosen = (epochs == epoch) & (chunks == chunk)
            rows[chosen] = self._chunk(epoch, chunk)[positions[chosen] - chunk * _CHUNK_POSITIONS]
        return rows

    def _permuted_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups in the order of an epoch, and the rows up to the end of each."""
        groups = self._permutation(len(self._group_rows), epoch)
        return groups, np.cumsum(self._group_rows[groups])

    def _chunk_rows(self, epoch: int, chunk: int) -> np.ndarray:
        """The rows of consecutive positions of an epoch, int64 of shape (at most _CHUNK_POSITIONS,)."""
        start = chunk * _CHUNK_POSITIONS
        positions = np.arange(start, min(start + _CHUNK_POSITIONS, self.n_sequences), dtype=np.int64)
        lanes, turns = positions % self.lanes, positions // self.lanes
        shortest, n_longer = divmod(self.n_sequences, self.lanes)
        places = lanes * shortest + np.minimum(lanes, n_longer) + turns  # in the epoch order
        groups, ends = self._groups_of_epoch(epoch)
        indexes = np.searchsorted(ends, places, side="right")
        rows = places - (ends[indexes] - self._group_rows[groups[indexes]])  # in the row group, before its permutation
        by_group = np.argsort(indexes, kind="stable")
        bounds = np.flatnonzero(np.diff(indexes[by_group])) + 1
        for part in np.split(by_group, bounds):
            group = int(groups[indexes[part[0]]])
            rows[part] = self._starts[group] + self._permutation(int(self._group_rows[group]), epoch, group)[rows[part]]
        return rows

    def _permutation(self, n: int, *words: int) -> np.ndarray:
        """A permutation of 0 .. n - 1, a function of the seed and the words."""
        self._random.seed(np.array([*self._seed_words, *words], dtype=np.uint32))
        return self._random.permutation(n)
