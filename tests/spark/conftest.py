"""Fixtures of the Spark tests: one Spark session, the demo's config, and what the tests of ingestion start from."""

from pathlib import Path

import pytest

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from tests.support.ingest_roots import make as make
from tests.support.ingest_roots import tokenizer_folder as tokenizer_folder
from tests.support.spark_session import REPOSITORY
from tests.support.spark_session import s3_spark as s3_spark
from tests.support.spark_session import spark as spark


@pytest.fixture
def demo_config(tmp_path: Path) -> ExperimentConfig:
    """conf/demo.yaml with its root in a temporary folder."""
    return load_config(REPOSITORY / "conf/demo.yaml", [f"root={tmp_path}/root"])
