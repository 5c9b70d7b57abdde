"""The result of an evaluation, how `evaluation.json` is written, and the names of its numbers in MLflow.

The file's keys are declared in `miniplm_udf.store.model_records`; `run` fills them in. Needs neither torch nor Spark.
"""

import dataclasses

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.layout import EVALUATION_FILE
from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import Evaluation
from trainer.tracking.metric_names import safe_names

_LOSSES = ("nats_per_token", "nats_per_instance_mean", "official_loss", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate` for one model: its `evaluation.json`, and whether nothing was left to evaluate."""

    evaluation: Evaluation
    skipped: bool

    def as_json(self) -> Json:
        """The evaluation's keys, and `skipped`."""
        return {**dataclasses.asdict(self.evaluation), "skipped": self.skipped}


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Returns the numbers of an `evaluation` by their names in MLflow.

    Those of the set `heldout` are `heldout_nats_per_token` and so on, those of another set
    `evaluate/NAME/nats_per_token`; bits per byte also by source. Tasks are `tasks/NAME` and `tasks/average`.
    """
    values: dict[str, float | None] = {}
    for name, losses in evaluation.sets.items():
        prefix = "heldout_" if name == HELDOUT else f"evaluate/{name}/"
        values |= {f"{prefix}{key}": getattr(losses, key) for key in _LOSSES}
        sources = safe_names(losses.by_source)
        for source, loss in losses.by_source.items():
            values[f"{prefix}bits_per_byte/{sources[source]}"] = loss.bits_per_byte
    if evaluation.tasks is not None:
        tasks = safe_names(evaluation.tasks.scores)
        values |= {f"tasks/{tasks[name]}": score.value for name, score in evaluation.tasks.scores.items()}
        values["tasks/average"] = evaluation.tasks.average
    return {name: value for name, value in values.items() if value is not None}


def write_evaluation(config: ExperimentConfig, name: str, evaluation: Evaluation) -> None:
    """Replaces `evaluation.json` of the model `name` by an `evaluation`.

    Args:
        config: the experiment.
        name: the student, or the alias of the reference.
        evaluation: what the file will hold.
    """
    storage.write_json(config.layout.model(name, EVALUATION_FILE), dataclasses.asdict(evaluation))
