"""Complete records of trained and evaluated models, for tests that care about a few of their keys."""

import dataclasses
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import (
    Evaluation,
    SetEvaluation,
    TaskEvaluation,
    TaskScore,
    TextLoss,
    TrainingRecord,
)


def training_record(**keys: Any) -> TrainingRecord:
    """A small finished training, with some keys of its record replaced."""
    defaults: Json = {
        "name": "student", "run_id": None, "steps": 100, "sequences": 800, "tokens": 204_800, "epochs": 1.0,
        "sequence_length": 256, "seconds": 1.5, "final_loss": 4.25, "n_parameters": 3_352_512, "tokenizer": "bpe",
        "packed_uri": "file:///root/tables/packed/kept/bpe", "packed_version": 0, "manifest_hash": "m" * 32,
        "fingerprint": "f" * 32, "config_fingerprint": "c" * 32, "lineage": None,
    }  # fmt: skip
    return TrainingRecord(**{**defaults, **keys})


def write_training(config: ExperimentConfig, name: str, **keys: Any) -> None:
    """Writes `training.json` of a model."""
    record = training_record(name=name, **keys)
    storage.write_json(config.layout.model(name, TRAINING_FILE), dataclasses.asdict(record))


def text_loss(bits_per_byte: float, n_tokens: int = 9876) -> TextLoss:
    """A loss whose other means are multiples of its bits per byte."""
    return TextLoss(
        nats_per_token=bits_per_byte * 1.7, nats_per_instance_mean=bits_per_byte * 1.8,
        official_loss=bits_per_byte * 1.9, bits_per_byte=bits_per_byte, n_instances=40, n_tokens=n_tokens,
        n_bytes=30_000,
    )  # fmt: skip


def set_evaluation(loss: TextLoss, by_source: dict[str, TextLoss] | None = None) -> SetEvaluation:
    """The evaluation on a set of texts without failures."""
    return SetEvaluation(
        **dataclasses.asdict(loss), location="file:///texts", version=None, by_source=by_source or {}, failed={},
        bad_rows={}, fingerprint="e" * 32,
    )  # fmt: skip


def evaluation(sets: dict[str, SetEvaluation], tasks: dict[str, float] | None = None) -> Evaluation:
    """An evaluation with accuracies on tasks, if any."""
    scores = {
        name: TaskScore(metric="acc", value=value, stderr=None, n_questions=8, version="1.0")
        for name, value in (tasks or {}).items()
    }
    average = sum(score.value for score in scores.values()) / max(len(scores), 1)
    evaluated = TaskEvaluation(scores=scores, average=average, lm_eval_version="0.4.13", fingerprint="t" * 32)
    return Evaluation(sets=sets, tasks=evaluated if scores else None)
