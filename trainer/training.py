"""One training: its data, model, optimiser and checkpoints on each rank, equal on all ranks before the first step.

Inputs: a `Target` and the newest version of its packed table. `prepare` builds the model, lets rank 0 choose the
checkpoint, checks that all ranks see the same data, checkpoint and weights, and divides the model among the ranks. No
file is written before these checks. `run_steps` runs the loop with metrics, checkpoints and a progress bar; all ranks
leave it after the same step, at the end, after a signal, or when one of them fails.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from miniplm_udf import stopping, storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import CorpusError, MiniplmError
from miniplm_udf.lease import Lease
from miniplm_udf.progress import Progress, progress
from miniplm_udf.scoring.description import ModelDescription
from trainer.blocks import prepare_blocks
from trainer.checkpoint import Checkpoints, SavedState, checkpoint_folder
from trainer.checkpoint_writer import CheckpointWriter
from trainer.data import PackedSequences, TokenizerInfo, read_tokenizer_info
from trainer.distributed import Agreement, Wish, World
from trainer.document_masks import check_follows_positions
from trainer.evaluation.during_training import TrainingEvaluation
from trainer.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.loop import Loop, StepMeasures, make_optimizer
from trainer.model import build_model, choose_scan, model_config
from trainer.model_folder import write_weights
from trainer.order import ORDER_VERSION
from trainer.parallel import divide
from trainer.records import read_training
from trainer.state import check_equal_weights, gather, gather_weights, set_optimizer, set_weights
from trainer.targets import Target
from trainer.teacher_loading import describe_teacher, load_teacher, teacher_identity
from trainer.tokenizer_files import TokenizerFiles, read_tokenizer_files
from trainer.tracking import Run


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a training.

    Attributes:
        sequences: the packed table.
        tokenizer: the table's tokenizer.
        teacher: the teacher, not loaded yet; None without one.
        fingerprint: hash of config, data, tokenizer and teacher.
    """

    sequences: PackedSequences
    tokenizer: TokenizerInfo
    teacher: ModelDescription | None
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Training:
    """One training and everything that it works on, on this rank.

    Attributes:
        model: the transformers model; its weights may be shards.
        state: the numbers of the checkpoint that it resumes from, or those of a new training.
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

    Raises:
        ConfigError: the teacher does not fit the tokenizer.
        CorpusError: the table or the tokenizer cannot be used, or ranks see different ones, or different teachers.
        ModelLoadError: the teacher cannot be found or read.
    """
    uri = config.layout.table(target.packed_table)

    def open_version(version: int | None) -> TrainingInputs:
        tokenizer = read_tokenizer_info(config.layout.model(target.tokenizer_folder))
        sequences = PackedSequences(uri, version, target.sequence_length, tokenizer)
        # The manifest instead of the version: a commit that changes no file (by VACUUM) is no reason to train again.
        # Another order of the rows is another training: its checkpoints are not continued.
        hashes = (target.config_fingerprint(), sequences.manifest_hash, tokenizer.tokenizer_hash, ORDER_VERSION)
        teacher = describe_teacher(config, target, tokenizer)
        identity = teacher_identity(config, target, teacher)
        return TrainingInputs(sequences, tokenizer, teacher, fingerprint(*hashes, *identity))

    newest = world.together(lambda: open_version(None))
    version = world.from_first(newest.sequences.version)
    inputs = world.together(lambda: newest if newest.sequences.version == version else open_version(version))
    _check_equal(world, inputs.fingerprint, f"config, packed table ({storage.redact(uri)}), tokenizer or teacher")
    return inputs


