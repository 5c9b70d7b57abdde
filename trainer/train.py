"""Trains one target: packed table and tokenizer in, a model folder and an MLflow run out.

Reads `<root>/tables/packed/<corpus>/<tokenizer>` at its newest version and `<root>/models/tokenizer_<tokenizer>/`;
writes `<root>/models/<name>/` (config.json, model.safetensors, tokenizer.json, tokenizer_config.json, training.json)
in one piece at the end, and checkpoints on the way. A finished model of the same config, data and tokenizer is left
as it is; so is a finished reference, whatever changed. A killed training goes on from its last checkpoint, in the
same MLflow run; on one process it ends with the same weights, bit for bit, as one that was not killed. Under torchrun
rank 0 alone writes.
"""

import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError
from miniplm_udf.progress import progress
from trainer.checkpoint import Checkpoints, checkpoint_folder
from trainer.data import PackedSequences, TokenizerInfo, read_tokenizer_info
from trainer.distributed import World, process_group
from trainer.loop import Loop, StepMeasures, make_optimizer
from trainer.model import build_model, model_config, n_parameters
from trainer.targets import Target
from trainer.tracking import Run, tracked_run

LOGGER = logging.getLogger("miniplm.trainer.train")


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a training starts from."""

    sequences: PackedSequences
    tokenizer: TokenizerInfo
    fingerprint: str


def train(config: ExperimentConfig, target: Target, *, retrain: bool = False) -> dict[str, Any]:
    """Trains a model, or finds that it is trained.

    Args:
        config: the experiment.
        target: from `trainer.targets`.
        retrain: train even where a finished model stands, from new weights.

    Returns:
        The model's `training.json`, with `skipped` telling whether it stood there already.

    Raises:
        ConfigError: the architecture cannot be built.
        CorpusError: no packed table, an empty one, or one of another tokenizer.
    """
    with process_group() as world:
        if world.nodes > 1 and not storage.is_local(config.root):
            raise ConfigError(
                "torchrun on several nodes keeps its checkpoints under root, so root must be a path that all mount"
            )
        # Rank 0 alone looks, lest ranks that look at different moments decide differently.
        frozen = world.from_first(_frozen(config, target) if world.is_first and not retrain else None)
        if frozen is not None:
            return {**frozen, "skipped": True}
        inputs = _inputs(config, target, world)
        finished = world.from_first(_finished(config, target, inputs) if world.is_first and not retrain else None)
        if finished is not None:
            return {**finished, "skipped": True}
        return {**_train(config, target, inputs, world, retrain), "skipped": False}


def _frozen(config: ExperimentConfig, target: Target) -> dict[str, Any] | None:
    """`training.json` of a finished model that must not change, or None."""
    folder = config.model_uri(target.name)
    if not target.frozen or not storage.exists(storage.join(folder, "config.json")):
        return None
    training = storage.read_json(storage.join(folder, "training.json")) or {"name": target.name}
    if training.get("config_fingerprint") != target.config_fingerprint():
        LOGGER.warning(
            "%s is frozen at %s although its config has changed since: scores made with it stay comparable; "
            "--retrain trains it anew, and the corpus is then scored anew",
            target.name,
            storage.redact(folder),
        )
    else:
        LOGGER.info("%s is trained and frozen: %s", target.name, storage.redact(folder))
    return dict(training)


def _inputs(config: ExperimentConfig, target: Target, world: World) -> _Inputs:
    """Opens the data; all ranks open the version that rank 0 found newest."""
    tokenizer = read_tokenizer_info(config.model_uri(target.tokenizer_folder))
    uri = config.table_uri(target.packed_table)
    sequences = PackedSequences(uri, None, target.sequence_length, tokenizer)
    version = world.from_first(sequences.version)
    if version != sequences.version:
        sequences = PackedSequences(uri, version, target.sequence_length, tokenizer)
    # The manifest, not the version: a commit that changes no file (VACUUM's) is no reason to train again.
    mark = fingerprint(target.config_fingerprint(), sequences.manifest_hash, tokenizer.tokenizer_hash)
    return _Inputs(sequences, tokenizer, mark)


def _finished(config: ExperimentConfig, target: Target, inputs: _Inputs) -> dict[str, Any] | None:
    training = storage.read_json(storage.join(config.model_uri(target.name), "training.json"))
    if training is None or training.get("fingerprint") != inputs.fingerprint:
        return None
    LOGGER.info("%s is trained on this data with this config: nothing to do", target.name)
    return dict(training)


def _train(
    config: ExperimentConfig,
    target: Target,
    inputs: _Inputs,
    world: World,
    retrain: bool,
) -> dict[str, Any]:
    sequences, separator_id = inputs.sequences, inputs.tokenizer.document_separator_id
    architecture = model_config(
        target.architecture,
        where=target.where,
        vocab_size=inputs.tokenizer.vocab_size,
        separator_id=separator_id,
        max_positions=target.max_positions,
    )
    # The cache of keys and values serves generation alone; it is switched on again in what is saved.
    if hasattr(architecture, "use_cache"):
        architecture.use_cache = False
    model: torch.nn.Module = build_model(architecture, where=target.where, seed=target.train.seed)
    model.to(world.device)
    optimizer = make_optimizer(model, target.train)
    folder = checkpoint_folder(config.checkpoint_uri(f"train/{target.name}"))
    checkpoints = Checkpoints(folder, inputs.fingerprint, target.train.keep_checkpoints)
    if retrain and world.is_first:
        checkpoints.clear()
    world.from_first(None)  # no rank looks for checkpoints before they are gone
    state = checkpoints.load(model, optimizer) or {
        "steps_done": 0,
        "seconds": 0.0,
        "loss": None,
    }
    loop = Loop(model, optimizer, sequences, target.train, separator_id, world)
    if not world.is_first:
        loop.run(state["steps_done"], lambda measures: None, lambda measures: None)
        return {}
    with tracked_run(config, target.name, checkpoints.run_id()) as run:
        checkpoints.set_run_id(run.run_id)
        _log_start(run, target, inputs, model)
        state = _run_first(loop, state, checkpoints, model, optimizer, run, target)
        training = _training_record(target, inputs, model, run, state)
        _save_model(config, target, model, training)
        run.log_metrics({"seconds": training["seconds"], "final_loss": training["final_loss"]})
    return training


def _run_first(
    loop: Loop,
    state: dict[str, Any],
    checkpoints: Checkpoints,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    target: Target,
) -> dict[str, Any]:
    """The loop on rank 0, with its curve, checkpoints and progress; returns the last state."""
    started, before = time.perf_counter(), float(state["seconds"])
    with progress(
        f"train {target.name}",
        total=target.train.steps - state["steps_done"],
        unit="step",
    ) as shown:

        def on_step(measures: StepMeasures) -> None:
            run.log_metrics(_metrics(measures), step=measures.steps_done)
            advanced = measures.steps_done - state["steps_done"] - shown.done
            shown.update(
                advanced,
                loss=f"{measures.loss:.4f}",
                tokens_per_second=f"{measures.tokens_per_second:,.0f}",
            )

        def on_save(measures: StepMeasures) -> None:
            latest.update(loss=measures.loss, seconds=before + time.perf_counter() - started)
            checkpoints.save(measures.steps_done, model, optimizer, latest)

        latest = {"loss": state["loss"], "seconds": before}
        loop.run(state["steps_done"], on_step, on_save)
    return latest


def _metrics(measures: StepMeasures) -> dict[str, float]:
    return {
        "train_loss": measures.loss,
        "learning_rate": measures.learning_rate,
        "gradient_norm": measures.gradient_norm,
        "tokens": measures.tokens,
        "tokens_per_second": measures.tokens_per_second,
    }


def _log_start(run: Run, target: Target, inputs: _Inputs, model: torch.nn.Module) -> None:
    run.log_params(
        {
            "train": dataclasses.asdict(target.train),
            "architecture": target.architecture,
            "corpus": target.corpus,
            "tokenizer": target.tokenizer,
            "vocab_size": inputs.tokenizer.vocab_size,
            "sequence_length": target.sequence_length,
            "n_parameters": n_parameters(model),
            "packed_sequences": inputs.sequences.n_sequences,
        }
    )
    sequences = inputs.sequences
    if run.is_new:
        table, digest = target.packed_table, sequences.manifest_hash
        run.log_table(sequences.uri, sequences.version, table, digest, sequences.metadata)
    run.set_tags(
        {
            "fingerprint": inputs.fingerprint,
            "tokenizer": target.tokenizer,
            "stage": "train",
        }
    )


def _training_record(
    target: Target,
    inputs: _Inputs,
    model: torch.nn.Module,
    run: Run,
    state: dict[str, Any],
) -> dict[str, Any]:
    n_sequences = target.train.steps * target.train.batch_sequences
    return {
        "name": target.name,
        "run_id": run.run_id,
        "steps": target.train.steps,
        "sequences": n_sequences,
        "tokens": n_sequences * target.sequence_length,
        "epochs": n_sequences / inputs.sequences.n_sequences,
        "sequence_length": target.sequence_length,
        "seconds": round(state["seconds"], 3),
        "final_loss": state["loss"],
        "n_parameters": n_parameters(model),
        "tokenizer": target.tokenizer,
        "packed_uri": storage.redact(inputs.sequences.uri),
        "packed_version": inputs.sequences.version,
        "manifest_hash": inputs.sequences.manifest_hash,
        "fingerprint": inputs.fingerprint,
        "config_fingerprint": target.config_fingerprint(),
        "lineage": inputs.sequences.metadata,
    }


def _save_model(config: ExperimentConfig, target: Target, model: Any, training: dict[str, Any]) -> None:
    """Puts the model's folder in place, whole."""
    tokenizer_uri = config.model_uri(target.tokenizer_folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = True
        disable_progress_bar()  # of transformers, which knows nothing of terminals
        model.save_pretrained(folder, max_shard_size="1TB")  # one file, as the readers of the folder expect
        enable_progress_bar()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            text = storage.read_text(storage.join(tokenizer_uri, file))
            (folder / file).write_text(text, encoding="utf-8", newline="")
        storage.write_json(str(folder / "training.json"), training)
        storage.upload_folder(folder, config.model_uri(target.name))
    LOGGER.info("%s: %s", target.name, storage.redact(config.model_uri(target.name)))


def plan(config: ExperimentConfig, target: Target) -> dict[str, Any]:
    """What `train` would do, from the config and what already exists; trains and writes nothing.

    Raises:
        ConfigError: the architecture cannot be built.
        CorpusError: the packed table is there, and does not fit.
    """
    sequences = target.train.steps * target.train.batch_sequences
    facts: dict[str, Any] = {
        "name": target.name,
        "reads": [
            storage.redact(config.table_uri(target.packed_table)),
            storage.redact(config.model_uri(target.tokenizer_folder)),
        ],
        "writes": storage.redact(config.model_uri(target.name)),
        "architecture": target.architecture,
        "train": dataclasses.asdict(target.train),
        "sequence_length": target.sequence_length,
        "sequences": sequences,
        "tokens": sequences * target.sequence_length,
    }
    info = storage.exists(storage.join(config.model_uri(target.tokenizer_folder), "miniplm.json"))
    if not info:
        return {**facts, "status": "waits for the pack stage"}
    tokenizer = read_tokenizer_info(config.model_uri(target.tokenizer_folder))
    architecture = model_config(
        target.architecture,
        where=target.where,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.document_separator_id,
        max_positions=target.max_positions,
    )
    with torch.device("meta"):
        facts["n_parameters"] = n_parameters(build_model(architecture, where=target.where, seed=0))
    done = storage.read_json(storage.join(config.model_uri(target.name), "training.json"))
    if done is None:
        return {**facts, "status": "to train"}
    if target.frozen:
        return {**facts, "status": "trained and frozen"}
    inputs = _inputs(config, target, World())
    return {
        **facts,
        "status": "trained" if done.get("fingerprint") == inputs.fingerprint else "to train anew",
    }
