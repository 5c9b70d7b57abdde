"""One Spark session for all Spark tests of a pytest process, and its settings while tests of S3 run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import session as session_module
from miniplm_udf import object_storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.config.spark import SparkConfig
from tests.support import s3_server
from tests.support.short_lived import SMALL_TABLES

REPOSITORY = Path(__file__).resolve().parents[2]
_MANAGER = "spark.sql.streaming.checkpointFileManagerClass"
# The manager that Spark chooses for a local checkpoint.
_LOCAL_MANAGER = "org.apache.spark.sql.execution.streaming.checkpointing.FileContextBasedCheckpointFileManager"


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    # Jars can only be given when a JVM starts, and a root on S3 adds the jars for S3. Nothing is read or written there.
    config = ExperimentConfig(
        root="s3a://unused/root",
        spark=SparkConfig(
            master="local[2]", conf={"spark.driver.memory": "2g", _MANAGER: _LOCAL_MANAGER, **SMALL_TABLES}
        ),
    )
    before = dict(os.environ)
    made = session_module.make_session(config, "miniplm tests")
    for name in object_storage.service(StorageConfig(), before).environment():
        os.environ.pop(name, None)
        made.sparkContext.environment.pop(name, None)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def s3_spark(spark: Any, s3: s3_server.S3Server) -> Iterator[Any]:
    """A session that reaches the server of the fixture `s3`; sessions that are made from it reach the server too."""
    context = spark.sparkContext
    environment, conf = dict(context.environment), context._jsc.sc().conf()
    variables = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "FSSPEC_"))}
    context.environment.update(variables)
    credentials = {"access.key": "test-key", "secret.key": "test-secret"}
    properties = object_storage.service(StorageConfig(), os.environ).spark_properties()
    properties |= {f"spark.hadoop.fs.s3a.{key}": value for key, value in credentials.items()}
    for key, value in properties.items():
        if key.startswith("spark.hadoop."):
            context._jsc.hadoopConfiguration().set(key.removeprefix("spark.hadoop."), value)
    conf.set(_MANAGER, properties[_MANAGER])
    yield spark.newSession()
    conf.set(_MANAGER, _LOCAL_MANAGER)
    context.environment.clear()
    context.environment.update(environment)
    # The next server has another port.
    uri = spark._jvm.java.net.URI(f"s3a://{s3_server.BUCKET}/")
    spark._jvm.org.apache.hadoop.fs.FileSystem.get(uri, context._jsc.hadoopConfiguration()).close()
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()
