"""The training loop. Uses only torch and numpy; reads no table, writes no file, does not call MLflow.

Inputs: a model with its loss, token sequences by row number (`Sequences`), a `TrainConfig`. Output: the model's
weights, changed in place; measures go to two callbacks. One step trains on one batch of `batch_sequences` over all
ranks, in micro-batches whose weighted sums add up to the loss of the whole batch; then it clips the gradient and
applies AdamW with the schedule's learning rate. Weight decay applies to all weights, as in the official code. Weights
are fp32; the forward pass is bf16 on a GPU with dtype auto. Between logs and saves, the CPU does not wait for the GPU.

Dropout is seeded by (seed, step, rank), and the order of rows by (seed, step). So the state of a run is the weights,
the optimiser and the number of steps done.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from miniplm_udf.scoring.peaks import peak_flops_per_second
from trainer.loader.batches import Batches, Sequences
from trainer.losses.loss import target_weights
from trainer.models.document_masks import document_positions
from trainer.models.flops import training_flops_per_token
from trainer.models.precision import autocast, product_dtype
from trainer.ranks.distributed import World
from trainer.ranks.parallel import clip_gradient, gradient_sums, undivided
from trainer.schedule import learning_rate


@dataclasses.dataclass(frozen=True)
class StepMeasures:
    """The measures of one step.

    Attributes:
        steps_done: optimiser steps of the whole run so far, including steps before a resume.
        loss: loss of the batch, in nats per token; with a teacher the mixed loss.
        learning_rate: rate of this step.
        gradient_norm: norm of the whole gradient before clipping.
        tokens: input tokens of the whole run so far, including tokens before a resume.
        tokens_per_second: input tokens of all ranks per second, since the measures before, or since the start.
        mfu: the model FLOPs per second as a share of the peak of all chips (peaks.py); None if the peak is not known.
        lm_loss: -log p of the targets, in nats per token, the same mean as `loss`; None without a teacher.
        kd_loss: KL divergence from the teacher to the student, in nats per token, likewise.
    """

    steps_done: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    mfu: float | None = None
    lm_loss: float | None = None
    kd_loss: float | None = None


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
        fused=True,  # one pass over the weights, on CPUs too
    )


class Loop:
    """Trains one model.

    Args:
        module: a model with its loss on `world.device`, prepared by `blocks.prepare_blocks` and divided among the ranks
            by `parallel.divide`; with `document_masks`, a model that `check_follows_positions` accepts.
        optimizer: the optimiser of the model's weights.
        sequences: the training data.
        config: settings of the optimiser and the schedule.
        separator_id: id of the document separator, for the official loss.
        world: the place of this process among the ranks.

    Attributes:
        model: the causal LM in `module`.

    Raises:
        ConfigError: a batch has fewer sequences than there are ranks.
    """

    def __init__(
        self,
        module: torch.nn.Module,
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
        self.module, self.optimizer, self.sequences, self.config = module, optimizer, sequences, config
        self.separator_id, self.world = separator_id, world
        self.batches = Batches(sequences, config, world)
        whole = undivided(module)
        self.model = whole.model
        teacher = None if whole.teacher is None else whole.teacher.model
        peak = peak_flops_per_second(world.device, str(product_dtype(config, world.device)).removeprefix("torch."))
        flops = training_flops_per_token(self.model, sequences.sequence_length, teacher)
        self._mfu_per_speed = None if peak is None else flops / (peak * world.size)
        # The first step whose loss or gradient is not finite; -1: none so far. Read only at logs and saves.
        self._first_bad_step = torch.tensor(-1, device=world.device)

    def run(
        self,
        steps_done: int,
        on_step: Callable[[StepMeasures], None],
        on_save: Callable[[StepMeasures], None],
        ends: Callable[[], bool] = lambda: False,
        on_evaluate: Callable[[int], None] | None = None,
    ) -> None:
        """Trains from step `steps_done` to the last step of the config, or until `ends` says so.

        Args:
            steps_done: optimiser steps that the weights have had.
            on_step: called every `log_every_steps` steps and after the last step.
            on_save: called every `save_every_steps` steps and after the last step, also if `ends` makes it the last.
            ends: called after each step; whether it is the last one. It gives the same answer on every rank.
            on_evaluate: called every `evaluate_every_steps` steps, unless that is 0, with the optimiser steps done; its
                time does not count in `tokens_per_second`. None calls nothing.

        Raises:
            MiniplmError: the loss or the gradient of a step is not finite; nothing after this step is logged or saved.
            CorpusError: a batch has no target, or cannot be read.
        """
        with self.batches.read_ahead(steps_done, self.config.steps):
            self._run(steps_done, on_step, on_save, ends, on_evaluate)

    def _run(
        self,
        steps_done: int,
        on_step: Callable[[StepMeasures], None],
        on_save: Callable[[StepMeasures], None],
        ends: Callable[[], bool],
        on_evaluate: Callable[[int], None] | None,
    ) -> None:
        """Trains on the batches of the steps, which are read ahead."""
        self.module.train()
        started, first = time.perf_counter(), steps_done
        for step in range(steps_done, self.config.steps):
            rate, losses, norm = self.step(step)
            done = step + 1
            if on_evaluate is not None and self._evaluates_at(done):
                self._check_finite(int(self._first_bad_step))
                paused = time.perf_counter()
                on_evaluate(done)
                started += time.perf_counter() - paused
            is_last = ends() or done == self.config.steps
            logs = done % self.config.log_every_steps == 0 or done == self.config.steps
            saves = done % self.config.save_every_steps == 0 or is_last
            if not (logs or saves):
                continue  # reading the loss makes the CPU wait for the GPU
            loss, *parts, norm_value = self._read(losses, norm)
            tokens_a_step = self.config.batch_sequences * self.sequences.sequence_length
            speed = (done - first) * tokens_a_step / (time.perf_counter() - started)
            mfu = None if self._mfu_per_speed is None else speed * self._mfu_per_speed
            measures = StepMeasures(done, loss, rate, norm_value, done * tokens_a_step, speed, mfu, *parts)
            if logs:
                on_step(measures)
                started, first = time.perf_counter(), done
            if saves:
                on_save(measures)
            if is_last:
                return

    def _evaluates_at(self, steps_done: int) -> bool:
        every = self.config.evaluate_every_steps
        return every > 0 and steps_done % every == 0

    def step(self, step: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Does one optimiser step. Does not wait for the device.

        Args:
            step: number of the step, from 0.

        Returns:
            (learning rate, losses of the batch in nats, norm of the whole gradient before clipping). The first loss is
            the differentiated loss; with a teacher, `lm_loss.Losses.parts_P` follow. Losses are not finite if the batch
            has no target.
        """
        config, world = self.config, self.world
        torch.manual_seed(((config.seed * 1_000_003 + step) * 4096 + world.rank) % 2**63)
        losses = world.sum(self._backward(*self.batches.get(step)))
        limit = config.gradient_clip_norm if config.gradient_clip_norm > 0 else float("inf")
        norm = clip_gradient(self.module, limit)
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
        is_first_bad = (self._first_bad_step < 0) & ~(torch.isfinite(losses[0]) & torch.isfinite(norm))
        # Not `where`: it copies the number to the GPU and waits for the copy.
        self._first_bad_step = self._first_bad_step.masked_fill(is_first_bad, step)
        return rate, losses, norm

    def _backward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes this rank's gradients of the batch's loss; returns this rank's part of the losses, (1 or 3,).

        Args:
            tokens: int64 ids of this rank's sequences, (B, L + 1).
            mask: 1 where a position has a target, (B, L).
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        masks = self.config.document_masks
        positions = document_positions(inputs, mask, self.separator_id) if masks else None
        weights, count = target_weights(inputs, mask, self.separator_id, self.config.loss)
        weights = weights / self.world.sum(count).float()
        totals: list[torch.Tensor] = []
        # Ranks that share weights wait for each other in every micro-batch, so all have the same number of them. A rank
        # without a row left repeats its first row with weight 0.
        starts = range(0, -(-self.config.batch_sequences // self.world.size), self.config.micro_batch_sequences)
        for start in starts:
            part = slice(start, start + self.config.micro_batch_sequences) if start < len(tokens) else slice(1)
            weight = weights[part] if start < len(tokens) else torch.zeros_like(weights[part])
            with gradient_sums(self.module, last=start == starts[-1]):
                with autocast(self.config, self.world.device):
                    loss, parts_P = self.module(
                        inputs[part], targets[part], weight, None if positions is None else positions[part]
                    )
                (loss * self.world.size).backward()  # DDP and FSDP take the mean over ranks; the batch needs the sum
            totals.append(torch.cat([loss.detach()[None], parts_P]).double())
        return torch.stack(totals).sum(dim=0)

    def _read(self, losses: torch.Tensor, norm: torch.Tensor) -> list[float]:
        """Reads losses and norm from the device, after the check that all steps so far were finite."""
        *values, bad_step_value = torch.cat([losses, norm.double()[None], self._first_bad_step.double()[None]]).tolist()
        self._check_finite(int(bad_step_value))
        return values

    def _check_finite(self, bad_step: int) -> None:
        """Raises the error of the first step whose loss or gradient is not finite; -1: there is none."""
        if bad_step < 0:
            return
        rows = self.batches.rows(bad_step)
        numbers = ", ".join(str(row) for row in rows.tolist())
        tokens, mask = (torch.from_numpy(array) for array in self.sequences.get(rows))
        if not target_weights(tokens[:, :-1], mask, self.separator_id, self.config.loss)[1] > 0:
            raise CorpusError(
                f"step {bad_step + 1}: a batch has no target: check the column target_mask of the packed table "
                f"(rows {numbers})"
            )
        raise MiniplmError(
            f"training diverged: at step {bad_step + 1} the loss or the gradient norm is not finite: lower "
            "train.learning_rate or raise train.warmup_steps; the last checkpoint was saved before this step; the step "
            f"trained on these rows of the packed table (sequence_id): {numbers}"
        )
