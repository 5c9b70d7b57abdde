"""`training.json` of a model folder: how a model was trained.

Owns its keys, as a frozen dataclass, and reads it. `train` writes it. Other programs read the same file (the report,
the summary), so a key keeps its name and meaning. A file without one of the required keys counts as absent. Needs
neither torch nor Spark.
"""

import dataclasses
from typing import Any, TypeVar

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.storage import Json

TRAINING_FILE = "training.json"
REGISTRATION_FILE = "registration.json"

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
        tracking_id: id of the training in other trackers than MLflow; None in a file of an earlier version.
        kd_ratio: share of the KL divergence from the teacher in the loss.
        kd_teacher: the teacher (`teacher_loading.teacher_record`); None without one.
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
    tracking_id: str | None = None
    kd_ratio: float = 0.0
    kd_teacher: Json | None = None


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


def read_training(config: ExperimentConfig, name: str) -> TrainingRecord | None:
    """Returns the content of `training.json` of the model `name`; None if the file is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    raw = storage.read_json(config.layout.model(name, TRAINING_FILE))
    return from_json(TrainingRecord, raw)


def from_json(record: type[_T], raw: Any) -> _T | None:
    """Makes a record of the values of a JSON object.

    Args:
        record: a dataclass.
        raw: parsed JSON.

    Returns:
        The record; None if `raw` is no object or lacks a key that has no default.
    """
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(raw, dict) or not raw.keys() >= required:
        return None
    return record(**{field.name: raw[field.name] for field in fields if field.name in raw})
