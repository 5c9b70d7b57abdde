"""Reads the points of a scaling law from MLflow: the compute and the loss of the finished runs of each student.

Inputs: the experiment's MLflow store, and the names of its students, which are the names of their runs. Output: a
`StudentRuns` for each student. The trainer logs no compute; it follows from what the trainer does log:

    compute = (6 * n_parameters + 2 * kd_teacher.n_parameters) * steps * train.batch_sequences * sequence_length

in FLOP: forward and backward pass of the student, and with a teacher (Vanilla KD) the teacher's forward pass.
Products of attention are not counted. Two students of one architecture without a teacher have the same compute per
token, so the ratio of their compute does not depend on this formula. Reads only; creates no store and no experiment.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError, MiniplmError, first_line, mlflow_errors
from trainer.scaling.laws import LossCurve

LOGGER = logging.getLogger("miniplm.trainer.scaling_runs")

FLOP_PER_PARAMETER_AND_TOKEN = 6
FLOP_PER_TEACHER_PARAMETER_AND_TOKEN = 2  # a forward pass
_TEACHER_SIZE = "kd_teacher.n_parameters"
# The points of a long curve are means of neighbours: a mean scatters less, and late steps do not outweigh early steps.
_POINTS_PER_CURVE = 40
_NEEDED = ("n_parameters", "sequence_length", "train.steps", "train.batch_sequences", "train.warmup_steps", "corpus",
           "tokenizer")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentRuns:
    """The finished runs of one student that have the loss.

    Attributes:
        name: the student.
        n_parameters: number of its weights.
        teacher_parameters: number of the weights of its teacher; 0 without a teacher.
        tokenizer: name of its tokenizer.
        text: the text of the losses: the fingerprint of the held-out text, or the name of the training corpus.
        run_ids: ids of the MLflow runs, the oldest first.
        curves: the points of each run.
    """

    name: str
    n_parameters: int
    teacher_parameters: int
    tokenizer: str
    text: str
    run_ids: tuple[str, ...]
    curves: tuple[LossCurve, ...]

    def flop(self, tokens: float) -> float:
        """Returns the compute of a training of this student, in FLOP.

        Args:
            tokens: input tokens, counted again in each epoch.
        """
        return _flop_per_token(self.n_parameters, self.teacher_parameters) * tokens

    def tokens(self, compute_flop: float) -> float:
        """Returns the input tokens of a training of this student.

        Args:
            compute_flop: training compute in FLOP.
        """
        return compute_flop / _flop_per_token(self.n_parameters, self.teacher_parameters)


def _flop_per_token(n_parameters: int, teacher_parameters: int) -> float:
    student = FLOP_PER_PARAMETER_AND_TOKEN * n_parameters
    return float(student + FLOP_PER_TEACHER_PARAMETER_AND_TOKEN * teacher_parameters)


def read_runs(config: ExperimentConfig, names: list[str], metric: str) -> dict[str, StudentRuns]:
    """Reads the finished runs of students.

    A metric with one value (the held-out losses) gives one point per run, at the end of the training. A metric that is
    logged during the training (`train_loss`) gives a curve per run: the steps after the warm-up, as means over at most
    40 parts of equal width in log compute.

    Args:
        config: the experiment, with the store.
        names: the students.
        metric: name of the metric in MLflow.

    Returns:
        The runs by student, in the order of `names`.

    Raises:
        CorpusError: there is no store or no experiment, a student has no finished run with the metric, or its runs
            differ in size, in tokenizer or in the text of the loss.
        MiniplmError: MLflow cannot be read.
    """
    try:
        client, experiment_id = _open(config)
        return {name: _student(client, experiment_id, name, metric) for name in names}
    except mlflow_errors() as error:
        shown = storage.redact(first_line(error))
        raise MiniplmError(f"MLflow at {storage.redact(config.mlflow_uri())} cannot be read: {shown}") from error


def _open(config: ExperimentConfig) -> tuple[Any, str]:
    """A client of the store, and the id of the experiment in it."""
    uri = config.mlflow_uri()
    # MLflow would create an SQLite file that is missing.
    is_missing = uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///"))
    experiment = None
    if not is_missing:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(config.mlflow.experiment)
    if experiment is None:
        raise CorpusError(
            f"MLflow at {storage.redact(uri)} has no experiment {config.mlflow.experiment!r}: train and evaluate the "
            "students first, or set mlflow.tracking_uri and mlflow.experiment"
        )
    return client, experiment.experiment_id


def _student(client: Any, experiment_id: str, name: str, metric: str) -> StudentRuns:
    runs, curves = [], []
    for run in _finished(client, experiment_id, name):
        if missing := [key for key in _NEEDED if key not in run.data.params]:
            LOGGER.warning("%s: run %s has no parameter %s: not used", name, run.info.run_id, ", ".join(missing))
            continue
        curve = _curve(run, client.get_metric_history(run.info.run_id, metric))
        if curve is None:
            LOGGER.warning("%s: run %s has no metric %s: not used", name, run.info.run_id, metric)
            continue
        runs.append(run)
        curves.append(curve)
    if not runs:
        raise CorpusError(
            f"student {name!r}: expected finished runs with the metric {metric!r}, found none: run "
            f"`python -m trainer train --student {name}` and `python -m trainer evaluate`, or name another --metric"
        )
    return StudentRuns(
        name=name,
        n_parameters=int(_common(name, "n_parameters", [run.data.params["n_parameters"] for run in runs])),
        teacher_parameters=int(
            _common(name, "size of the teacher", [run.data.params.get(_TEACHER_SIZE, "0") for run in runs])
        ),
        tokenizer=_common(name, "tokenizer", [run.data.params["tokenizer"] for run in runs]),
        text=_common(name, "text of the loss", [_text(run, metric) for run in runs]),
        run_ids=tuple(run.info.run_id for run in runs),
        curves=tuple(curves),
    )


def _common(name: str, what: str, values: list[str]) -> str:
    """The value that all runs of a student share."""
    distinct = sorted(set(values))
    if len(distinct) > 1:
        raise CorpusError(
            f"student {name!r}: expected runs with one {what}, found {' and '.join(distinct)}: a law holds for one "
            "model and one text; delete the other runs in MLflow, or use another mlflow.experiment"
        )
    return distinct[0]


def _text(run: Any, metric: str) -> str:
    """The text on which a run's metric was computed."""
    if metric.startswith("heldout"):
        return f"held-out text {run.data.tags.get('heldout_fingerprint', 'without a fingerprint')}"
    if metric.startswith("evaluate/"):
        name = metric.split("/")[1]
        return f"external text {run.data.tags.get(f'{name}_fingerprint', 'without a fingerprint')}"
    return f"corpus {run.data.params['corpus']}"


