"""One Spark session for all Spark tests, and small helpers. `maxFailures` is 1: a failure shows at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import session as session_module
from miniplm_udf.config import ExperimentConfig, SparkConfig, load_config
from tests.short_lived import SMALL_TABLES

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    config = ExperimentConfig(
        root="/tmp/unused",
        spark=SparkConfig(master="local[2]", conf={"spark.driver.memory": "2g", **SMALL_TABLES}),
    )
    made = session_module.make_session(config, "miniplm tests")
    yield made
    made.stop()


@pytest.fixture
def demo_config(tmp_path: Path) -> ExperimentConfig:
    """conf/demo.yaml with its root in a temporary folder."""
    return load_config(REPOSITORY / "conf/demo.yaml", [f"root={tmp_path}/root"])
