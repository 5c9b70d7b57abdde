"""Prepares a training: its data, model, optimiser and checkpoints on each rank, the same on every rank.

Inputs: a `Target` and the newest version of its packed table. `open_inputs` opens table, tokenizer and teacher.
`prepare` builds the model, lets rank 0 choose the checkpoint, checks that all ranks see the same data, checkpoint and
weights, and divides the model among the ranks. No file is written before these checks.
"""

import dataclasses
import logging
from collections.abc import Mapping

import torch

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.targets import Target
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store.model_records import TokenizerRecord, TrainingRecord, read_training
from trainer.checkpoints.checkpoint import Checkpoints, SavedState, checkpoint_folder
from trainer.checkpoints.mirror import Mirror
from trainer.evaluation.during_training import TrainingEvaluation
from trainer.loader.data import PackedSequences, read_tokenizer
from trainer.loader.order import ORDER_VERSION
from trainer.loop import Loop, make_optimizer
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.models.blocks import prepare_blocks
from trainer.models.document_masks import check_follows_positions
from trainer.models.model import build_model, choose_scan, model_config
from trainer.models.teacher_loading import describe_teacher, load_teacher, teacher_identity
from trainer.models.tokenizer_files import TokenizerFiles, read_tokenizer_files
from trainer.ranks.distributed import World
from trainer.ranks.parallel import divide
from trainer.ranks.state import check_equal_weights, set_optimizer, set_weights

LOGGER = logging.getLogger("miniplm.trainer.preparation")


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a training.

    Attributes:
        sequences: the packed table.
        tokenizer: the table's tokenizer.
        teacher: description of the teacher, which is not loaded yet; None without a teacher.
        fingerprint: hash of config, data, tokenizer and teacher.
        settings: the values behind the fingerprint, as text by name, for messages.
    """

    sequences: PackedSequences
    tokenizer: TokenizerRecord
    teacher: ModelDescription | None
    fingerprint: str
    settings: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Training:
    """A prepared training on this rank.

    Attributes:
        config: the experiment.
        target: the model to train.
        inputs: packed table, tokenizer and teacher.
        world: the place of this process among the ranks.
        model: the transformers model; its weights may be shards.
        optimizer: the optimiser of the model's weights.
        loop: the training loop over the model and the packed table.
        checkpoints: the checkpoints of this training.
        state: the numbers of the checkpoint that the training resumes from; zeros for a new training.
        files: the tokenizer's files, for the model folder.
        evaluation: the evaluation during the training; None if `evaluate_every_steps` is 0.
    """

    config: ExperimentConfig
    target: Target
    inputs: TrainingInputs
    world: World
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loop: Loop
    checkpoints: Checkpoints
    state: SavedState
    files: TokenizerFiles
    evaluation: TrainingEvaluation | None


def open_inputs(config: ExperimentConfig, target: Target, world: World) -> TrainingInputs:
    """Opens tokenizer, packed table and teacher; all ranks open the version that is the newest on rank 0.

    Args:
        config: the experiment.
        target: the model.
        world: the place of this process among the ranks.

    Returns:
        The same table version, tokenizer and teacher on every rank.

    Raises:
        ConfigError: the teacher does not fit the tokenizer.
        CorpusError: the table or the tokenizer cannot be used, or ranks see different tables, tokenizers, teachers or
            settings.
        ModelLoadError: the teacher cannot be found or read.
    """
    uri = config.layout.table(target.packed_table)
    # Also settings that are not part of the fingerprint decide which collectives a rank takes part in, and when.
    train_hash = fingerprint(dataclasses.asdict(target.train))
    _check_equal(
        world, train_hash, "sections train of the config", "start all ranks with the same config and overrides"
    )

    def open_version(version: int | None) -> TrainingInputs:
        tokenizer = read_tokenizer(config.layout.tokenizer(target.tokenizer))
        sequences = PackedSequences(uri, version, target.sequence_length, tokenizer)
        # The manifest instead of the version: a commit that changes no file (by VACUUM) is no reason to train again.
        # If the row order changes, checkpoints of the old order cannot be resumed.
        hashes = (target.config_fingerprint(), sequences.manifest_hash, tokenizer.tokenizer_hash, ORDER_VERSION)
        teacher = describe_teacher(config, target, tokenizer)
        identity = teacher_identity(config, target, teacher)
        settings = target.settings() | {
            "rows of the packed table": sequences.manifest_hash,
            "tokenizer": tokenizer.tokenizer_hash,
            "order of the rows": str(ORDER_VERSION),
            "teacher": " ".join(identity),
        }
        return TrainingInputs(sequences, tokenizer, teacher, fingerprint(*hashes, *identity), settings)

    newest = world.together(lambda: open_version(None))
    version = world.from_first(newest.sequences.version)
    inputs = world.together(lambda: newest if newest.sequences.version == version else open_version(version))
    _check_equal(world, inputs.fingerprint, f"config, packed table ({storage.redact(uri)}), tokenizer or teacher")
    return inputs


def _check_equal(
    world: World, value: str, what: str, remedy: str = "root must be one folder that all machines share"
) -> None:
    """Raises a CorpusError on every rank if a value differs between ranks."""
    values = world.from_all(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise CorpusError(
                f"rank {rank} and rank 0 see different {what}: {other}, and {values[0]} on rank 0. Nothing was "
                f"written; {remedy}"
            )


def prepare(config: ExperimentConfig, target: Target, inputs: TrainingInputs, world: World, retrain: bool) -> Training:
    """Returns a training, resumed from its newest checkpoint, with the same weights on every rank.

    Args:
        config: the experiment.
        target: the model.
        inputs: the result of `open_inputs`.
        world: the place of this process among the ranks.
        retrain: begin at the first step, unless the checkpoints belong to an earlier `retrain` that was stopped.

    Raises:
        ConfigError: the architecture cannot be built or trained as the config says.
        CorpusError: no checkpoint can be used, or the ranks do not see the same checkpoint or weights.
        ModelLoadError: the teacher cannot be loaded.
    """
    whole = world.together(lambda: _new_model(config, target, inputs, world))
    model = whole.model
    finished = world.together(lambda: read_training(config, target.name))
    checkpoints = _checkpoints(config, target, inputs, finished)
    world.first_decides(checkpoints.fetch)
    replaced = None if finished is None else str(finished.tracking_id)
    files = world.together(lambda: read_tokenizer_files(config.layout.tokenizer(target.tokenizer)))
    evaluation = world.together(
        lambda: TrainingEvaluation(config, target) if target.train.evaluate_every_steps else None
    )
    # Only rank 0 chooses the checkpoint: ranks could see a damaged disk differently and start from different steps.
    begins_again = world.first_decides(lambda: retrain and not checkpoints.is_replacing(replaced))
    step = world.first_decides(lambda: None if begins_again else checkpoints.newest_whole(model))
    if step is None:
        module, optimizer, state = *distribute(whole, target.train, world), SavedState(0)
    else:
        module, optimizer, state = resume(checkpoints, step, whole, target.train, world)
    loop = Loop(module, optimizer, inputs.sequences, target.train, inputs.tokenizer.document_separator_id, world)
    if begins_again and world.is_first:
        checkpoints.replace(replaced or "")
    return Training(config, target, inputs, world, model, optimizer, loop, checkpoints, state, files, evaluation)


def distribute(
    module: CausalLMWithLoss, config: TrainConfig, world: World
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Divides a model among the ranks, and makes its optimiser.

    Args:
        module: whole, with the same weights on every rank; its weights may become shards.
        config: the division and the settings of the optimiser.
        world: the place of this process among the ranks.

    Returns:
        The module to call in the training loop, and the optimiser.

    Raises:
        CorpusError: the weights of the ranks differ.
    """
    check_equal_weights(module.model, world)
    divided = divide(module, config, world)
    return divided, make_optimizer(module.model, config)


