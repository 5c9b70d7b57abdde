"""Silences some loggers of Spark, because this project reports the failure itself. Driver only.

Spark logs a failed query or task with its Java stack. This project logs one line about the failure, which the stack
would hide. Nothing is lost: a failure that ends the command is raised with the same stack, which `--debug` shows. With
`--debug`, or `MINIPLM_SPARK_LOG_LEVEL` in the environment, all loggers stay as they are.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from miniplm_udf.progress import is_debug

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Loggers of failed queries, and of failed tasks.
QUERY_LOGGER = "org.apache.spark.sql.execution.streaming.runtime.MicroBatchExecution"
TASK_LOGGERS = (
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.api.python.PythonRunner",
)


def is_wanted() -> bool:
    """Whether the user wants to see Spark's log: `--debug`, or `MINIPLM_SPARK_LOG_LEVEL` in the environment."""
    return is_debug() or "MINIPLM_SPARK_LOG_LEVEL" in os.environ


def silence(spark: "SparkSession", names: Sequence[str]) -> None:
    """Silences the Java loggers of these names until the JVM ends.

    Args:
        spark: any session.
        names: names of Java loggers.
    """
    log4j = spark._jvm.org.apache.logging.log4j
    for name in names:
        log4j.core.config.Configurator.setLevel(name, log4j.Level.OFF)


@contextlib.contextmanager
def silenced(spark: "SparkSession", names: Sequence[str]) -> Iterator[None]:
    """Silences the Java loggers of these names, and py4j's logger of failed callbacks, while the block runs.

    Args:
        spark: any session.
        names: names of Java loggers; nothing is silenced with `--debug`, or if `MINIPLM_SPARK_LOG_LEVEL` is set.
    """
    if is_wanted():
        yield
        return
    log4j = spark._jvm.org.apache.logging.log4j
    configuration = log4j.LogManager.getContext(False).getConfiguration()
    configs = {name: configuration.getLoggerConfig(name) for name in names}
    # None means the level of the parent logger, which may change later.
    levels = {name: c.getExplicitLevel() if c.getName() == name else None for name, c in configs.items()}
    proxy_logger = logging.getLogger("py4j.clientserver")
    level = proxy_logger.level
    silence(spark, names)
    proxy_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        proxy_logger.setLevel(level)
        for name, before in levels.items():
            log4j.core.config.Configurator.setLevel(name, before)
