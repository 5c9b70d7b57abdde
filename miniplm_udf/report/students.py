"""The report's facts about trained students: records, curves from MLflow, and differences. Driver only.

Inputs: `<root>/models/<student>/training.json` and `evaluation.json`, which the trainer writes, and the metric history
`train_loss` of the run that training.json names. Losses are nats per token or bits per byte. Also owns the MLflow run
"comparison", which holds the report and the summary as artifacts: a rerun replaces them in the same run. Loads neither
torch nor the trainer, and needs no Spark.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT, task_columns
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.rules import is_baseline_corpus, is_random_corpus
from miniplm_udf.errors import mlflow_errors
from miniplm_udf.report.baselines import Difference, is_small, setting_without_corpus, with_baselines
from miniplm_udf.report.summary import PipelineSummary
from miniplm_udf.store.model_records import (
    Evaluation,
    SetEvaluation,
    TaskScore,
    TrainingRecord,
    read_evaluation,
    read_training,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGER = logging.getLogger("miniplm.report")

COMPARISON_RUN = "comparison"
ROOT_TAG = "miniplm_root"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentFacts:
    """One trained student.

    Attributes:
        name, corpus, tokenizer: names of the student, its corpus and its tokenizer in the config.
        is_random: whether its corpus is a random choice.
        is_baseline: whether its corpus is a random choice or the whole of the candidates.
        setting: its settings except the corpus: the result of `baselines.setting_without_corpus`.
        training: its `training.json`.
        evaluation: its `evaluation.json`; None if the student was not evaluated.
        curve: (step, train_loss in nats per token), empty if MLflow has none.
    """

    name: str
    corpus: str
    tokenizer: str
    is_random: bool
    is_baseline: bool
    setting: str
    training: TrainingRecord
    evaluation: Evaluation | None
    curve: list[tuple[int, float]]

    @property
    def sets(self) -> dict[str, SetEvaluation]:
        """Losses by set of texts; empty if the student was not evaluated."""
        return self.evaluation.sets if self.evaluation else {}

    @property
    def heldout(self) -> SetEvaluation | None:
        """Losses on the experiment's held-out text; None if the student was not evaluated on it."""
        return self.sets.get(HELDOUT)

    @property
    def task_scores(self) -> dict[str, TaskScore]:
        """Scores by task; empty without any."""
        return self.evaluation.tasks.scores if self.evaluation and self.evaluation.tasks else {}

    @property
    def bits_per_byte(self) -> float | None:
        """Held-out bits per byte over all sources; None if the student was not evaluated."""
        return self.heldout.bits_per_byte if self.heldout else None

    @property
    def corpus_version(self) -> int | None:
        """Version of the refined corpus that the student was trained on; None for other text."""
        return (self.training.lineage or {}).get("refined_version")

    def source_bits_per_byte(self, source: str) -> float | None:
        """Returns the held-out bits per byte of one source; None if the student was not evaluated on it.

        Args:
            source: name of the source.
        """
        loss = self.heldout.by_source.get(source) if self.heldout else None
        return loss.bits_per_byte if loss else None


def students(config: ExperimentConfig) -> list[StudentFacts]:
    """Returns the records of the trained students of the config, in its order.

    Args:
        config: the experiment.
    """
    facts = []
    for name, student in config.students.items():
        training = read_training(config, name)
        if training is None:
            continue
        facts.append(
            StudentFacts(
                name=name,
                corpus=student.corpus,
                tokenizer=student.tokenizer,
                is_random=is_random_corpus(config.refine.corpora, student.corpus),
                is_baseline=is_baseline_corpus(config.refine.corpora, student.corpus),
                setting=setting_without_corpus(student, with_seed=True),
                training=training,
                evaluation=read_evaluation(config, name),
                curve=_curve(config, training.run_id),
            )
        )
    return facts


def sources(students: Sequence[StudentFacts]) -> list[str]:
    """Returns every source that any student was evaluated on, sorted.

    Args:
        students: the result of `students`.
    """
    return sorted({source for student in students if student.heldout for source in student.heldout.by_source})


