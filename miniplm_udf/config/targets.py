"""The models that an experiment trains: its students and its reference, both as a `Target`.

Inputs: an `ExperimentConfig` and a name. Output: a `Target`, which holds everything that the trainer needs from the
config. Reads no file.
"""

import dataclasses
import difflib
import json

from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.training import KEYS_WITHOUT_EFFECT, TrainConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.schemas import table_names
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One model to train.

    Attributes:
        name: name of the model's folder and of its MLflow run.
        where: config key of the architecture, for messages.
        corpus: name of the packed corpus: a refined corpus, or `reference`.
        tokenizer: name of the tokenizer, as in `models/tokenizer_<tokenizer>` and `packed/<corpus>/<tokenizer>`.
        architecture: `AutoConfig` keywords.
        train: settings of the optimiser and the schedule.
        sequence_length: tokens of one input.
        max_positions: longest input of the model in training and scoring, in tokens.
        frozen: whether a finished model is kept even if the config or the data changes.
    """

    name: str
    where: str
    corpus: str
    tokenizer: str
    architecture: Json
    train: TrainConfig
    sequence_length: int
    max_positions: int
    frozen: bool = False

    @property
    def packed_table(self) -> str:
        """Name of the packed table under `tables/`."""
        return table_names.packed(self.corpus, self.tokenizer)

    def settings(self) -> dict[str, str]:
        """Returns every config value that the weights depend on, as JSON by name, for messages.

        A name is the key without the sections before it: `train.seed` also stands for `students.NAME.train.seed`.
        """
        values = {
            **{f"architecture.{key}": value for key, value in self.architecture.items()},
            **{f"train.{key}": value for key, value in self._train_values().items()},
            "packed table": self.packed_table,
            "sequence_length": self.sequence_length,
            "longest input": self.max_positions,
        }
        return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}

    def _train_values(self) -> dict[str, object]:
        """The values of the section `train` that the weights depend on."""
        train = dataclasses.asdict(self.train)
        return {key: value for key, value in train.items() if key not in KEYS_WITHOUT_EFFECT}

    def config_fingerprint(self) -> str:
        """Returns a hash of every config value that the weights depend on."""
        train = self._train_values()
        for key in ("document_masks", "kd_ratio"):  # models of versions without these keys stay finished
            if not train[key]:
                del train[key]
        return fingerprint(
            self.architecture,
            train,
            self.packed_table,
            self.sequence_length,
            self.max_positions,
        )


def student_target(config: ExperimentConfig, name: str) -> Target:
    """Returns the target of the student `name`.

    Args:
        config: the experiment.
        name: the student.

    Raises:
        ConfigError: the config has no student of this name.
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
    """The reference model as a training target: its name, data, tokenizer and training settings.

    Args:
        config: the experiment.

    Raises:
        ConfigError: the config has no section `reference`.
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
        # The reference scores with the `context_tokens` of its `models` entry, which may exceed its training length.
        max_positions=max(config.pack.sequence_length, config.models[reference.alias].context_tokens),
        frozen=True,
    )


def all_targets(config: ExperimentConfig) -> list[Target]:
    """Returns the targets of the reference, if the config trains one, and of all students.

    Args:
        config: the experiment.
    """
    first = [reference_target(config)] if config.reference else []
    return first + [student_target(config, name) for name in config.students]
