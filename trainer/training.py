"""Runs the steps of a prepared training, with metrics, checkpoints, evaluations and a progress bar.

Input: a `Training`. Output: the model's trained weights in its memory, and its checkpoints on the disk. All ranks leave
the loop after the same step: at the end, after a signal, or when one of them fails.
"""

import contextlib
import functools
import time
from collections.abc import Callable

from miniplm_udf import stopping
from miniplm_udf.errors import MiniplmError
from miniplm_udf.lease import Lease
from miniplm_udf.progress import Progress, progress
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.checkpoints.checkpoint_writer import CheckpointWriter
from trainer.loop import StepMeasures
from trainer.preparation import Training
from trainer.ranks.distributed import Agreement, Request
from trainer.ranks.state import gather, gather_weights
from trainer.results.model_folder import write_weights
from trainer.tracking.run import Run


def run_steps(training: Training, run: Run | None, lease: Lease | None) -> tuple[SavedState, bool]:
    """Runs the loop to the last step, or until a signal; the last step's checkpoint is whole when this returns.

    Args:
        training: the result of `prepare`.
        run: the MLflow run, on rank 0; None on the others.
        lease: the training's lease, on rank 0; None on the others.

    Returns:
        The numbers of the newest checkpoint, and whether the training was stopped by a signal.

    Raises:
        MiniplmError: the loss or the gradient is not finite, a checkpoint cannot be written, the lease was lost, or
            another rank failed.
    """
    agreement = Agreement(training.world)
    if agreement.now(_request()) is not Request.CONTINUE:
        return training.state, True
    name, total, done = training.target.name, training.target.train.steps, training.state.steps_done
    is_first = training.world.is_first
    shown = progress(f"train {name}", total, "steps", done) if is_first else contextlib.nullcontext()
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


def _request() -> Request:
    return Request.CONTINUE if stopping.received() is None else Request.STOP


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
            measures.steps_done - self._bar.done,
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
        """Evaluates the weights on rank 0. Evaluation time does not count as training time."""
        paused = time.perf_counter()
        training, run, evaluation = self._training, self._run, self._training.evaluation
        weights = gather_weights(training.model)
        if run is not None and weights is not None and evaluation is not None:
            write = functools.partial(write_weights, training.model, weights, training.files)
            self._attempt(lambda: run.log_metrics(evaluation.measure(write), step=steps_done))
        self._started += time.perf_counter() - paused

    def ends(self) -> bool:
        """Whether all ranks stop after this step, because one of them received a signal."""
        self._attempt(self._writer.check)
        agreed = self._agreement.after_step(_request() if self._failure is None else Request.FAIL)
        self._raise_if(agreed)
        self.stopped = agreed is Request.STOP
        return self.stopped

    def finish(self) -> None:
        """Waits until the last checkpoint is whole."""
        self._attempt(self._writer.finish)
        self._raise_if(self._agreement.now(Request.CONTINUE if self._failure is None else Request.FAIL))

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

    def _raise_if(self, agreed: Request) -> None:
        if agreed is Request.FAIL:
            raise self._failure or MiniplmError("another rank failed, and its message says why; all ranks stop")


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
