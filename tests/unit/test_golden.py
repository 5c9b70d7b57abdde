"""Loss, schedule and optimiser step within 1e-6 of the official code's formulas, written out in plain Python.

The model is a table of logits, one row per input token, so `math` alone computes every number. All constants stand in
this file. Source: the official implementation of arXiv 2410.17215: its loss (`_get_lm_loss_from_logits`, with the mask
of its `LMDataset`), its distillation loss (`_get_kd_loss`), its schedule (`WarmupCosineAnnealingLR`) and its AdamW with
gradient clipping.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from trainer.loop import Loop, make_optimizer
from trainer.losses.kd_teacher import Teacher
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.losses.loss import target_nll, target_weights
from trainer.ranks.distributed import World
from trainer.schedule import learning_rate

SEPARATOR = 3
# The logits of the next token by input token.
TABLE = [
    [0.5, -1.0, 2.0, 0.25],
    [1.5, 0.75, -0.5, -2.0],
    [-0.25, 3.0, 0.125, 1.0],
    [0.0, 0.5, -1.5, 2.5],
]
# The teacher's.
TEACHER_TABLE = [
    [1.0, -0.5, 1.5, 0.0],
    [-1.0, 2.0, 0.25, -0.75],
    [0.5, 1.25, 2.5, -0.25],
    [0.75, -1.5, 0.0, 3.0],
]
KD_RATIO = 0.5
# Two sequences of L + 1 = 6 tokens: one with a document's end in its middle, one that ends with padding.
TOKENS = [[0, 2, 3, 1, 1, 2], [2, 0, 1, 3, 3, 3]]
# In the second sequence the targets end with the separator of its document; the rest is padding.
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]

GOLDEN_LOSS = 2.592549479  # of TABLE over TOKENS
GOLDEN_KD_LOSS = 1.730497191  # of TABLE under the predictions of TEACHER_TABLE

Matrix = list[list[float]]


def log_softmax(row: list[float]) -> list[float]:
    normalizer = math.log(sum(math.exp(value) for value in row))
    return [value - normalizer for value in row]


def official_weights() -> Matrix:
    """Each target's weight: 1 / targets of its sequence / sequences; 0 if its input is the separator or padding."""
    weights = []
    for tokens in TOKENS:
        counts = [token != SEPARATOR for token in tokens[:-1]]
        weights.append([is_counted / sum(counts) / len(TOKENS) for is_counted in counts])
    return weights


def official_loss(table: Matrix) -> float:
    return sum(
        -weight * log_softmax(table[token])[target]
        for tokens, row in zip(TOKENS, official_weights(), strict=True)
        for token, target, weight in zip(tokens[:-1], tokens[1:], row, strict=True)
    )


def official_gradient(table: Matrix) -> Matrix:
    """The derivative of `official_loss`: weight * (p - 1 at the target), added up by row of the table."""
    gradient = [[0.0] * len(table) for _ in table]
    for tokens, row in zip(TOKENS, official_weights(), strict=True):
        for token, target, weight in zip(tokens[:-1], tokens[1:], row, strict=True):
            for entry, log_p in enumerate(log_softmax(table[token])):
                gradient[token][entry] += weight * (math.exp(log_p) - (entry == target))
    return gradient


def official_kd_loss(table: Matrix, teacher: Matrix = TEACHER_TABLE) -> float:
    """`_get_kd_loss`: the cross-entropy of the student under the teacher's probabilities, with the weights above."""
    return sum(
        -weight
        * sum(
            math.exp(log_q) * log_p
            for log_q, log_p in zip(log_softmax(teacher[token]), log_softmax(table[token]), strict=True)
        )
        for tokens, row in zip(TOKENS, official_weights(), strict=True)
        for token, weight in zip(tokens[:-1], row, strict=True)
    )


def official_mixed_gradient(table: Matrix) -> Matrix:
    """The derivative of (1 - kd_ratio) * `official_loss` + kd_ratio * `official_kd_loss`."""
    mixed = [[(1 - KD_RATIO) * value for value in row] for row in official_gradient(table)]
    for tokens, row in zip(TOKENS, official_weights(), strict=True):
        for token, weight in zip(tokens[:-1], row, strict=True):
            both = zip(log_softmax(table[token]), log_softmax(TEACHER_TABLE[token]), strict=True)
            for entry, (log_p, log_q) in enumerate(both):
                mixed[token][entry] += KD_RATIO * weight * (math.exp(log_p) - math.exp(log_q))
    return mixed


def official_rate(epoch: int, *, peak: float, lowest: float, warmup: int, total: int) -> float:
    """The rate of `WarmupCosineAnnealingLR` at `last_epoch`, which is 0 in the first update."""
    if epoch < warmup:
        return peak * epoch / warmup
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup)))


def test_the_official_loss() -> None:
    tokens = torch.tensor(TOKENS)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights, count = target_weights(inputs, torch.tensor(MASK, dtype=torch.uint8), SEPARATOR, "official")
    loss = (target_nll(torch.tensor(TABLE)[inputs], targets) * weights).sum() / count
    # By hand: sequence 0 has the targets 2, 3, 1 and 2 of the inputs 0, 2, 1 and 1; sequence 1 those of 2, 0 and 1.
    nll = {(i, t): -log_softmax(TABLE[i])[t] for i in range(3) for t in range(4)}
    first = (nll[0, 2] + nll[2, 3] + nll[1, 1] + nll[1, 2]) / 4
    second = (nll[2, 0] + nll[0, 1] + nll[1, 3]) / 3
    assert official_loss(TABLE) == pytest.approx((first + second) / 2, abs=1e-12)
    assert loss.item() == pytest.approx(official_loss(TABLE), abs=1e-6)
    assert loss.item() == pytest.approx(GOLDEN_LOSS, abs=1e-6)


