"""Trains one model: reads a packed table and a tokenizer, writes a model folder and an MLflow run.

Reads the newest version of `<root>/tables/packed/<corpus>/<tokenizer>`, and `<root>/models/tokenizer_<tokenizer>/`.
Writes checkpoints during training, and at the end the whole folder `<root>/models/<name>/` (config.json,
model.safetensors, tokenizer.json, tokenizer_config.json, training.json). A finished model is skipped while its config,
data and tokenizer are unchanged; a finished reference is always skipped. A killed training resumes from its last
checkpoint in the same MLflow run; on one process the weights are then the same, bit for bit, as without the kill.
Under torchrun only rank 0 writes. A lease makes sure that one process (or one torchrun) trains a model at a time.
"""

import contextlib
import dataclasses
import functools
import logging
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError, MiniplmError
from miniplm_udf.lease import Lease
from miniplm_udf.progress import progress
from miniplm_udf.storage import Json
from trainer.blocks import prepare_blocks
from trainer.checkpoint import Checkpoints, SavedState, checkpoint_folder
from trainer.data import PackedSequences, TokenizerInfo, read_tokenizer_info
from trainer.distributed import World, process_group
from trainer.document_masks import check_follows_positions
from trainer.evaluation.during_training import TrainingEvaluation
from trainer.lm_loss import CausalLMWithLoss
from trainer.loop import Loop, StepMeasures, make_optimizer
from trainer.model import build_model, choose_scan, model_config, n_parameters
from trainer.order import ORDER_VERSION
from trainer.records import TRAINING_FILE, TrainingRecord, TrainResult, read_training
from trainer.targets import Target
from trainer.tokenizer_files import TokenizerFiles, check_auto_tokenizer, read_tokenizer_files
from trainer.tracking import Run, tracked_run

LOGGER = logging.getLogger("miniplm.trainer.train")

