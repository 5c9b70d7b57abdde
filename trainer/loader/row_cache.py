"""Gathers rows of a table by number and keeps the row groups that were used last, in memory of a fixed size.

Inputs: the rows of each row group, a number of slots, and a function that decodes a row group. Output: copies of the
asked rows. A row group is decoded into a slot, an array for as many rows as the largest row group has. Memory: slots x
rows of the largest row group x bytes of a row. In the order of order.py, with a slot for each lane and some
more, each row group is decoded once an epoch, or twice where two lanes share it. Reads no file itself.
"""

import threading
from collections.abc import Callable

import numpy as np

ReadGroup = Callable[[int], tuple[np.ndarray, np.ndarray]]


class RowCache:
    """The rows of the row groups that were used last.

    Args:
        group_rows: int64 of shape (n_groups,), the rows of each row group in stored order.
        n_slots: row groups that are kept, at least 1.
        sequence_length: L, tokens of one input.
        read_group: decodes a row group by its number: token_ids (n, L + 1) int32 and target_mask (n, L) uint8.

    Attributes:
        n_bytes: size of the slots.
        rows_decoded: rows of all row groups that were decoded so far.
    """

    def __init__(self, group_rows: np.ndarray, n_slots: int, sequence_length: int, read_group: ReadGroup):
        self._ends = np.cumsum(group_rows)
        self._starts = self._ends - group_rows
        self._read_group = read_group
        self._slot_rows, self._n_slots = int(group_rows.max()), min(n_slots, len(group_rows))
        # The system gives an untouched page no memory, so a small table takes no more than its size.
        self._tokens = np.empty((self._n_slots * self._slot_rows, sequence_length + 1), dtype=np.int32)
        self._mask = np.empty((self._n_slots * self._slot_rows, sequence_length), dtype=np.uint8)
        self._slot_of = np.full(len(group_rows), -1, dtype=np.int32)
        self._group_in = np.full(self._n_slots, -1, dtype=np.int64)
        self._last_used = np.zeros(self._n_slots, dtype=np.int64)
        self._clock = 1
        self._lock = threading.Lock()
        self.n_bytes = self._tokens.nbytes + self._mask.nbytes
        self.rows_decoded = 0

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gathers rows. Thread-safe; concurrent calls run one after the other.

        Args:
            rows: int64 row numbers of shape (n,).

        Returns:
            (token_ids (n, L + 1) int32, target_mask (n, L) uint8), in the order of `rows`.
        """
        tokens = np.empty((len(rows), self._tokens.shape[1]), dtype=np.int32)
        mask = np.empty((len(rows), self._mask.shape[1]), dtype=np.uint8)
        with self._lock:
            if len(rows):
                self._gather(rows, tokens, mask)
        return tokens, mask

    def _gather(self, rows: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> None:
        groups = np.searchsorted(self._ends, rows, side="right")
        needed = np.unique(groups)
        if len(needed) > self._n_slots:  # then the halves need fewer
            half = len(rows) // 2
            self._gather(rows[:half], tokens[:half], mask[:half])
            self._gather(rows[half:], tokens[half:], mask[half:])
            return
        self._load(needed)
        slots = self._slot_of[groups]
        places = slots * self._slot_rows + (rows - self._starts[groups])
        # All places exist; with mode="raise", numpy would gather into a buffer first.
        np.take(self._tokens, places, axis=0, out=tokens, mode="clip")
        np.take(self._mask, places, axis=0, out=mask, mode="clip")
        # The row that a lane used last decides: its finished row group is then older than all other lanes' groups.
        self._last_used[slots] = self._clock + np.arange(len(rows))
        self._clock += len(rows)

    def _load(self, needed: np.ndarray) -> None:
        """Decodes the needed row groups that are in no slot, into the slots that were not used for longest."""
        missing = needed[self._slot_of[needed] < 0]
        if not len(missing):
            return
        ages = self._last_used.copy()
        ages[self._slot_of[needed[self._slot_of[needed] >= 0]]] = np.iinfo(np.int64).max
        for group, slot in zip(missing, np.argsort(ages, kind="stable"), strict=False):
            if self._group_in[slot] >= 0:
                self._slot_of[self._group_in[slot]] = -1
            self._group_in[slot] = -1  # also if the decoding fails
            tokens, mask = self._read_group(int(group))
            start = slot * self._slot_rows
            self._tokens[start : start + len(tokens)] = tokens
            self._mask[start : start + len(mask)] = mask
            self._group_in[slot], self._slot_of[group] = group, slot
            self.rows_decoded += len(tokens)