def _finished(client: Any, experiment_id: str, name: str) -> Iterator[Any]:
    """The finished runs of a student, the oldest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            f"attributes.run_name = '{name}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _curve(run: Any, history: list[Any]) -> LossCurve | None:
    """The points of a run; None if it has no loss after the warm-up."""
    params = run.data.params
    # A step may be logged twice: by a resumed training, or by a second evaluation. The later value counts.
    by_step = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
    if set(by_step) == {0}:  # a value without a step, of the trained model
        by_step = {int(params["train.steps"]): by_step[0]}
    else:
        by_step = {step: value for step, value in by_step.items() if step > int(params["train.warmup_steps"])}
    if not by_step:
        return None
    tokens_a_step = int(params["train.batch_sequences"]) * int(params["sequence_length"])
    flop_a_step = _flop_per_token(int(params["n_parameters"]), int(params.get(_TEACHER_SIZE, "0"))) * tokens_a_step
    steps = np.array(sorted(by_step))
    losses = np.array([by_step[step] for step in steps])
    flop, means = _thinned(steps * flop_a_step, losses)
    return LossCurve(compute_flop=tuple(flop.tolist()), loss=tuple(means.tolist()))


def _thinned(compute_flop: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means of compute and loss over parts of equal width in log compute.

    Args:
        compute_flop, loss: points, ascending in compute, shape (n,).

    Returns:
        The same two arrays with at most `_POINTS_PER_CURVE` points; unchanged if there are no more than that.
    """
    if len(compute_flop) <= _POINTS_PER_CURVE:
        return compute_flop, loss
    log_compute, log_loss = np.log(compute_flop), np.log(loss)
    edges = np.linspace(log_compute[0], log_compute[-1], _POINTS_PER_CURVE + 1)
    part = np.clip(np.searchsorted(edges, log_compute, side="right") - 1, 0, _POINTS_PER_CURVE - 1)
    counts = np.bincount(part, minlength=_POINTS_PER_CURVE)
    filled = counts > 0
    means = [
        np.bincount(part, values, _POINTS_PER_CURVE)[filled] / counts[filled] for values in (log_compute, log_loss)
    ]
    return np.exp(means[0]), np.exp(means[1])
