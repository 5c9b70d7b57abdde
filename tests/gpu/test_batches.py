"""The trainer's batches on a CUDA device: equal to batches on the CPU, and copied without making the CPU wait."""

import numpy as np
import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from tests.support.gpu_device import needs_cuda
from trainer.loader.batches import Batches
from trainer.ranks.distributed import World

pytestmark = [pytest.mark.gpu, needs_cuda]


class NumberedRows:
    """Rows that hold their number."""

    sequence_length, n_sequences, group_rows = 8, 200, np.array([100, 100])

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(rows[:, None], 9, axis=1).astype(np.int32), np.ones((len(rows), 8), np.uint8)


def test_batches_reach_the_device_without_a_wait() -> None:
    config = TrainConfig(batch_sequences=16, steps=12, warmup_steps=0)
    expected = Batches(NumberedRows(), config, World())
    batches = Batches(NumberedRows(), config, World(device=torch.device("cuda", 0)))
    received = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        with batches.read_ahead(0, 12):
            received = [batches.get(step) for step in range(12)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (tokens, mask) in enumerate(received):
        assert (tokens.device.type, tokens.dtype, mask.device.type) == ("cuda", torch.int64, "cuda")
        assert torch.equal(tokens.cpu(), expected.get(step)[0])
        assert torch.equal(mask.cpu(), expected.get(step)[1])
