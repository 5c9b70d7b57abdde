"""What can be trained: the students of an experiment and its reference, in one shape.

Inputs: an `ExperimentConfig` and a name. Output: a `Target` that the trainer needs nothing beside. Reads no file.
"""

import dataclasses
import difflib
from typing import Any

from miniplm_udf.config import ExperimentConfig, TrainConfig, fingerprint
from miniplm_udf.errors import ConfigError

# These change how a run is watched or cut up, not what it computes: a run is resumed, and a finished model kept,
# when they change. The batch in micro-batches is the same sum (in another order of additions).
_NOT_IN_FINGERPRINT = (
    "micro_batch_sequences",
    "save_every_steps",
    "keep_checkpoints",
    "log_every_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One model to train.

    Attributes:
        name: of the model's folder and of its MLflow run.
        where: the config key that it stands under, for messages.
        corpus: packed corpus: a refined corpus' name, or `reference`.
        tokenizer: name behind `models/tokenizer_` and in `packed/<corpus>/`.
        architecture: `AutoConfig` keywords.
        train: optimiser and schedule.
        sequence_length: tokens of one input.
        max_positions: longest input that the model must take, in training and when it scores.
        frozen: a finished model stays as it is, whatever the config and the data say.
    """

    name: str
    where: str
    corpus: str
    tokenizer: str
    architecture: dict[str, Any]
    train: TrainConfig
    sequence_length: int
    max_positions: int
    frozen: bool = False

    @property
    def packed_table(self) -> str:
        return f"packed/{self.corpus}/{self.tokenizer}"

    @property
    def tokenizer_folder(self) -> str:
        return f"tokenizer_{self.tokenizer}"

    def config_fingerprint(self) -> str:
        """Hash of all in the config that the weights depend on."""
        train = dataclasses.asdict(self.train)
        for key in _NOT_IN_FINGERPRINT:
            del train[key]
        return fingerprint(
            self.architecture,
            train,
            self.packed_table,
            self.sequence_length,
            self.max_positions,
        )


def student_target(config: ExperimentConfig, name: str) -> Target:
    """The student `name`.

    Raises:
        ConfigError: there is no such student.
    """
    if name not in config.students:
        close = difflib.get_close_matches(name, list(config.students), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"student {name!r}: expected one of {sorted(config.students)} (section students){hint}")
    student = config.students[name]
    return Target(
        name=name,
        where=f"students.{name}.architecture",
        corpus=student.corpus,
        tokenizer=student.tokenizer,
        architecture=student.architecture,
        train=student.train,
        sequence_length=config.pack.sequence_length,
        max_positions=config.pack.sequence_length,
    )


def reference_target(config: ExperimentConfig) -> Target:
    """The reference model.

    Raises:
        ConfigError: the experiment trains none.
    """
    if config.reference is None:
        raise ConfigError("reference: the config has no such section, so there is no reference to train")
    reference = config.reference
    return Target(
        name=reference.alias,
        where="reference.architecture",
        corpus="reference",
        tokenizer=reference.tokenizer,
        architecture=reference.architecture,
        train=reference.train,
        sequence_length=config.pack.sequence_length,
        # It scores with the context that its `models` entry states, which may be longer than what it is trained on.
        max_positions=max(config.pack.sequence_length, config.models[reference.alias].context_tokens),
        frozen=True,
    )


def all_targets(config: ExperimentConfig) -> list[Target]:
    """The reference, where there is one, and all students."""
    first = [reference_target(config)] if config.reference else []
    return first + [student_target(config, name) for name in config.students]
