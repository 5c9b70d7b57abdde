"""Evaluates trained models: losses on sets of texts (`losses`), scores on tasks (`tasks`).

Reads held-out rows of `instances`, external sets (`evaluate.inputs`), tasks (`evaluate.tasks`), and the folders
`<root>/models/<name>/`. Writes `evaluation.json` there after each set and after the tasks, and the same numbers to the
model's MLflow run. A part that exists for the same weights, texts and settings is skipped, so a killed evaluation
continues with the next set. Runs in one process; a lease makes sure that it runs once at a time.
"""

import dataclasses
import logging
from collections.abc import Sequence

from miniplm_udf import storage
from miniplm_udf.config.evaluate import HELDOUT
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.targets import Target
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.lease import Lease
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_log
from miniplm_udf.store.model_records import Evaluation, TrainingRecord, read_evaluation, read_training
from trainer.evaluation.losses import EvaluatedModel
from trainer.evaluation.records import EvaluateResult, metrics, write_evaluation
from trainer.evaluation.tasks import Tasks
from trainer.evaluation.texts import EvaluationSet, evaluation_sets, external_sets, heldout_set
from trainer.tracking.callbacks import callbacks_of, require_packages
from trainer.tracking.run import tracked_run

LOGGER = logging.getLogger("miniplm.trainer.evaluation")


def evaluate(config: ExperimentConfig, targets: Sequence[Target]) -> dict[str, EvaluateResult]:
    """Evaluates models.

    Args:
        config: the experiment.
        targets: the models, from `miniplm_udf.config.targets`.

    Returns:
        The result of each model, by name.

    Raises:
        ConfigError: the config names nothing to evaluate on; an external set or a task is missing or wrong; or lm-eval
            or the package of a configured tracker is not installed.
        CorpusError: there is no held-out text, or a model is not trained yet.
    """
    _require_something(config)
    require_packages(config)
    trainings = [(target, _training(config, target)) for target in targets]
    tasks = Tasks(config) if config.evaluate.tasks else None
    # A second process waits for the first one, and then skips every model.
    with Lease(config.layout.lease("evaluate"), "evaluate", waits=True, what="evaluation"):
        sets = evaluation_sets(config)
        return {target.name: _evaluate_model(config, target, training, sets, tasks) for target, training in trainings}


def plan(config: ExperimentConfig, targets: Sequence[Target]) -> Json:
    """Returns the plan of `evaluate` for a dry run; writes nothing.

    Args:
        config: the experiment.
        targets: the models.

    Returns:
        `models`, `waits_for_training` (models without a training), `sets` (the location of each set) and `tasks`; with
        held-out text also `heldout_instances` and `heldout_bytes`, or `status` if there is no table yet.

    Raises:
        ConfigError: the config names nothing to evaluate on, or an external set is missing or lacks the text column.
        CorpusError: the first file of an external set cannot be read.
    """
    _require_something(config)
    names = [target.name for target in targets]
    trained = [name for name in names if storage.exists(config.layout.model(name, TRAINING_FILE))]
    facts: Json = {
        "models": names,
        "waits_for_training": [name for name in names if name not in trained],
        "sets": {each.name: each.location for each in external_sets(config)},
        "tasks": config.evaluate.task_names,
    }
    if config.ingest.split.heldout <= 0:
        return facts
    facts["sets"] = {HELDOUT: storage.redact(config.layout.table("instances")), **facts["sets"]}
    if not delta_log.has_commits(config.layout.table("instances")):
        return {**facts, "status": "waits for the ingest stage"}
    heldout = heldout_set(config)
    return {**facts, "heldout_instances": sum(1 for _ in heldout.rows()), "heldout_bytes": heldout.n_bytes}


def _require_something(config: ExperimentConfig) -> None:
    if config.ingest.split.heldout <= 0 and not config.evaluate.inputs and not config.evaluate.tasks:
        raise ConfigError(
            "evaluate: expected something to evaluate on, found none; set evaluate.inputs or evaluate.tasks, or an "
            "ingest.split.heldout above 0 (and ingest into a new root)"
        )


