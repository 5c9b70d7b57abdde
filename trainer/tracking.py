"""MLflow: one run a model, with parameters, curves, and the Delta version it was trained on as dataset input.

Owns the choice of store (config, else MLFLOW_TRACKING_URI, else SQLite beside the report) and the names of what is
logged. Runs on rank 0 alone. Needs no JVM: the dataset input is a reference to a table and version, not a read of it.
A resumed training goes on in its run; a step logged twice has the same value twice. No secret goes in: URIs are
redacted.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config import ExperimentConfig

LOGGER = logging.getLogger("miniplm.trainer.tracking")


def connect(config: ExperimentConfig) -> Any:
    """Points MLflow at the experiment's store and experiment.

    Returns:
        The `mlflow` module, which takes 3 s to import and is therefore imported here.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    for name in (
        "alembic",
        "mlflow",
        "mlflow.store.db.utils",
    ):  # the import sets them anew
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


def _known_run(mlflow: Any, run_id: str | None) -> str | None:
    """`run_id` where the store has it, undeleted."""
    if run_id is None:
        return None
    try:
        found = mlflow.MlflowClient().get_run(run_id)
    except mlflow.exceptions.MlflowException:
        LOGGER.warning("MLflow run %s is not in this store: a new run is started", run_id)
        return None
    return run_id if found.info.lifecycle_stage == "active" else None


class Run:
    """An open MLflow run."""

    def __init__(self, mlflow: Any, run_id: str, is_new: bool):
        self._mlflow, self.run_id, self.is_new = mlflow, run_id, is_new

    def log_params(self, params: dict[str, Any]) -> None:
        """Logs parameters of a new run; those of a run that goes on stay, since MLflow's cannot change."""
        if self.is_new:
            self._mlflow.log_params(_flatten(params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def log_table(
        self,
        uri: str,
        version: int,
        name: str,
        digest: str,
        metadata: dict[str, Any] | None,
    ) -> None:
        """The Delta table and version as dataset input, and as tags, with the lineage behind it.

        Args:
            uri: of the table.
            version: trained on.
            name: of the dataset: the table's under `tables/`.
            digest: the manifest's hash.
            metadata: the table's `userMetadata`.
        """
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset

        shown = storage.redact(uri)
        source = DeltaDatasetSource(path=shown, delta_table_version=version)
        dataset = MetaDataset(source=source, name=name, digest=digest)  # type: ignore[abstract,unused-ignore]
        self._mlflow.log_input(dataset, context="training")
        lineage = metadata or {}
        # DeltaDatasetSource drops version 0 (ENGINE.md), so the version is a tag as well.
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
        self._mlflow.set_tags({key: str(value) for key, value in tags.items() if value is not None})
        self._mlflow.log_dict(lineage, "lineage.json")

    def set_tags(self, tags: dict[str, Any]) -> None:
        self._mlflow.set_tags(tags)


@contextmanager
def tracked_run(config: ExperimentConfig, name: str, run_id: str | None = None) -> Iterator[Run]:
    """The run of a model: `run_id` goes on where the store has it, else a new one starts. An error fails it."""
    mlflow = connect(config)
    known = _known_run(mlflow, run_id)
    with mlflow.start_run(run_id=known, run_name=None if known else name) as active:
        yield Run(mlflow, active.info.run_id, is_new=known is None)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _find(value: Any, key: str) -> Any:
    """The first value of `key` anywhere inside nested mappings."""
    if not isinstance(value, dict):
        return None
    if key in value:
        return value[key]
    return next(
        (found for inner in value.values() if (found := _find(inner, key)) is not None),
        None,
    )
