"""`evaluation.json` of a model folder: losses on sets of texts, and scores on tasks; and their names in MLflow.

Owns the keys, as frozen dataclasses, and reads them; `run` writes them. Other programs read the same file (the report,
the summary), so a key keeps its name and meaning. A file without one of the required keys counts as absent: the model
is then evaluated again. Needs neither torch nor Spark.
"""

import dataclasses
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.storage import Json
from trainer.records import from_json
from trainer.tracking.metric_names import safe_names

EVALUATION_FILE = "evaluation.json"
_LOSSES = ("nats_per_token", "nats_per_instance_mean", "official_loss", "bits_per_byte")


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

    def metrics(self) -> dict[str, float]:
        """The numbers by their names in MLflow.

        Those of the set `heldout` are `heldout_nats_per_token` and so on, those of another set
        `evaluate/NAME/nats_per_token`; bits per byte also by source. Tasks are `tasks/NAME` and `tasks/average`.
        """
        metrics: dict[str, float | None] = {}
        for name, losses in self.sets.items():
            prefix = "heldout_" if name == HELDOUT else f"evaluate/{name}/"
            metrics |= {f"{prefix}{key}": getattr(losses, key) for key in _LOSSES}
            sources = safe_names(losses.by_source)
            for source, loss in losses.by_source.items():
                metrics[f"{prefix}bits_per_byte/{sources[source]}"] = loss.bits_per_byte
        if self.tasks is not None:
            tasks = safe_names(self.tasks.scores)
            metrics |= {f"tasks/{tasks[name]}": score.value for name, score in self.tasks.scores.items()}
            metrics["tasks/average"] = self.tasks.average
        return {name: value for name, value in metrics.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate` for one model: its `evaluation.json`, and whether nothing was left to evaluate."""

    evaluation: Evaluation
    skipped: bool

    def as_json(self) -> Json:
        """The evaluation's keys, and `skipped`."""
        return {**dataclasses.asdict(self.evaluation), "skipped": self.skipped}


def read_evaluation(config: ExperimentConfig, name: str) -> Evaluation | None:
    """Returns the content of `evaluation.json` of the model `name`; None if the file is absent.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    raw = storage.read_json(config.layout.model(name, EVALUATION_FILE))
    evaluation = from_json(Evaluation, raw)
    if evaluation is None:
        return None
    sets = {name: each for name, value in raw["sets"].items() if (each := _set_from_json(value)) is not None}
    return dataclasses.replace(evaluation, sets=sets, tasks=_tasks_from_json(raw.get("tasks")))


def write_evaluation(config: ExperimentConfig, name: str, evaluation: Evaluation) -> None:
    """Replaces `evaluation.json` of the model `name` by an `evaluation`.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.
        evaluation: what the file will hold.
    """
    storage.write_json(config.layout.model(name, EVALUATION_FILE), dataclasses.asdict(evaluation))


def _set_from_json(raw: Any) -> SetEvaluation | None:
    evaluation = from_json(SetEvaluation, raw)
    if evaluation is None:
        return None
    losses = {source: from_json(TextLoss, value) for source, value in raw["by_source"].items()}
    by_source = {source: loss for source, loss in losses.items() if loss is not None}
    return dataclasses.replace(evaluation, by_source=by_source) if len(by_source) == len(losses) else None


def _tasks_from_json(raw: Any) -> TaskEvaluation | None:
    evaluation = from_json(TaskEvaluation, raw)
    if evaluation is None:
        return None
    scores = {name: from_json(TaskScore, value) for name, value in raw["scores"].items()}
    whole = {name: score for name, score in scores.items() if score is not None}
    return dataclasses.replace(evaluation, scores=whole) if len(whole) == len(scores) else None
