"""MLflow's tracking stores of tests: each test sees its own, and an empty one is made once for a process.

MLflow is imported only where a store is made.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

DATABASE = "mlflow.db"


@contextlib.contextmanager
def own_tracking_store() -> Iterator[None]:
    """A block in which experiments log to their own stores: MLflow keeps the last store in an environment variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # so that the end of the block removes what MLflow sets in it
        patch.delenv("MLFLOW_TRACKING_URI")
        yield


def write_empty_store(folder: Path) -> None:
    """Writes MLflow's SQLite store without an experiment: making its tables takes MLflow a second of processor time."""
    (folder / DATABASE).write_bytes(_empty_store())


@functools.cache
def _empty_store() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/{DATABASE}"
        MlflowClient(tracking_uri=uri).search_experiments()
        return (Path(folder) / DATABASE).read_bytes()
