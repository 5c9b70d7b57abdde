"""Small training loops without files: sequences as a function of their number, and a model of some thousand weights."""

from typing import Any

import numpy as np
import torch

from miniplm_udf.config.training import TrainConfig
from tests.support.trainer_roots import LLAMA
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.loop import Loop, StepMeasures
from trainer.losses.kd_teacher import Teacher
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.models.model import build_model, model_config
from trainer.preparation import distribute, resume
from trainer.ranks.distributed import World

LENGTH, VOCAB, SEPARATOR = 12, 40, 3


class FakeSequences:
    """Rows that are a function of their number; the last one is mostly padding."""

    sequence_length = LENGTH

    def __init__(self, n_sequences: int = 10):
        self.n_sequences = n_sequences
        self.group_rows = np.array([n_sequences])
        generator = np.random.default_rng(0)
        self.tokens = generator.integers(0, 20, (n_sequences, LENGTH + 1)).astype("i4")
        self.mask = np.ones((n_sequences, LENGTH), "u1")
        self.mask[-1, 4:] = 0

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[rows], self.mask[rows]


def make_loop(
    world: World | None = None,
    architecture: dict[str, Any] = LLAMA,
    sequences: Any = None,
    resumed: tuple[Checkpoints, int] | None = None,
    teacher: Teacher | None = None,
    **train: Any,
) -> Loop:
    """A loop with new weights, or with a checkpoint's weights after a step; with a teacher it distils."""
    world = world or World()
    settings = {"steps": 5, "batch_sequences": 6, "micro_batch_sequences": 6, "learning_rate": 0.01, "warmup_steps": 2}
    config = TrainConfig(**settings | {"log_every_steps": 1, "save_every_steps": 2} | train)
    shape = model_config(architecture, where="x", vocab_size=VOCAB, separator_id=SEPARATOR, max_positions=LENGTH)
    model = build_model(shape, where="x", seed=config.seed)
    whole = CausalLMWithLoss(model) if teacher is None else DistilledCausalLM(model, teacher, config.kd_ratio)
    if resumed:
        module, optimizer, _ = resume(*resumed, whole, config, world)
    else:
        module, optimizer = distribute(whole, config, world)
    return Loop(module, optimizer, sequences or FakeSequences(), config, SEPARATOR, world)


def make_teacher(architecture: dict[str, Any] = LLAMA, vocab_size: int = VOCAB, bos_id: int | None = None) -> Teacher:
    """A frozen teacher with confident predictions for the ids of the loops' vocabulary."""
    shape = model_config(architecture, where="x", vocab_size=vocab_size, separator_id=SEPARATOR, max_positions=64)
    model: Any = build_model(shape, where="x", seed=7).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(8)))
    return Teacher(model, VOCAB, bos_id)


def run(loop: Loop, steps_done: int = 0) -> list[StepMeasures]:
    measures: list[StepMeasures] = []
    loop.run(steps_done, measures.append, lambda m: None)
    return measures


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    """Copies of the weights of a loop on one process."""
    return {name: value.clone() for name, value in loop.model.state_dict().items()}
