"""One Spark session for all Spark tests of a pytest process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import session as session_module
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import SparkConfig
from tests.support.short_lived import SMALL_TABLES

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