_T = typing.TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The data that a training reads; `fingerprint` is a hash of config, data and tokenizer."""

    sequences: PackedSequences
    tokenizer: TokenizerInfo
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class _Training:
    """One training and everything that it works on."""

    config: ExperimentConfig
    target: Target
    inputs: _Inputs
    model: torch.nn.Module
    module: CausalLMWithLoss
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    files: TokenizerFiles
    evaluation: TrainingEvaluation | None


def train(config: ExperimentConfig, target: Target, *, retrain: bool = False) -> TrainResult:
    """Trains a model, unless it is trained already.

    Args:
        config: the experiment.
        target: the model, from `trainer.targets`.
        retrain: train from new weights, even if a finished or frozen model exists.

    Returns:
        The model's record, and whether the training was skipped.

    Raises:
        ConfigError: the architecture cannot be built or trained as the config says, or several nodes train under a
            root that they do not share.
        CorpusError: the packed table is missing, empty, or packed with another tokenizer; or another process trains
            this model; or every checkpoint is damaged.
        MiniplmError: the loss or the gradient is not finite.
    """
    with process_group() as world:
        if world.nodes > 1 and not storage.is_local(config.root):
            raise ConfigError(
                "torchrun on several nodes keeps its checkpoints under root, so root must be a path that all mount"
            )
        with _alone(config, target, world) as lease:
            # Only rank 0 checks what exists: ranks that check at different moments could decide differently.
            frozen = world.from_first(_frozen(config, target) if world.is_first and not retrain else None)
            if frozen is not None:
                return frozen
            inputs = _inputs(config, target, world)
            finished = world.from_first(_finished(config, target, inputs) if world.is_first and not retrain else None)
            if finished is not None:
                return finished
            return TrainResult(target.name, _train(config, target, inputs, world, retrain, lease), skipped=False)


@contextlib.contextmanager
def _alone(config: ExperimentConfig, target: Target, world: World) -> Iterator[Lease | None]:
    """Holds the training's lease on rank 0; yields it there, and None on the other ranks.

    Raises:
        CorpusError: on every rank, if another process trains this model.
    """
    lease = Lease(config.layout.lease(f"train-{target.name}"), target.name, what="training")
    _first_decides(world, lambda: lease.__enter__() and None)
    if not world.is_first:
        yield None
        return
    with contextlib.ExitStack() as stack:
        stack.push(lease)
        yield lease


def _first_decides(world: World, decide: Callable[[], _T]) -> _T:
    """Calls `decide` on rank 0 only; returns its result, or raises its MiniplmError, on every rank."""
    result, error = None, None
    if world.is_first:
        try:
            result = decide()
        except MiniplmError as raised:
            error = raised
    result, error = world.from_first((result, error))
    if error is not None:
        raise error
    return typing.cast(_T, result)


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


def _inputs(config: ExperimentConfig, target: Target, world: World) -> _Inputs:
    """Opens the tokenizer and the packed table; all ranks open the version that is the newest on rank 0."""
    tokenizer = read_tokenizer_info(config.layout.model(target.tokenizer_folder))
    uri = config.layout.table(target.packed_table)
    sequences = PackedSequences(uri, None, target.sequence_length, tokenizer)
    version = world.from_first(sequences.version)
    if version != sequences.version:
        sequences = PackedSequences(uri, version, target.sequence_length, tokenizer)
    # The manifest instead of the version: a commit that changes no file (by VACUUM) is no reason to train again.
    # Another order of the rows is another training: its checkpoints are not continued.
    inputs_fingerprint = fingerprint(
        target.config_fingerprint(), sequences.manifest_hash, tokenizer.tokenizer_hash, ORDER_VERSION
    )
    return _Inputs(sequences, tokenizer, inputs_fingerprint)


def _finished(config: ExperimentConfig, target: Target, inputs: _Inputs) -> TrainResult | None:
    """The result for a model that is trained with this config on this data, or None."""
    training = read_training(config, target.name)
    if training is None or training.fingerprint != inputs.fingerprint:
        return None
    LOGGER.info("%s is already trained on this data with this config: skipped", target.name)
    return TrainResult(target.name, training, skipped=True)


def _train(
    config: ExperimentConfig,
    target: Target,
    inputs: _Inputs,
    world: World,
    retrain: bool,
    lease: Lease | None,
) -> TrainingRecord | None:
    """Trains the model on this rank. Returns its record on rank 0 (which holds the lease), None on the others."""
    training = _new_training(config, target, inputs, world)
    checkpoints, model, optimizer = training.checkpoints, training.model, training.optimizer
    if retrain and world.is_first:
        checkpoints.clear()
    # Only rank 0 chooses the checkpoint: ranks could see a damaged disk differently and start from different steps.
    step = _first_decides(world, lambda: checkpoints.newest_whole(model, optimizer))
    state = SavedState(0) if step is None else checkpoints.load(step, model, optimizer)
    loop = Loop(
        training.module, optimizer, inputs.sequences, target.train, inputs.tokenizer.document_separator_id, world
    )
    if lease is None:
        loop.run(state.steps_done, lambda measures: None, lambda measures: None)
        return None
    with tracked_run(config, target.name, checkpoints.run_id()) as run:
        if run.run_id is not None:
            checkpoints.set_run_id(run.run_id)
        _log_start(training, run)
        state = _run_first(training, loop, state, run, lease)
        record = _record(training, run, state)
        _save_model(training, record)
        metrics = {"seconds": record.seconds, "final_loss": record.final_loss}
        run.log_metrics({name: value for name, value in metrics.items() if value is not None})
    return record


def _new_training(config: ExperimentConfig, target: Target, inputs: _Inputs, world: World) -> _Training:
    """The model with new weights on this rank's device, its optimiser and its checkpoints."""
    architecture = model_config(
        target.architecture,
        where=target.where,
        vocab_size=inputs.tokenizer.vocab_size,
        separator_id=inputs.tokenizer.document_separator_id,
        max_positions=target.max_positions,
    )
    # The cache of keys and values is for generation only; the saved config switches it on again.
    if hasattr(architecture, "use_cache"):
        architecture.use_cache = False
    choose_scan(architecture, target.architecture, world.device, where=target.where)
    model: torch.nn.Module = build_model(architecture, where=target.where, seed=target.train.seed)
    model.to(world.device)
    if target.train.document_masks:
        check_follows_positions(model, architecture.vocab_size, target.where)
    module = CausalLMWithLoss(model)
    prepare_blocks(module, target.train, target.sequence_length, target.where)
    optimizer = make_optimizer(model, target.train)
    folder = checkpoint_folder(config.layout.checkpoint(f"train/{target.name}"))
    checkpoints = Checkpoints(folder, inputs.fingerprint, target.train.keep_checkpoints)
    files = read_tokenizer_files(config.layout.model(target.tokenizer_folder))
    evaluation = TrainingEvaluation(config, target) if target.train.evaluate_every_steps else None
    return _Training(config, target, inputs, model, module, optimizer, checkpoints, files, evaluation)


def _run_first(training: _Training, loop: Loop, state: SavedState, run: Run, lease: Lease) -> SavedState:
    """Runs the loop on rank 0 with metrics, checkpoints and a progress bar; returns the last saved state."""
    target, latest, started = training.target, state, time.perf_counter()
    with progress(f"train {target.name}", total=target.train.steps - state.steps_done, unit="step") as bar:

        def on_step(measures: StepMeasures) -> None:
            run.log_metrics(_metrics(measures), step=measures.steps_done)
            bar.update(
                measures.steps_done - state.steps_done - bar.done,
                loss=f"{measures.loss:.4f}",
                tokens_per_second=f"{measures.tokens_per_second:,.0f}",
            )

        def on_save(measures: StepMeasures) -> None:
            nonlocal latest
            lease.check()
            seconds = state.seconds + time.perf_counter() - started
            latest = SavedState(measures.steps_done, seconds=seconds, loss=measures.loss)
            training.checkpoints.save(latest, training.model, training.optimizer)

        def on_evaluate(steps_done: int) -> None:
            nonlocal started
            assert training.evaluation is not None
            paused = time.perf_counter()
            metrics = training.evaluation.measure(functools.partial(_write_model, training))
            run.log_metrics(metrics, step=steps_done)
            started += time.perf_counter() - paused  # the seconds of a training are those of its steps

        loop.run(state.steps_done, on_step, on_save, on_evaluate)
    return latest


