"""Sizes of the models that an experiment trains, by the tokens and the FLOPs that there are for them. Pure.

A model is the largest one that gets 20 tokens for each of its weights outside the embeddings (arXiv 2203.15556), within
a budget of FLOPs (6 x parameters x tokens). Its text is seen at most four times (arXiv 2305.16264). Little text gets a
width of 64 all the same: a narrower model is worse on it, however few tokens it needs (docs/init.md).
"""

import dataclasses

TOKENS_PER_PARAMETER = 20
# The paper's reference sees 48 tokens for each weight (5B over 104M); more is not needed.
_MOST_TOKENS_PER_PARAMETER = 48
MOST_EPOCHS = 4
_LEAST_STEPS, _GOOD_STEPS = 10, 300
_LARGEST_BATCH, _LEAST_STEP_TOKENS = 512, 1024
# Hidden size, layers, attention heads.
_SHAPES = (
    (32, 1, 2), (64, 2, 2), (128, 3, 4), (192, 4, 6), (256, 6, 4), (384, 6, 6), (512, 8, 8), (768, 12, 12),
    (1024, 24, 16), (1536, 24, 16),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a transformer with tied embeddings.

    Attributes:
        hidden: width.
        layers: number of layers.
        heads: attention heads.
        n_ids: size of the vocabulary.
    """

    hidden: int
    layers: int
    heads: int
    n_ids: int

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layers: 8/3 of the hidden size, in multiples of 32."""
        return -(-self.hidden * 8 // 3 // 32) * 32

    @property
    def n_body(self) -> int:
        """Weights outside the embeddings."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def n_parameters(self) -> int:
        """All weights."""
        return self.n_ids * self.hidden + self.n_body


@dataclasses.dataclass(frozen=True)
class PlannedTraining:
    """A model and the steps that it is trained for.

    Attributes:
        shape: the model.
        steps: optimiser steps.
        batch: sequences in a step.
        micro_batch: sequences in a forward pass.
        learning_rate: highest learning rate.
        n_tokens: tokens of all steps.
        n_text: tokens of the text that it is trained on.
    """

    shape: Shape
    steps: int
    batch: int
    micro_batch: int
    learning_rate: float
    n_tokens: int
    n_text: int

    @property
    def epochs(self) -> float:
        """How often the text is seen."""
        return self.n_tokens / max(1, self.n_text)

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens for each weight outside the embeddings."""
        return self.n_tokens / self.shape.n_body

    @property
    def flops(self) -> float:
        """FLOPs of the training."""
        return 6.0 * self.shape.n_parameters * self.n_tokens


# Highest learning rate up to a width; wider models have the paper's.
_LEARNING_RATES = ((64, 3e-3), (384, 1e-3))
# Up to this width a wider model is better, whatever the text; and the tokens that it is worth at least.
_LEAST_WIDTH, _LEAST_TOKENS = 64, 200_000


def largest(n_ids: int, n_text: float, budget: float, most_parameters: float) -> Shape:
    """Returns the largest shape for some text and a budget.

    Args:
        n_ids: size of the vocabulary.
        n_text: tokens of the text.
        budget: FLOPs.
        most_parameters: largest number of weights; the smallest shape may have more.
    """
    shapes = [Shape(*sizes, n_ids) for sizes in _SHAPES]
    fitting = [
        shape
        for shape in shapes
        if shape.n_parameters <= most_parameters
        and (tokens := _needed_tokens(shape, n_text)) <= MOST_EPOCHS * n_text
        and 6.0 * shape.n_parameters * tokens <= budget
    ]
    return fitting[-1] if fitting else shapes[0]


def _needed_tokens(shape: Shape, n_text: float) -> float:
    """The tokens without which a shape is too large; those of a narrow one are all that there are, if these are few."""
    if shape.hidden <= _LEAST_WIDTH:
        return min(_LEAST_TOKENS, MOST_EPOCHS * n_text)
    return TOKENS_PER_PARAMETER * shape.n_body


def wanted_tokens(shape: Shape, budget: float) -> float:
    """Returns the tokens that a model is worth: as many for each weight as the paper's, or what the budget allows.

    Args:
        shape: the model.
        budget: FLOPs.
    """
    return min(_MOST_TOKENS_PER_PARAMETER * shape.n_parameters, budget / (6.0 * shape.n_parameters))


def training(shape: Shape, n_text: float, budget: float, sequence: int, has_gpu: bool) -> PlannedTraining:
    """Returns the steps of a model.

    Args:
        shape: the model.
        n_text: tokens of its text.
        budget: FLOPs.
        sequence: tokens of a sequence.
        has_gpu: whether it is trained on a GPU, with larger forward passes.
    """
    n_tokens = max(1.0, min(wanted_tokens(shape, budget), MOST_EPOCHS * n_text))
    # About a thousand tokens in a step: a small model learns more from many small steps.
    batch = max(1, _LEAST_STEP_TOKENS // sequence)
    while batch < _LARGEST_BATCH and n_tokens / (2 * batch * sequence) >= _GOOD_STEPS:
        batch *= 2
    steps = max(_LEAST_STEPS, round(n_tokens / (batch * sequence)))
    return PlannedTraining(
        shape=shape,
        steps=steps,
        batch=batch,
        micro_batch=min(batch, 16 if has_gpu else 8),
        learning_rate=next((rate for width, rate in _LEARNING_RATES if shape.hidden <= width), 6e-4),
        n_tokens=steps * batch * sequence,
        n_text=round(n_text),
    )
