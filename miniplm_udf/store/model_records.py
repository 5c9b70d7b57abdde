"""The JSON records in the folders of models and tokenizers.

    models/<name>/training.json              how a model was trained
    models/<name>/evaluation.json            its losses on sets of texts, and its scores on tasks
    models/tokenizer_<name>/miniplm.json     the separator, the hash and the size of a tokenizer

Owns their keys, as frozen dataclasses, and reads the files. The trainer writes the first two and packing the third; the
report, a take-down, the maintenance of a root and the trainer read them, so a key keeps its name and meaning. A file
without one of the required keys counts as absent: the model is then trained or evaluated again, and the tokenizer made
again. On the driver and in the trainer; needs neither torch nor Spark.
"""

import dataclasses

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.json_records import from_json
from miniplm_udf.layout import EVALUATION_FILE, TOKENIZER_RECORD_FILE, TRAINING_FILE
from miniplm_udf.storage import Json
from miniplm_udf.store.provenance import PackedMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedText:
    """Where the text of a training came from, so that no other run scores it with the model by mistake.

    Attributes:
        inputs: `ingest.input` of the experiment, without secrets.
        reference_share: `ingest.split.reference` of the experiment.
    """

    inputs: list[str]
    reference_share: float


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
        lineage: `userMetadata` of the packed table; None if it has none.
        tokenizer_hash: hash of the tokenizer.json that the data was packed with; None in a file of an earlier version.
        tokenizer_file_hash: hash of the tokenizer.json in the model's folder; None in a file of an earlier version.
        tracking_id: id of the training in other trackers than MLflow; None in a file of an earlier version.
        kd_ratio: share of the KL divergence from the teacher in the loss.
        kd_teacher: facts about the teacher; None without one.
        text: where its text came from; None in a file of an earlier version.
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
    lineage: PackedMetadata | None
    tokenizer_hash: str | None = None
    tokenizer_file_hash: str | None = None
    tracking_id: str | None = None
    kd_ratio: float = 0.0
    kd_teacher: Json | None = None
    text: TrainedText | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """`miniplm.json` of a tokenizer folder.

    Attributes:
        document_separator, document_separator_id: the token that ends a document, and its id.
        tokenizer_hash: hash of tokenizer.json.
        vocab_size: one more than the largest id.
        fingerprint: hash of the part of the config that the tokenizer was made from.
    """

    document_separator: str
    document_separator_id: int
    tokenizer_hash: str
    vocab_size: int
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Loss of a model over a set of instances. A mean is None if no instance was scored for it.

    Attributes:
        nats_per_token: the token mean: sum of -log p over the number of tokens.
        nats_per_instance_mean: mean over texts (held-out instances, external documents) of their nats per token.
        official_loss: the official mean of instance means: as the mean above, but over instances of at most one
            training sequence, with nothing in front of a text, and without the predictions from a separator. The loss
            of the paper's tables.
        bits_per_byte: sum of -log2 p over the number of bytes; the only one that compares tokenizers.
        n_instances, n_tokens, n_bytes: texts, tokens and bytes that were scored for the three others.
    """

    nats_per_token: float | None
    nats_per_instance_mean: float | None
    official_loss: float | None
    bits_per_byte: float | None
    n_instances: int
    n_tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetEvaluation(TextLoss):
    """Loss of a model on one set of texts.

    Attributes:
        location: path or URI of the texts, without secrets.
        version: version of a Delta table; None for files.
        by_source: the same loss for each source.
        failed: number of instances that could not be scored, by reason.
        bad_rows: number of rows without a usable text, by reason.
        fingerprint: hash of the method, the model's revision and the texts.
    """

    location: str
    version: int | None
    by_source: dict[str, TextLoss]
    failed: dict[str, int]
    bad_rows: dict[str, int]
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Score of a model on one task of lm-eval.

    Attributes:
        metric: `acc_norm` where the task has it, else `acc`.
        value: share of right answers, 0 to 1.
        stderr: standard error of `value`; None for a single question.
        n_questions: number of questions.
        version: version of the task's definition.
    """

    metric: str
    value: float
    stderr: float | None
    n_questions: int
    version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """Scores of a model on tasks, without examples in the prompt (zero-shot).

    Attributes:
        scores: by name of the task.
        average: mean of the values.
        lm_eval_version: version of the library.
        fingerprint: hash of the method, the model's revision, the tasks and the library's version.
    """

    scores: dict[str, TaskScore]
    average: float
    lm_eval_version: str
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluation.json`.

    Attributes:
        sets: by name; `heldout` is the experiment's own held-out text.
        tasks: None if the config names no task.
        run_id: MLflow run that has these numbers; None until they are logged.
    """

    sets: dict[str, SetEvaluation]
    tasks: TaskEvaluation | None = None
    run_id: str | None = None


def read_training_in(folder: str) -> TrainingRecord | None:
    """Returns `training.json` of a model folder; None if it has none.

    Args:
        folder: path or URI of the folder.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    return from_json(TrainingRecord, storage.read_json(storage.join(folder, TRAINING_FILE)))


def read_training(config: ExperimentConfig, name: str) -> TrainingRecord | None:
    """Returns `training.json` of the model `name`; None if it is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    return read_training_in(config.layout.model(name))


def read_tokenizer_record(folder_uri: str) -> TokenizerRecord | None:
    """Returns `miniplm.json` of a tokenizer folder; None if it is absent.

    Args:
        folder_uri: URI of the folder.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    return from_json(TokenizerRecord, storage.read_json(storage.join(folder_uri, TOKENIZER_RECORD_FILE)))


def read_evaluation(config: ExperimentConfig, name: str) -> Evaluation | None:
    """Returns `evaluation.json` of the model `name`; None if it is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    raw = storage.read_json(config.layout.model(name, EVALUATION_FILE))
    if not isinstance(raw, dict) or not isinstance(raw.get("sets"), dict):
        return None
    # A set or the tasks of an earlier version are evaluated again; the others stay.
    sets = {name: each for name, value in raw["sets"].items() if (each := from_json(SetEvaluation, value)) is not None}
    return Evaluation(sets=sets, tasks=from_json(TaskEvaluation, raw.get("tasks")), run_id=raw.get("run_id"))
