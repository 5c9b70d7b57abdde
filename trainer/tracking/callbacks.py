"""Trackers besides MLflow: TensorBoard and Weights & Biases, each behind one small protocol.

Input: what MLflow also gets: parameters and tags, points, the final status. Owns the protocol `TrackingCallback`, its
two implementations, and `Callbacks`, which calls them: a tracker that fails gets no further calls, with a warning, and
the work continues. A training has an id of its own (`Checkpoints.tracking_id`), which its resumed processes and its
evaluation share. The packages are extras and are imported when they are used. Rank 0 only.
"""

import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.tracking import WandbConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json

LOGGER = logging.getLogger("miniplm.trainer.tracking")

# Longest time that W&B may take to ask for a key, to start a run, and to send what it holds at the end.
_WANDB_SECONDS = 60


class TrackingCallback(Protocol):
    """A tracker of one run. Calls come in this order, from one thread, and may raise anything."""

    def on_start(self, params: Json, tags: dict[str, str]) -> None:
        """Starts the run, or continues it.

        Args:
            params: nested values by name; empty for an evaluation.
            tags: further facts by name.
        """

    def on_metrics(self, values: dict[str, float], step: int | None) -> None:
        """Logs values.

        Args:
            values: value of each metric, by its name.
            step: optimiser step; None for values of the trained model.
        """

    def on_end(self, status: str) -> None:
        """Ends the run.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
        """


class Callbacks:
    """The callbacks of one run; the first error of a callback ends it, with a warning.

    Args:
        callbacks: the callbacks.
    """

    def __init__(self, callbacks: Sequence[TrackingCallback] = ()) -> None:
        self._callbacks = list(callbacks)

    def on_start(self, params: Json, tags: dict[str, str]) -> None:
        """Starts every tracker with `params` and `tags`."""
        self._each(lambda callback: callback.on_start(params, tags))

    def on_metrics(self, values: dict[str, float], step: int | None) -> None:
        """Gives `values` of a `step` to every tracker."""
        self._each(lambda callback: callback.on_metrics(values, step))

    def on_end(self, status: str) -> None:
        """Ends every tracker with a `status`."""
        self._each(lambda callback: callback.on_end(status))

    def _each(self, call: Callable[[TrackingCallback], None]) -> None:
        for callback in tuple(self._callbacks):
            try:
                call(callback)
            except Exception as error:  # the packages have errors of many classes
                self._callbacks.remove(callback)
                reason = storage.redact(next(iter(str(error).splitlines()), ""))
                name, kind = type(callback).__name__, type(error).__name__
                LOGGER.warning("%s gets no further values: %s: %s; the work continues", name, kind, reason)


class TensorBoard:
    """Writes the curve of a training into a folder, which resumed processes continue.

    Args:
        folder: the training's folder; a path, or a URI that TensorBoard can write.
        steps_done: steps of the checkpoint that the training resumes from. Later points in the folder are hidden,
            because the training writes them again.
    """

    def __init__(self, folder: str, steps_done: int) -> None:
        self._folder, self._step = folder, steps_done
        self._writer: Any = None

    def on_start(self, params: Json, tags: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=self._step + 1)
        facts = {"params": params, "tags": tags}
        self._writer.add_text("run", f"```json\n{json.dumps(facts, indent=2, sort_keys=True)}\n```", self._step)

    def on_metrics(self, values: dict[str, float], step: int | None) -> None:
        self._step = self._step if step is None else step
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._step)
        self._writer.flush()  # a training that is killed resumes after a step whose points must be in the file

    def on_end(self, status: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs a training as a run of a W&B project, which resumed processes continue.

    Args:
        config: project, entity and mode.
        name: name of the model, which names the run.
        group: name of the experiment.
        folder: W&B keeps its files in `wandb/` below it.
        run_id: the training's id, which is also the run's.
    """

    def __init__(self, config: WandbConfig, *, name: str, group: str, folder: Path, run_id: str) -> None:
        self._config, self._name, self._group, self._folder, self._run_id = config, name, group, folder, run_id
        # W&B ignores a step that it already has, but in offline mode a new process does not know the earlier steps.
        self._newest_file = folder / "wandb" / f"{run_id}.newest-step"
        self._logged_before = -1
        self._run: Any = None

    def on_start(self, params: Json, tags: dict[str, str]) -> None:
        import wandb

        self._newest_file.parent.mkdir(parents=True, exist_ok=True)
        if self._newest_file.exists():
            self._logged_before = int(self._newest_file.read_text())
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            id=self._run_id,
            resume="allow",
            name=self._name,
            group=self._group,
            dir=str(self._folder),
            config={**params, "tags": tags} if params else None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                login_timeout=_WANDB_SECONDS,  # a terminal without a key is asked for one
                init_timeout=_WANDB_SECONDS,
                finish_timeout=_WANDB_SECONDS,
            ),
        )

    def on_metrics(self, values: dict[str, float], step: int | None) -> None:
        if step is None:  # W&B accepts no second row for the same step
            self._run.summary.update(values)
            return
        if step > self._logged_before:
            self._run.log(values, step=step)
            self._newest_file.write_text(str(step))

    def on_end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


def require_packages(config: ExperimentConfig) -> None:
    """Checks that the packages of the configured trackers are installed.

    Args:
        config: the experiment.

    Raises:
        ConfigError: a package is missing.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name}: expected the package {name}, which is not installed: pip install 'miniplm[{name}]', or "
                f"remove the section {name}"
            )


def callbacks_of(config: ExperimentConfig, name: str, tracking_id: str | None, steps_done: int) -> Callbacks:
    """Returns the callbacks of the configured trackers.

    Args:
        config: the experiment.
        name: name of the model.
        tracking_id: the training's id; None, for a model of an earlier version, gives no callbacks.
        steps_done: optimiser steps that the weights have had.
    """
    callbacks: list[TrackingCallback] = []
    if tracking_id is None:
        return Callbacks()
    if config.tensorboard is not None:
        base = storage.to_uri(config.tensorboard.folder or str(config.local_folder() / "tensorboard"))
        folder = storage.join(storage.local_path(base) if storage.is_local(base) else base, name, tracking_id[:8])
        callbacks.append(TensorBoard(folder, steps_done))
    if config.wandb is not None:
        callbacks.append(
            WeightsAndBiases(
                config.wandb,
                name=name,
                group=config.mlflow.experiment,
                folder=config.local_folder(),
                run_id=tracking_id,
            )
        )
    return Callbacks(callbacks)
