"""MLflow tracking: one run per model, with parameters, curves, and the packed table's Delta version as dataset input.

Owns the names of parameters, metrics and tags. Runs on rank 0. Needs no JVM: the dataset input names a table and a
version and does not read them. A resumed training continues in its run; a step that is logged twice has the same value
twice. URIs are redacted, so no secret is logged. Tracking never stops the work: calls are made in a thread, in order,
and kept while the store cannot be reached. The numbers are in the model folder's JSON files in any case.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import first_line
from miniplm_udf.storage import Json
from miniplm_udf.store.provenance import PackedMetadata
from trainer.tracking import parent_runs
from trainer.tracking.callbacks import Callbacks
from trainer.tracking.environment import code_tags, table_tags
from trainer.tracking.metric_names import safe_names
from trainer.tracking.outbox import Outbox, Point
from trainer.tracking.store import TRAINING_TAG, connect, existing_run, is_artifact_error, run_of_training
from trainer.tracking.system_metrics import SystemMetrics

LOGGER = logging.getLogger("miniplm.trainer.tracking")

# MLflow's limits: parameters or tags in one call, metrics in one call.
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000
# A stopped or failed run waits at most this long for MLflow, because its user waits for the command to end.
_WAIT_OF_A_STOPPED_RUN_SECONDS = 5.0
# The last tag of a training's start. A run without it lacks facts of the start, for example because it was killed.
_LAST_TAG_OF_THE_START = "fingerprint"


class Run:
    """An MLflow run. Its calls return at once; a thread makes them, and repeats failed calls (`outbox.Outbox`).

    Attributes:
        name: name of the model.
        callbacks: other trackers, which get the same metrics.
        run_id: id of the run, or None as long as MLflow could not start it.
        is_new: whether the facts of a training's start are still missing in the run; False for a run that continues.
        stopped: whether a signal stops the training; its run ends as KILLED.
    """

    def __init__(self, name: str, callbacks: Callbacks | None = None) -> None:
        self.name, self.is_new, self.stopped = name, True, False
        self.callbacks = callbacks or Callbacks()
        self.run_id: str | None = None
        self._started, self._experiment_id, self._parent = 0, "", ""
        self._parent_name: str | None = None
        self._system_metrics: SystemMetrics | None = None
        self._is_ending = False
        self._mlflow: Any = None
        self._outbox = Outbox(name, self._send)

    def start(self, config: ExperimentConfig, run_id: str | None, training_id: str | None = None) -> None:
        """Starts a new run, or continues the run of this training. Waits for the first attempt only.

        Args:
            config: the experiment.
            run_id: id of the run to continue, if the store has it.
            training_id: continues the run that this training created before, if there is no `run_id`; tags a new run.
        """

        def start() -> None:
            mlflow = connect(config)
            self._experiment_id = mlflow.get_experiment_by_name(config.mlflow.experiment).experiment_id
            existing = existing_run(mlflow, run_id, self._experiment_id)
            tags = {}
            if training_id is not None:
                existing = existing or run_of_training(mlflow, self._experiment_id, training_id)
                tags = {TRAINING_TAG: training_id}
            if config.mlflow.parent_run is not None:
                self._parent = parent_runs.find_or_create(
                    mlflow.MlflowClient(), self._experiment_id, config.mlflow.parent_run
                )
                tags |= parent_runs.tag(self._parent)
            active = mlflow.start_run(run_id=existing, run_name=None if existing else self.name, tags=tags)
            self._mlflow, self.is_new = mlflow, _LAST_TAG_OF_THE_START not in active.data.tags
            self.run_id, self._started = active.info.run_id, active.info.start_time

        self._parent_name = config.mlflow.parent_run
        self._outbox.call("start of the run", start)
        self._outbox.wait_for_attempt()

    def end(self, status: str, wait_seconds: float) -> None:
        """Ends the run, and waits until the store has every call and point.

        Args:
            status: MLflow's status: `FINISHED`, `FAILED` or `KILLED`.
            wait_seconds: longest time to wait for a store that cannot be reached.
        """
        self._is_ending = True
        if self._system_metrics is not None:
            self._system_metrics.stop()
        self.callbacks.on_end(status)
        self._log("end of the run", lambda: self._mlflow.end_run(status))
        if self._parent_name is not None:
            self._log("end of the parent run", functools.partial(self._end_parent, self._parent_name))
        self._outbox.close(wait_seconds)

    def _end_parent(self, name: str) -> None:
        client = self._mlflow.MlflowClient()
        parent = parent_runs.agree(client, self._experiment_id, name, self._parent, str(self.run_id))
        parent_runs.end(client, self._experiment_id, parent)

    def _log(self, what: str, call: Callable[[], Any], raises: bool = True) -> None:
        """Adds a call, which is not made if the run was never started."""
        self._outbox.call(what, lambda: None if self._mlflow is None else call(), raises=raises)

    def _send(self, points: Sequence[Point]) -> None:
        if self._mlflow is None:
            return
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point.timestamp, point.step or 0)
            for point in points
            for name, value in point.values.items()
        ]
        self._mlflow.MlflowClient().log_batch(self.run_id, metrics=metrics)

    def log_params(self, params: Json) -> None:
        """Logs the parameters of a new run; nested keys are joined with dots.

        A run that continues keeps its parameters, because MLflow does not let them change.

        Args:
            params: values by name; a value may be a dictionary of further names.
        """
        flat = _flatten(params)
        names = safe_names(flat)
        values = {names[key]: value for key, value in flat.items()}
        for part in _parts(values, _PARAMS_A_CALL):
            self._log("parameters", functools.partial(self._params, part))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Logs metric values of this moment.

        Args:
            metrics: value by name.
            step: optimiser step of the values, for a curve; None for single values.
        """
        self.callbacks.on_metrics(metrics, step)
        now = time.time_ns() // 1_000_000
        for part in _parts(metrics, _METRICS_A_CALL):
            self._outbox.point(Point(part, step, now))

    def log_points(self, points: Sequence[Point]) -> None:
        """Logs points that an earlier process held back.

        Args:
            points: the result of `held_points`; the store keeps one copy of a point that it already has.
        """
        for point in points:
            self._outbox.point(point)

    def held_points(self) -> tuple[Point, ...]:
        """The points that MLflow does not have yet."""
        return self._outbox.held_points()

    def _params(self, part: Json) -> None:
        if self.is_new:
            self._mlflow.log_params(part)

    def log_table(
        self,
        uri: str,
        version: int,
        name: str,
        digest: str,
        metadata: PackedMetadata | None,
    ) -> dict[str, str]:
        """Logs the packed table of a new run as dataset input and as tags, and its lineage as artifact `lineage.json`.

        Args:
            uri: URI of the table.
            version: Delta version that the model is trained on.
            name: name of the dataset: the table's name under `tables/`.
            digest: manifest hash of the version.
            metadata: `userMetadata` of the table, or None.

        Returns:
            The tags of the table.
        """
        shown = storage.redact(uri)

        def log_input() -> None:
            from mlflow.data.delta_dataset_source import DeltaDatasetSource
            from mlflow.data.meta_dataset import MetaDataset

            source = DeltaDatasetSource(path=shown, delta_table_version=version)
            dataset = MetaDataset(source=source, name=name, digest=digest)  # type: ignore[abstract,unused-ignore]
            self._mlflow.log_input(dataset, context="training")

        lineage: PackedMetadata = metadata or {}
        texts = table_tags(uri, version, digest, lineage)
        for add, what, call in (
            (self._log, "dataset", log_input),
            (self._log, "tags of the dataset", lambda: self._mlflow.set_tags(texts)),
            (self._log_artifacts, "lineage", lambda: self._mlflow.log_dict(lineage, "lineage.json")),
        ):
            add(what, lambda call=call: call() if self.is_new else None)  # type: ignore[misc]
        return texts

    def log_start(self, files: dict[str, str], steps_done: int) -> None:
        """Logs the files of a start as artifacts, and makes the tags of a git checkout describe this package's code.

        Args:
            files: texts by the name of their file. A run that continues logs them below `resumed_after_step_N`, so that
                the files of every start are kept.
            steps_done: optimiser steps that the weights have had.
        """

        def log_files() -> None:
            folder = "" if self.is_new else f"resumed_after_step_{steps_done}/"
            for name, text in files.items():
                self._mlflow.log_text(text, f"{folder}{name}")

        def tag_code() -> None:
            for tag, value in code_tags(self._mlflow.active_run().data.tags).items():
                if value is None:
                    self._mlflow.delete_tag(tag)
                else:
                    self._mlflow.set_tag(tag, value)

        self._log("tags of the code", tag_code)
        self._log_artifacts("files of the start", log_files)

    def measure_system(self) -> None:
        """Logs the use of this machine until the end of the run, from the moment in which MLflow has the run."""

        def measure() -> None:
            log = functools.partial(self._outbox.point, raises=False)
            self._system_metrics = SystemMetrics(str(self.run_id), self._started, log)
            if self._is_ending:  # MLflow could not be reached until now
                self._system_metrics.stop()

        self._log("start of the system metrics", measure)

    def _log_artifacts(self, what: str, call: Callable[[], None]) -> None:
        """Adds a call that writes artifacts; if they cannot be written, the other calls continue."""

        def attempt() -> None:
            try:
                call()
            except Exception as error:
                if not is_artifact_error(error):
                    raise
                # Raises if MLflow itself cannot be reached: then the call is made again.
                self._mlflow.MlflowClient().get_run(self.run_id)
                reason = storage.redact(first_line(error))
                LOGGER.warning("%s: MLflow does not take the %s: %s; the work continues", self.name, what, reason)

        self._log(what, attempt)

    def tag_checkpoint(self, step: int, path: Path) -> None:
        """Tags the run with its newest checkpoint. May be called in the thread that saves checkpoints.

        Args:
            step: the checkpoint's step.
            path: its folder.
        """
        tags = {"checkpoint_uri": storage.to_uri(str(path)), "checkpoint_step": str(step)}
        self._log("tags of the checkpoint", lambda: self._mlflow.set_tags(tags), raises=False)

    def set_tags(self, tags: dict[str, str]) -> None:
        """Sets tags of the run.

        Args:
            tags: values by name.
        """
        self._log("tags", lambda: self._mlflow.set_tags(tags))