def _metrics(measures: StepMeasures) -> dict[str, float]:
    metrics = {
        "train_loss": measures.loss,
        "learning_rate": measures.learning_rate,
        "gradient_norm": measures.gradient_norm,
        "tokens": measures.tokens,
        "tokens_per_second": measures.tokens_per_second,
    }
    return metrics if measures.mfu is None else {**metrics, "train/mfu": measures.mfu}


def _log_start(training: _Training, run: Run) -> None:
    """Logs parameters, tags and, for a new run, the packed table as dataset input."""
    target, inputs, sequences = training.target, training.inputs, training.inputs.sequences
    run.log_params(
        {
            "train": dataclasses.asdict(target.train),
            "architecture": target.architecture,
            "corpus": target.corpus,
            "tokenizer": target.tokenizer,
            "vocab_size": inputs.tokenizer.vocab_size,
            "sequence_length": target.sequence_length,
            "n_parameters": n_parameters(training.model),
            "packed_sequences": sequences.n_sequences,
        }
    )
    if run.is_new:
        table, digest = target.packed_table, sequences.manifest_hash
        run.log_table(sequences.uri, sequences.version, table, digest, sequences.metadata)
    run.set_tags({"fingerprint": inputs.fingerprint, "tokenizer": target.tokenizer, "stage": "train"})


def _record(training: _Training, run: Run, state: SavedState) -> TrainingRecord:
    """The content of `training.json` at the end of a training."""
    target, inputs, sequences = training.target, training.inputs, training.inputs.sequences
    n_sequences = target.train.steps * target.train.batch_sequences
    return TrainingRecord(
        name=target.name,
        run_id=run.run_id,
        steps=target.train.steps,
        sequences=n_sequences,
        tokens=n_sequences * target.sequence_length,
        epochs=n_sequences / sequences.n_sequences,
        sequence_length=target.sequence_length,
        seconds=round(state.seconds, 3),
        final_loss=state.loss,
        n_parameters=n_parameters(training.model),
        tokenizer=target.tokenizer,
        packed_uri=storage.redact(sequences.uri),
        packed_version=sequences.version,
        manifest_hash=sequences.manifest_hash,
        fingerprint=inputs.fingerprint,
        config_fingerprint=target.config_fingerprint(),
        lineage=sequences.metadata,
        tokenizer_hash=training.files.packed_hash,
        tokenizer_file_hash=training.files.saved_hash,
    )


def _write_model(training: _Training, folder: Path) -> None:
    """Writes weights, config and tokenizer into a local folder, as a finished model has them."""
    model = typing.cast(Any, training.model)
    disable_progress_bar()  # transformers draws its bar even if stderr is not a terminal
    model.save_pretrained(folder, max_shard_size="1TB")  # one file: readers of the folder expect one
    enable_progress_bar()
    training.files.write(folder)


def _save_model(training: _Training, record: TrainingRecord) -> None:
    """Writes the model folder in a temporary place, then uploads it to its own place."""
    layout, target, model = training.config.layout, training.target, typing.cast(Any, training.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = True
        _write_model(training, folder)
        storage.write_json(str(folder / TRAINING_FILE), dataclasses.asdict(record))
        storage.upload_folder(folder, layout.model(target.name))
        LOGGER.info("%s: %s", target.name, storage.redact(layout.model(target.name)))
        # This check comes last, so that the model is in its place even if transformers raises.
        check_auto_tokenizer(folder, target.name)


def plan(config: ExperimentConfig, target: Target) -> Json:
    """Returns the plan of `train` for a dry run. Trains and writes nothing.

    Args:
        config: the experiment.
        target: the model, from `trainer.targets`.

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
            storage.redact(config.layout.model(target.tokenizer_folder)),
        ],
        "writes": storage.redact(config.layout.model(target.name)),
        "architecture": target.architecture,
        "train": dataclasses.asdict(target.train),
        "sequence_length": target.sequence_length,
        "sequences": sequences,
        "tokens": sequences * target.sequence_length,
    }
    if not storage.exists(config.layout.model(target.tokenizer_folder, "miniplm.json")):
        return {**facts, "status": "waits for the pack stage"}
    tokenizer = read_tokenizer_info(config.layout.model(target.tokenizer_folder))
    architecture = model_config(
        target.architecture,
        where=target.where,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.document_separator_id,
        max_positions=target.max_positions,
    )
    with torch.device("meta"):
        facts["n_parameters"] = n_parameters(build_model(architecture, where=target.where, seed=0))
    return {**facts, "status": _status(config, target)}


def _status(config: ExperimentConfig, target: Target) -> str:
    """Whether `train` would train the model."""
    training = read_training(config, target.name)
    if training is None:
        return "to train"
    if target.frozen:
        return "trained and frozen"
    return "trained" if training.fingerprint == _inputs(config, target, World()).fingerprint else "to train again"
