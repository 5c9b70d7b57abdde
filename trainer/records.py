"""The two JSON files that the trainer writes into a model folder: `training.json` and `evaluation.json`.

Owns their keys, as frozen dataclasses, and reads them. `train` and `evaluate` write them. Other programs read the same
files (the report, the summary), so a key keeps its name and meaning. A file without one of the required keys counts as
absent. Needs neither torch nor Spark.
"""

import dataclasses
from typing import Any, TypeVar

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.storage import Json

TRAINING_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """`training.json`: how a model was trained, and on what.

    Attributes:
        name: name of the model's folder.
        run_id: MLflow run, or None if MLflow gave none.
        steps: optimiser steps.
        sequences: sequences that were trained on, counted again in each epoch.
        tokens: input tokens of these sequences.
        epochs: passes over the packed table.
        sequence_length: tokens of one input.
        seconds: training time, without pauses between a kill and the next start.
        final_loss: loss of the last step, in nats per token; None if no step ran.
        n_parameters: number of weights; tied weights count once.
        tokenizer: name of the tokenizer.
        packed_uri: the packed table, without secrets.
        packed_version: its Delta version.
        manifest_hash: hash of the files, row groups and row counts of that version.
        fingerprint: hash of the config, the data and the tokenizer.
        config_fingerprint: hash of the config alone.
        lineage: `userMetadata` of the packed table, or None if it has none.
        tokenizer_hash: hash of the tokenizer.json that the data was packed with; None in a file of an earlier version.
        tokenizer_file_hash: hash of the tokenizer.json in the model's folder; None in a file of an earlier version.
    """

    name: str
    run_id: str | None
    steps: int
    sequences: int
    tokens: int
    epochs: float
    sequence_length: int
    seconds: float
    final_loss: float | None
    n_parameters: int
    tokenizer: str
    packed_uri: str
    packed_version: int
    manifest_hash: str
    fingerprint: str
    config_fingerprint: str
    lineage: Json | None
    tokenizer_hash: str | None = None
    tokenizer_file_hash: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Held-out loss of a model over a set of instances. The three means are None if no instance was scored.

    Attributes:
        heldout_nats_per_token: sum of -log p over the number of tokens.
        heldout_nats_per_instance_mean: mean over instances of their nats per token.
        heldout_bits_per_byte: sum of -log2 p over the number of bytes.
        n_instances, n_tokens, n_bytes: what was scored.
    """

    heldout_nats_per_token: float | None
    heldout_nats_per_instance_mean: float | None
    heldout_bits_per_byte: float | None
    n_instances: int
    n_tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(HeldOutLoss):
    """`evaluation.json`: held-out loss over all instances and by source.

    Attributes:
        failed: number of instances that could not be scored, by reason.
        by_source: the same loss for each source.
        fingerprint: hash of the method, the model's revision and the held-out instances.
    """

    failed: dict[str, int]
    by_source: dict[str, HeldOutLoss]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `train` for one model.

    Attributes:
        name: the model.
        record: its `training.json`. None for a frozen model folder without this file, for a training that was stopped,
            and on ranks other than 0.
        skipped: whether the model was trained before.
        stopped_after: the saved step after which a signal stopped the training; None if it is finished.
    """

    name: str
    record: TrainingRecord | None
    skipped: bool
    stopped_after: int | None = None

    def as_json(self) -> Json:
        """The record's keys, and `skipped`; for a training that was stopped also `stopped_after`."""
        keys = {"name": self.name} if self.record is None else dataclasses.asdict(self.record)
        stop = {} if self.stopped_after is None else {"stopped_after": self.stopped_after}
        return {**keys, **stop, "skipped": self.skipped}


@dataclasses.dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate` for one model: its `evaluation.json`, and whether the model was evaluated before."""

    evaluation: Evaluation
    skipped: bool

    def as_json(self) -> Json:
        """The evaluation's keys, and `skipped`."""
        return {**dataclasses.asdict(self.evaluation), "skipped": self.skipped}


def read_training(config: ExperimentConfig, name: str) -> TrainingRecord | None:
    """Reads `training.json` of the model `name`; None if it is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    raw = storage.read_json(config.layout.model(name, TRAINING_FILE))
    return _from_json(TrainingRecord, raw)


def read_evaluation(config: ExperimentConfig, name: str) -> Evaluation | None:
    """Reads `evaluation.json` of the model `name`; None if it is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    raw = storage.read_json(config.layout.model(name, EVALUATION_FILE))
    evaluation = _from_json(Evaluation, raw)
    if evaluation is None:
        return None
    losses = {source: _from_json(HeldOutLoss, numbers) for source, numbers in raw["by_source"].items()}
    by_source = {source: loss for source, loss in losses.items() if loss is not None}
    return dataclasses.replace(evaluation, by_source=by_source) if len(by_source) == len(losses) else None


def _from_json(record: type[_T], raw: Any) -> _T | None:
    """The record with the values of a JSON object, or None if a key without a default is missing."""
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(raw, dict) or not raw.keys() >= required:
        return None
    return record(**{field.name: raw[field.name] for field in fields if field.name in raw})
