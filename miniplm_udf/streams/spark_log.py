"""Silences some loggers of Spark, because this project reports the failure itself, and its first lines. Driver only.

Spark logs a failed query or task with its Java stack. This project logs one line about the failure, which the stack
would hide. Nothing is lost: a failure that ends the command is raised with the same stack, which `--debug` shows. A JVM
that a command starts reads spark_log4j2.properties, so that Spark does not begin with lines about its own log. With
`--debug`, or `MINIPLM_SPARK_LOG_LEVEL` in the environment, all loggers stay as they are.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
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
# Variables of the environment with options of Java.
_JAVA_OPTIONS = ("SPARK_SUBMIT_OPTS", "JDK_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS")


def is_wanted() -> bool:
    """Whether the user wants to see Spark's log: `--debug`, or `MINIPLM_SPARK_LOG_LEVEL` in the environment."""
    return is_debug() or "MINIPLM_SPARK_LOG_LEVEL" in os.environ


def start_properties() -> dict[str, str]:
    """Returns the property of a new JVM with which Spark prints no lines about its own log when it starts.

    Returns:
        No property if the user wants to see Spark's log, or has a log4j2 file or a Java option for it.
    """
    if is_wanted() or _has_own_settings():
        return {}
    file = Path(str(resources.files("miniplm_udf.streams") / "spark_log4j2.properties"))
    # Spark puts spark.driver.extraJavaOptions after these options, so that a file named there is the one that is read.
    return {"spark.driver.defaultJavaOptions": f"-Dlog4j2.configurationFile={file.as_uri()}"}


def _has_own_settings() -> bool:
    """Whether the user has settings of Spark's log, in the places where Java finds them without us."""
    from pyspark.find_spark_home import _find_spark_home

    folder = Path(os.environ.get("SPARK_CONF_DIR") or Path(_find_spark_home()) / "conf")
    files = [file for file in folder.glob("log4j2*") if file.suffix != ".template"]
    options = [os.environ.get(name, "") for name in _JAVA_OPTIONS]
    return bool(files) or "LOG4J_CONFIGURATION_FILE" in os.environ or any("log4j" in text for text in options)


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
