"""The training loop: batches to weights. Torch and numpy alone; knows no table, no disk and no MLflow.

Inputs: a model, rows of tokens by number (`Sequences`), a `TrainConfig`. Output: the trained model, in place;
measures go to two callbacks. One step = one batch of `batch_sequences` over all ranks, in micro-batches whose
weighted sums add up to the loss of the whole batch, then clip, AdamW, schedule. Weight decay is on all weights, as in
the official code. Random numbers (dropout) are seeded by (seed, step, rank), the order of rows by (seed, step): the
state of a run is the weights, the optimiser and the number of steps done, and nothing else. fp32 weights; bf16
autocast on a GPU with dtype auto.
"""

import contextlib
import dataclasses
import time
import typing
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from miniplm_udf.config import TrainConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from trainer.distributed import World
from trainer.loss import target_nll, target_weights
from trainer.order import batch_rows, rank_rows
from trainer.schedule import learning_rate


class Sequences(Protocol):
    """Token sequences by row number."""

    n_sequences: int
    sequence_length: int

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(token_ids (n, L + 1) int32, target_mask (n, L) uint8) of these rows."""


@dataclasses.dataclass(frozen=True)
class StepMeasures:
    """What one step measured. `loss` in nats; `tokens` are inputs of the whole run so far, resumed steps included."""

    steps_done: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all weights, with decay on all of them."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    use = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if use else contextlib.nullcontext()


class Loop:
    """Trains one model.

    Args:
        model: on `world.device`; forward takes `input_ids` and gives `.logits`.
        optimizer: of its weights.
        sequences: the data.
        config: optimiser and schedule.
        separator_id: the document separator, for the official loss.
        world: this process's place among the ranks.

    Raises:
        ConfigError: fewer sequences in a batch than ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        sequences: Sequences,
        config: TrainConfig,
        separator_id: int,
        world: World,
    ):
        if config.batch_sequences < world.size:
            raise ConfigError(
                f"train.batch_sequences: expected at least one a rank ({world.size}), found {config.batch_sequences}"
            )
        self.optimizer, self.sequences, self.config = optimizer, sequences, config
        self.separator_id, self.world = separator_id, world
        self.model = DistributedDataParallel(model) if world.size > 1 else model

    def run(
        self,
        steps_done: int,
        on_step: Callable[[StepMeasures], None],
        on_save: Callable[[StepMeasures], None],
    ) -> None:
        """Trains from `steps_done` to the end.

        Args:
            steps_done: steps that the weights have had already.
            on_step: called every `log_every_steps` and at the end.
            on_save: called every `save_every_steps` and at the end.

        Raises:
            MiniplmError: the loss or the gradient is not finite.
        """
        self.model.train()
        started, first = time.perf_counter(), steps_done
        for step in range(steps_done, self.config.steps):
            rate, loss, norm = self.step(step)
            done = step + 1
            logs = done % self.config.log_every_steps == 0 or done == self.config.steps
            saves = done % self.config.save_every_steps == 0 or done == self.config.steps
            if not (logs or saves):
                continue  # reading the loss would make the GPU wait
            loss_value, norm_value = float(self.world.sum(loss)), float(norm)
            self._check_finite(done, loss_value, norm_value)
            tokens_a_step = self.config.batch_sequences * self.sequences.sequence_length
            speed = (done - first) * tokens_a_step / (time.perf_counter() - started)
            measures = StepMeasures(done, loss_value, rate, norm_value, done * tokens_a_step, speed)
            if logs:
                on_step(measures)
            if saves:
                on_save(measures)

    def step(self, step: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """One optimiser step.

        Args:
            step: 0-based.

        Returns:
            (learning rate, this rank's part of the loss, norm of the whole gradient before clipping).
        """
        config, world = self.config, self.world
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + world.rank)
        rows = batch_rows(config.seed, step, config.batch_sequences, self.sequences.n_sequences)
        tokens, mask = self.sequences.get(rank_rows(rows, world.rank, world.size))
        loss = self._backward(
            torch.from_numpy(tokens).to(world.device, torch.int64),
            torch.from_numpy(mask).to(world.device),
        )
        limit = config.gradient_clip_norm if config.gradient_clip_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        rate = learning_rate(
            step,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            peak=config.learning_rate,
            min_ratio=config.min_learning_rate_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate, loss, norm

    def _backward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Gradients of the whole batch's loss, of which this rank has `tokens` (B, L + 1); its part of the loss."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        weights, count = target_weights(inputs, mask, self.separator_id, self.config.loss)
        count = self.world.sum(count)
        if not count > 0:
            raise CorpusError("a batch holds no target at all: look at target_mask of the packed table")
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        starts = range(0, len(tokens), self.config.micro_batch_sequences)
        for start in starts:
            part = slice(start, start + self.config.micro_batch_sequences)
            with self._sync(last=start == starts[-1]):
                with _autocast(self.config, self.world.device):
                    logits = self.model(input_ids=inputs[part]).logits
                loss = (target_nll(logits, targets[part]) * weights[part]).sum() / count.float()
                (loss * self.world.size).backward()  # DDP takes the mean over ranks; we want the sum
            total += loss.detach()
        return total

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Ranks add up their gradients once a step, in the last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return typing.cast(contextlib.AbstractContextManager[object], self.model.no_sync())
        return contextlib.nullcontext()

    def _check_finite(self, steps_done: int, loss: float, norm: float) -> None:
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise MiniplmError(
                f"training diverged: at step {steps_done} the loss is {loss} and the gradient norm {norm}: lower "
                "train.learning_rate or lengthen train.warmup_steps; the last checkpoint is from before"
            )
