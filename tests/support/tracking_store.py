"""MLflow's tracking store of a test, which other tests do not see. Needs only pytest."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def own_tracking_store() -> Iterator[None]:
    """A block in which experiments log to their own stores: MLflow keeps the last store in an environment variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # so that the end of the block removes what MLflow sets in it
        patch.delenv("MLFLOW_TRACKING_URI")
        yield
