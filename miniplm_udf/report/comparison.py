"""Students × metrics: the trainings of one or several experiments, with the spread over seeds. Driver only; no Spark.

Inputs: `<root>/models/<student>/training.json` and `evaluation.json`, or the finished runs of an MLflow experiment.
Outputs: one row for all trainings that differ in nothing but the seed, and the address of MLflow's page that compares
their runs. Losses in bits per byte, accuracies from 0 to 1, compute in FLOP: 6 x parameters x tokens for
a student, and 2 x parameters x tokens for its teacher. Reads only, so a retry repeats it.
"""

import dataclasses
import json
import logging
import os
import re
import statistics
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.config.rules import is_baseline_corpus
from miniplm_udf.errors import CorpusError, MiniplmError, first_line, mlflow_errors
from miniplm_udf.report.baselines import Difference, is_small, setting_without_corpus, with_baselines
from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import Evaluation, TrainingRecord, read_evaluation, read_training

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOGGER = logging.getLogger("miniplm.compare")

BITS_PER_BYTE = "heldout_bits_per_byte"
AVERAGE = "tasks/average"
# The address of `mlflow ui`, for a store that is a file.
LOCAL_SERVER = "http://127.0.0.1:5000"
_SEED = "train.seed"
# The text that a reference is trained on, in the lineage of its packed table.
_REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """One training of a student.

    Attributes:
        name: the student, which is also the name of its MLflow run.
        setting: what the training was told, without its seed: trainings with one setting differ in the seed alone.
        seed: its seed; None if it is not known.
        corpus, corpus_version: the corpus and its version; None for other text.
        tokenizer: name of the tokenizer.
        steps, tokens: optimiser steps, and input tokens, counted again in each epoch.
        flop: training compute.
        metrics: by the name that MLflow has for it; those that were measured.
        setting_without_corpus: the result of `baselines.setting_without_corpus` without the seed; None if the config
            does not declare the student.
        is_baseline: whether its corpus is a random choice or the whole of the candidates.
        heldout_location: the held-out texts; None if the student was not evaluated on them. `heldout_tokens`: their
            tokens.
        run_id: the MLflow run; None without one.
    """

    name: str
    setting: str
    seed: int | None
    corpus: str | None
    corpus_version: int | None
    tokenizer: str
    steps: int
    tokens: int
    flop: float
    metrics: dict[str, float]
    run_id: str | None
    setting_without_corpus: str | None = None
    is_baseline: bool = False
    heldout_location: str | None = None
    heldout_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean of a metric over `n` trainings, and their standard deviation; None for a single training."""

    mean: float
    deviation: float | None
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedStudent:
    """The trainings of one setting.

    Attributes:
        name: the student; for students that differ in their seeds, the beginning that their names share.
        trainings: the names of the trainings; `seeds`: their seeds, as far as known.
        corpus, tokenizer, steps, tokens, flop: as in `Trained`.
        corpus_versions: versions of the corpus; more than one: the trainings read different text.
        metrics: by name.
        run_ids: MLflow runs.
        difference: the difference of the means to the baseline; None without a baseline.
    """

    name: str
    trainings: list[str]
    seeds: list[int]
    corpus: str | None
    corpus_versions: list[int]
    tokenizer: str
    steps: int
    tokens: int
    flop: float
    metrics: dict[str, Spread]
    run_ids: list[str]
    difference: Difference | None = None


def trainings_of_experiment(config: ExperimentConfig) -> list[Trained]:
    """Returns the trained students of a config; without students in it, those whose folders the root has.

    Args:
        config: the experiment.
    """
    names = list(config.students) or storage.list_folder(config.layout.model(""))
    records = {name: read_training(config, name) for name in names}
    return [
        _trained(config, name, record)
        for name, record in records.items()
        if record is not None and (name in config.students or (record.lineage or {}).get("corpus") != _REFERENCE)
    ]


def _trained(config: ExperimentConfig, name: str, record: TrainingRecord) -> Trained:
    student = config.students.get(name)
    lineage = record.lineage or {}
    corpus = student.corpus if student else lineage.get("corpus")
    setting: Json = {"name": name, "steps": record.steps, "tokens": record.tokens}
    if student is not None:
        setting = to_dict(student)
        del setting["train"]["seed"]
        setting["chosen"] = to_dict(config.refine.corpora[student.corpus]) if corpus in config.refine.corpora else None
    evaluation = read_evaluation(config, name)
    heldout = evaluation.sets.get(HELDOUT) if evaluation else None
    teacher = int((record.kd_teacher or {}).get("n_parameters") or 0)
    return Trained(
        name=name, setting=json.dumps(setting, sort_keys=True, default=str),
        seed=student.train.seed if student else None, corpus=corpus, corpus_version=lineage.get("refined_version"),
        tokenizer=record.tokenizer, steps=record.steps, tokens=record.tokens,
        flop=training_flop(record.n_parameters, teacher, record.tokens),
        metrics=_metrics(evaluation), run_id=record.run_id,
        setting_without_corpus=setting_without_corpus(student, with_seed=False) if student else None,
        is_baseline=student is not None and is_baseline_corpus(config.refine.corpora, student.corpus),
        heldout_location=heldout.location if heldout else None, heldout_tokens=heldout.n_tokens if heldout else 0,
    )  # fmt: skip


def training_flop(n_parameters: int, teacher_parameters: int, tokens: int) -> float:
    """Returns the compute of a training in FLOP: both passes of the student, and the forward pass of a teacher.

    Args:
        n_parameters: number of the student's weights.
        teacher_parameters: number of the teacher's weights; 0 without one.
        tokens: input tokens.
    """
    return float((6 * n_parameters + 2 * teacher_parameters) * tokens)


def _metrics(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    values = {
        (BITS_PER_BYTE if name == HELDOUT else f"evaluate/{name}/bits_per_byte"): loss.bits_per_byte
        for name, loss in evaluation.sets.items()
    }
    if evaluation.tasks:
        values |= {f"tasks/{name}": score.value for name, score in evaluation.tasks.scores.items()}
        values[AVERAGE] = evaluation.tasks.average
    return {name: value for name, value in values.items() if value is not None}


def trainings_in_mlflow(config: ExperimentConfig) -> list[Trained]:
    """Returns the finished trainings in the MLflow experiment of a config.

    Args:
        config: the experiment, with the store and the name of the MLflow experiment.

    Raises:
        CorpusError: there is no such experiment.
        MiniplmError: MLflow cannot be read.
    """
    shown = f"MLflow at {storage.redact(config.mlflow_uri())}"
    client = _client(config)
    try:
        experiment = client.get_experiment_by_name(config.mlflow.experiment) if client else None
        if client is None or experiment is None:
            raise CorpusError(
                f"{shown} has no experiment {config.mlflow.experiment!r}: set mlflow.tracking_uri and mlflow.experiment"
            )
        runs: list[Any] = []
        token: str | None = None
        while token != "":
            page = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", page_token=token)
            runs, token = runs + list(page), page.token or ""
    except mlflow_errors() as error:
        raise MiniplmError(f"{shown} cannot be read: {storage.redact(first_line(error))}") from error
    needed = ("n_parameters", "sequence_length", "train.steps", "train.batch_sequences")
    return [_logged(run) for run in runs if all(key in run.data.params for key in needed)]


def _logged(run: Any) -> Trained:
    """A training from the parameters, tags and metrics of its run."""
    params, tags = run.data.params, run.data.tags
    steps = int(params["train.steps"])
    tokens = steps * int(params["train.batch_sequences"]) * int(params["sequence_length"])
    version, seed = tags.get("refined_version"), params.get(_SEED)
    return Trained(
        name=run.info.run_name,
        setting=json.dumps({key: value for key, value in params.items() if key != _SEED}, sort_keys=True),
        seed=None if seed is None else int(seed), corpus=tags.get("corpus") or params.get("corpus"),
        corpus_version=int(version) if version is not None else None, tokenizer=params.get("tokenizer", "-"),
        steps=steps, tokens=tokens,
        flop=training_flop(int(params["n_parameters"]), int(params.get("kd_teacher.n_parameters") or 0), tokens),
        metrics={
            name: value for name, value in run.data.metrics.items()
            if name == BITS_PER_BYTE or name.startswith("tasks/") or re.fullmatch("evaluate/[^/]+/bits_per_byte", name)
        },
        run_id=run.info.run_id,
    )  # fmt: skip


def compare(trainings: Iterable[Trained]) -> list[ComparedStudent]:
    """Puts the trainings that differ in their seeds together.

    Args:
        trainings: the trainings.

    Returns:
        One entry per setting: the lowest held-out bits per byte first, those without an evaluation last.
    """
    settings: dict[str, list[Trained]] = {}
    for each in trainings:
        settings.setdefault(each.setting, []).append(each)
    groups = list(settings.values())
    evaluated = [group for group in groups if _evaluated(group)]
    pairs = with_baselines(evaluated, setting=_shared_with_baseline, is_baseline=lambda group: group[0].is_baseline)
    differences = {group[0].setting: _difference(group, baseline) for group, baseline in pairs}
    students = [_student(group, differences.get(group[0].setting)) for group in groups]
    return sorted(students, key=lambda student: _mean(student, BITS_PER_BYTE))


def _mean(student: ComparedStudent, metric: str) -> float:
    return student.metrics[metric].mean if metric in student.metrics else float("inf")


def _evaluated(group: Sequence[Trained]) -> list[Trained]:
    return [each for each in group if each.metrics.get(BITS_PER_BYTE)]


def _shared_with_baseline(group: Sequence[Trained]) -> tuple[object, ...] | None:
    """The values that a student and its baseline have in common: the settings, and the texts of their losses."""
    first = group[0]
    if first.setting_without_corpus is None:
        return None
    locations = sorted({str(each.heldout_location) for each in _evaluated(group)})
    return first.setting_without_corpus, first.steps, first.tokens, *locations


def _difference(group: Sequence[Trained], baseline: Sequence[Trained]) -> Difference:
    """The difference of the means of two groups."""
    of_group, of_baseline = _evaluated(group), _evaluated(baseline)
    bits = statistics.fmean(each.metrics[BITS_PER_BYTE] for each in of_group)
    base = statistics.fmean(each.metrics[BITS_PER_BYTE] for each in of_baseline)
    return Difference(
        name=shared_name([each.name for each in group]),
        baseline=shared_name([each.name for each in baseline]),
        bits_per_byte=bits - base,
        relative=bits / base - 1.0,
        is_noise=any(is_small(each.tokens, each.heldout_tokens) for each in (*of_group, *of_baseline)),
    )


def _student(group: Sequence[Trained], difference: Difference | None) -> ComparedStudent:
    first = group[0]
    names = dict.fromkeys(name for each in group for name in each.metrics)
    return ComparedStudent(
        name=shared_name([each.name for each in group]),
        trainings=[each.name for each in group],
        seeds=sorted({each.seed for each in group if each.seed is not None}),
        corpus=first.corpus, tokenizer=first.tokenizer, steps=first.steps, tokens=first.tokens, flop=first.flop,
        corpus_versions=sorted({each.corpus_version for each in group if each.corpus_version is not None}),
        metrics={name: _spread([each.metrics[name] for each in group if name in each.metrics]) for name in names},
        run_ids=[each.run_id for each in group if each.run_id],
        difference=difference,
    )  # fmt: skip


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, n=len(values))


def shared_name(names: Sequence[str]) -> str:
    """Returns a name for students that differ in their seeds: the beginning of their names, without `_seed` or `_s`.

    Args:
        names: names of the students; if nothing is left of them, the first with the number of the others.
    """
    if len(set(names)) == 1:
        return names[0]
    shared = os.path.commonprefix(list(names))  # noqa: RUF071 - of letters, not of folders
    beginning = re.sub(r"[-_.]+(seed|s)?[-_.]*\d*$", "", shared)
    return beginning or f"{names[0]} and {len(set(names)) - 1} more"


def mlflow_page(config: ExperimentConfig, students: Sequence[ComparedStudent]) -> str | None:
    """Returns the address of MLflow's page that compares the students' runs: their metrics, parameters and curves.

    Args:
        config: the experiment, with the store.
        students: the students, in the order of the page.

    Returns:
        The address; None, with a warning where runs were expected, if MLflow has none of the runs.
    """
    run_ids = [run_id for student in students for run_id in student.run_ids]
    client = _client(config) if run_ids else None
    if client is None:
        return None
    experiments: dict[str, str] = {}
    for run_id in run_ids:
        try:
            experiments[run_id] = client.get_run(run_id).info.experiment_id
        except mlflow_errors() as error:
            LOGGER.warning("MLflow has no run %s (%s)", run_id, storage.redact(first_line(error)))
    if not experiments:
        return None
    runs, ids = json.dumps(list(experiments)), json.dumps(sorted(set(experiments.values())))
    uri = config.mlflow_uri()
    base = storage.redact(uri).rstrip("/") if uri.startswith(("http:", "https:")) else LOCAL_SERVER
    return f"{base}/#/compare-runs?runs={urllib.parse.quote(runs)}&experiments={urllib.parse.quote(ids)}"


def _client(config: ExperimentConfig) -> "MlflowClient | None":
    """A client of the store; None where MLflow would create its SQLite file."""
    uri = config.mlflow_uri()
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)
