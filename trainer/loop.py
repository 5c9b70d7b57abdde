"""The training loop. Uses only torch and numpy; reads no table, writes no file, does not call MLflow.

Inputs: a model, token sequences by row number (`Sequences`), a `TrainConfig`. Output: the model's weights, changed in
place; measures go to two callbacks. One step trains on one batch of `batch_sequences` over all ranks, in micro-batches
whose weighted sums add up to the loss of the whole batch; then it clips the gradient and applies AdamW with the
schedule's learning rate. Weight decay applies to all weights, as in the official code. Weights are fp32; the forward
pass is bf16 on a GPU with dtype auto.

Dropout is seeded by (seed, step, rank), and the order of rows by (seed, step). So the state of a run is the weights,
the optimiser and the number of steps done.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from trainer.distributed import World
from trainer.document_masks import document_positions
from trainer.loss import target_nll, target_weights
from trainer.order import batch_rows, rank_rows
from trainer.parallel import clip_gradient, gradient_sums
from trainer.schedule import learning_rate


class Sequences(Protocol):
    """Token sequences of length `sequence_length` (L inputs and as many targets), by row number."""

    n_sequences: int
    sequence_length: int

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads sequences.

        Args:
            rows: numbers of the rows, shape (n,).

        Returns:
            token_ids (n, L + 1) int32, and target_mask (n, L) uint8.
        """


@dataclasses.dataclass(frozen=True)
class StepMeasures:
    """The measures of one step.

    Attributes:
        steps_done: optimiser steps of the whole run so far, including those before a resume.
        loss: loss of the batch, in nats per token.
        learning_rate: rate of this step.
        gradient_norm: norm of the whole gradient before clipping.
        tokens: input tokens of the whole run so far, including those before a resume.
        tokens_per_second: mean speed since the run was started or resumed.
    """

    steps_done: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW over all weights of the model, with weight decay on all of them.

    Args:
        model: the model.
        config: learning rate, betas, epsilon and weight decay.
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if is_bfloat16 else contextlib.nullcontext()


class Loop:
    """Trains one model.

    Args:
        model: a model on `world.device`, divided among the ranks (`parallel.divide`), whose forward pass takes
            `input_ids` and returns `.logits`; with `document_masks`, a model that `check_follows_positions` accepts.
        optimizer: the optimiser of the model's weights.
        sequences: the training data.
        config: settings of the optimiser and the schedule.
        separator_id: id of the document separator, for the official loss.
        world: the place of this process among the ranks.

    Raises:
        ConfigError: a batch has fewer sequences than there are ranks.
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
                f"train.batch_sequences: expected at least one per rank ({world.size}), found {config.batch_sequences}"
            )
        self.model, self.optimizer, self.sequences, self.config = model, optimizer, sequences, config
        self.separator_id, self.world = separator_id, world

    def run(
        self,
        steps_done: int,
        on_step: Callable[[StepMeasures], None],
        on_save: Callable[[StepMeasures], None],
        ends: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains from step `steps_done` to the last step of the config, or until `ends` says so.

        Args:
            steps_done: optimiser steps that the weights have had.
            on_step: called every `log_every_steps` steps and after the last step.
            on_save: called every `save_every_steps` steps and after the last step.
            ends: called after each step; whether it is the last one. It gives the same answer on every rank.

        Raises:
            MiniplmError: the loss or the gradient is not finite.
            CorpusError: a batch has no target.
        """
        self.model.train()
        started, first = time.perf_counter(), steps_done
        for step in range(steps_done, self.config.steps):
            rate, loss, norm = self.step(step)
            done = step + 1
            is_last = ends() or done == self.config.steps
            logs = done % self.config.log_every_steps == 0 or is_last
            saves = done % self.config.save_every_steps == 0 or is_last
            if not (logs or saves):
                continue  # reading the loss makes the CPU wait for the GPU
            loss_value, norm_value = float(self.world.sum(loss)), float(norm)
            self._check_finite(done, loss_value, norm_value)
            tokens_a_step = self.config.batch_sequences * self.sequences.sequence_length
            speed = (done - first) * tokens_a_step / (time.perf_counter() - started)
            measures = StepMeasures(done, loss_value, rate, norm_value, done * tokens_a_step, speed)
            if logs:
                on_step(measures)
            if saves:
                on_save(measures)
            if is_last:
                return

    def step(self, step: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Does one optimiser step.

        Args:
            step: number of the step, from 0.

        Returns:
            (learning rate, this rank's part of the loss in nats, norm of the whole gradient before clipping).

        Raises:
            CorpusError: the batch has no target.
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
        norm = clip_gradient(self.model, limit)
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
        """Computes this rank's gradients of the batch's loss; returns this rank's part of the loss.

        Args:
            tokens: int64 ids of this rank's sequences, (B, L + 1).
            mask: 1 where a position has a target, (B, L).
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        masks = self.config.document_masks
        positions = document_positions(inputs, mask, self.separator_id) if masks else None
        weights, count = target_weights(inputs, mask, self.separator_id, self.config.loss)
        count = self.world.sum(count)
        if not count > 0:
            raise CorpusError("a batch has no target: check the column target_mask of the packed table")
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        starts = range(0, len(tokens), self.config.micro_batch_sequences)
        for start in starts:
            part = slice(start, start + self.config.micro_batch_sequences)
            with gradient_sums(self.model, last=start == starts[-1]):
                with _autocast(self.config, self.world.device):
                    # A cache would keep transformers from building the mask.
                    extra = {} if positions is None else {"position_ids": positions[part], "use_cache": False}
                    logits = self.model(input_ids=inputs[part], **extra).logits
                loss = (target_nll(logits, targets[part]) * weights[part]).sum() / count.float()
                (loss * self.world.size).backward()  # DDP and FSDP take the mean over ranks; the batch needs the sum
            total += loss.detach()
        return total

    def _check_finite(self, steps_done: int, loss: float, norm: float) -> None:
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise MiniplmError(
                f"training diverged: at step {steps_done} the loss is {loss} and the gradient norm {norm}: lower "
                "train.learning_rate or raise train.warmup_steps; the last checkpoint was saved before this step"
            )
