"""Writes the folder of a trained model: `<root>/models/<name>/`, whole or not at all.

Inputs: the trained model, whose weights may be shards, and the tokenizer's files. Output: config.json,
model.safetensors, tokenizer.json, tokenizer_config.json and training.json, written in a temporary folder first and
moved by rename. Rank 0 writes; the other ranks take part in gathering the weights.
"""

import contextlib
import dataclasses
import logging
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import MiniplmError, reason
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.store.model_records import TrainedText, TrainingRecord
from trainer.checkpoints.checkpoint import SavedState
from trainer.models.model import n_parameters
from trainer.models.teacher_loading import teacher_record
from trainer.models.tokenizer_files import TokenizerFiles, check_auto_tokenizer
from trainer.preparation import Training
from trainer.tracking.run import Run

LOGGER = logging.getLogger("miniplm.trainer.train")


def _record(training: Training, run: Run, state: SavedState) -> TrainingRecord:
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
        tracking_id=training.checkpoints.tracking_id(),
        kd_ratio=target.train.kd_ratio,
        kd_teacher=teacher_record(inputs.teacher),
        text=TrainedText(
            inputs=[storage.redact(storage.to_uri(path)) for path in training.config.ingest.inputs],
            reference_share=training.config.ingest.split.reference,
        ),
    )


def write_model(training: Training, weights: dict[str, torch.Tensor], run: Run, state: SavedState) -> TrainingRecord:
    """Writes the model folder in a temporary place, then moves it to its own place.

    Args:
        training: the finished training.
        weights: whole weights by name (`state.gather_weights`).
        run: the training's MLflow run.
        state: the numbers of the last step.

    Returns:
        The content of `training.json`.

    Raises:
        MiniplmError: the folder cannot be written, for example because the disk is full.
    """
    layout, target = training.config.layout, training.target
    model = typing.cast(Any, training.model)
    record = _record(training, run, state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = True
            write_weights(model, weights, training.files, folder)
            storage.write_json(str(folder / TRAINING_FILE), dataclasses.asdict(record))
            # A reference counts as trained if it has a config.json, a student if it has both.
            storage.upload_folder(folder, layout.model(target.name), last=[TRAINING_FILE, "config.json"])
        except (OSError, SafetensorError) as error:
            raise MiniplmError(
                f"{storage.redact(layout.model(target.name))}: the model cannot be written ({reason(error)}): free "
                f"space there and in {tempfile.gettempdir()} (or set TMPDIR); step {state.steps_done} is saved, and "
                "the same command writes the model from it"
            ) from error
        LOGGER.info("%s: %s", target.name, storage.redact(layout.model(target.name)))
        # Checked last, so that the model is in its place even if transformers raises.
        check_auto_tokenizer(folder, target.name)
    return record


def write_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], files: TokenizerFiles, folder: Path
) -> None:
    """Writes weights, config and tokenizer into a local folder, as a finished model has them.

    Args:
        model: the transformers model; its own weights may be shards.
        weights: whole weights by name.
        files: the tokenizer's files.
        folder: the local folder.
    """
    with no_progress_bars():
        # One file: readers of the folder expect one.
        typing.cast(Any, model).save_pretrained(folder, state_dict=dict(weights), max_shard_size="1TB")
    files.write(folder)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """A block in which transformers draws no bars; it draws them even if stderr is not a terminal."""
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def set_run(config: ExperimentConfig, record: TrainingRecord, run_id: str | None) -> TrainingRecord:
    """Writes the id of the MLflow run into `training.json` of a model that is in its place.

    Args:
        config: the experiment.
        record: the content of `training.json`.
        run_id: the run's id.

    Returns:
        The new content.

    Raises:
        MiniplmError: the file cannot be written.
    """
    record = dataclasses.replace(record, run_id=run_id)
    uri = config.layout.model(record.name, TRAINING_FILE)
    try:
        storage.write_json(uri, dataclasses.asdict(record))
    except OSError as error:
        raise MiniplmError(
            f"{storage.redact(uri)}: the id of the MLflow run {run_id} cannot be written ({reason(error)}); "
            "the model itself is whole"
        ) from error
    return record
