"""A command starts a JVM: Spark prints no lines about its own log, and logs what happens afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.spark_session import REPOSITORY

# Lines with which Spark and Hadoop begin.
START = (
    "Unable to load native-hadoop library",
    "default log4j profile",
    "Setting default log level",
    "Setting Spark log",
)
JOB = """
import sys
from jobs.session import make_session
from miniplm_udf.config.experiment import load_config
from tests.support.short_lived import JAVA_OPTIONS

options = {"spark.driver.extraJavaOptions": JAVA_OPTIONS, "spark.driver.memory": "1g"}
overrides = [f"spark.conf.{key}={value}" for key, value in options.items()]
config = load_config(sys.argv[1], [f"root={sys.argv[2]}", *overrides])
session = make_session(config, "start")
logger = session._jvm.org.apache.logging.log4j.LogManager.getLogger("org.apache.spark.Some")
logger.warn("a hidden warning")
logger.error("a first error")
session.sparkContext.setLogLevel("INFO")
logger.info("a shown line")
session.stop()
"""


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_start_is_quiet_and_the_log_is_not(tmp_path: Path, debug: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MINIPLM_", "SPARK_"))}
    environment |= {"PYTHONPATH": str(REPOSITORY)} | ({"MINIPLM_LOG_LEVEL": "DEBUG"} if debug else {})
    if "MINIPLM_CACHE" in os.environ:
        environment["MINIPLM_CACHE"] = os.environ["MINIPLM_CACHE"]
    completed = subprocess.run(
        [sys.executable, "-c", JOB, REPOSITORY / "conf/demo.yaml", tmp_path / "root"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert [line in completed.stderr for line in START] == [debug] * len(START), completed.stderr[:3000]
    assert "ERROR Some: a first error" in completed.stderr
    assert "INFO Some: a shown line" in completed.stderr
    assert "a hidden warning" not in completed.stderr