@pytest.mark.parametrize(
    ("peak", "lowest", "warmup"),
    [(6e-4, 6e-5, 2000), (3e-4, 3e-5, 2000), (2.5e-4, 2.5e-5, 2000), (2e-3, 1e-5, 10_000)],
)
def test_the_schedule_is_the_official_one_shifted_by_one_update(peak: float, lowest: float, warmup: int) -> None:
    total = 100_000
    for step in (0, 1, warmup - 2, warmup - 1, warmup, warmup + 1, 50_000, 99_998, 99_999):
        rate = learning_rate(step, steps=total, warmup_steps=warmup, peak=peak, min_ratio=lowest / peak)
        official = official_rate(step + 1, peak=peak, lowest=lowest, warmup=warmup, total=total)
        assert rate == pytest.approx(official, rel=1e-6)
    assert official_rate(0, peak=peak, lowest=lowest, warmup=warmup, total=total) == 0
    # The official run never reaches its lowest rate: its last update has the rate of our last but one.
    rate = learning_rate(total - 1, steps=total, warmup_steps=warmup, peak=peak, min_ratio=lowest / peak)
    assert rate == pytest.approx(lowest, rel=1e-6)


class Bigram(torch.nn.Module):
    """A model whose logits are the row of the input token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(TABLE))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Sequences:
    """The two sequences as a packed table."""

    group_rows, sequence_length = np.array([len(TOKENS)]), len(TOKENS[0]) - 1

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array(TOKENS, dtype=np.int32)[rows], np.array(MASK, dtype=np.uint8)[rows]


# The rate is large, so that an error of the update shows in weights of size 1.
STEP = TrainConfig(
    steps=6, warmup_steps=2, batch_sequences=2, micro_batch_sequences=1, learning_rate=0.5, weight_decay=0.1,
    gradient_clip_norm=0.125,
)  # fmt: skip


def adamw(steps: int, gradient_of: Callable[[Matrix], Matrix] = official_gradient) -> tuple[Matrix, list[float]]:
    """The table after AdamW steps with decoupled weight decay and a clipped gradient, and the norms before clipping."""
    table = [list(row) for row in TABLE]
    first, second = ([[0.0] * len(TABLE) for _ in TABLE] for _ in range(2))
    norms = []
    for step in range(1, steps + 1):
        rate = official_rate(step, peak=0.5, lowest=0.05, warmup=2, total=6)
        gradient = gradient_of(table)
        norms.append(math.sqrt(sum(value * value for row in gradient for value in row)))
        scale = min(1.0, 0.125 / (norms[-1] + 1e-6))
        for i, row in enumerate(gradient):
            for j, value in enumerate(row):
                clipped = scale * value
                first[i][j] = 0.9 * first[i][j] + 0.1 * clipped
                second[i][j] = 0.98 * second[i][j] + 0.02 * clipped * clipped
                mean, variance = first[i][j] / (1 - 0.9**step), second[i][j] / (1 - 0.98**step)
                table[i][j] *= 1 - rate * 0.1
                table[i][j] -= rate * mean / (math.sqrt(variance) + 1e-6)
    return table, norms


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_of_the_loop_are_adamw_with_the_clipped_gradient(steps: int) -> None:
    assert (STEP.adam_beta1, STEP.adam_beta2, STEP.adam_eps) == (0.9, 0.98, 1e-6)
    model = Bigram()
    loop = Loop(CausalLMWithLoss(model), make_optimizer(model, STEP), Sequences(), STEP, SEPARATOR, World())
    results = [loop.step(step) for step in range(steps)]
    expected, norms = adamw(steps)
    assert float(results[0][1]) == pytest.approx(official_loss(TABLE), abs=1e-6)
    assert [float(norm) for _, _, norm in results] == pytest.approx(norms, abs=1e-6)
    assert min(norms) > 0.125  # else nothing was clipped
    torch.testing.assert_close(model.table.detach(), torch.tensor(expected), atol=1e-6, rtol=0)


class TableTeacher(Teacher):
    """A teacher whose hidden states are its logits."""

    def __init__(self) -> None:
        self.model, self.n_ids = Bigram(), len(TEACHER_TABLE)
        self._table = torch.tensor(TEACHER_TABLE)

    def hidden(self, inputs_BT: torch.Tensor, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        return self._table[inputs_BT]

    def logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        return hidden_nD.clone()


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_with_a_teacher_are_adamw_on_the_official_mixture(steps: int) -> None:
    model = Bigram()
    module = DistilledCausalLM(model, TableTeacher(), KD_RATIO)
    loop = Loop(module, make_optimizer(model, STEP), Sequences(), STEP, SEPARATOR, World())
    results = [loop.step(step) for step in range(steps)]
    # The official code logs the cross-entropy; ours is the KL divergence, the cross-entropy without q's own entropy.
    entropy = official_kd_loss(TEACHER_TABLE)
    kd_loss = official_kd_loss(TABLE) - entropy
    assert official_kd_loss(TABLE) == pytest.approx(GOLDEN_KD_LOSS, abs=1e-6)
    mixed = (1 - KD_RATIO) * official_loss(TABLE) + KD_RATIO * kd_loss
    assert results[0][1].tolist() == pytest.approx([mixed, official_loss(TABLE), kd_loss], abs=1e-6)
    expected, norms = adamw(steps, official_mixed_gradient)
    assert [float(norm) for _, _, norm in results] == pytest.approx(norms, abs=1e-6)
    assert min(norms) > 0.125  # else nothing was clipped
    torch.testing.assert_close(model.table.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
