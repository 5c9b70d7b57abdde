"""The sections of an experiment about training: the optimiser and its schedule, the students, and the reference.

Frozen dataclasses, checked when they are made, as in sections.py. The defaults are the paper's recipe for its
Qwen models. `experiment.load_config` lets each model inherit from the experiment's section `train` and from its named
model (student_models.py). Imports nothing heavy.
"""

import dataclasses
from typing import Literal

from miniplm_udf.config.sections import check
from miniplm_udf.config.values import FOLLOWS, follows
from miniplm_udf.storage import Json

# These keys do not change the result of a training, so a run resumes and a finished model stays when they change.
# Another micro-batch size, another division among ranks, or compilation adds up the same batch in another order.
KEYS_WITHOUT_EFFECT = (
    "micro_batch_sequences",
    "parallel",
    "shard_ranks",
    "save_every_steps",
    "keep_checkpoints",
    "log_every_steps",
    "compile",
    "activation_checkpointing",
    "evaluate_every_steps",
    "kd_teacher",  # a name; the fingerprint of the training has the hash of the teacher's weights
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser and schedule; the defaults are the paper's.

    Attributes:
        steps: optimiser steps.
        batch_sequences: sequences in one step, over all ranks.
        micro_batch_sequences: sequences in one forward pass of one rank.
        learning_rate: highest learning rate, reached after the warm-up.
        min_learning_rate_ratio: final learning rate over `learning_rate`.
        warmup_steps: steps in which the learning rate rises; the default is 2000, or a quarter of `steps` if that is
            less.
        adam_beta1: decay of AdamW's mean of the gradients.
        adam_beta2: decay of AdamW's mean of the squared gradients.
        adam_eps: term that AdamW adds to the root of that mean.
        weight_decay: AdamW's weight decay, on all weights.
        gradient_clip_norm: largest norm of the gradient; 0 does not clip.
        loss: official is the mean over sequences of the mean over targets whose input is not the separator;
            token_mean is the mean over all targets.
        kd_ratio: share of the forward KL divergence from the teacher in the loss (Vanilla KD); the rest is the LM loss.
            0, the default, trains without a teacher.
        kd_teacher: alias of the teacher in the section `models`.
        document_masks: whether tokens see only their own document in a sequence; false as in the paper.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        parallel: how ranks divide a model. ddp: each rank has all weights; fsdp: all ranks share one copy of the
            weights and of the optimiser's state; hsdp: groups of `shard_ranks` ranks share one copy. One process
            ignores it.
        shard_ranks: ranks that share a copy with hsdp; null: the ranks of one machine. It divides the number of ranks.
        compile: whether torch compiles the model's layers; auto compiles on a GPU, where that is possible.
        activation_checkpointing: whether the backward pass computes the layers again instead of keeping what they
            computed: slower, and with less memory.
        save_every_steps: steps between checkpoints.
        keep_checkpoints: number of newest checkpoints that are kept.
        log_every_steps: steps between points of the curves.
        evaluate_every_steps: steps between evaluations on held-out and external texts; 0: none during training.
        seed: seed of the weights, the order of the rows and dropout.
    """

    steps: int = 100_000
    batch_sequences: int = 512
    micro_batch_sequences: int = 8
    learning_rate: float = 6e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = follows("2000, or a quarter of steps if that is less")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    weight_decay: float = 0.01
    gradient_clip_norm: float = 1.0
    loss: Literal["official", "token_mean"] = "official"
    kd_ratio: float = 0.0
    kd_teacher: str = "teacher"
    document_masks: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_ranks: int | None = None
    compile: bool | Literal["auto"] = "auto"
    activation_checkpointing: bool = False
    save_every_steps: int = 1000
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    evaluate_every_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps == FOLLOWS:
            object.__setattr__(self, "warmup_steps", min(2000, self.steps // 4))
        for name in (
            "steps",
            "batch_sequences",
            "micro_batch_sequences",
            "save_every_steps",
            "keep_checkpoints",
            "log_every_steps",
        ):
            check(getattr(self, name) >= 1, f"train.{name}: expected at least 1, found {getattr(self, name)}")
        check(
            self.shard_ranks is None or (self.shard_ranks >= 1 and self.parallel == "hsdp"),
            f"train.shard_ranks: expected null, or at least 1 with train.parallel: hsdp, found {self.shard_ranks}",
        )
        check(
            0 <= self.warmup_steps <= self.steps,
            f"train.warmup_steps: expected 0 to steps ({self.steps}), found {self.warmup_steps}",
        )
        check(self.learning_rate > 0, f"train.learning_rate: expected more than 0, found {self.learning_rate}")
        check(self.weight_decay >= 0, f"train.weight_decay: expected at least 0, found {self.weight_decay}")
        check(
            0 <= self.kd_ratio <= 1,
            f"train.kd_ratio: expected 0 (no teacher) to 1 (the teacher alone), found {self.kd_ratio}",
        )
        check(
            self.evaluate_every_steps >= 0,
            f"train.evaluate_every_steps: expected 0 (never) or more, found {self.evaluate_every_steps}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """A student model.

    Attributes:
        model: name of a model in `conf/students`, which gives every key of `architecture` and `train` that is not set
            (`student_models.fill_in`); null gives none.
        architecture: keywords of transformers' `AutoConfig`, with `model_type`.
        corpus: name of the refined corpus that it is trained on.
        tokenizer: name in the section `tokenizers`.
        train: keys that are not set come from the experiment's section `train`, then from `model`.
    """

    corpus: str
    tokenizer: str
    model: str | None = None
    architecture: Json = dataclasses.field(default_factory=dict)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference LM: trained once on the split `reference`, then frozen.

    Attributes:
        alias: its alias in the section `models`.
        tokenizer: alias of the model whose tokenizer it uses.
        model: name of a model in `conf/students`, as for a student.
        architecture: keywords of transformers' `AutoConfig`, as for a student.
        train: keys that are not set come from the experiment's section `train`, then from `model`.
    """

    alias: str = "reference"
    tokenizer: str = "teacher"
    model: str | None = None
    architecture: Json = dataclasses.field(default_factory=dict)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(
            self.train.kd_ratio == 0,
            f"reference.train.kd_ratio: expected 0, found {self.train.kd_ratio}: what a reference learns from the "
            "teacher is missing in the difference of their scores; set reference.train.kd_ratio=0",
        )