@contextmanager
def tracked_run(
    config: ExperimentConfig,
    name: str,
    run_id: str | None = None,
    callbacks: Callbacks | None = None,
    training_id: str | None = None,
) -> Iterator[Run]:
    """Yields the MLflow run of a model and ends it: as FAILED if the block raises, as KILLED if it was stopped.

    Args:
        config: the experiment, with the store.
        name: name of the model, which names a new run.
        run_id: run to continue, if the store has it.
        callbacks: other trackers.
        training_id: id of the training; see `Run.start`.
    """
    run = Run(name, callbacks)
    run.start(config, run_id, training_id)
    try:
        yield run
    except BaseException:
        run.end("FAILED", min(config.mlflow.wait_seconds, _WAIT_OF_A_STOPPED_RUN_SECONDS))
        raise
    if run.stopped:
        run.end("KILLED", min(config.mlflow.wait_seconds, _WAIT_OF_A_STOPPED_RUN_SECONDS))
    else:
        run.end("FINISHED", config.mlflow.wait_seconds)


def _parts(values: Json, size: int) -> Iterator[Json]:
    """Splits a dict into dicts of at most `size` entries."""
    names = list(values)
    return ({name: values[name] for name in names[i : i + size]} for i in range(0, len(names), size))


def _flatten(values: Json, prefix: str = "") -> Json:
    """Nested dicts as one dict whose keys are joined with dots."""
    flat: Json = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