def resume(
    checkpoints: Checkpoints, step: int, module: CausalLMWithLoss, config: TrainConfig, world: World
) -> tuple[torch.nn.Module, torch.optim.Optimizer, SavedState]:
    """Loads a checkpoint into a model, divides it among the ranks, and makes its optimiser.

    Args:
        checkpoints: the training's checkpoints. Rank 0 reads the tensors; the other ranks only compare the checksum.
        step: the step of the checkpoint, chosen by rank 0.
        module, config, world: see `distribute`.

    Returns:
        The module to call in the training loop, the optimiser, and the checkpoint's numbers.

    Raises:
        CorpusError: the ranks see different checkpoints of this step.
    """
    _check_equal(world, checkpoints.checksum(step), f"checkpoints {checkpoints.folder}/step-{step}")
    state, tensors = checkpoints.load(step) if world.is_first else (SavedState(step), None)
    set_weights(module.model, tensors, world)
    divided, optimizer = distribute(module, config, world)
    set_optimizer(module.model, optimizer, tensors, world)
    return divided, optimizer, world.from_first(state)


def _new_model(config: ExperimentConfig, target: Target, inputs: TrainingInputs, world: World) -> CausalLMWithLoss:
    """The model with new weights and its loss, with its teacher if it has one, on this rank's device."""
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
    if inputs.teacher is None:
        module = CausalLMWithLoss(model)
    else:
        teacher = load_teacher(config, target, inputs.tokenizer, inputs.teacher, world.device)
        module = DistilledCausalLM(model, teacher, target.train.kd_ratio)
    prepare_blocks(module, target.train, target.sequence_length, target.where)
    return module


def _checkpoints(
    config: ExperimentConfig, target: Target, inputs: TrainingInputs, finished: TrainingRecord | None
) -> Checkpoints:
    """The checkpoints of the training; checkpoints of the finished model may be replaced."""
    uri = config.layout.training(target.name)
    return Checkpoints(
        checkpoint_folder(uri),
        inputs.fingerprint,
        target.train.keep_checkpoints,
        inputs.settings,
        replaceable=() if finished is None else (finished.fingerprint,),
        mirror=None if storage.is_local(uri) else Mirror(uri),
    )