def _check_equal(world: World, value: str, what: str) -> None:
    """Raises a CorpusError on every rank if a value differs between ranks."""
    values = world.from_all(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise CorpusError(
                f"rank {rank} and rank 0 see another {what}: {other}, and {values[0]} on rank 0. Nothing was written; "
                "root must be one folder that all machines share"
            )


def prepare(config: ExperimentConfig, target: Target, inputs: TrainingInputs, world: World, retrain: bool) -> Training:
    """Builds a training, resumed from its newest checkpoint, with the same weights on every rank.

    Args:
        config: the experiment.
        target: the model.
        inputs: from `open_inputs`.
        world: the place of this process among the ranks.
        retrain: remove the checkpoints and begin at the first step.

    Raises:
        ConfigError: the architecture cannot be built or trained as the config says.
        CorpusError: no checkpoint can be used, or the ranks do not see the same checkpoint or weights.
        ModelLoadError: the teacher cannot be loaded.
    """
    whole = world.together(lambda: _new_model(config, target, inputs, world))
    model = whole.model
    checkpoints = _checkpoints(config, target, inputs)
    files = world.together(lambda: read_tokenizer_files(config.layout.model(target.tokenizer_folder)))
    evaluation = world.together(
        lambda: TrainingEvaluation(config, target) if target.train.evaluate_every_steps else None
    )
    # Only rank 0 chooses the checkpoint: ranks could see a damaged disk differently and start from different steps.
    step = world.first_decides(lambda: None if retrain else checkpoints.newest_whole(model))
    if step is None:
        module, optimizer, state = *distribute(whole, target.train, world), SavedState(0)
    else:
        module, optimizer, state = resume(checkpoints, step, whole, target.train, world)
    if retrain and world.is_first:
        checkpoints.clear()
    loop = Loop(module, optimizer, inputs.sequences, target.train, inputs.tokenizer.document_separator_id, world)
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
        step: the step that rank 0 chose.
        module, config, world: as for `distribute`.

    Returns:
        The module to call in the training loop, the optimiser, and the checkpoint's numbers.

    Raises:
        CorpusError: the ranks see different checkpoints of this step.
    """
    _check_equal(world, checkpoints.checksum(step), f"checkpoint {checkpoints.folder}/step-{step}")
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


def _checkpoints(config: ExperimentConfig, target: Target, inputs: TrainingInputs) -> Checkpoints:
    """The checkpoints of the training; those of the finished model may be replaced."""
    finished = read_training(config, target.name)
    return Checkpoints(
        checkpoint_folder(config.layout.checkpoint(f"train/{target.name}")),
        inputs.fingerprint,
        target.train.keep_checkpoints,
        replaceable=() if finished is None else (finished.fingerprint,),
    )


def run_steps(training: Training, run: Run | None, lease: Lease | None) -> tuple[SavedState, bool]:
    """Runs the loop to the last step, or until a signal; the last step's checkpoint is whole when this returns.

    Args:
        training: from `prepare`.
        run: the MLflow run, on rank 0; None on the others.
        lease: the training's lease, on rank 0; None on the others.

    Returns:
        The numbers of the newest checkpoint, and whether the training was stopped by a signal.

    Raises:
        MiniplmError: the loss or the gradient is not finite, a checkpoint cannot be written, the lease was lost, or
            another rank failed.
    """
    agreement = Agreement(training.world)
    if agreement.now(_wish()) is not Wish.GO_ON:
        return training.state, True
    name, total = training.target.name, training.target.train.steps - training.state.steps_done
    shown = progress(f"train {name}", total=total, unit="step") if training.world.is_first else contextlib.nullcontext()
    with CheckpointWriter(training.checkpoints, *(() if run is None else (run.tag_checkpoint,))) as writer:
        with shown as bar:
            steps = _Steps(training, run, lease, agreement, writer, bar)
            training.loop.run(training.state.steps_done, steps.on_step, steps.on_save, steps.ends, steps.on_evaluate)
        steps.finish()
    return steps.latest, steps.stopped and steps.latest.steps_done < training.target.train.steps


def record_run(checkpoints: Checkpoints, run: Run) -> None:
    """Records the id of the MLflow run, once MLflow has started it, so that a killed training continues in it.

    Args:
        checkpoints: the training's checkpoints.
        run: the training's run.

    Raises:
        MiniplmError: the file cannot be written.
    """
    if run.run_id is not None and run.run_id != checkpoints.run_id():
        checkpoints.set_run_id(run.run_id)


def _wish() -> Wish:
    return Wish.GO_ON if stopping.received() is None else Wish.STOP


class _Steps:
    """The callbacks of the loop. An error on one rank makes all ranks leave the loop after the same step."""

    def __init__(
        self,
        training: Training,
        run: Run | None,
        lease: Lease | None,
        agreement: Agreement,
        writer: CheckpointWriter,
        bar: Progress | None,
    ) -> None:
        self._training, self._run, self._lease = training, run, lease
        self._agreement, self._writer, self._bar = agreement, writer, bar
        self._started = time.perf_counter()
        self._failure: MiniplmError | None = None
        self.latest, self.stopped = training.state, False

    def on_step(self, measures: StepMeasures) -> None:
        """Logs the measures of a step on rank 0."""
        if self._run is None or self._bar is None:
            return
        self._run.log_metrics(_metrics(measures), step=measures.steps_done)
        self._bar.update(
            measures.steps_done - self._training.state.steps_done - self._bar.done,
            loss=f"{measures.loss:.4f}",
            tokens_per_second=f"{measures.tokens_per_second:,.0f}",
        )

    def on_save(self, measures: StepMeasures) -> None:
        """Gathers the state on rank 0, where the writer saves it while the next steps run."""
        seconds = self._training.state.seconds + time.perf_counter() - self._started
        points = () if self._run is None else self._run.held_points()
        self.latest = SavedState(measures.steps_done, seconds, measures.loss, points)
        tensors = gather(self._training.model, self._training.optimizer)
        if self._lease is not None and self._run is not None and tensors is not None:
            self._attempt(self._writer.finish)  # the lease may be lost while this waits
            self._attempt(self._lease.check)
            self._attempt(functools.partial(record_run, self._training.checkpoints, self._run))
            self._attempt(functools.partial(self._writer.save, self.latest, tensors))

    def on_evaluate(self, steps_done: int) -> None:
        """Evaluates the weights on rank 0; the seconds of a training are those of its steps."""
        paused = time.perf_counter()
        training = self._training
        weights = gather_weights(training.model)
        if self._run is not None and weights is not None and training.evaluation is not None:
            write = functools.partial(write_weights, training.model, weights, training.files)
            self._run.log_metrics(training.evaluation.measure(write), step=steps_done)
        self._started += time.perf_counter() - paused

    def ends(self) -> bool:
        """Whether all ranks stop after this step, because one of them received a signal."""
        self._attempt(self._writer.check)
        agreed = self._agreement.after_step(_wish() if self._failure is None else Wish.FAIL)
        self._raise_if(agreed)
        self.stopped = agreed is Wish.STOP
        return self.stopped

    def finish(self) -> None:
        """Waits until the last checkpoint is whole."""
        self._attempt(self._writer.finish)
        self._raise_if(self._agreement.now(Wish.GO_ON if self._failure is None else Wish.FAIL))

    def _attempt(self, call: Callable[[], None]) -> None:
        """Calls a function, unless an earlier one failed. Its error is raised after the ranks have agreed on it."""
        if self._failure is not None:
            return
        try:
            call()
        except MiniplmError as error:
            self._failure = error
            if self._training.world.size == 1:
                raise

    def _raise_if(self, agreed: Wish) -> None:
        if agreed is Wish.FAIL:
            raise self._failure or MiniplmError("another rank failed, and its message says why; no rank trains on")


def _metrics(measures: StepMeasures) -> dict[str, float]:
    metrics = {
        "train_loss": measures.loss,
        "learning_rate": measures.learning_rate,
        "gradient_norm": measures.gradient_norm,
        "tokens": measures.tokens,
        "tokens_per_second": measures.tokens_per_second,
    }
    optional = {"train/mfu": measures.mfu, "train/lm_loss": measures.lm_loss, "train/kd_loss": measures.kd_loss}
    return metrics | {name: value for name, value in optional.items() if value is not None}
