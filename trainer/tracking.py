"""MLflow tracking: one run per model, with parameters, curves, and the packed table's Delta version as dataset input.

Owns the connection to the store (from the config, else MLFLOW_TRACKING_URI, else SQLite next to the report) and the
names of parameters, metrics and tags. Runs on rank 0. Needs no JVM: the dataset input names a table and a version and
does not read them. A resumed training continues in its run; a step that is logged twice has the same value twice. URIs
are redacted, so no secret is logged. Tracking never stops the work: a failed call is a warning, and after three
failures in a row no further call is made. The numbers are in the model folder's JSON files in any case.
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import mlflow_errors
from miniplm_udf.storage import Json
from trainer.metric_names import safe_names

LOGGER = logging.getLogger("miniplm.trainer.tracking")

# MLflow's limits: parameters or tags in one call, metrics in one call.
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000
# After this many failures in a row no further call is made: each call to an unreachable server waits.
_FAILURES_IN_A_ROW = 3
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def connect(config: ExperimentConfig) -> Any:
    """Connects MLflow to the store of the config and selects the experiment; creates the experiment if needed.

    Args:
        config: the experiment.

    Returns:
        The `mlflow` module. It takes 3 s to import, so it is imported here.
    """
    for variable, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **_PATIENCE}.items():
        os.environ.setdefault(variable, value)
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    for name in (
        "alembic",
        "mlflow",
        "mlflow.store.db.utils",
    ):  # the import sets them again
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = config.mlflow_uri()
    if uri.startswith("sqlite:"):
        config.report_folder().mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.disable_system_metrics_logging()
    if mlflow.get_experiment_by_name(config.mlflow.experiment) is None:
        mlflow.create_experiment(config.mlflow.experiment, artifact_location=config.artifact_uri())
    mlflow.set_experiment(config.mlflow.experiment)
    return mlflow


def _existing_run(mlflow: Any, run_id: str | None) -> str | None:
    """Returns `run_id` if the store has this run and it is not deleted, else None."""
    if run_id is None:
        return None
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except mlflow.exceptions.MlflowException:
        LOGGER.warning("MLflow run %s is not in this store: a new run is started", run_id)
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


class Run:
    """An MLflow run. A call that fails logs a warning and raises nothing.

    Attributes:
        name: name of the model.
        run_id: id of the run, or None if MLflow could not start it.
        is_new: whether the run was started here; False for a run that continues.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_new = name, True
        self.run_id: str | None = None
        self._mlflow: Any = None
        self._failures = 0

    def start(self, config: ExperimentConfig, run_id: str | None) -> None:
        """Starts a new run, or continues `run_id` if the store has it.

        Args:
            config: the experiment.
            run_id: id of the run to continue; None starts a new one.
        """

        def start() -> None:
            mlflow = connect(config)
            existing = _existing_run(mlflow, run_id)
            active = mlflow.start_run(run_id=existing, run_name=None if existing else self.name)
            self._mlflow, self.run_id, self.is_new = mlflow, active.info.run_id, existing is None

        self._try("the run cannot be started", start)

    def end(self, status: str) -> None:
        """Ends the run with an MLflow status: `FINISHED` or `FAILED`.

        Args:
            status: `FINISHED` or `FAILED`.
        """
        if self._mlflow is not None:
            self._try("the run cannot be ended", lambda: self._mlflow.end_run(status))

    def _try(self, problem: str, call: Callable[[], Any]) -> None:
        """Calls MLflow and turns a failure into a warning."""
        if self._failures >= _FAILURES_IN_A_ROW:
            return
        try:
            call()
        except mlflow_errors() as error:
            self._failures += 1
            shown = storage.redact(next(iter(str(error).splitlines()), type(error).__name__))
            LOGGER.warning("%s: MLflow: %s: %s; the work continues", self.name, problem, shown)
            if self._failures == _FAILURES_IN_A_ROW:
                LOGGER.warning("%s: MLflow failed %d times in a row: no further calls", self.name, self._failures)
        else:
            self._failures = 0

    def _log(self, problem: str, call: Callable[[], Any]) -> None:
        if self._mlflow is not None:
            self._try(problem, call)

    def log_params(self, params: Json) -> None:
        """Logs the parameters of a new run; nested keys are joined with dots.

        A run that continues keeps its parameters, because MLflow does not let them change.

        Args:
            params: values by name; a value may be a dictionary of further names.
        """
        flat = _flatten(params)
        names = safe_names(flat)
        values = {names[key]: value for key, value in flat.items()}
        if self.is_new:
            for part in _parts(values, _PARAMS_A_CALL):
                self._log("parameters are not logged", functools.partial(self._params, part))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Logs metric values.

        Args:
            metrics: value by name.
            step: optimiser step of the values, for a curve; None for single values.
        """
        for part in _parts(metrics, _METRICS_A_CALL):
            self._log("metrics are not logged", functools.partial(self._metrics, part, step))

    def _params(self, part: Json) -> None:
        self._mlflow.log_params(part)

    def _metrics(self, part: dict[str, float], step: int | None) -> None:
        self._mlflow.log_metrics(part, step=step)

    def log_table(
        self,
        uri: str,
        version: int,
        name: str,
        digest: str,
        metadata: Json | None,
    ) -> None:
        """Logs the packed table as dataset input and as tags, and its lineage as the artifact `lineage.json`.

        Args:
            uri: URI of the table.
            version: Delta version that the model is trained on.
            name: name of the dataset: the table's name under `tables/`.
            digest: manifest hash of the version.
            metadata: `userMetadata` of the table, or None.
        """
        shown = storage.redact(uri)

        def log_input() -> None:
            from mlflow.data.delta_dataset_source import DeltaDatasetSource
            from mlflow.data.meta_dataset import MetaDataset

            source = DeltaDatasetSource(path=shown, delta_table_version=version)
            dataset = MetaDataset(source=source, name=name, digest=digest)  # type: ignore[abstract,unused-ignore]
            self._mlflow.log_input(dataset, context="training")

        self._log("the dataset is not logged", log_input)
        lineage = metadata or {}
        # DeltaDatasetSource drops version 0, so the version is also a tag.
        tags = {
            "delta_table_uri": shown,
            "delta_table_version": version,
            "manifest_hash": digest,
        }
        tags |= {
            "corpus": lineage.get("corpus"),
            "refined_version": lineage.get("refined_version"),
        }
        revisions = _find(lineage.get("refined_metadata"), "model_revisions")
        tags["model_revisions"] = json.dumps(revisions, sort_keys=True) if revisions else None
        self.set_tags({key: str(value) for key, value in tags.items() if value is not None})
        self._log("the lineage is not logged", lambda: self._mlflow.log_dict(lineage, "lineage.json"))

    def set_tags(self, tags: dict[str, str]) -> None:
        """Sets tags of the run.

        Args:
            tags: values by name.
        """
        self._log("tags are not set", lambda: self._mlflow.set_tags(tags))


@contextmanager
def tracked_run(config: ExperimentConfig, name: str, run_id: str | None = None) -> Iterator[Run]:
    """Yields the MLflow run of a model and ends it: as FAILED if the block raises, else as FINISHED.

    Args:
        config: the experiment, with the store.
        name: name of the model, which names a new run.
        run_id: run to continue, if the store has it.
    """
    run = Run(name)
    run.start(config, run_id)
    try:
        yield run
    finally:
        run.end("FINISHED" if sys.exc_info()[0] is None else "FAILED")


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


def _find(value: Any, key: str) -> Any:
    """The first value of `key` in nested dicts, searched depth first; None if there is none."""
    if not isinstance(value, dict):
        return None
    if key in value:
        return value[key]
    return next(
        (match for inner in value.values() if (match := _find(inner, key)) is not None),
        None,
    )
