"""The connection to MLflow's store, and the runs that are in it.

Input: the store of the config, else MLFLOW_TRACKING_URI, else SQLite in the config's local folder. `connect` selects
the experiment. The rest finds runs again, and tells the store's errors from ours.
"""

import logging
import os
from typing import Any

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import mlflow_errors
from trainer.tracking.outbox import is_refusal

LOGGER = logging.getLogger("miniplm.trainer.tracking")

# The trainer's stdout has its result alone, as JSON; with a server, MLflow would print links to it.
_STDOUT = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
# MLflow's own retries handle a short interruption; the outbox tries again after them.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# A server that stores artifacts elsewhere answers only after it has stored them, which may be gigabytes.
_SECONDS_OF_AN_UPLOAD = "1800"
# The tag by which a training finds a run that it created, but whose id it lost: MLflow's answer was lost, or the
# training was killed.
TRAINING_TAG = "training_id"


def connect(config: ExperimentConfig) -> Any:
    """Connects MLflow to the store of the config and selects the experiment; creates the experiment if needed.

    Args:
        config: the experiment.

    Returns:
        The `mlflow` module. It takes 3 s to import, so it is imported here.
    """
    for variable, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **_STDOUT, **_PATIENCE}.items():
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
        config.local_folder().mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.disable_system_metrics_logging()
    if mlflow.get_experiment_by_name(config.mlflow.experiment) is None:
        mlflow.create_experiment(config.mlflow.experiment, artifact_location=config.artifact_uri())
    mlflow.set_experiment(config.mlflow.experiment)
    return mlflow


def existing_run(mlflow: Any, run_id: str | None, experiment_id: str | None = None) -> str | None:
    """Returns `run_id` if the store has this run and it is not deleted, else None.

    Args:
        mlflow: the result of `connect`.
        run_id: id of a run.
        experiment_id: the experiment that the run has to be in; None allows any.
    """
    if run_id is None:
        return None
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except mlflow.exceptions.MlflowException as error:
        if not is_refusal(error):  # the store cannot be reached
            raise
        LOGGER.warning("MLflow run %s is not in this store: a new run is started", run_id)
        return None
    if experiment_id not in (None, run.info.experiment_id):
        LOGGER.warning("MLflow run %s is in another experiment: a new run is started", run_id)
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def run_of_training(mlflow: Any, experiment_id: str, training_id: str) -> str | None:
    """Returns the id of the oldest run that a training has created in an experiment; None if there is no run.

    Args:
        mlflow: the result of `connect`.
        experiment_id: the experiment.
        training_id: the value of the run's tag `TRAINING_TAG`.
    """
    client, condition = mlflow.MlflowClient(), f"tags.{TRAINING_TAG} = '{training_id}'"
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"])
    return runs[0].info.run_id if runs else None


def wait_for_uploads() -> None:
    """Makes MLflow wait longer for the answer to an upload of weights, unless the user has set the time."""
    variable = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    if os.environ.get(variable) == _PATIENCE[variable]:
        os.environ[variable] = _SECONDS_OF_AN_UPLOAD


def is_artifact_error(error: Exception) -> bool:
    """Whether an error comes from MLflow or its place of artifacts (a folder, an object store), and not from our code.

    Args:
        error: raised while artifacts were written.
    """
    # The packages of object stores have their own classes; a package that is missing is an ImportError.
    return isinstance(error, (*mlflow_errors(), ImportError)) or type(error).__module__ != "builtins"