def _training(config: ExperimentConfig, target: Target) -> TrainingRecord:
    """The record of a trained model.

    Raises:
        CorpusError: the model is not trained.
    """
    training = read_training(config, target.name)
    if training is None:
        option = "--reference" if target.frozen else f"--student {target.name}"
        raise CorpusError(
            f"no trained model at {storage.redact(config.layout.model(target.name))} (expected a {TRAINING_FILE} with "
            f"all keys): run `python -m trainer train {option}` first"
        )
    return training


def _evaluate_model(
    config: ExperimentConfig,
    target: Target,
    training: TrainingRecord,
    sets: Sequence[EvaluationSet],
    tasks: Tasks | None,
) -> EvaluateResult:
    """Evaluates one model on the parts that its `evaluation.json` lacks, and writes the file after each part."""
    if training.config_fingerprint != target.config_fingerprint():
        LOGGER.warning(
            "%s is trained with other settings than the config's (%d steps): these numbers are of that model; train it "
            "again for numbers of this config",
            target.name,
            training.steps,
        )
    model = EvaluatedModel(config, target, config.layout.model(target.name), training.sequence_length)
    previous = read_evaluation(config, target.name) or Evaluation(sets={})
    done = _unchanged(previous, model, sets, tasks)
    if tasks is not None and done.tasks is None:
        tasks.load()  # a wrong task is refused before the sets are scored
    for texts in sets:
        if texts.name not in done.sets:
            scored = {**done.sets, texts.name: model.score(texts)}
            in_order = {each.name: scored[each.name] for each in sets if each.name in scored}
            done = dataclasses.replace(done, sets=in_order, run_id=None)
            # The file comes first: it has the true names of the sources, and does not depend on MLflow.
            write_evaluation(config, target.name, done)
    if tasks is not None and done.tasks is None:
        done = dataclasses.replace(done, tasks=tasks.evaluate(model, training.sequence_length), run_id=None)
        write_evaluation(config, target.name, done)
    skipped = done == previous
    if skipped:
        LOGGER.info("%s is already evaluated on these texts and tasks: skipped", target.name)
    if done.run_id is None:
        done = _log(config, target, training, done, sets)
    if done != previous:
        write_evaluation(config, target.name, done)
    return EvaluateResult(done, skipped)


def _unchanged(
    previous: Evaluation, model: EvaluatedModel, sets: Sequence[EvaluationSet], tasks: Tasks | None
) -> Evaluation:
    """The parts of an evaluation that need not be done again; an MLflow run has them if it had all parts before."""
    kept = {
        texts.name: previous.sets[texts.name]
        for texts in sets
        if texts.name in previous.sets and previous.sets[texts.name].fingerprint == model.fingerprint_of(texts)
    }
    scores = previous.tasks
    if scores is None or tasks is None or scores.fingerprint != tasks.fingerprint_of(model):
        scores = None
    return dataclasses.replace(previous, sets=kept, tasks=scores)


def _log(
    config: ExperimentConfig,
    target: Target,
    training: TrainingRecord,
    evaluation: Evaluation,
    sets: Sequence[EvaluationSet],
) -> Evaluation:
    """Logs an evaluation to the model's MLflow run, and returns it with the id of this run."""
    tags = {f"{each.name}_fingerprint": each.fingerprint for each in sets}
    tags |= {f"{each.name}_version": str(each.version) for each in sets if each.version is not None}
    if evaluation.tasks is not None:
        tags |= {"lm_eval_version": evaluation.tasks.lm_eval_version, "lm_eval_num_fewshot": "0"}
        tags |= {f"task_version/{name}": score.version for name, score in evaluation.tasks.scores.items()}
    callbacks = callbacks_of(config, target.name, training.tracking_id, training.steps)
    with tracked_run(config, target.name, training.run_id, callbacks) as run:
        callbacks.on_start({}, tags)
        run.log_metrics(metrics(evaluation))
        run.set_tags(tags)
        return dataclasses.replace(evaluation, run_id=run.run_id)
