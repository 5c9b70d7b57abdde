"""Trains one model: reads a packed table and a tokenizer, writes a model folder and an MLflow run.

Reads the newest version of `<root>/tables/packed/<corpus>/<tokenizer>`, and `<root>/models/tokenizer_<tokenizer>/`.
Writes checkpoints during training, and at the end the whole folder `<root>/models/<name>/` (config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, training.json). A finished model is skipped while its config,
data and tokenizer are unchanged; a finished reference is always skipped. A killed training resumes from its last
checkpoint in the same MLflow run, on any number of ranks; with one process, the weights are bit for bit the same as
without the kill. Under torchrun only rank 0 writes, and all ranks first check that they see the same data. A lease
makes sure that only one process (or one torchrun) trains a model at a time.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import torch

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.targets import Target
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.layout import TOKENIZER_RECORD_FILE
from miniplm_udf.lease import Lease
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_log
from miniplm_udf.store.model_records import read_training
from trainer.loader.data import PackedSequences, read_tokenizer
from trainer.models.flops import equal_compute_steps
from trainer.models.model import build_model, model_config, n_parameters
from trainer.models.teacher_loading import teacher_record
from trainer.preparation import Training, TrainingInputs, open_inputs, prepare
from trainer.ranks.distributed import World, process_group
from trainer.ranks.state import gather_weights
from trainer.records import TrainResult
from trainer.results.model_folder import set_run, write_model
from trainer.tracking.callbacks import callbacks_of, require_packages
from trainer.tracking.environment import start_files, start_tags
from trainer.tracking.run import Run, tracked_run
from trainer.training import record_run, run_steps

LOGGER = logging.getLogger("miniplm.trainer.train")


def train(config: ExperimentConfig, target: Target, *, retrain: bool = False) -> TrainResult:
    """Trains a model, unless it is trained already.

    Args:
        config: the experiment.
        target: the model, from `miniplm_udf.config.targets`.
        retrain: train from new weights, even if a finished or frozen model exists.

    Returns:
        The model's record, with a note if the training was skipped, or stopped by a signal (`stopping.deferred`).

    Raises:
        ConfigError: the architecture cannot be built or trained as the config says, the teacher does not fit the
            packed data, the package of a configured tracker is not installed, or several nodes train under a root that
            they do not share.
        CorpusError: the packed table is missing, empty, or packed with another tokenizer; or another process trains
            this model; or no checkpoint can be used; or ranks see different data, checkpoints or weights.
        MiniplmError: the loss or the gradient is not finite, a file cannot be written, or another rank failed.
    """
    require_packages(config)
    with process_group() as world:
        if world.nodes > 1 and not storage.is_local(config.root):
            raise ConfigError(
                "torchrun on several nodes keeps its checkpoints under root, so root must be a path that all mount"
            )
        with _alone(config, target, world) as lease:
            # Only rank 0 checks what exists: ranks that check at different moments could decide differently.
            frozen = world.first_decides(lambda: None if retrain else _frozen(config, target))
            if frozen is not None:
                return frozen
            inputs = open_inputs(config, target, world)
            finished = world.first_decides(lambda: None if retrain else _finished(config, target, inputs))
            if finished is not None:
                return finished
            return _train(config, target, inputs, world, retrain, lease)


@contextlib.contextmanager
def _alone(config: ExperimentConfig, target: Target, world: World) -> Iterator[Lease | None]:
    """Holds the training's lease on rank 0; yields it there, and None on the other ranks.

    Raises:
        CorpusError: on every rank, if another process trains this model.
    """
    lease = Lease(config.layout.lease(f"train-{target.name}"), target.name, what="training")
    world.first_decides(lambda: lease.__enter__() and None)
    if not world.is_first:
        yield None
        return
    with contextlib.ExitStack() as stack:
        stack.push(lease)
        yield lease


def _frozen(config: ExperimentConfig, target: Target) -> TrainResult | None:
    """The result for a finished model that must not change; None if the target is not frozen or not trained."""
    folder = config.layout.model(target.name)
    if not target.frozen or not storage.exists(storage.join(folder, "config.json")):
        return None
    training = read_training(config, target.name)
    if training is None or training.config_fingerprint != target.config_fingerprint():
        LOGGER.warning(
            "%s is frozen at %s although its config has changed since: this keeps scores comparable. --retrain trains "
            "it again; then the corpus has to be scored again",
            target.name,
            storage.redact(folder),
        )
    else:
        LOGGER.info("%s is trained and frozen: %s", target.name, storage.redact(folder))
    return TrainResult(target.name, training, skipped=True)


def _finished(config: ExperimentConfig, target: Target, inputs: TrainingInputs) -> TrainResult | None:
    """The result for a model that is trained with this config on this data, or None."""
    training = read_training(config, target.name)
    if training is None:
        return None
    if training.fingerprint != inputs.fingerprint:
        is_config = training.config_fingerprint != target.config_fingerprint()
        LOGGER.warning(
            "%s is trained with other %s (%d steps): it is trained again, and the new model replaces %s at the end",
            target.name,
            "settings" if is_config else "data, or another tokenizer or teacher",
            training.steps,
            storage.redact(config.layout.model(target.name)),
        )
        return None
    if not storage.exists(config.layout.model(target.name, "config.json")):  # its upload was stopped
        return None
    LOGGER.info("%s is already trained on this data with this config: skipped", target.name)
    return TrainResult(target.name, training, skipped=True)


def _train(
    config: ExperimentConfig,
    target: Target,
    inputs: TrainingInputs,
    world: World,
    retrain: bool,
    lease: Lease | None,
) -> TrainResult:
    """Trains the model on this rank. The result has the record on rank 0, which holds the lease."""
    training = prepare(config, target, inputs, world, retrain)
    with contextlib.ExitStack() as stack:
        run: Run | None = None
        if lease is not None:
            run = stack.enter_context(_run(training))
            record_run(training.checkpoints, run)
            _log_start(training, run)
            run.log_points(training.state.points)
        state, is_stopped = run_steps(training, run, lease)
        if is_stopped:
            step = f"after step {state.steps_done}, which is saved" if state.steps_done else "before its first step"
            LOGGER.warning("%s: stopped %s", target.name, step)
            if run is not None:
                run.stopped = True
            return TrainResult(target.name, None, skipped=False, stopped_after=state.steps_done)
        weights = gather_weights(training.model)
        if run is None or weights is None:
            return TrainResult(target.name, None, skipped=False)
        metrics = {"seconds": round(state.seconds, 3), "final_loss": state.loss}
        run.log_metrics({name: value for name, value in metrics.items() if value is not None})
        record = write_model(training, weights, run, state)
        run.set_tags({"model_uri": storage.redact(config.layout.model(target.name))})
    if run.run_id != record.run_id:  # MLflow could not be reached until now
        record = set_run(config, record, run.run_id)
    return TrainResult(target.name, record, skipped=False)


def _run(training: Training) -> contextlib.AbstractContextManager[Run]:
    """The MLflow run and the other trackers; a resumed training continues its earlier run."""
    config, name, checkpoints = training.config, training.target.name, training.checkpoints
    training_id = checkpoints.tracking_id()
    callbacks = callbacks_of(config, name, training_id, training.state.steps_done)
    return tracked_run(config, name, checkpoints.run_id(), callbacks, training_id)


def _log_start(training: Training, run: Run) -> None:
    """Logs config, environment, parameters, tags and, for a new run, the packed table as dataset input."""
    target, inputs, sequences = training.target, training.inputs, training.inputs.sequences
    params: Json = {
        "train": dataclasses.asdict(target.train),
        "architecture": target.architecture,
        "corpus": target.corpus,
        "tokenizer": target.tokenizer,
        "vocab_size": inputs.tokenizer.vocab_size,
        "sequence_length": target.sequence_length,
        "n_parameters": n_parameters(training.model),
        "packed_sequences": sequences.n_sequences,
        **({} if inputs.teacher is None else {"kd_teacher": teacher_record(inputs.teacher)}),
    }
    tags = {"fingerprint": inputs.fingerprint, "tokenizer": target.tokenizer, "stage": "train"}
    tags |= {"miniplm_root": storage.redact(training.config.root), **start_tags(training.world)}
    if training.config.mlflow.system_metrics:
        run.measure_system()
    run.log_params(params)
    table, digest = target.packed_table, sequences.manifest_hash
    data_tags = run.log_table(sequences.uri, sequences.version, table, digest, sequences.metadata)
    run.set_tags(tags)
    run.log_start(start_files(training.config, training.world), training.state.steps_done)
    run.callbacks.on_start(params, {**data_tags, **tags})


def plan(config: ExperimentConfig, target: Target) -> Json:
    """Returns the plan of `train` for a dry run. Trains and writes nothing.

    Args:
        config: the experiment.
        target: the model, from `miniplm_udf.config.targets`.

    Returns:
        What is read and written, the sizes (sequences, tokens, number of weights) and a `status`.

    Raises:
        ConfigError: the architecture cannot be built.
        CorpusError: the packed table exists, but cannot be trained on.
    """
    sequences = target.train.steps * target.train.batch_sequences
    facts: Json = {
        "name": target.name,
        "reads": [
            storage.redact(config.layout.table(target.packed_table)),
            storage.redact(config.layout.tokenizer(target.tokenizer)),
        ],
        "writes": storage.redact(config.layout.model(target.name)),
        "architecture": target.architecture,
        "train": dataclasses.asdict(target.train),
        "sequence_length": target.sequence_length,
        "sequences": sequences,
        "tokens": sequences * target.sequence_length,
    }
    if not storage.exists(config.layout.tokenizer(target.tokenizer, TOKENIZER_RECORD_FILE)):
        return {**facts, "status": "waits for the pack stage"}
    tokenizer = read_tokenizer(config.layout.tokenizer(target.tokenizer))
    architecture = model_config(
        target.architecture,
        where=target.where,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.document_separator_id,
        max_positions=target.max_positions,
    )
    with torch.device("meta"):
        facts["n_parameters"] = n_parameters(build_model(architecture, where=target.where, seed=0))
    facts |= _distillation(config, target, facts["n_parameters"])
    uri = config.layout.table(target.packed_table)
    if delta_log.has_commits(uri):
        in_table = PackedSequences(uri, None, target.sequence_length, tokenizer).n_sequences
        facts |= {"sequences_in_table": in_table, "epochs": round(sequences / in_table, 2)}
    return {**facts, "status": _status(config, target)}


def _distillation(config: ExperimentConfig, target: Target, student_parameters: int) -> Json:
    """The teacher of a plan, and the steps of equal compute; nothing for a model without a teacher.

    The teacher's size comes from its record, which the scoring writes.
    """
    alias, ratio = target.train.kd_teacher, target.train.kd_ratio
    if ratio == 0:
        return {}
    record = storage.read_json(config.layout.model_record(alias)) or {}
    size = record.get("n_parameters")
    facts: Json = {
        "teacher": alias,
        "path": storage.redact(str(config.models[alias].path)),
        "teacher_parameters": size,
        "kd_ratio": ratio,
        "steps_of_equal_compute": size and equal_compute_steps(config.train.steps, student_parameters, size),
    }
    return {"distillation": facts}


def _status(config: ExperimentConfig, target: Target) -> str:
    """Whether `train` would train the model. For a trained student with a teacher, the teacher's files are read."""
    training = read_training(config, target.name)
    if training is None:
        return "to train"
    if target.frozen:
        return "trained and frozen"
    try:
        inputs = open_inputs(config, target, World())
    except ModelLoadError as error:
        return f"trained; not compared with its teacher: {error}"
    return "trained" if training.fingerprint == inputs.fingerprint else "to train again"
