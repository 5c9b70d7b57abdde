"""The batches of a training on one rank, read in a background thread ahead of the steps.

Inputs: token sequences by row number (`Sequences`), the training's seed and batch size, the ranks. Output: for each
step this rank's token ids (n, L + 1) int64 and target mask (n, L) uint8 on its device. On a GPU, the thread puts
batches into pinned memory, and the copy to the device does not make the CPU wait. At most `_DEPTH` batches are held. A
batch is a function of its step alone. An error while reading a batch is raised in the step that needs the batch.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.workers.read_ahead import ReadAhead
from trainer.loader.order import RowOrder
from trainer.ranks.distributed import World

_DEPTH = 4

_Batch = tuple[int, torch.Tensor, torch.Tensor]  # step, token ids int32, target mask


class Sequences(Protocol):
    """Token sequences of length `sequence_length` (L inputs and as many targets), by row number.

    Attributes:
        sequence_length: L.
        group_rows: int64 of shape (n_groups,): rows that stand next to each other and are read together.
    """

    sequence_length: int
    group_rows: np.ndarray

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads sequences.

        Args:
            rows: numbers of the rows, shape (n,).

        Returns:
            token_ids (n, L + 1) int32, and target_mask (n, L) uint8.
        """


class Batches:
    """The batches of one rank.

    Args:
        sequences: the training data.
        config: seed and batch size.
        world: the place of this process among the ranks, and its device.
    """

    def __init__(self, sequences: Sequences, config: TrainConfig, world: World):
        self._order = RowOrder(sequences.group_rows, config.seed)
        self._sequences, self._batch_sequences, self._world = sequences, config.batch_sequences, world
        self._ahead: Iterator[_Batch] | None = None

    @contextlib.contextmanager
    def read_ahead(self, first: int, stop: int) -> Iterator[None]:
        """Reads batches in a background thread while the block runs; `get` then takes them in the order of the steps.

        Args:
            first: first step, from 0.
            stop: the step after the last one.
        """
        with ReadAhead(map(self._read, range(first, stop)), _DEPTH) as batches:
            self._ahead = batches
            try:
                yield
            finally:
                self._ahead = None

    def rows(self, step: int) -> np.ndarray:
        """Returns the numbers of the rows of a batch over all ranks, int64 of shape (B,).

        Args:
            step: the step, from 0.
        """
        return self._order.batch_rows(step, self._batch_sequences)

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this rank's part of a batch.

        Args:
            step: the step, from 0. In a block of `read_ahead`, the steps follow each other.

        Returns:
            Token ids (n, L + 1) int64 and target mask (n, L) uint8, on the device.

        Raises:
            CorpusError: the rows cannot be read.
        """
        at, tokens, mask = self._read(step) if self._ahead is None else next(self._ahead)
        assert at == step, f"batch {at} was read ahead, batch {step} is asked for"
        device = self._world.device
        # Ids become int64 on the device: int32 is half the transfer, and a change of type on the CPU would wait for it.
        return tokens.to(device, non_blocking=True).to(torch.int64), mask.to(device, non_blocking=True)

    def _read(self, step: int) -> _Batch:
        world = self._world
        rows = self._order.batch_rows(step, self._batch_sequences, world.rank, world.size)
        tokens, mask = map(torch.from_numpy, self._sequences.get(rows))
        if world.device.type == "cuda":
            with torch.cuda.device(world.device):  # else pinning on this thread would use the first GPU
                tokens, mask = tokens.pin_memory(), mask.pin_memory()
        return step, tokens, mask