def external_sets(students: Sequence[StudentFacts]) -> list[str]:
    """Returns every external set of texts that any student was evaluated on, in the order of the records.

    Args:
        students: the result of `students`.
    """
    return list(dict.fromkeys(name for student in students for name in student.sets if name != HELDOUT))


def tasks(students: Sequence[StudentFacts]) -> dict[str, str]:
    """Returns every task that any student was evaluated on: the paper's tasks first, in its order.

    Args:
        students: the result of `students`.

    Returns:
        The name of the task's column, by name of the task.
    """
    return task_columns(task for student in students for task in student.task_scores)


def differences(students: Sequence[StudentFacts]) -> list[Difference]:
    """Compares every evaluated student with the student that differs in the corpus only and has a random or whole one.

    Args:
        students: the result of `students`.

    Returns:
        One difference per evaluated student that has an evaluated baseline, in the order of the students.
    """
    pairs = with_baselines(
        [student for student in students if student.bits_per_byte],
        setting=lambda student: (student.setting, student.training.tokens),
        is_baseline=lambda student: student.is_baseline,
    )
    return [_difference(student, baseline) for student, baseline in pairs]


def _difference(student: StudentFacts, baseline: StudentFacts) -> Difference:
    bits, base = student.bits_per_byte or 0.0, baseline.bits_per_byte or 0.0
    return Difference(
        name=student.name,
        baseline=baseline.name,
        bits_per_byte=bits - base,
        relative=bits / base - 1.0,
        is_noise=_is_small(student) or _is_small(baseline),
    )


def _is_small(student: StudentFacts) -> bool:
    return is_small(student.training.tokens, student.heldout.n_tokens if student.heldout else 0)


def _client(config: ExperimentConfig) -> "MlflowClient":
    """A separate client, because `mlflow.set_tracking_uri` would change the whole process and its environment."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # they log every step of making a new SQLite file
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = config.mlflow_uri()
    if uri.startswith("sqlite:"):
        config.local_folder().mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _curve(config: ExperimentConfig, run_id: str | None) -> list[tuple[int, float]]:
    if not run_id:
        return []
    try:
        history = _client(config).get_metric_history(run_id, "train_loss")
    except mlflow_errors() as error:
        LOGGER.warning("no training curve: MLflow has no run %s (%s)", run_id, str(error).splitlines()[0])
        return []
    # A resumed run logs some steps twice; the later value belongs to the training that led to the final weights.
    return sorted({point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}.items())


def log_comparison(config: ExperimentConfig, page: str, summary: PipelineSummary) -> str | None:
    """Puts the report and the summary into MLflow, as artifacts of the run "comparison" of this root.

    Args:
        config: the experiment.
        page: the text of report.html.
        summary: summary of the pipeline.

    Returns:
        The id of the run; None, with a warning, if MLflow refuses. The report is written anyway.
    """
    try:
        client = _client(config)
        run_id = _comparison_run(client, config)
        client.log_text(run_id, page, "report.html")
        client.log_dict(run_id, summary, "summary.json")
        client.set_terminated(run_id)
    except mlflow_errors() as error:
        LOGGER.warning("the report is not in MLflow (%s)", storage.redact(str(error).splitlines()[0]))
        return None
    return run_id


def _comparison_run(client: "MlflowClient", config: ExperimentConfig) -> str:
    experiment = client.get_experiment_by_name(config.mlflow.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(config.mlflow.experiment, artifact_location=config.artifact_uri())
    else:
        experiment_id = experiment.experiment_id
    root = storage.redact(config.root)
    for run in client.search_runs([experiment_id], f"attributes.run_name = '{COMPARISON_RUN}'"):
        if run.data.tags.get(ROOT_TAG) == root:
            return str(run.info.run_id)
    return str(client.create_run(experiment_id, run_name=COMPARISON_RUN, tags={ROOT_TAG: root}).info.run_id)
